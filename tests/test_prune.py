import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import movement_jax as mj

PARAMS = {
    "bias": jnp.array([0.5, -0.5, 0.0]),
    "kernel": jnp.array([[3.0, -0.1, 0.7], [0.2, -4.0, -0.3]]),
}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
TX = optax.chain(optax.adam(0.01), mj.movement_pruning(None, mj.Magnitude()))
HALF = [[1, 0, 1], [0, 1, 0]]

prune = jax.jit(mj.prune)


class Tuple(NamedTuple):
    step: int
    params: Any
    opt_state: Any


@dataclasses.dataclass
class Plain:
    params: Any
    opt_state: Any
    step: int = 7


@chex.dataclass(frozen=True)
class Chex:
    params: Any
    opt_state: Any
    step: int = 7


@flax.struct.dataclass
class Struct:
    params: Any
    opt_state: Any
    step: int = 7


def train_state(params, opt_state):
    state = TrainState.create(apply_fn=None, params=params, tx=TX)
    return state.replace(opt_state=opt_state, step=7)


KINDS = {
    "TrainState": train_state,
    "NamedTuple": lambda params, opt_state: Tuple(7, params, opt_state),
    "dataclass": Plain,
    "chex.dataclass": lambda p, o: Chex(params=p, opt_state=o),
    "flax.struct": Struct,
    "dict": lambda p, o: {"step": 7, "params": p, "opt_state": o},
}


def get(state, name):
    return state[name] if isinstance(state, dict) else getattr(state, name)


def test_a_pair_is_pruned():
    params, opt_state = mj.prune((PARAMS, TX.init(PARAMS)), 0.5)
    np.testing.assert_array_equal(params["kernel"], PARAMS["kernel"] * np.array(HALF))
    np.testing.assert_array_equal(params["bias"], PARAMS["bias"])
    np.testing.assert_array_equal(mj.find_state(opt_state).masks["kernel"], HALF)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_train_state_comes_back_as_it_was(kind):
    state = KINDS[kind](PARAMS, TX.init(PARAMS))
    pruned = mj.prune(state, 0.5)
    assert type(pruned) is type(state)
    assert get(pruned, "step") == 7
    kernel = get(pruned, "params")["kernel"]
    np.testing.assert_array_equal(kernel, PARAMS["kernel"] * np.array(HALF))
    assert get(state, "params") is not get(pruned, "params")
    assert mj.sparsity_of(pruned) == 0.5
    assert mj.metrics(pruned)["pruning/sparsity_asked"] == 0.5


def test_jit_with_a_traced_sparsity_equals_eager():
    state = (PARAMS, TX.init(PARAMS))
    for level in (0.0, 0.25, 0.5, 0.9):
        chex.assert_trees_all_equal(prune(state, level), mj.prune(state, level))


@pytest.mark.parametrize(
    "allocation", [mj.Uniform(), mj.Global(), mj.ErdosRenyi()], ids=repr
)
def test_the_debugging_modes_of_jax_find_nothing(allocation):
    tx = mj.movement_pruning(0.5, mj.Magnitude(), allocation=allocation)
    state, level = (PARAMS, tx.init(PARAMS)), jnp.float32(0.5)
    with jax.debug_nans(True), jax.checking_leaks():
        want = mj.prune(state, 0.5)
        with jax.transfer_guard("disallow"):
            _, opt_state = jax.jit(tx.update)(GRADS, state[1], PARAMS)
            got = prune(state, level)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal(opt_state.masks, got[1].masks)


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": mj.Global(per="[ab]")},
        {"allocation": mj.ErdosRenyi(), "criterion": mj.Magnitude()},
        {"structure": mj.Axis(-1)},
        {"structure": mj.NM(2, 4)},
        {"structure": mj.Block((2, 3)), "allocation": mj.Global()},
        pytest.param({"criterion": mj.RigL(100), "inner": optax.sgd(0.1)}, id="RigL"),
    ],
    ids=str,
)
def test_eager_code_is_compiled_once_for_all_sparsities(options, caplog):
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 9), "b": (8, 4), "c": (5, 9)}
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }
    tx = mj.movement_pruning(**options)
    _, opt_state = jax.jit(tx.update)(params, tx.init(params), params)

    def reports(sparsity):
        state = mj.prune((params, opt_state), sparsity)
        return str(mj.summary(state)) + str(mj.health(state)), mj.metrics(state)

    first = reports(0.25)
    with jax.log_compiles():
        assert reports(0.5)[0] != first[0]
        assert [r for r in caplog.messages if r.startswith("Finished XLA")] == []
        jax.jit(lambda x: x + 1)(1.0)  # which is told
        assert [r for r in caplog.messages if r.startswith("Finished XLA")]


def test_every_member_of_an_ensemble_gets_its_own_sparsity():
    members = jax.tree.map(lambda p: jnp.stack([p, 2 * p, p[::-1]]), PARAMS)
    levels = jnp.array([0.5, 0.0, 1 / 3])
    states = (members, jax.vmap(TX.init)(members))
    params, _ = jax.vmap(mj.prune)(states, levels)
    # Of the last member, rows reversed, the two lowest are -0.1 and 0.2.
    want = [HALF, np.ones((2, 3)), [[0, 1, 1], [1, 0, 1]]]
    np.testing.assert_array_equal(params["kernel"], members["kernel"] * np.array(want))


