"""Masks in bits: the same masks in an eighth of the memory, everywhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import movement_jax as mj
from movement_jax import packing, shrink

RNG = np.random.default_rng(0)
SHAPES = {  # what of them is packed: the input axis, rows, lanes, nothing
    "dense": {"kernel": (64, 48), "bias": (48,)},
    "conv": {"kernel": (3, 3, 32, 8)},
    "stacked": {"kernel": (32, 5, 7)},
    "wide": {"kernel": (5, 96)},
    "odd": {"kernel": (33, 7)},
}
PARAMS = jax.tree.map(
    lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)
CUBIC = mj.cubic(0.8, begin=2, end=12, every=2)


def loss(params, key):
    """Draws every weight to a number of its own, with noise."""
    leaves = jax.tree.leaves(params)
    keys = jax.random.split(key, len(leaves))
    draws = (jax.random.normal(k, x.shape) for k, x in zip(keys, leaves))
    return sum(((x - jnp.sin(7 * d)) ** 2).sum() for x, d in zip(leaves, draws))


def train(tx, steps=16, params=PARAMS):
    @jax.jit
    def step(params, state, key):
        at = mj.effective_params(params, state)
        updates, state = tx.update(jax.grad(loss)(at, key), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params, state


def pruning(packed, **options):
    options = {"sparsity": CUBIC, "criterion": mj.Movement(), **options}
    options = {"inner": optax.adam(0.05), **options}
    return mj.movement_pruning(**options, pack_masks=packed)


@functools.cache
def trained(packed):
    return train(pruning(packed))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("shape", [(64, 48), (3, 3, 32, 8), (96,), (5, 64), (2, 32, 1)])
def test_what_is_packed_comes_back(shape):
    mask = {"a": jnp.asarray(RNG.random(shape) < 0.5), "b": optax.MaskedNode()}
    packed = packing.pack(mask)
    assert packed["a"].words.nbytes == mask["a"].nbytes / 8
    assert packed["b"] == mask["b"]
    assert_same(packing.unpack(packed), mask)
    assert packed["a"].words.dtype == jnp.uint32


def test_bits_are_in_their_order_along_the_axis():
    mask = np.zeros((64, 3), bool)
    mask[33, 2] = mask[31, 0] = True
    (packed,) = packing.pack([jnp.asarray(mask)])
    assert packed.axis == -2
    assert packed.words.tolist() == [[2**31, 0, 0], [0, 0, 2]]


def test_a_tensor_without_a_fitting_axis_stays_as_it_is():
    masks = {"kernel": jnp.ones((33, 7), bool), "none": jnp.ones((0, 4), bool)}
    assert packing.pack(masks) is not None
    assert not packing.has_packed(packing.pack(masks))


@pytest.mark.parametrize(
    "shape, axis", [((64, 32), -2), ((32, 64, 5), -2), ((7, 32), -1), ((64, 9, 3), -3)]
)
def test_the_last_axis_of_all_is_packed_only_if_no_other_fits(shape, axis):
    assert packing.pack(jnp.ones(shape, bool)).axis == axis


def test_only_masks_take_less():
    (_, plain), (_, packed) = trained(False), trained(True)
    masks = jax.tree.leaves(packed.masks, is_leaf=packing.is_packed)
    axes = [getattr(mask, "axis", None) for mask in masks]
    assert axes == [-2, -2, None, -3, -1]
    size = sum(x.nbytes for x in jax.tree.leaves(packed.masks))
    shapes = [(64, 48), (3, 3, 32, 8), (32, 5, 7), (5, 96)]
    assert size == sum(np.prod(shape) for shape in shapes) / 8 + 33 * 7
    plain, packed = (s._replace(masks=()) for s in (plain, packed))
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, packed)


CASES = {
    "movement": {},
    "magnitude, in a chain": {"criterion": mj.Magnitude(), "inner": None},
    "regrow": {"regrow": True},
    "global": {"allocation": mj.Global()},
    "blocks": {"structure": mj.Block((4, 4))},
    "N:M": {"structure": {"dense": mj.NM(2, 4)}, "sparsity": mj.cubic(0.5, 2, 12)},
    "soft": {"criterion": mj.SoftMovement(0.5), "sparsity": None, "regrow": True},
    "exchanging": {
        "criterion": mj.RigL(end=14, every=3),
        "sparsity": 0.6,
    },
    "tracked": {"track_start": True, "track_noise": True},
}


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_bit_for_bit(name):
    plain, packed = (train(pruning(p, **CASES[name])) for p in (False, True))
    assert packing.has_packed(packed[1].masks)
    assert 0.1 < mj.sparsity_of(plain) < 0.9
    assert_same(plain[0], packed[0])
    assert_same(plain[1], mj.find_state(packed[1]))


def test_pruning_by_hand_and_reports_are_the_same():
    plain, packed = (train(pruning(p, sparsity=None)) for p in (False, True))
    for sparsity in (0.3, 0.7):
        plain, packed = (jax.jit(mj.prune)(s, sparsity) for s in (plain, packed))
        assert packing.has_packed(packed[1].masks)
        assert_same(plain[1], mj.find_state(packed[1]))
        assert str(mj.summary(plain)) == str(mj.summary(packed))
    assert str(mj.health(plain)) == str(mj.health(packed))
    reports = [str(mj.agreement(s, mj.Magnitude(), 0.7)) for s in (plain, packed)]
    assert reports[0] == reports[1]
    assert mj.sparsity_of(packed) == mj.sparsity_of(plain)
    assert_same(mj.finalize(plain)[0], mj.finalize(packed)[0])
    params, state = mj.finalize(packed)
    updates, after = pruning(True, sparsity=None).update(params, state, params)
    assert packing.has_packed(after.masks)
    assert_same(after.masks, packed[1].masks)
    updated = optax.apply_updates(params, updates)
    assert_same(mj.apply_masks(updated, mj.find_state(after).masks), updated)


def test_checkpoints_hold_the_words(tmp_path):
    params, state = trained(True)
    mj.checkpoint.save(tmp_path / "run", 16, (params, state))
    like = (PARAMS, pruning(True).init(PARAMS))
    restored = mj.checkpoint.restore(tmp_path / "run", like=like)
    assert_same(restored, (params, state))
    with pytest.raises(mj.CheckpointError, match="masks"):
        plain = (PARAMS, pruning(False).init(PARAMS))
        mj.checkpoint.restore(tmp_path / "run", like=plain)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_words_are_sharded_as_the_weights_are(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    spec = {"kernel": P("x", "y")}
    params = {"kernel": jnp.asarray(RNG.normal(size=(128, 16)), jnp.float32)}
    placed = jax.device_put(
        params, jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
    )
    tx = pruning(True)
    want, state = train(tx, params=params)
    with jax.set_mesh(mesh):
        got, sharded = train(tx, params=placed)
    np.testing.assert_allclose(want["kernel"], got["kernel"], rtol=1e-3, atol=1e-6)
    assert_same(state.masks, sharded.masks)
    words = sharded.masks["kernel"].words
    assert words.shape == (4, 16)
    assert {s.data.shape for s in words.addressable_shards} == {(2, 4)}


def test_devices_that_each_hold_a_part_make_the_masks_of_one():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    params = {"kernel": jnp.asarray(RNG.normal(size=(128, 16)), jnp.float32)}
    options = {"sparsity": 0.7, "criterion": mj.Magnitude()}
    whole = pruning(True, **options)
    parts = pruning(True, **options, axis_name="x")

    def step(tx, params):
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state.masks

    split = jax.shard_map(
        lambda p: step(parts, p), mesh=mesh, in_specs=P("x"), out_specs=P("x")
    )
    assert_same(step(whole, params), jax.jit(split)(params))


def test_members_of_an_ensemble_have_their_own_words():
    params = {"kernel": jnp.asarray(RNG.normal(size=(3, 64, 8)), jnp.float32)}
    tx = pruning(True, sparsity=0.5, criterion=mj.Magnitude())
    state = jax.vmap(tx.init)(params)
    _, state = jax.vmap(tx.update)(params, state, params)
    assert state.masks["kernel"].words.shape == (3, 2, 8)
    for i in range(3):
        one = {"kernel": params["kernel"][i]}
        _, want = tx.update(one, tx.init(one), one)
        got = state.masks["kernel"].words[i]
        np.testing.assert_array_equal(got, want.masks["kernel"].words)


def test_a_step_that_does_not_prune_leaves_the_words_where_they_are():
    tx = pruning(True)
    state = tx.init(PARAMS)
    step = jax.jit(tx.update, donate_argnums=1).lower(PARAMS, state, PARAMS).compile()
    memory = step.memory_analysis()
    sizes = sum(x.nbytes for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= sizes - 64  # scalars may not be


def test_a_cut_state_is_packed_anew():
    def model(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]

    params = {
        "a": {"kernel": jnp.asarray(RNG.normal(size=(32, 64)), jnp.float32)},
        "b": {"kernel": jnp.asarray(RNG.normal(size=(64, 3)), jnp.float32)},
    }
    groups = shrink.find_groups(model, params, jnp.ones((2, 32)))
    plan = groups.plan({"a/kernel:1": np.arange(64) < 40})
    states = []
    for packed in (False, True):
        tx = pruning(packed, sparsity=0.5, criterion=mj.Magnitude())
        _, state = tx.update(params, tx.init(params), params)
        states.append(plan.shrink_like(optax.chain(tx).init(params)[:0] + (state,)))
    plain, cut = (mj.find_state(state) for state in states)
    assert_same(plain, cut)
    masks = states[1][0].masks
    assert masks["a"]["kernel"].words.shape == (1, 40)
    assert masks["b"]["kernel"].shape == (40, 3)  # 32 does not divide 40


def test_other_wrappers_keep_the_words():
    tx = optax.apply_if_finite(pruning(True, check_finite=False), 3)
    params, state = PARAMS, tx.init(PARAMS)
    _, bad = tx.update(jax.tree.map(lambda x: x * jnp.nan, PARAMS), state, params)
    assert_same(bad.inner_state.masks, state.inner_state.masks)
    assert packing.has_packed(bad.inner_state.masks)
    assert dataclasses.is_dataclass(bad.inner_state.masks["dense"]["kernel"])
