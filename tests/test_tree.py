import re
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

KERNEL = jnp.array([[1.0, -4.0], [3.0, -2.0]])
HALF = [[False, True], [True, False]]
TX = mj.movement_pruning(0.5, mj.Magnitude())


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def updated(params, tx=TX, updates=None):
    """Params and pruning state after one compiled update of zero."""
    if updates is None:
        updates = jax.tree.map(zero_update, params)
    updates, state = jax.jit(tx.update)(updates, tx.init(params), params)
    return optax.apply_updates(params, updates), state


def zero_update(leaf):
    return jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.number) else leaf


TREES = {
    "a list": [{"kernel": KERNEL}, {"kernel": KERNEL}],
    "a NamedTuple": Layer(KERNEL, jnp.ones(2)),
    "a tuple of dicts": ({"w": KERNEL}, {"b": jnp.ones(2)}),
    "a FrozenDict": flax.core.freeze({"dense": {"kernel": KERNEL}}),
    "a linen box": {"kernel": nn.Partitioned(KERNEL, names=("in", "out"))},
    "nested boxes and lists": [{"weight": nn.Partitioned(KERNEL, names=(None, None))}],
    "None first": {"a": None, "kernel": KERNEL, "z": jnp.ones(2)},
    "None in the middle": {"a": jnp.ones(2), "k": None, "kernel": KERNEL},
    "None last": {"kernel": KERNEL, "z": None},
    "an empty leaf": {"a": {"kernel": jnp.ones((0, 3))}, "b": {"kernel": KERNEL}},
    "integers": {"kernel": KERNEL, "steps": jnp.arange(4).reshape(2, 2)},
    "complex": {"kernel": KERNEL, "phase": {"kernel": jnp.ones((2, 2), jnp.complex64)}},
    "scalars": {"kernel": KERNEL, "scale": jnp.float32(3.0)},
}


@pytest.mark.parametrize("kind", TREES)
def test_the_kernels_of_any_container_are_pruned_and_nothing_else(kind):
    params, state = updated(TREES[kind])
    assert jax.tree.structure(params) == jax.tree.structure(TREES[kind])
    masks = jax.tree.leaves(state.masks)
    for mask in masks:
        np.testing.assert_array_equal(mask, HALF)
    pruned = 0
    for got, was in zip(jax.tree.leaves(params), jax.tree.leaves(TREES[kind])):
        if was is KERNEL:
            pruned += 1
            was = np.where(HALF, was, 0.0)
        np.testing.assert_array_equal(got, was)
    assert pruned == len(masks) > 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("hole", ["a", "k", "z"])
def test_a_bad_gradient_is_seen_on_either_side_of_a_none(hole, value):
    params = {"b": jnp.ones(2), "j": jnp.ones(2), "kernel": KERNEL, "y": jnp.ones(2)}
    params[hole] = None
    for bad in ("b", "j", "kernel", "y"):
        grads = jax.tree.map(jnp.zeros_like, params)
        grads[bad] = jnp.full_like(grads[bad], value)
        _, state = jax.jit(TX.update)(grads, TX.init(params), params)
        assert (state.step, state.events.skipped) == (0, 1)


def test_bools_and_random_keys_pass_through_untouched():
    key = jax.random.key(0)
    params = {"kernel": KERNEL, "rng": key, "flag": jnp.array([[True, False]])}
    updates = {**params, "kernel": jnp.zeros_like(KERNEL)}
    updates, state = jax.jit(TX.update)(updates, TX.init(params), params)
    assert updates["rng"].dtype == key.dtype
    assert updates["flag"].tolist() == [[True, False]]
    np.testing.assert_array_equal(state.masks["kernel"], HALF)


def test_gradients_of_integers_pass_through_untouched():
    params = {"kernel": KERNEL, "table": jnp.arange(4).reshape(2, 2)}
    grads = jax.grad(lambda p: jnp.sum(p["kernel"]), allow_int=True)(params)
    updates, state = TX.update(grads, TX.init(params), params)
    assert updates["table"].dtype == jax.dtypes.float0
    assert state.step == 1 and state.events.skipped == 0


def test_a_mixed_tree_is_carried_through_a_scan():
    params = {"kernel": KERNEL, "steps": jnp.arange(3), "none": None}
    grads = {"kernel": jnp.ones((2, 2)), "steps": jnp.zeros(3, int), "none": None}

    def body(carry, _):
        params, state = carry
        updates, state = TX.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(body, (params, TX.init(params)), length=3)
    assert params["steps"].tolist() == [0, 1, 2]
    assert state.step == 3


def test_an_equinox_module_is_pruned():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 8, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(0.5, mj.Magnitude()))

    def loss(params, x):
        return jnp.sum(eqx.combine(params, static)(x) ** 2)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(loss)(params, jnp.ones(3))
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state

    params, opt_state = step(params, tx.init(params))
    assert [int(jnp.sum(x.weight == 0)) for x in params.layers] == [12, 32, 8]
    assert all(jnp.all(layer.bias != 0) for layer in params.layers)


PATHS = {
    "embed": {"weight": KERNEL},
    "layer_norm": {"weight": KERNEL, "kernel": KERNEL},
    "dense": {"kernel": KERNEL, "bias": jnp.ones(2), "weight": KERNEL},
    "mlp": {"w": KERNEL, "w_in": KERNEL},
    "gain": {"kernel": jnp.ones(2)},
}