def test_sparsity_zero_changes_no_bit_of_the_params():
    kernel = jnp.array([[-0.0, 1e-45, jnp.nan], [jnp.inf, 1.0, -2.0]])
    params = {**PARAMS, "kernel": kernel}
    got, _ = prune((params, TX.init(params)), 0.0)
    assert np.asarray(got["kernel"]).tobytes() == np.asarray(kernel).tobytes()


def test_asking_for_less_than_is_pruned_changes_nothing():
    state = prune((PARAMS, TX.init(PARAMS)), 0.5)
    again = prune(state, 0.2)
    chex.assert_trees_all_equal(again[0], state[0])
    assert mj.find_state(again[1]).sparsity == 0.5


def test_masks_only_shrink_when_pruned_by_hand_in_between():
    state = prune((PARAMS, TX.init(PARAMS)), 1 / 3)
    kernel = state[0]["kernel"].at[0, 1].set(99.0)  # a pruned weight, tampered with
    params, opt_state = prune(({**state[0], "kernel": kernel}, state[1]), 0.5)
    np.testing.assert_array_equal(params["kernel"], PARAMS["kernel"] * np.array(HALF))
    np.testing.assert_array_equal(mj.find_state(opt_state).masks["kernel"], HALF)


def train(tx, state, steps):
    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(GRADS, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        state = step(*state)
    return state


def test_pruned_weights_stay_at_zero_while_others_train_on():
    state = prune((PARAMS, TX.init(PARAMS)), 0.5)
    params, _ = train(TX, state, 5)
    kernel = np.asarray(params["kernel"])
    np.testing.assert_array_equal(kernel != 0, np.array(HALF, bool))
    assert np.all(kernel[kernel != 0] != state[0]["kernel"][kernel != 0])


def test_finalize_keeps_the_zeros_and_drops_the_scores():
    tx = optax.chain(
        optax.adam(0.01),
        mj.movement_pruning(mj.linear(0.5, 0, 2), track_start=True, track_noise=True),
    )
    params, opt_state = mj.finalize(train(tx, (PARAMS, tx.init(PARAMS)), 3))
    state = mj.find_state(opt_state)
    assert jax.tree.leaves((state.scores, state.tracked)) == []
    after, opt_state = train(tx, (params, opt_state), 5)
    np.testing.assert_array_equal(after["kernel"] != 0, np.array(HALF, bool))
    assert np.all(after["bias"] != params["bias"])
    assert mj.sparsity_of(opt_state) == 0.5


def test_finalize_masks_the_dense_params_of_regrowth():
    tx = mj.movement_pruning(None, mj.Magnitude(), regrow=True)
    params, opt_state = prune((PARAMS, tx.init(PARAMS)), 0.5)
    np.testing.assert_array_equal(params["kernel"], PARAMS["kernel"])
    seen = mj.effective_params(params, opt_state)
    np.testing.assert_array_equal(seen["kernel"], PARAMS["kernel"] * np.array(HALF))
    params, opt_state = jax.jit(mj.finalize)((params, opt_state))
    np.testing.assert_array_equal(params["kernel"], PARAMS["kernel"] * np.array(HALF))
    after, _ = train(tx, (params, opt_state), 2)
    np.testing.assert_array_equal(after["kernel"] != 0, np.array(HALF, bool))


def test_regrowth_chooses_the_masks_afresh():
    tx = mj.movement_pruning(None, mj.Magnitude(), regrow=True)
    state = prune((PARAMS, tx.init(PARAMS)), 0.5)
    _, opt_state = prune(state, 1 / 6)
    assert opt_state.masks["kernel"].sum() == 5


@pytest.mark.parametrize("level", [np.nan, -0.5, 1.5, 80.0, np.inf, -np.inf])
def test_a_traced_sparsity_out_of_range_is_refused_and_counted(level):
    state = prune((PARAMS, TX.init(PARAMS)), 0.5)
    params, opt_state = prune(state, level)
    chex.assert_trees_all_equal(params, state[0])
    found = mj.find_state(opt_state)
    np.testing.assert_array_equal(found.masks["kernel"], HALF)
    assert (found.sparsity, found.events.refused, found.events.changes) == (0.5, 1, 1)


def test_pruning_before_any_score_is_refused_and_counted_under_jit():
    tx = mj.movement_pruning()
    params, opt_state = prune((PARAMS, tx.init(PARAMS)), 0.5)
    chex.assert_trees_all_equal(params, PARAMS)
    assert opt_state.masks["kernel"].all() and opt_state.events.refused == 1


@pytest.mark.parametrize("regrow", [True, False])
def test_params_and_optimizer_state_can_be_donated_together(regrow):
    tx = mj.movement_pruning(
        0.5,
        mj.Movement(),
        inner=optax.adam(0.1),
        regrow=regrow,
        track_start=True,
        track_noise=True,
    )

    def step(params, opt_state):
        updates, opt_state = tx.update(GRADS, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    donating = jax.jit(step, donate_argnums=(0, 1))
    state = jax.tree.map(jnp.copy, PARAMS)
    state = (state, tx.init(state))
    for _ in range(3):
        state = donating(*state)
    state = jax.jit(mj.prune, donate_argnums=0)(state, 0.6)
    assert mj.sparsity_of(state) == np.float32(4 / 6)


def test_metrics_are_scalars_under_jit():
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(0.5, mj.Magnitude()))
    _, opt_state = train(tx, (PARAMS, tx.init(PARAMS)), 2)
    logged = jax.jit(mj.metrics)(opt_state)
    assert {name: float(value) for name, value in logged.items()} == {
        "pruning/sparsity": 0.5,
        "pruning/sparsity_asked": 0.5,
        "pruning/lowest_density": 0.5,
        "pruning/mask_changes": 1.0,
        "pruning/churn": 0.0,
        "pruning/skipped_steps": 0.0,
        "pruning/refused_changes": 0.0,
        "pruning/undone_updates": 0.0,
        "pruning/scored_steps": 2.0,
    }


def test_metrics_of_an_optimizer_without_params_are_defined():
    tx = mj.movement_pruning()
    assert mj.metrics(tx.init({}))["pruning/lowest_density"] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_a_mask_turns_every_weight_into_positive_zero(value):
    weights = {"kernel": jnp.array([value, 1.0], jnp.float32)}
    masks = {"kernel": jnp.array([False, True])}
    got = np.asarray(mj.apply_masks(weights, masks)["kernel"])
    assert got.view(np.int32).tolist() == [0, np.float32(1).view(np.int32)]


def test_the_sparsity_does_not_enter_a_derivative():
    def shrunk(params, level):
        pruned, _ = mj.prune((params, TX.init(params)), level)
        return jnp.sum(pruned["kernel"])

    slopes, slope = jax.jit(jax.grad(shrunk, argnums=(0, 1)))(PARAMS, 0.5)
    np.testing.assert_array_equal(slopes["kernel"], HALF)
    assert slope == 0


def pruned(sparsity, tx=TX):
    return mj.prune((PARAMS, tx.init(PARAMS)), sparsity)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: pruned(80), ValueError, "in .0, 1., got 80. Did you mean 0.8?"),
        (lambda: pruned(jnp.float32(80)), ValueError, "got 80.0. Did you mean 0.8?"),
        (lambda: pruned(np.float64(-1)), ValueError, "got -1.0"),
        (lambda: pruned(float("nan")), ValueError, "got nan"),
        (
            lambda: pruned(True),
            TypeError,
            "must be a fraction of the weights to drop.*True of type bool",
        ),
        (lambda: pruned("0.8"), TypeError, "'0.8' of type str. .*`sparsity=0.8`"),
        (lambda: pruned(None), TypeError, "None of type NoneType"),
        (
            lambda: pruned(jnp.ones(2)),
            ValueError,
            r"must be a scalar, got shape \(2,\).*=PerPath\({...}\)`",
        ),
        (lambda: pruned(1.0), ValueError, r"say so with `allocation=Uniform\(min_kee"),
        (
            lambda: pruned(0.5, mj.movement_pruning()),
            ValueError,
            r"been scored yet: `prune` ranks weights .*`Magnitude\(\)`",
        ),
        (lambda: pruned(0.5, optax.adam(1.0)), ValueError, "Found no `movement_prunin"),
        (
            lambda: mj.prune(mj.finalize(pruned(0.5)), 0.6),
            ValueError,
            "Call `prune` before `finalize`",
        ),
        (
            lambda: mj.prune([PARAMS, TX.init(PARAMS)], 0.5),
            ValueError,
            r"got list. For example `prune\(\(params, opt_state\), 0.8\)`",
        ),
        (lambda: mj.prune(TX.init(PARAMS)[1], 0.5), ValueError, "got MovementState"),
        (
            lambda: mj.prune(SimpleNamespace(params=PARAMS, opt_state=()), 0.5),
            ValueError,
            "`params` and `opt_state` that can be replaced.*got SimpleNamespace",
        ),
        (
            lambda: mj.prune(({"kernel": jnp.ones((3, 2))}, TX.init(PARAMS)), 0.5),
            ValueError,
            "`params` does not fit the pruning state",
        ),
        (
            lambda: pruned(0.5, optax.contrib.schedule_free(TX, 0.1)),
            ValueError,
            "`optax.contrib.schedule_free` keeps the weights it trains",
        ),
        (
            lambda: pruned(0.5, optax.contrib.mechanize(TX)),
            ValueError,
            "`optax.contrib.mechanize` keeps the weights it trains",
        ),
    ],
)
def test_a_wrong_call_is_refused_with_the_right_one(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sparsity_one_is_done_if_asked_for_twice():
    tx = mj.movement_pruning(None, mj.Magnitude(), allocation=mj.Uniform(min_keep=0))
    params, _ = pruned(1.0, tx)
    assert not np.any(params["kernel"])
