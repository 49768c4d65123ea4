"""What JAX does to programs, and several devices."""

import ast
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import movement_jax as mj
from movement_jax import grouping

from . import naive
from .subjects import (
    NAIVE,
    OURS,
    PARAMS,
    both,
    mask_of,
    pull,
    train,
)

needs_eight = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (see conftest.py)"
)


@functools.cache
def scored(subject=OURS):
    """A state with scores and nothing pruned."""
    tx = optax.chain(optax.sgd(0.1), subject.pruning())
    return train(tx)


def masks_at(sparsity, subject=OURS):
    _, opt_state = subject.prune(scored(subject), sparsity)
    return subject.state(opt_state).masks["kernel"]


@functools.cache
def eager_masks_at(sparsity, subject):
    return np.asarray(masks_at(sparsity, subject))


def scan_over(masks_at, levels):
    return jax.lax.scan(lambda _, x: (0, masks_at(x)), 0, levels)[1]


WAYS = {
    "jit": jax.jit,
    "vmap": lambda f: jax.jit(lambda x: jax.vmap(f)(jnp.stack([x, x]))[1]),
    "scan": lambda f: jax.jit(lambda x: scan_over(f, x[None])[0]),
    "remat": lambda f: jax.jit(jax.checkpoint(f)),
}
COUNTING = dataclasses.replace(
    NAIVE, prune=functools.partial(naive.prune, select=naive.by_top_k)
)


@pytest.mark.parametrize("way", WAYS)
@both(
    "top_k wants a number, which a traced sparsity does not give",
    naive=COUNTING,
    raises=[jax.errors.ConcretizationTypeError],
)
def test_E1_masks_are_those_of_eager_code(subject, way):
    masks = WAYS[way](functools.partial(masks_at, subject=subject))
    for level in (0.3, 0.9):
        want = eager_masks_at(level, subject)
        assert want.sum() == 64 - round(level * 64)
        np.testing.assert_array_equal(masks(jnp.float32(level)), want)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["grad", "remat"])
def test_E1_derivatives_are_finite_and_know_nothing_of_the_sparsity(wrap):
    @wrap
    def loss(params, sparsity):
        pruned, _ = mj.prune((params, scored()[1]), sparsity)
        return jnp.sum(jnp.square(pruned["kernel"]))

    slopes, slope = jax.jit(jax.grad(loss, argnums=(0, 1)))(scored()[0], 0.5)
    want = 2 * scored()[0]["kernel"] * masks_at(0.5)
    np.testing.assert_array_equal(slopes["kernel"], want)
    assert slope == 0


def mesh_of(devices, mode=AxisType.Auto):
    return jax.make_mesh(
        (devices,), ("x",), axis_types=(mode,), devices=jax.devices()[:devices]
    )


@needs_eight
@both("every device takes the quantile of its own part")
def test_E2_parts_in_a_shard_map_are_ranked_as_one(subject):
    whole = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    params = {"kernel": whole}

    def masks(tx, params, opt_state):
        _, opt_state = tx.update(pull(params), opt_state, params)
        return subject.state(subject.prune((params, opt_state), 0.9)[1]).masks

    tx = subject.pruning()
    want = masks(tx, params, tx.init(params))
    tx = subject.pruning(axis_name="x")
    opt_state = tx.init(params)
    specs = [
        jax.tree.map(lambda x: P("x") if jnp.ndim(x) == 2 else P(), tree)
        for tree in (params, opt_state)
    ]
    mapped = jax.shard_map(
        functools.partial(masks, tx),
        mesh=mesh_of(8),
        in_specs=tuple(specs),
        out_specs={"kernel": P("x")},
    )
    got = jax.jit(mapped)(params, opt_state)
    np.testing.assert_array_equal(got["kernel"], want["kernel"])


LAYOUTS = {
    "rows": P(("x", "y")),
    "columns": P(None, ("x", "y")),
    "both": P("x", "y"),
    "replicated": P(),
}


def spread(array, shape, spec, mode):
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(mode,) * 2, devices=devices)
    return jax.device_put(array, NamedSharding(mesh, spec))


TIED = (np.round(np.random.default_rng(0).normal(size=(32, 32)), 1) + 0.05).astype("f")


@jax.jit
def our_mask(kernel):
    params = {"kernel": kernel}
    tx = mj.movement_pruning(None, mj.Magnitude(), allocation=mj.Global())
    return mj.prune((params, tx.init(params)), 0.7)[1].masks["kernel"]


def quantile_mask(kernel):
    try:
        return jax.jit(naive.by_quantile)(jnp.abs(kernel), 0.7)
    except Exception as error:  # of a kind that has no public name
        assert "sharding" not in str(error), error
        raise


@needs_eight
@pytest.mark.parametrize("layout", LAYOUTS)
def test_E3_sharded_weights_are_ranked_as_whole_ones(layout):
    whole = np.asarray(our_mask(TIED))
    parts = our_mask(spread(TIED, (4, 2), LAYOUTS[layout], AxisType.Auto))
    np.testing.assert_array_equal(parts, whole)
    assert whole.sum() == 1024 - round(0.7 * 1024)


