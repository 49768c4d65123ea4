"""Leaves that are no weights, trees that change, buffers that are shared."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import movement_jax as mj

from . import naive
from .subjects import (
    HALF,
    KERNEL,
    OURS,
    PARAMS,
    alike,
    all_finite,
    both,
    pull,
    train,
)

KEY = jax.random.key(0)
OTHERS = {
    "C1": jnp.zeros((0, 3)),
    "C2": jnp.float32(0.5),
    "C3": jnp.arange(4).reshape(2, 2),
    "C4": jnp.array([[True, False], [False, True]]),
    "C5": jnp.array([[1 + 2j, 0.1j], [0.2, 3j]], jnp.complex64),
    "C6": jax.random.split(KEY, 4).reshape(2, 2),
}
ERRORS = (TypeError, ValueError)


def raw(leaf):
    keys = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if keys else leaf)


def check_untouched(subject, leaf):
    """Trains and prunes beside a leaf, under the name of a kernel, in a scan."""
    params = {"a": {"kernel": leaf}, "b": {"kernel": KERNEL}}
    updates = {"a": {"kernel": leaf}, "b": {"kernel": jnp.zeros_like(KERNEL)}}
    tx = subject.pruning()

    @jax.jit
    def run(opt_state):
        def step(opt_state, _):
            updated, opt_state = tx.update(updates, opt_state, params)
            return opt_state, updated["a"]["kernel"]

        return jax.lax.scan(step, opt_state, length=3)

    opt_state, updated = run(tx.init(params))
    np.testing.assert_array_equal(raw(updated[-1]), raw(leaf))
    pruned, opt_state = subject.prune((params, opt_state), 0.5)
    assert pruned["a"]["kernel"].dtype == leaf.dtype
    np.testing.assert_array_equal(raw(pruned["a"]["kernel"]), raw(leaf))
    state = subject.state(opt_state)
    assert np.sum(state.masks["b"]["kernel"]) == HALF
    # Nothing is carried for it, which a checkpoint would have to hold.
    assert not jax.tree.leaves((state.masks["a"], state.scores["a"]))
    return opt_state


@both("a quantile of nothing is an error", raises=ERRORS)
def test_C1_an_empty_leaf_is_left_out_and_the_state_can_be_saved(subject, tmp_path):
    opt_state = check_untouched(subject, OTHERS["C1"])
    ocp.save(tmp_path / "state", opt_state)
    restored = ocp.load(tmp_path / "state", opt_state)
    assert mj.sparsity_of(restored) == 0.5


@both("a lone score is never above its own quantile")
def test_C2_a_scalar_is_left_alone(subject):
    check_untouched(subject, OTHERS["C2"])


@both("the score changes its dtype, which a scan refuses", raises=ERRORS)
def test_C3_integers_are_left_alone(subject):
    check_untouched(subject, OTHERS["C3"])


@both("bools have no minus", raises=ERRORS)
def test_C4_bools_are_left_alone(subject):
    check_untouched(subject, OTHERS["C4"])


@both("complex scores are made, which have no order", raises=ERRORS)
def test_C5_complex_leaves_are_left_alone(subject):
    check_untouched(subject, OTHERS["C5"])


@both("a key of zeros is made as its score", raises=ERRORS)
def test_C6_random_keys_are_left_alone(subject):
    check_untouched(subject, OTHERS["C6"])


@both(
    "gradients and what is to be watched are flattened apart, and None counts in one",
    ours=mj.movement_pruning(0.5, mj.Magnitude()),
    naive=naive.guarded(naive.pruning()),
)
def test_C7_a_bad_gradient_is_seen_on_either_side_of_a_none(subject):
    update = jax.jit(subject.update)
    for hole in ("z", "k", "a"):
        params = {"b": jnp.ones(2), "kernel": KERNEL, "y": jnp.ones(2), hole: None}
        for bad in ("b", "kernel", "y"):
            grads = jax.tree.map(jnp.zeros_like, params)
            grads[bad] = grads[bad].at[0].set(np.nan)
            _, state = update(grads, subject.init(params), params)
            assert state.step == 0, (hole, bad)
            assert np.asarray(state.masks["kernel"]).all()


@both("float0 cannot be multiplied", raises=ERRORS)
def test_C8_gradients_of_integers_pass_through(subject):
    params = {"kernel": KERNEL, "table": jnp.arange(4)}
    grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2), allow_int=True)(params)
    tx = subject.pruning()
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["table"].dtype == jax.dtypes.float0
    assert all_finite(subject.state(state).scores) and state.step == 1


CHANGED = {
    "shrinks": {"a": {"kernel": KERNEL}},
    "grows": {"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL}, "c": {}},
    "renamed": {"a": {"kernel": KERNEL}, "b": {"matrix": KERNEL}},
    "frozen": flax.core.freeze({"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL}}),
}


@pytest.mark.parametrize("how", CHANGED)
@both("an error of JAX that speaks of pytrees", raises=ERRORS)
def test_C9_a_tree_that_changed_is_refused_by_what_it_is(subject, how):
    tx = subject.pruning()
    opt_state = tx.init({"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL}})
    changed = CHANGED[how]
    missing = r"\['b/kernel'\]" if how in ("shrinks", "renamed") else r"\[\]"
    message = f"`params` does not fit the pruning state: .*Missing: {missing}"
    with pytest.raises(ValueError, match=message):
        tx.update(changed, opt_state, changed)


@both("broadcasts without a word")
def test_C10_a_shape_that_changed_is_refused_by_path(subject):
    tx = subject.pruning()
    opt_state = tx.init({"a": {"kernel": KERNEL}})
    narrow = {"a": {"kernel": KERNEL[:, :1]}}
    message = r"leaf 'a/kernel' has shape \(8, 1\), .* initialised with \(8, 8\)"
    with pytest.raises(ValueError, match=message):
        tx.update(narrow, opt_state, narrow)


@both("an error about leaves that are None", raises=ERRORS)
def test_C12_an_update_without_params_is_told_the_right_call(subject):
    tx = subject.pruning()
    with pytest.raises(ValueError, match=r"call `tx.update\(updates, state, params\)`"):
        tx.update(pull(PARAMS), tx.init(PARAMS))


@alike()
def test_C14_a_donated_state_that_is_used_again_is_an_error_of_jax(subject):
    tx = optax.chain(optax.sgd(0.1), subject.pruning())
    params = jax.tree.map(jnp.copy, PARAMS)
    state = params, tx.init(params)
    donating = jax.jit(lambda state: subject.prune(state, 0.0), donate_argnums=0)
    donating(state)
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        np.asarray(state[0]["kernel"])
    if subject is OURS:
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            mj.sparsity_of(state)


ALIASED = optax.chain(optax.sgd(0.1), naive.pruning(start_at_weights=True))
TRACKED = optax.chain(
    optax.sgd(0.1), mj.movement_pruning(track_start=True, track_noise=True)
)


@both(
    "the first score is the weight's own buffer, donated twice",
    ours=TRACKED,
    naive=ALIASED,
    raises=[ValueError, RuntimeError],
)
def test_C15_params_and_state_can_be_donated_together(subject):
    step = jax.jit(
        lambda params, opt_state: subject.update(params, opt_state, params),
        donate_argnums=(0, 1),
    )
    params = jax.tree.map(jnp.copy, PARAMS)
    updates, _ = step(params, subject.init(params))
    assert all_finite(updates)


@both(
    "one threshold for all, and a layer of small weights is gone",
    ours=mj.prune,
    naive=naive.prune_globally,
)
def test_C16_no_layer_falls_below_its_floor(subject):
    params = {"a": {"kernel": KERNEL}, "b": {"kernel": 1e-3 * KERNEL}}
    pruning = naive.pruning()
    if subject is mj.prune:
        pruning = mj.movement_pruning(allocation=mj.Global(min_keep=0.1))
    tx = optax.chain(optax.sgd(0.1), pruning)
    pruned, opt_state = subject(train(tx, (params, tx.init(params))), 0.5)
    kept = {name: int(np.sum(pruned[name]["kernel"] != 0)) for name in pruned}
    assert kept == {"a": 57, "b": 7}  # of 64 at least 6.4
    if subject is mj.prune:
        lowest = mj.metrics(opt_state)["pruning/lowest_density"]
        assert lowest == np.float32(7 / 64)
