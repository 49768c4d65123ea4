import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

PARAMS = {
    "a": {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3)},
    "b": {"kernel": jnp.arange(7.0, 15.0).reshape(2, 4)},
}
GRADS = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), PARAMS)
LEAVES = ["a/kernel", "a/bias", "b/kernel"]
BAD = [np.nan, np.inf, -np.inf]


def poison(leaf, value, index=(0,)):
    grads = jax.tree.map(jnp.copy, GRADS)
    module, name = leaf.split("/")
    bad = grads[module][name].ravel().at[jnp.array(index)].set(value)
    grads[module][name] = bad.reshape(grads[module][name].shape)
    return grads


FORMS = {
    "chain": lambda optimizer, **kw: optax.chain(
        optimizer, mj.movement_pruning(mj.linear(0.5, 0, 4), **kw)
    ),
    "inner": lambda optimizer, **kw: mj.movement_pruning(
        mj.linear(0.5, 0, 4), mj.Movement(), inner=optimizer, **kw
    ),
    "regrow": lambda optimizer, **kw: mj.movement_pruning(
        mj.linear(0.5, 0, 4), mj.Taylor(), inner=optimizer, regrow=True, **kw
    ),
}


@functools.cache
def form(name, check_finite=True):
    tx = FORMS[name](optax.sgd(0.1), check_finite=check_finite)
    return tx, stepper(tx)


def stepper(tx):
    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def run(step, params, opt_state, steps):
    for _ in range(steps):
        params, opt_state = step(params, opt_state, GRADS)
    return params, opt_state


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", FORMS)
def test_a_bad_step_changes_no_score_and_no_mask(name, leaf, value):
    tx, step = form(name)
    params, opt_state = run(step, PARAMS, tx.init(PARAMS), 3)
    before = mj.find_state(opt_state)
    _, opt_state = step(params, opt_state, poison(leaf, value))
    after = mj.find_state(opt_state)
    for field in ("step", "scores", "masks", "sparsity"):
        assert_same_bits(getattr(before, field), getattr(after, field))
    assert (before.events.skipped, after.events.skipped) == (0, 1)


def test_an_optimizer_that_overflows_on_finite_gradients_makes_a_bad_step():
    tx = mj.movement_pruning(0.5, mj.Taylor(), inner=optax.scale(1e30))
    grads = jax.tree.map(jnp.zeros_like, GRADS)
    grads["a"]["bias"] = jnp.full(3, 1e30)
    _, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    assert (state.step, state.events.skipped) == (0, 1)


@pytest.mark.parametrize("name", FORMS)
def test_training_goes_on_after_a_bad_step_as_if_it_had_not_been(name):
    tx = optax.apply_if_finite(FORMS[name](optax.adam(0.1)), 3)
    step = stepper(tx)
    params, opt_state = run(step, PARAMS, tx.init(PARAMS), 2)
    params, opt_state = step(params, opt_state, poison("a/bias", np.nan))
    params, opt_state = run(step, params, opt_state, 3)
    want_params, want_state = run(step, PARAMS, tx.init(PARAMS), 5)
    assert_same_bits(params, want_params)
    assert_same_bits(opt_state.inner_state, want_state.inner_state)


def test_a_bad_gradient_of_a_pruned_weight_leaves_it_at_zero():
    tx, step = form("chain")
    params, opt_state = run(step, PARAMS, tx.init(PARAMS), 5)
    pruned = np.flatnonzero(~np.asarray(mj.find_state(opt_state).masks["a"]["kernel"]))
    assert pruned.tolist() == [0, 1, 2]
    params, opt_state = step(params, opt_state, poison("a/kernel", np.nan, pruned))
    assert np.all(np.isfinite(params["a"]["kernel"]))
    assert np.asarray(params["a"]["kernel"]).ravel()[:3].tolist() == [0, 0, 0]
    assert mj.find_state(opt_state).events.skipped == 1


@pytest.mark.parametrize("errors", [0, 1, 3])
@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("name", ["chain", "inner"])
def test_scores_stay_finite_even_when_apply_if_finite_gives_up(
    name, check_finite, errors
):
    tx = optax.apply_if_finite(form(name, check_finite)[0], errors)
    step = stepper(tx)
    params, opt_state = run(step, PARAMS, tx.init(PARAMS), 3)
    for _ in range(5):
        params, opt_state = step(params, opt_state, poison("a/kernel", np.nan, [5]))
    params, opt_state = run(step, params, opt_state, 2)
    state = mj.find_state(opt_state)
    for scores in jax.tree.leaves(state.scores):
        assert np.all(np.isfinite(scores))
    assert int(state.masks["a"]["kernel"].sum()) == 3


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", FORMS)
def test_without_the_check_only_the_bad_scores_stand_still(name, value):
    tx, step = form(name, False)
    params, opt_state = run(step, PARAMS, tx.init(PARAMS), 1)
    before = scores_of(opt_state)
    _, opt_state = step(params, opt_state, poison("a/kernel", value, [4]))
    after = scores_of(opt_state)
    moved = after != before
    assert np.all(np.isfinite(after))
    assert moved.tolist() == [[True, True, True], [True, False, True]]