@needs_eight
@both(
    "a quantile reshapes and sorts, and must be told where the parts go",
    ours=our_mask,
    naive=quantile_mask,
)
def test_E3_so_are_those_whose_sharding_is_part_of_their_type(subject):
    whole = np.asarray(subject(TIED))
    for spec in LAYOUTS.values():
        parts = subject(spread(TIED, (4, 2), spec, AxisType.Explicit))
        np.testing.assert_array_equal(parts, whole)


@needs_eight
@both(
    "sums of floats depend on the order of the summands",
    ours=lambda x: grouping.group_scores(x, (x.shape[0], 1), "sum"),
    naive=lambda x: jnp.sum(x, axis=0, keepdims=True),
)
def test_E4_what_a_column_is_worth_has_the_same_bits_on_every_sharding(subject):
    x = np.random.default_rng(0).normal(size=(4096, 64)).astype(np.float32)
    want = np.asarray(jax.jit(subject)(jnp.asarray(x)))
    for spec in LAYOUTS.values():
        got = jax.jit(subject)(spread(x, (4, 2), spec, AxisType.Auto))
        np.testing.assert_array_equal(np.asarray(got), want)


def descent(subject, devices, times=1):
    """A regression trained with its examples spread over devices; params, masks."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(512, 32)).astype(np.float32)
    targets = np.tanh(inputs @ rng.normal(size=(32, 16)).astype(np.float32))
    examples = NamedSharding(mesh_of(devices), P("x"))
    replicated = NamedSharding(mesh_of(devices), P())
    inputs, targets = jax.device_put((inputs, targets), examples)
    pruning = naive.pruning()
    if subject is OURS:
        pruning = mj.movement_pruning(mj.cubic(0.8, 5, 40))
    tx = optax.chain(optax.adamw(1e-2), pruning)

    @jax.jit
    def step(params, opt_state, inputs, targets):
        def loss(params):
            return jnp.mean((jnp.tanh(inputs @ params["kernel"]) - targets) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = {"kernel": jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)}
    params = jax.device_put(params, replicated)
    for _ in range(times):
        state = params, tx.init(params)
        for _ in range(50):
            state = jax.block_until_ready(step(*state, inputs, targets))
        if subject is not OURS:
            state = subject.prune(state, 0.8)
        yield np.asarray(state[0]["kernel"]), mask_of(subject, state[1])


@pytest.mark.slow
@needs_eight
@both("a quantile keeps another number than is asked for, on any topology")
def test_E7_bits_repeat_on_one_topology_and_counts_are_exact_on_any(subject):
    (weights, masks), again = descent(subject, 1, times=2)
    assert masks.sum() == 512 - round(0.8 * 512)
    assert weights.tobytes() == again[0].tobytes()
    assert masks.tobytes() == again[1].tobytes()
    ((weights_there, masks_there),) = descent(subject, 4)
    assert weights_there.tobytes() != weights.tobytes()  # sums of floats differ
    assert masks_there.sum() == masks.sum()
    assert np.sum(masks_there != masks) <= 8


@pytest.mark.parametrize("allocation", [mj.Uniform(), mj.Global()], ids=repr)
def test_E8_the_debugging_modes_of_jax_find_nothing(allocation):
    schedule = mj.cubic(0.5, begin=0, end=3)
    pruning = mj.movement_pruning(schedule, allocation=allocation)
    tx = optax.chain(optax.sgd(0.1), pruning)
    state, grads = (PARAMS, tx.init(PARAMS)), pull(PARAMS)
    level, apply = jnp.float32(0.75), jax.jit(optax.apply_updates)
    with jax.debug_nans(True), jax.checking_leaks():
        with jax.transfer_guard("disallow"):
            for _ in range(4):
                updates, opt_state = jax.jit(tx.update)(grads, state[1], state[0])
                state = apply(state[0], updates), opt_state
            state = jax.jit(mj.prune)(state, level)
    assert mask_of(OURS, state[1]).sum() == 16


@both("Inf minus Inf is NaN in the score", raises=[FloatingPointError])
def test_E8_infinite_gradients_make_no_nan_that_debug_nans_would_find(subject):
    tx = subject.by_gradient(optax.sgd(0.1))
    good, opt_state = train(tx)
    with jax.debug_nans(True):
        for value in (np.inf, -np.inf):
            grads = {"kernel": pull(good)["kernel"].at[1, 2].set(value)}
            _, opt_state = train(tx, (good, opt_state), 1, grads)


DECIDING = (
    *("allocation", "counting", "criteria", "grouping", "masking", "position"),
    *("prune", "scoring", "selection", "structure", "transform", "tree", "wide"),
)
# What differs between processes, or from run to run.
OF_A_HOST = {"process_index", "process_count", "local_devices", "time", "uuid"}


def of_a_host(source):
    """Names in a file by which one process could decide otherwise than another."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & {"random", "time", "uuid"}
        elif isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", None)
            if node.attr in OF_A_HOST or (owner == "np" and node.attr == "random"):
                yield node.attr


@pytest.mark.parametrize("room", DECIDING)
def test_E6_nothing_is_decided_by_what_only_one_process_knows(room):
    source = pathlib.Path(mj.__file__).with_name(f"{room}.py").read_text()
    assert [*of_a_host(source)] == []


@pytest.mark.parametrize(
    "source", ["jax.process_index()", "np.random.rand()", "import random"]
)
def test_E6_would_find_it_if_it_were(source):
    assert [*of_a_host(source)]
