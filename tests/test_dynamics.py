"""Criteria of how weights behave, against the same written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import LEVELS, PARAMS, STEPS, gradients, keep_highest, kernels, train

import movement_jax as mj

ALPHA, HALF_LIFE = 0.5, 7.0


def peak(seen):
    decay, best = 0.5 ** (1 / HALF_LIFE), 0.0
    for w in seen[1:]:
        best = np.maximum(decay * best, np.abs(w))
    return best


def confidence(seen):
    decay = 0.5 ** (1 / HALF_LIFE)
    mean, square = np.abs(seen[0]), np.abs(seen[0]) ** 2
    for w in seen[1:]:
        mean = decay * mean + (1 - decay) * np.abs(w)
        square = decay * square + (1 - decay) * w**2
    return mean + 2 * np.sqrt(np.maximum(square - mean**2, 0))


def rms(w):
    return np.sqrt((w**2).sum() / max((w != 0).sum(), 1))


def dormancy(seen):
    decay, dormant = 0.5 ** (1 / HALF_LIFE), 0.0
    for w in seen[1:]:
        small = np.abs(w) < ALPHA * rms(w)
        dormant = decay * dormant + (1 - decay) * small
    # Masks change before the step is scored, by the weights that enter it.
    size = np.abs(seen[-1])
    return 1e-3 * size / (size + rms(seen[-1])) - dormant


CASES = {
    "peak": (mj.PeakMagnitude(half_life=HALF_LIFE), peak),
    "confidence": (mj.UpperConfidence(half_life=HALF_LIFE, kappa=2.0), confidence),
    "dormancy": (mj.Dormancy(ALPHA, half_life=HALF_LIFE), dormancy),
}


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_equal_numpy(name):
    criterion, by_hand = CASES[name]
    schedule = mj.cubic(0.6, 5, 40)
    tx = optax.chain(optax.sgd(0.5), mj.movement_pruning(schedule, criterion))
    weights, masks = kernels(PARAMS), [1, 1]
    seen = [weights]
    for t, (params, state) in enumerate(train(tx), 1):
        grads = gradients(weights)
        if t > 1:
            scores = [by_hand([w[i] for w in seen]) for i in range(2)]
            scores = [np.where(m, s, -np.inf) for m, s in zip(masks, scores)]
            masks = [keep_highest(s, LEVELS[t]) for s in scores]
        weights = [m * (w - 0.5 * g) for m, w, g in zip(masks, weights, grads)]
        seen.append(weights)
        scores = criterion.scores(state.scores, params)
        for i, got in enumerate(kernels(scores)):
            want = by_hand([w[i] for w in seen])
            np.testing.assert_allclose(got, want, atol=1e-5)
            np.testing.assert_array_equal(kernels(state.masks)[i], 1 * masks[i])
            np.testing.assert_allclose(kernels(params)[i], weights[i], atol=1e-5)
    assert t == STEPS


def scores_of(criterion, steps):
    """Scores of single weights after what they did, step by step."""
    first = {"kernel": jnp.asarray(steps[0])}
    state = criterion.init(first)
    for w in steps:
        new = {"kernel": jnp.asarray(w)}
        state = criterion.update(state, params=first, grads=None, new_params=new)
    return np.asarray(criterion.scores(state, new)["kernel"])


def test_a_spike_outlives_a_half_life_in_its_peak_but_not_in_the_average():
    still, spiked = np.full(20, 0.3), np.r_[0.1, 1.0, np.full(18, 0.1)]
    steps = np.stack([still, spiked], 1).astype(np.float32)
    low, high = scores_of(mj.PeakMagnitude(half_life=20), steps)
    assert low < high
    low, high = scores_of(mj.EmaMagnitude(half_life=20), steps)
    assert low > high


def test_what_moves_is_given_the_benefit_of_the_doubt():
    calm, wild = np.full(40, 0.5), np.tile([0.1, 0.9], 20)
    steps = np.stack([calm, wild], 1).astype(np.float32)
    low, high = scores_of(mj.UpperConfidence(half_life=8), steps)
    assert low < high
    np.testing.assert_allclose(scores_of(mj.UpperConfidence(kappa=0.0), steps)[0], 0.5)


def test_who_lives_near_zero_is_pruned_before_who_visits_it():
    visits = np.tile([1.0, 1.0, 1.0, 0.0], 10)
    lives = np.r_[np.full(39, 0.01), 1.0]
    steps = np.stack([visits, lives, np.ones(40)], 1).astype(np.float32)
    visitor, dweller, awake = scores_of(mj.Dormancy(0.1, half_life=10), steps)
    assert dweller < visitor < awake


def test_pruning_does_not_lower_what_counts_as_small():
    w = np.r_[np.zeros(90), np.full(10, 1.0), 0.2].astype(np.float32)
    assert scores_of(mj.Dormancy(0.5, decay=0.0), w[None])[-1] < -0.99


def test_equally_dormant_weights_are_ranked_by_magnitude():
    w = np.array([0.2, 0.1, 5.0, 4.0, 0.3], np.float32)
    order = np.argsort(scores_of(mj.Dormancy(0.1), np.stack([w] * 3)))
    np.testing.assert_array_equal(order, np.argsort(w))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scores_are_float32_and_finite(name, dtype):
    criterion = CASES[name][0]
    params = {"kernel": jnp.array([[0.0, 1.0], [-2.0, 1e-7]], dtype)}
    tx = mj.movement_pruning(None, criterion, check_finite=False)
    state = tx.init(params)
    for bad in (0.0, np.nan, np.inf, 0.5):
        _, state = jax.jit(tx.update)(
            {"kernel": jnp.full((2, 2), bad, dtype)}, state, params
        )
    scores = criterion.scores(state.scores, params)["kernel"]
    assert scores.dtype == jnp.float32
    assert np.all(np.isfinite(scores))


def test_whole_tensors_are_not_split():
    with pytest.raises(ValueError, match="`Dormancy` looks at whole tensors.*`jit`"):
        mj.movement_pruning(0.5, mj.Dormancy(), axis_name="x")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: mj.PeakMagnitude(1.0),
            ValueError,
            r"`decay` must be in .0, 1., got 1",
        ),
        (lambda: mj.PeakMagnitude(0.5, 3), ValueError, "`PeakMagnitude` takes.*not b"),
        (lambda: mj.UpperConfidence(kappa=-1), ValueError, "`kappa`.*at least 0, got"),
        (lambda: mj.UpperConfidence(kappa="1"), TypeError, "`kappa` must be a number"),
        (lambda: mj.UpperConfidence(half_life=0), ValueError, "`half_life`.*got 0"),
        (lambda: mj.Dormancy(0), ValueError, "`alpha` must be positive, got 0"),
        (lambda: mj.Dormancy(decay=2), ValueError, "`decay` must be in"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()
