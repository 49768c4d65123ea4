"""Where in a chain pruning stands, and what it takes for a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

from . import naive
from .subjects import HALF, KERNEL, OURS, PARAMS, alike, bits, both, mask_of, train

STEPS = 100
GOAL = {"kernel": 2 * KERNEL}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.01, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
}
FOLLOWERS = {
    "scale(-lr)": optax.scale(-0.1),
    "scale": optax.scale(0.5),
    "ema": optax.ema(0.9),
    "clip_by_global_norm": optax.clip_by_global_norm(0.1),
}
WRONG = OPTIMIZERS | FOLLOWERS


def descend(tx, state, steps, seen=lambda opt_state: None):
    """Trains towards a goal far from zero; what is seen after every step."""

    @jax.jit
    def step(params, opt_state):
        grads = jax.tree.map(lambda p, g: p - g, params, GOAL)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    log = []
    for _ in range(steps):
        state = step(*state)
        log.append(seen(state[1]))
    return state, log


def check_zeros_or_report(subject, after):
    tx = optax.chain(subject.pruning(), after)
    state, _ = descend(tx, (PARAMS, tx.init(PARAMS)), 3)
    # As a schedule does: masks change, and updates are to bring weights to zero.
    masked = state[0], subject.prune(state, 0.5)[1]
    state, _ = descend(tx, masked, STEPS)
    alive = np.asarray(state[0]["kernel"])[mask_of(subject, state[1]) == 0]
    assert alive.size == HALF
    assert not alive.any() or subject.reports(state[1])


@both("pruned weights are alive, and nothing says so")
def test_D1_a_mask_before_an_optimizer_is_reported(subject):
    check_zeros_or_report(subject, optax.adamw(1e-2))


@pytest.mark.parametrize("after", FOLLOWERS)
@both("pruned weights are alive, and nothing says so")
def test_D2_whatever_follows_is_reported(subject, after):
    check_zeros_or_report(subject, FOLLOWERS[after])


def undone(opt_state):
    return int(mj.find_state(opt_state).events.undone)


def warned(state):
    found = [f for f in mj.health(state).findings if f.name == "position"]
    return any(finding.level == "warning" for finding in found)


@pytest.mark.parametrize("after", WRONG)
def test_D2_wrong_orders_are_reported_by_the_second_update(after):
    tx = optax.chain(mj.movement_pruning(0.5, mj.Magnitude()), WRONG[after])
    state = PARAMS, tx.init(PARAMS)
    assert not warned(state)

    def seen(opt_state):
        return undone(opt_state), warned((PARAMS, opt_state))

    # The first prunes, the second finds them alive, the third finds them alive again.
    _, log = descend(tx, state, 3, seen)
    assert log == [(0, True), (0, True), (1, True)]


PRUNING = mj.movement_pruning(mj.cubic(0.5, begin=2, end=20, every=3))
BY_MOVEMENT = functools.partial(
    mj.movement_pruning, mj.cubic(0.5, begin=2, end=20, every=3), mj.Movement()
)


def _last(optimizer):
    return optax.chain(optimizer, PRUNING)


RIGHT = {name: _last(optimizer) for name, optimizer in OPTIMIZERS.items()} | {
    "clip, adamw": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-2), PRUNING
    ),
    "adam, decay": optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale(-0.1),
        PRUNING,
    ),
    "adafactor": _last(optax.adafactor(1e-2)),
    "adagrad": _last(optax.adagrad(1e-2)),
    "lamb": _last(optax.lamb(1e-2)),
    "apply_every": _last(optax.chain(optax.apply_every(2), optax.sgd(0.1))),
    "named_chain": optax.named_chain(("a", optax.adam(1e-2)), ("b", PRUNING)),
    "MultiSteps": optax.MultiSteps(
        _last(optax.adam(1e-2)), 2
    ).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(_last(optax.adam(1e-2)), 3),
    "masked": optax.masked(_last(optax.adam(1e-2)), {"kernel": True}),
    "partition": optax.partition({"p": _last(optax.adam(1e-2))}, {"kernel": "p"}),
    "inject": optax.inject_hyperparams(lambda rate: _last(optax.adam(rate)))(rate=1e-2),
    "inner": BY_MOVEMENT(inner=optax.adamw(1e-2)),
    "inner, regrow": BY_MOVEMENT(inner=optax.adamw(1e-2), regrow=True),
}


@pytest.mark.parametrize("order", RIGHT)
def test_D3_right_orders_leave_exact_zeros_and_raise_no_alarm(order):
    tx = RIGHT[order]
    state, log = descend(tx, (PARAMS, tx.init(PARAMS)), STEPS, undone)
    assert not any(log) and not warned(state)
    mask = np.asarray(mj.find_state(state[1]).masks["kernel"])
    assert mask.sum() == HALF
    seen = mj.effective_params(*state) if "regrow" in order else state[0]
    assert not bits(seen["kernel"])[~mask].any()


def test_D3_ten_are_wrong_and_twenty_right():
    assert (len(WRONG), len(RIGHT)) == (10, 20)


@pytest.mark.parametrize("order", ["adam", "MultiSteps", "apply_if_finite", "masked"])
def test_D3_naive_code_that_comes_last_leaves_exact_zeros_too(order):
    last = optax.chain(optax.adam(1e-2), naive.pruning())
    tx = {
        "adam": last,
        "MultiSteps": optax.MultiSteps(last, 2).gradient_transformation(),
        "apply_if_finite": optax.apply_if_finite(last, 3),
        "masked": optax.masked(last, {"kernel": True}),
    }[order]
    state, _ = descend(tx, (PARAMS, tx.init(PARAMS)), 4)
    state, _ = descend(tx, naive.prune(state, 0.5), 20)
    mask = np.asarray(naive.find_state(state[1]).masks["kernel"])
    assert mask.sum() == HALF and not bits(state[0]["kernel"])[~mask].any()


@both("sees the update for the gradient, and keeps the half that should go")
def test_D4_the_first_order_score_is_that_of_the_raw_gradient(subject):
    rng = np.random.default_rng(1)
    grads = {"kernel": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)}
    tx = subject.by_gradient(optax.sgd(1e-3))
    _, opt_state = subject.prune(train(tx, steps=2, grads=grads), 0.5)
    kept = mask_of(subject, opt_state) != 0
    movement = -np.asarray(KERNEL) * np.asarray(grads["kernel"])
    true = movement > np.median(movement)
    assert (kept & true).sum() / true.sum() > 0.99


def test_D4_by_hand_on_two_by_two():
    params = {"kernel": jnp.array([[1.0, -1.0], [2.0, -2.0]])}
    grads = {"kernel": jnp.array([[-1.0, -1.0], [0.5, 2.0]])}
    tx = mj.movement_pruning(None, mj.Movement(optax.sgd(1.0)), inner=optax.identity())
    _, state = tx.update(grads, tx.init(params), params)
    want = [[1.0, -1.0], [-1.0, 4.0]]  # of -w * g: away from zero is good
    np.testing.assert_array_equal(state.scores.values["kernel"], want)


def test_D4_a_score_of_gradients_is_refused_where_there_are_none():
    message = r"`Movement` needs the raw gradients.*`movement_pruning\(.*inner=optax"
    with pytest.raises(ValueError, match=message):
        optax.chain(optax.sgd(0.1), mj.movement_pruning(0.5, mj.Movement()))


@both("the optimizer goes on to be drawn towards what pruned weights may not do")
def test_D5_the_momentum_of_pruned_weights_fades(subject):
    tx = subject.around(optax.adam(1e-3))
    state, _ = descend(tx, (PARAMS, tx.init(PARAMS)), 3)
    state, _ = descend(tx, subject.prune(state, 0.5), STEPS)
    mu = np.abs(optax.tree_utils.tree_get(state[1], "mu")["kernel"])
    kept = mask_of(subject, state[1]) != 0
    assert mu[~kept].max() < 1e-3 * mu[kept].mean()


@pytest.mark.parametrize(
    "dtype, update_dtype",
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
    ],
)
@alike()
def test_D6_a_weight_and_its_negative_cancel_in_every_dtype(
    subject, dtype, update_dtype
):
    pruned_always = mj.movement_pruning(0.5, mj.Magnitude())
    tx = pruned_always if subject is OURS else naive.pruning()
    params = {"kernel": KERNEL.astype(dtype)}
    grads = {"kernel": jnp.ones((8, 8), update_dtype)}
    state = train(tx, (params, tx.init(params)), 3, grads)
    if subject is not OURS:
        state = train(tx, naive.prune(state, 0.5), 3, grads)
    params, opt_state = state
    assert params["kernel"].dtype == dtype
    pruned = bits(params["kernel"])[~mask_of(subject, opt_state)]
    assert pruned.size == HALF and not pruned.any()
