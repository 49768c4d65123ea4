"""Criteria of what the loss would change, against the same written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import (
    LEVELS,
    PARAMS,
    AdamByHand,
    gradients,
    keep_highest,
    kernels,
    train,
)

import movement_jax as mj


def follow(tx, update, worth, step, regrow):
    """Compares a run with one by hand.

    Args:
      tx: the transformation.
      update: takes weights and gradients of one step, before its scores.
      worth: from weights to the scores by hand.
      step: from gradients to updates of the weights.
      regrow: whether masks change after the step, and gradients see them.
    """
    weights = kernels(PARAMS)
    masks = [np.ones(w.shape, bool) for w in weights]
    for t, (params, state) in enumerate(train(tx), 1):
        seen = [m * w for m, w in zip(masks, weights)]
        grads = gradients(seen if regrow else weights)
        moves = step([m * g for m, g in zip(masks, grads)])
        if not regrow:
            if t > 1:
                old = [np.where(m, s, -1) for m, s in zip(masks, worth(weights))]
                masks = [keep_highest(s, LEVELS[t]) for s in old]
        update(weights, grads)
        weights = [w + m * d for w, m, d in zip(weights, masks, moves)]
        if regrow:
            masks = [keep_highest(s, LEVELS[t]) for s in worth(weights)]
        else:
            weights = [m * w for m, w in zip(masks, weights)]
        got = mj.find_state(state)
        for i in range(2):
            np.testing.assert_array_equal(kernels(got.masks)[i], masks[i])
            np.testing.assert_allclose(kernels(params)[i], weights[i], atol=1e-5)
        yield got, params, weights


@pytest.mark.parametrize("regrow", [True, False], ids=["regrow", "frozen"])
def test_sensitivity_equals_platon_written_by_hand(regrow):
    mean, uncertainty = [0.0, 0.0], [0.0, 0.0]

    def update(weights, grads):
        for i in range(2):
            now = np.abs(weights[i] * grads[i])
            mean[i] = 0.85 * mean[i] + 0.15 * now
            uncertainty[i] = 0.95 * uncertainty[i] + 0.05 * np.abs(now - mean[i])

    def worth(weights):
        return [m * u for m, u in zip(mean, uncertainty)]

    criterion = mj.Sensitivity()
    tx = mj.movement_pruning(
        mj.cubic(0.6, 5, 40), criterion, inner=optax.sgd(0.5), regrow=regrow
    )
    steps = follow(tx, update, worth, lambda g: [-0.5 * x for x in g], regrow)
    for state, params, weights in steps:
        for i, got in enumerate(kernels(criterion.scores(state.scores, params))):
            want = worth(weights)[i]
            # They are small: relative to the largest, where it counts.
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.max())
    assert state.step == 50 and np.asarray(mean[0]).max() > 1e-3


@pytest.mark.parametrize("regrow", [True, False], ids=["regrow", "frozen"])
def test_fisher_equals_adams_second_moment_by_hand(regrow):
    adam = AdamByHand(kernels(PARAMS))

    def worth(weights):
        return [w**2 * v for w, v in zip(weights, adam.square)]

    tx = mj.movement_pruning(
        mj.cubic(0.6, 5, 40), mj.Fisher(), inner=optax.adam(1e-2), regrow=regrow
    )
    steps = follow(tx, lambda w, g: None, worth, adam, regrow)
    for state, params, weights in steps:
        got = mj.Fisher().scores((), params, optimizer_state=state.inner_state)
        for i in range(2):
            want = worth(weights)[i]
            np.testing.assert_allclose(
                kernels(got)[i], want, rtol=1e-4, atol=1e-5 * want.max()
            )
    assert state.step == 50


INNER = {
    "adamw": optax.adamw(1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "rmsprop": optax.rmsprop(1e-2),
    "partition": optax.partition(
        {"a": optax.adam(1e-2), "b": optax.rmsprop(1e-2)}, {"first": "a", "second": "b"}
    ),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "finite": optax.apply_if_finite(optax.adam(1e-2), 3),
}


@pytest.mark.parametrize("name", INNER)
def test_the_second_moment_is_found_in_the_wrapped_optimizer(name):
    tx = mj.movement_pruning(0.5, mj.Fisher(), inner=INNER[name])
    _, state = train(tx, 3)[-1]
    assert state.scores == ()
    assert 0 < sum(int(m.sum()) for m in jax.tree.leaves(state.masks)) <= 23


@pytest.mark.parametrize(
    "inner", [optax.sgd(0.1), optax.chain(optax.adam(1.0), optax.rmsprop(1.0))]
)
def test_an_optimizer_without_the_one_moment_is_refused_with_the_right_call(inner):
    message = r"`Fisher` reads.*\(sparsity, Fisher\(\), inner=optax.adamw\("
    with pytest.raises(ValueError, match=message):
        mj.movement_pruning(0.5, mj.Fisher(), inner=inner).init(PARAMS)


def test_a_criterion_that_needs_gradients_is_refused_in_a_chain():
    for criterion in (mj.Fisher(), mj.Sensitivity()):
        name = type(criterion).__name__
        with pytest.raises(ValueError, match=rf"`{name}` needs .*{name}\(\), inner="):
            mj.movement_pruning(0.5, criterion)


@pytest.mark.parametrize("criterion", [mj.Fisher(), mj.Sensitivity()])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scores_are_float32_and_bad_steps_stay_out(dtype, criterion):
    params = {"kernel": jnp.array([[0.0, 1.0], [-2.0, 1e-7]], dtype)}
    inner = optax.apply_if_finite(optax.adam(1e-2), 100)
    tx = mj.movement_pruning(None, criterion, inner=inner)
    state = tx.init(params)
    for bad in (0.1, np.nan, np.inf, 0.5):
        grads = {"kernel": jnp.full((2, 2), bad, dtype)}
        _, state = jax.jit(tx.update)(grads, state, params)
    scores = mj.prune((params, state), 0.5)[1]
    assert int(scores.masks["kernel"].sum()) == 2
    if isinstance(criterion, mj.Fisher):
        made = criterion.scores((), params, optimizer_state=state.inner_state)
    else:
        made = criterion.scores(state.scores, params)
    assert made["kernel"].dtype == jnp.float32
    assert np.all(np.isfinite(made["kernel"]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mj.Sensitivity(1.0), "`decay` must be in"),
        (lambda: mj.Sensitivity(uncertainty_decay=-1), "`uncertainty_decay` must be"),
    ],
)
def test_a_wrong_decay_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
