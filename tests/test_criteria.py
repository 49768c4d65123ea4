import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import (
    LEVELS,
    PARAMS,
    STEPS,
    AdamByHand,
    gradients,
    keep_highest,
    kernels,
    train,
)

import movement_jax as mj

prune = jax.jit(mj.prune)


def movement_by_hand(score_step, regrow):
    """Hard movement pruning of the regression, as the paper writes it."""
    weights = kernels(PARAMS)
    scores = [np.zeros_like(w) for w in weights]
    masks = [np.ones(w.shape, bool) for w in weights]
    history = []
    for t in range(1, STEPS + 1):
        if not regrow and t > 1:
            old = [np.where(m, s, -np.inf) for m, s in zip(masks, scores)]
            masks = [keep_highest(s, LEVELS[t]) for s in old]
        seen = [m * w for m, w in zip(masks, weights)]
        if regrow:
            grads = gradients(seen)
        else:
            # The masks of this step come after its gradient.
            grads = gradients(weights)
        movement = [w * g for w, g in zip(weights, grads)]
        weights = [w - 0.5 * m * g for w, m, g in zip(weights, masks, grads)]
        if not regrow:
            weights = [m * w for m, w in zip(masks, weights)]
        scores = [s + d for s, d in zip(scores, score_step(movement))]
        if regrow:
            masks = [keep_highest(s, LEVELS[t]) for s in scores]
        history.append((weights, scores, masks))
    return history


@pytest.mark.parametrize("regrow", [True, False], ids=["regrow", "frozen"])
@pytest.mark.parametrize("rule", ["adam", "plain sum"])
def test_movement_equals_the_paper_written_by_hand(rule, regrow):
    if rule == "adam":
        criterion, by_hand = mj.Movement(), AdamByHand(kernels(PARAMS))
    else:
        criterion = mj.Movement(optax.sgd(1.0))
        by_hand = functools.partial(map, np.negative)
    tx = mj.movement_pruning(
        mj.cubic(0.6, 5, 40), criterion, inner=optax.sgd(0.5), regrow=regrow
    )
    for got, want in zip(train(tx), movement_by_hand(by_hand, regrow)):
        (params, state), (weights, scores, masks) = got, want
        for i in range(2):
            np.testing.assert_array_equal(kernels(state.masks)[i], masks[i])
            np.testing.assert_allclose(kernels(params)[i], weights[i], atol=1e-5)
            np.testing.assert_allclose(
                kernels(state.scores.values)[i], scores[i], atol=1e-5
            )


@pytest.mark.parametrize("regrow", [True, False], ids=["regrow", "frozen"])
def test_pruned_weights_come_back_only_if_they_may_regrow(regrow):
    tx = mj.movement_pruning(
        mj.cubic(0.6, 5, 40), mj.Movement(), inner=optax.sgd(0.5), regrow=regrow
    )
    masks = [kernels(state.masks) for _, state in train(tx)]
    returned = [
        np.any(b > a) for old, new in zip(masks, masks[1:]) for a, b in zip(old, new)
    ]
    assert any(returned) == regrow


def test_the_score_rises_when_a_weight_moves_away_from_zero():
    params = {"kernel": jnp.array([[2.0, -2.0], [2.0, -2.0]])}
    grads = {"kernel": jnp.array([[-1.0, 1.0], [1.0, -1.0]])}  # descent: away, towards
    tx = mj.movement_pruning(
        0.5, mj.Movement(optax.sgd(1.0)), inner=optax.sgd(0.1), regrow=True
    )
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(state.scores.values["kernel"], [[2, 2], [-2, -2]])
    np.testing.assert_array_equal(state.masks["kernel"], [[True, True], [False, False]])