def selected(prunable, params=PATHS):
    masks = mj.movement_pruning(prunable=prunable).init(params).masks
    paths = jax.tree_util.tree_flatten_with_path(masks)[0]
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]


def test_matrices_are_prunable_by_default_but_not_embeddings_and_norms():
    want = ["dense/kernel", "dense/weight", "layer_norm/kernel", "mlp/w"]
    assert selected(None) == want


@pytest.mark.parametrize(
    "pattern, want",
    [
        ("^mlp/", ["mlp/w", "mlp/w_in"]),
        (re.compile("embed|gain"), ["embed/weight", "gain/kernel"]),
        ("bias$", ["dense/bias"]),
    ],
)
def test_a_regular_expression_selects_by_path(pattern, want):
    assert selected(pattern) == want


def test_a_tree_of_bools_may_be_a_prefix():
    flags = {name: False for name in PATHS}
    flags |= {"mlp": True, "dense": {"kernel": True, "bias": False, "weight": False}}
    assert selected(flags) == ["dense/kernel", "mlp/w", "mlp/w_in"]
    assert len(selected(True)) == 9


def test_a_flag_never_selects_what_cannot_be_ranked():
    params = {"steps": jnp.arange(4), "empty": jnp.ones((0, 2)), "kernel": KERNEL}
    assert selected(True, params) == ["kernel"]


@pytest.mark.parametrize(
    "prunable, message",
    [
        ("(", r"`prunable` takes regular expressions, and '\('"),
        ("nowhere", r"(?s)`prunable`='nowhere' selects no.*\n  dense/bias\n"),
        ({"mlp": True}, "tree of bools that does not fit `params`.*prefix of it"),
        (lambda path: True, "regular expression or a tree of bools, got <function"),
        ({"mlp": 1}, "a tree of bools, got 1 at 'mlp'"),
        (False, "selects no float leaf"),
    ],
)
def test_a_wrong_selection_is_refused_with_the_paths(prunable, message):
    with pytest.raises(ValueError, match=message):
        selected(prunable)


def test_a_model_without_kernels_is_refused_with_its_first_paths():
    params = {f"scale{i:02}": jnp.ones(3) for i in range(25)}
    with pytest.raises(ValueError, match=r"(?s)'kernel', 'w' or.*e19\n.*and 5 more"):
        TX.init(params)


STATE = TX.init({"a": {"kernel": KERNEL}, "b": jnp.ones(2)})


@pytest.mark.parametrize(
    "params, message",
    [
        ({"a": {"w": KERNEL}, "b": jnp.ones(2)}, r"Missing: \['a/kernel'\]"),
        ({"b": jnp.ones(2)}, r"Missing: \['a/kernel'\]"),
        ({"a": {"kernel": KERNEL}}, "structure is not that of the params given to"),
        (
            {"a": {"kernel": KERNEL[:, :1]}, "b": jnp.ones(2)},
            r"'a/kernel' has shape \(2, 1\), the state was initialised with \(2, 2\)",
        ),
        (
            flax.core.freeze({"a": {"kernel": KERNEL}, "b": jnp.ones(2)}),
            "Expected dict, got FrozenDict",
        ),
    ],
)
@pytest.mark.parametrize("which", ["params", "updates"])
def test_a_changed_model_is_refused_by_path_and_shape(params, message, which):
    right = {"a": {"kernel": KERNEL}, "b": jnp.ones(2)}
    updates, params = (right, params) if which == "params" else (params, right)
    with pytest.raises(ValueError, match=f"(?s)`{which}` does not fit.*{message}"):
        TX.update(updates, STATE, params)


def python(code):
    """Runs a program in a fresh interpreter and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_needs_no_optional_dependency():
    heavy = ["orbax", "matplotlib", "sklearn", "tqdm"]
    code = f"""
        import sys
        import movement_jax
        print(*[name for name in {heavy} if name in sys.modules])
    """
    assert python(code) == []


def test_dtypes_stay_as_they_are_with_64_bits():
    code = """
        import jax
        jax.config.update("jax_enable_x64", True)
        import jax.numpy as jnp, optax, movement_jax as mj
        for dtype, allocation, regrow in (
            (jnp.float64, mj.Uniform(), True),
            (jnp.float64, mj.Global(), False),
            (jnp.float32, mj.ErdosRenyi(), False),
        ):
            tx = mj.movement_pruning(
                mj.cubic(0.5, 0, 2), mj.Movement(), inner=optax.adam(0.1),
                allocation=allocation, regrow=regrow, track_noise=True)
            params = {"kernel": jnp.arange(1, 9.).reshape(2, 4).astype(dtype)}
            def body(carry, _):
                params, state = carry
                updates, state = tx.update(params, state, params)
                return (optax.apply_updates(params, updates), state), None
            start = params, tx.init(params)
            state, _ = jax.jit(lambda x: jax.lax.scan(body, x, length=3))(start)
            state = jax.jit(mj.prune)(state, 0.75)
            types = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
            assert types(state) == types(start), (dtype, allocation, regrow)
            assert state[1].scores.values["kernel"].dtype == jnp.float32
            assert mj.sparsity_of(state) == 0.75
        print("done")
    """
    assert python(code) == ["done"]