def scores_of(opt_state):
    scores = mj.find_state(opt_state).scores
    if isinstance(scores, mj.MovementScores):
        scores = scores.values
    return np.asarray(scores["a"]["kernel"])


def test_an_infinite_weight_stays_out_of_the_running_average():
    tx, step = form("chain", False)
    params = {**PARAMS, "b": {"kernel": PARAMS["b"]["kernel"].at[0, 0].set(jnp.inf)}}
    _, opt_state = run(step, params, tx.init(params), 8)
    scores = np.asarray(mj.find_state(opt_state).scores["b"]["kernel"])
    assert scores[0, 0] == 0 and np.all(scores.ravel()[1:] > 0)


def test_an_infinite_weight_does_not_stall_a_common_threshold():
    tx = mj.movement_pruning(0.5, mj.Magnitude(), allocation=mj.Global())
    params = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), PARAMS)
    _, state = jax.jit(tx.update)(GRADS, tx.init(params), params)
    assert sum(int(m.sum()) for m in jax.tree.leaves(state.masks)) == 7


def test_a_nan_weight_is_kept_and_the_count_stays_exact():
    tx = mj.movement_pruning(0.5, mj.Magnitude())
    params = {"kernel": jnp.array([[jnp.nan, 1.0, 2.0], [3.0, jnp.nan, 4.0]])}
    _, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    want = [[True, False, False], [False, True, True]]
    np.testing.assert_array_equal(state.masks["kernel"], want)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.adam(1e-3), tx),
    "named_chain": lambda tx: optax.named_chain(("adam", optax.adam(1e-3)), ("p", tx)),
    "partition": lambda tx: optax.partition(
        {"prune": tx, "rest": optax.sgd(0.1)}, {"a": "prune", "b": "rest"}
    ),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "inject": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), tx)
    )(rate=0.1),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_state_is_found_in_every_wrapper(wrapper):
    tx = WRAPPERS[wrapper](mj.movement_pruning())
    state = mj.find_state(tx.init(PARAMS))
    assert isinstance(state, mj.MovementState)
    assert state.masks["a"]["kernel"].shape == (2, 3)


def test_no_state_is_an_error_that_shows_the_right_chain():
    with pytest.raises(
        ValueError, match=r"Found no .*`optax.chain\(optax.adamw\(.*mov"
    ):
        mj.find_state(optax.adam(1e-3).init(PARAMS))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(mj.movement_pruning(), mj.movement_pruning()),
        mj.movement_pruning(inner=mj.movement_pruning()),
    ],
    ids=["side by side", "nested"],
)
def test_two_states_are_an_error_that_names_the_way_out(tx):
    with pytest.raises(
        ValueError,
        match=r"Found 2 .* Use one `movement_pruning` .*`allocation=PerPath\({...}\)`",
    ):
        mj.find_state(tx.init(PARAMS))


def test_params_with_a_key_named_like_a_field_do_not_confuse_the_search():
    params = {"scores": {"kernel": jnp.ones((2, 2))}, "masks": jnp.ones(3)}
    state = mj.find_state(
        optax.adam(1e-3).init(params) + (mj.movement_pruning().init(params),)
    )
    assert state.masks["scores"]["kernel"].shape == (2, 2)


def test_a_wide_run_of_bad_steps_ends_at_the_exact_sparsity():
    rng = np.random.default_rng(0)
    tx, step = form("chain")
    params, opt_state = PARAMS, tx.init(PARAMS)
    good = bad = 0
    while good < 60:
        if rng.random() < 0.5:
            leaf = LEAVES[rng.integers(3)]
            _, opt_state = step(params, opt_state, poison(leaf, BAD[rng.integers(3)]))
            bad += 1
        else:
            params, opt_state = step(params, opt_state, GRADS)
            good += 1
    state = mj.find_state(opt_state)
    assert (state.step, state.events.skipped) == (good, bad)
    assert [int(m.sum()) for m in jax.tree.leaves(state.masks)] == [3, 4]