def test_scores_may_start_from_the_ranking_by_magnitude():
    tx = mj.movement_pruning(
        0.5, mj.Movement(from_magnitude=2.0), inner=optax.sgd(0.5), regrow=True
    )
    state = tx.init(PARAMS)
    for got, w in zip(kernels(state.scores.values), kernels(PARAMS)):
        np.testing.assert_allclose(got, 2 * np.abs(w) / np.abs(w).mean(), rtol=1e-6)


def test_the_running_average_equals_numpy_after_200_steps():
    tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), mj.movement_pruning())
    history = train(tx, 200)
    average = [np.zeros_like(w) for w in kernels(PARAMS)]
    for params, _ in history:
        average = [
            0.9 * a + (1 - 0.9) * np.abs(w) for a, w in zip(average, kernels(params))
        ]
    for got, want in zip(kernels(history[-1][1].scores), average):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_half_life_goes_through_a_replaced_field():
    criterion = mj.EmaMagnitude(half_life=5)
    assert dataclasses.replace(criterion) == criterion
    assert criterion.decay == 0.5 ** (1 / 5)


def test_half_of_a_score_is_forgotten_after_its_half_life():
    tx = mj.movement_pruning(None, mj.EmaMagnitude(half_life=5))
    update = jax.jit(tx.update)
    ones = {"kernel": jnp.ones((2, 2))}
    zeros = {"kernel": jnp.zeros((2, 2))}
    _, state = update(zeros, tx.init(ones), ones)
    first = float(state.scores["kernel"][0, 0])
    for _ in range(5):
        _, state = update(zeros, state, zeros)
    np.testing.assert_allclose(first, 1 - 0.5**0.2, rtol=1e-6)
    np.testing.assert_allclose(state.scores["kernel"], first / 2, rtol=1e-6)


def test_scores_of_low_precision_weights_do_not_stall():
    tx = mj.movement_pruning(None, mj.EmaMagnitude(decay=0.999))
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    zeros = {"kernel": jnp.zeros((2, 2), jnp.bfloat16)}
    _, state = jax.lax.scan(
        lambda state, _: (tx.update(zeros, state, params)[1], None),
        tx.init(params),
        length=2000,
    )[::-1]
    np.testing.assert_allclose(state.scores["kernel"], 1 - 0.999**2000, rtol=1e-4)


def test_a_product_that_half_precision_cannot_hold_is_scored():
    tx = mj.movement_pruning(None, mj.Taylor(), inner=optax.sgd(0.1))
    params = {"kernel": jnp.array([[1e-2, 2.0]], jnp.float16)}
    grads = {"kernel": jnp.array([[1e-6, 6e4]], jnp.float16)}
    _, state = tx.update(grads, tx.init(params), params)
    want = np.float32(params["kernel"]) * np.float32(grads["kernel"])
    np.testing.assert_array_equal(state.scores["kernel"], want)


def test_taylor_sums_saliencies_with_momentum():
    tx = mj.movement_pruning(None, mj.Taylor(momentum=0.5), inner=optax.sgd(0.0))
    params = {"kernel": jnp.array([[2.0, -3.0]])}
    state = tx.init(params)
    for g in ([[1.0, 1.0]], [[-4.0, 0.0]]):
        _, state = tx.update({"kernel": jnp.array(g)}, state, params)
    np.testing.assert_array_equal(state.scores["kernel"], [[0.5 * 2 + 8, 0.5 * 3]])


def test_random_scores_depend_on_seed_and_path_only():
    def scores(seed, tree):
        return mj.Random(seed).scores((), tree)

    a = scores(1, {"a": jnp.zeros((9, 9)), "b": jnp.zeros((9, 9))})
    again = scores(1, {"a": jnp.ones((9, 9), jnp.bfloat16)})
    np.testing.assert_array_equal(a["a"], again["a"])
    assert np.all(a["a"] != a["b"])
    assert np.all(a["a"] != scores(2, {"a": jnp.zeros((9, 9))})["a"])


