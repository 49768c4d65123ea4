"""Pruning in the wrong place of a chain: noticed, made up for, and reported."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj
from movement_jax import position

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "sgd(1)": optax.sgd(1.0),
    "momentum": optax.sgd(0.01, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(3e-3),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
}
SHRINKING = {
    "decay": optax.add_decayed_weights(-0.1),
    "scale": optax.scale(0.5),
    "clip": optax.clip_by_global_norm(0.1),
}
SCHEDULES = {
    "at once": 0.5,
    "every step": mj.cubic(0.8, begin=5, end=60),
    "in steps": mj.cubic(0.8, begin=5, end=60, every=5),
}
STEPS = 500
RNG = np.random.default_rng(0)
PARAMS = {"kernel": jnp.asarray(0.05 * RNG.normal(size=(16, 16)), jnp.float32)}
GOAL = 2 * PARAMS["kernel"]


def train(
    tx, params=PARAMS, opt_state=None, steps=STEPS, change=lambda step, params: params
):
    opt_state = tx.init(params) if opt_state is None else opt_state

    @jax.jit
    def step(params, opt_state):
        grads = {"kernel": 0.1 * (params["kernel"] - GOAL)}
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(steps):
        params, opt_state = step(change(i, params), opt_state)
    return params, opt_state


def pruned_part(params, opt_state):
    mask = np.asarray(mj.find_state(opt_state).masks["kernel"])
    return np.abs(np.asarray(params["kernel"]))[~mask]


@pytest.mark.parametrize("sparsity", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("after", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_before_an_optimizer_pruned_weights_are_still_driven_to_zero(after, sparsity):
    params, opt_state = train(optax.chain(mj.movement_pruning(sparsity), after))
    events = mj.find_state(opt_state).events
    assert events.undone > 0 and events.turned == 1
    assert np.abs(GOAL).mean() > 0.07  # where they would be if they were not pruned
    assert np.median(pruned_part(params, opt_state)) < 3e-3
    # Zeros are exact in what is evaluated, pruned by hand, or shipped.
    for exact in (
        mj.effective_params(params, opt_state),
        mj.prune((params, opt_state), 0.5)[0],
        mj.finalize((params, opt_state))[0],
    ):
        assert not pruned_part(exact, opt_state).any()


@pytest.mark.parametrize("sparsity", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("after", SHRINKING.values(), ids=SHRINKING)
def test_before_what_shrinks_updates_pruned_weights_reach_zero_later(after, sparsity):
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(sparsity), after)
    params, opt_state = train(tx)
    events = mj.find_state(opt_state).events
    assert events.undone > 0 and events.turned == 0
    assert pruned_part(params, opt_state).max() < 1e-9


OUTSIDE = {
    "warm-up": optax.adam(optax.linear_schedule(0, 1e-2, 300)),
    "momentum": optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("every", [2, 10])
@pytest.mark.parametrize("optimizer", OUTSIDE.values(), ids=OUTSIDE)
def test_weights_that_revive_while_pruning_pauses_are_zero_when_it_does_not(
    optimizer, every
):
    def on_time(step, **_):
        return step % every == 0

    pruning = mj.movement_pruning(0.5, mj.Magnitude())
    tx = optax.chain(optimizer, optax.conditionally_transform(pruning, on_time))
    steps = 1 + every * (1200 // every)
    params, opt_state = train(tx, steps=steps)
    assert mj.find_state(opt_state).events.turned != 1
    assert not pruned_part(params, opt_state).any()


def test_noise_that_grows_turns_nothing_for_long():
    tx = optax.chain(optax.adam(1e-3), mj.movement_pruning(0.5, mj.Magnitude()))
    rng = np.random.default_rng(1)

    def disturb(step, params):
        scale = 1e-5 * 1.02**step
        return {"kernel": params["kernel"] + rng.normal(0, scale, (16, 16))}

    params, opt_state = train(tx, change=disturb)
    assert mj.find_state(opt_state).events.turned != 1
    assert not pruned_part(params, opt_state).any()


def test_pruning_by_hand_in_the_wrong_place_is_noticed_too():
    tx = optax.chain(mj.movement_pruning(), optax.adam(1e-2))
    pruned = mj.prune(train(tx, steps=5), 0.5)
    _, opt_state = train(tx, *pruned, steps=2 * position.LOOK_EVERY)
    assert mj.find_state(opt_state).events.undone > 0


def test_misplaced_pruning_scores_the_weights_as_they_come():
    tx = optax.chain(mj.movement_pruning(0.5), optax.sgd(0.1))
    before, opt_state = train(tx)
    scores = mj.find_state(opt_state).scores
    updates, opt_state = tx.update({"kernel": 1e3 * GOAL}, opt_state, before)
    expected = 0.9 * scores["kernel"] + 0.1 * jnp.abs(before["kernel"])
    got = mj.find_state(opt_state).scores["kernel"]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_health_and_metrics_tell_even_if_no_weight_is_alive_any_more():
    params, opt_state = train(optax.chain(mj.movement_pruning(0.5), optax.sgd(1.0)))
    assert not pruned_part(params, opt_state).any()
    found = [f for f in mj.health((params, opt_state)).findings if f.name == "position"]
    assert [(f.level, f.figure) for f in found] == [("warning", 1)]
    assert "Pruned weights were alive after 1 updates to zero them" in found[0].message
    assert mj.metrics(opt_state)["pruning/undone_updates"] == 1


@pytest.mark.parametrize("steps", [{40}, {40, 90, 140}, set(range(40, 140, 3))])
def test_weights_that_a_user_revives_are_no_sign_of_a_wrong_place(steps):
    tx = optax.chain(optax.adam(1e-3), mj.movement_pruning(SCHEDULES["in steps"]))
    revive = lambda step, params: PARAMS if step in steps else params  # noqa: E731
    params, opt_state = train(tx, steps=200, change=revive)
    events = mj.find_state(opt_state).events
    assert (events.undone, events.turned) == (0, 0)
    assert not pruned_part(params, opt_state).any()


def test_noise_that_a_user_adds_after_every_step_turns_nothing():
    tx = optax.chain(optax.adam(1e-3), mj.movement_pruning(SCHEDULES["every step"]))
    rng = np.random.default_rng(1)

    def disturb(step, params):
        return {"kernel": params["kernel"] + rng.normal(0, 1e-3, (16, 16))}

    params, opt_state = train(tx, change=disturb)
    assert mj.find_state(opt_state).events.turned == 0
    assert not pruned_part(params, opt_state).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pruned_weight_that_is_not_finite_turns_nothing(value):
    tx = optax.chain(optax.adam(1e-3), mj.movement_pruning(0.5))

    def spoil(step, params):
        return {"kernel": params["kernel"].at[0].set(value)} if step > 30 else params

    _, opt_state = train(tx, steps=100, change=spoil)
    assert mj.find_state(opt_state).events.turned == 0