def test_random_masks_of_a_rising_sparsity_are_nested():
    tx = mj.movement_pruning(None, mj.Random(), regrow=True)
    state = (PARAMS, tx.init(PARAMS))
    masks = [kernels(prune(state, s)[1].masks) for s in (0.3, 0.6, 0.9)]
    for low, high in zip(masks, masks[1:]):
        assert all(np.all(a >= b) for a, b in zip(low, high))


@pytest.mark.parametrize("size", [(4, 5), (7, 9), (16, 16), (1, 999)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75, 0.9])
def test_masks_equal_a_strict_quantile_up_to_one_weight(size, sparsity):
    scores = np.random.default_rng(4).permutation(size[0] * size[1]).reshape(size) + 1
    tx = mj.movement_pruning(None, mj.Magnitude())
    params = {"kernel": jnp.asarray(scores, jnp.float32)}
    _, state = prune((params, tx.init(params)), sparsity)
    strict = scores > np.quantile(scores, sparsity)
    assert np.sum(np.asarray(state.masks["kernel"]) != strict) <= 1


def test_a_strict_quantile_keeps_one_weight_too_few_where_we_do_not():
    scores = np.arange(1.0, 22.0).reshape(3, 7)
    tx = mj.movement_pruning(None, mj.Magnitude())
    params = {"kernel": jnp.asarray(scores, jnp.float32)}
    _, state = prune((params, tx.init(params)), 0.5)
    assert np.sum(scores > np.quantile(scores, 0.5)) == 10
    assert np.sum(state.masks["kernel"]) == 21 - 10  # half of 21, rounded to even


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: mj.EmaMagnitude(1.0),
            ValueError,
            r"`decay` must be in \[0, 1\), got 1",
        ),
        (lambda: mj.EmaMagnitude(-0.1), ValueError, "got -0.1"),
        (lambda: mj.EmaMagnitude(float("nan")), ValueError, "got nan"),
        (lambda: mj.EmaMagnitude(True), TypeError, "must be a number.*got True"),
        (lambda: mj.EmaMagnitude("0.9"), TypeError, "must be a number.*got '0.9'"),
        (lambda: mj.EmaMagnitude(0.5, 3), ValueError, "not both.*0.5, half_life=3"),
        (
            lambda: mj.EmaMagnitude(half_life=0),
            ValueError,
            "is a number of steps and must be positive, got 0",
        ),
        (
            lambda: mj.EmaMagnitude(half_life="3"),
            TypeError,
            "`half_life` must be a number, got '3'",
        ),
        (lambda: mj.Taylor(momentum=1), ValueError, r"`momentum` must be in \[0, 1\)"),
        (lambda: mj.Random(seed=0.5), TypeError, "got 0.5. For example `seed=0`"),
        (lambda: mj.Movement(1e-2), TypeError, r"`Movement\(learning_rate=1e-2\)`"),
        (lambda: mj.Movement(from_magnitude=-1), ValueError, "at least 0, got -1"),
        (lambda: mj.Movement(learning_rate=0), ValueError, "positive, got 0"),
        (
            lambda: mj.Movement(learning_rate="1"),
            TypeError,
            "`learning_rate` must be a number, got '1' of type",
        ),
        (
            lambda: mj.Movement(optax.sgd(1.0), 0.1),
            ValueError,
            r"not both: .*`Movement\(optimizer=optax.sgd\(0.1\)\)`",
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_scores_learn_at_a_rate_that_follows_a_schedule():
    params, grads = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.full((2, 3), -1.0)}
    scores = []
    for rate in (0.5, lambda count: 0.5, lambda count: 0.5 * (count < 1)):
        criterion = mj.Movement(learning_rate=rate)
        state = criterion.init(params)
        for _ in range(2):
            state = criterion.update(
                state, params=params, grads=grads, new_params=params
            )
        scores.append(criterion.scores(state, params)["kernel"])
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], 2 * scores[2], rtol=1e-5)
