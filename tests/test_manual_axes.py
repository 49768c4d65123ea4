"""Pruning inside ``shard_map`` and ``pmap``, where every device sees its own part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import movement_jax as mj

P = PartitionSpec
STEPS = 6
DEVICES = 2  # more take longer to meet than to count
pytestmark = pytest.mark.skipif(len(jax.devices()) < DEVICES, reason="needs devices")
RNG = np.random.default_rng(0)
PARAMS = {  # rounded, so that many scores are tied
    "split": {"kernel": np.round(RNG.normal(size=(64, 6)), 1).astype(np.float32)},
    "whole": {"kernel": np.round(RNG.normal(size=(5, 7)), 1).astype(np.float32)},
}
SPECS = {"split": {"kernel": P("x", None)}, "whole": {"kernel": P()}}
FORMS = {
    "uniform": (mj.Uniform(), False),
    "global": (mj.Global(), False),
    "global, regrow": (mj.Global(), True),
    "global, per layer": (mj.Global(per="split"), False),
    "per path, regrow": (mj.PerPath({"split": 0.9}), True),
}


def make_mesh():
    kinds, devices = (jax.sharding.AxisType.Auto,), jax.devices()[:DEVICES]
    return jax.make_mesh((DEVICES,), ("x",), axis_types=kinds, devices=devices)


def make(allocation=FORMS["uniform"][0], regrow=False, **options):
    if regrow:
        inner = optax.adam(1e-3)
        return mj.movement_pruning(
            mj.cubic(0.7, 1, 4),
            mj.Taylor(),
            allocation=allocation,
            inner=inner,
            regrow=True,
            **options,
        )
    tx = mj.movement_pruning(
        mj.cubic(0.7, 1, 4), mj.Magnitude(), allocation=allocation, **options
    )
    return optax.chain(optax.sgd(0.01), tx)


def step(tx, params, opt_state):
    grads = jax.tree.map(lambda p: jnp.round(p, 1), params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train(tx, params, opt_state):
    def body(state, _):
        return step(tx, *state), None

    return jax.lax.scan(body, (params, opt_state), length=STEPS)[0]


def train_whole(tx):
    params = jax.tree.map(jnp.asarray, PARAMS)
    return jax.jit(functools.partial(train, tx))(params, tx.init(params))


def specs_of(opt_state, specs):
    """A spec for every leaf: that of the params for what is like params."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        split = "split" in name and "kernel" in name and np.ndim(leaf) == 2
        return specs["split"]["kernel"] if split else P()

    return jax.tree_util.tree_map_with_path(one, opt_state)


def train_split(tx, specs=SPECS, **options):
    mesh = make_mesh()
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = params, tx.init(params)
    layout = specs, specs_of(state[1], specs)
    state = jax.device_put(
        state, jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout)
    )
    mapped = jax.shard_map(
        functools.partial(train, tx),
        mesh=mesh,
        in_specs=layout,
        out_specs=layout,
        **options,
    )
    return jax.jit(mapped)(*state)


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("allocation, regrow", FORMS.values(), ids=FORMS)
def test_parts_on_several_devices_are_ranked_as_one(allocation, regrow):
    expected = train_whole(make(allocation, regrow))
    got = train_split(make(allocation, regrow, axis_name="x"))
    masks = mj.find_state(got[1]).masks
    assert_equal(masks, mj.find_state(expected[1]).masks)
    assert_equal(mj.find_state(got[1]).events, mj.find_state(expected[1]).events)
    assert not np.asarray(masks["split"]["kernel"]).all()


def test_without_the_axis_name_every_device_would_rank_its_own_part():
    expected = train_whole(make())
    got = train_split(make(), check_vma=False)
    a, b = (mj.find_state(s[1]).masks["split"]["kernel"] for s in (got, expected))
    assert not np.array_equal(a, b)


def test_counts_are_exact_when_another_axis_is_split():
    specs = {"split": {"kernel": P(None, "x")}, "whole": {"kernel": P()}}
    tall = {"kernel": PARAMS["split"]["kernel"].T.copy().repeat(8, 0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PARAMS, "split", tall)
        _, opt_state = train_split(make(axis_name="x"), specs)
    mask = np.asarray(mj.find_state(opt_state).masks["split"]["kernel"])
    assert (~mask).sum() == round(0.7 * mask.size)


def test_without_checks_of_shard_map_all_params_count_as_split():
    specs = {"split": {"kernel": P("x", None)}, "whole": {"kernel": P("x", None)}}
    whole = {"kernel": np.round(RNG.normal(size=(16, 4)), 1).astype(np.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PARAMS, "whole", whole)
        patch.setitem(globals(), "specs_of", lambda state, _: all_split(state))
        got = train_split(make(axis_name="x"), specs, check_vma=False)
        expected = train_whole(make())
    assert_equal(mj.find_state(got[1]).masks, mj.find_state(expected[1]).masks)


def all_split(opt_state):
    return jax.tree.map(lambda x: P("x", None) if np.ndim(x) == 2 else P(), opt_state)


def test_a_bad_value_on_one_device_skips_the_step_on_all():
    tx = make(axis_name="x")
    mesh = make_mesh()
    params = jax.tree.map(jnp.asarray, PARAMS)
    opt_state = tx.init(params)
    layout = specs_of(opt_state, SPECS)
    broken = jax.tree.map(jnp.ones_like, params)
    broken["split"]["kernel"] = broken["split"]["kernel"].at[0, 0].set(jnp.nan)
    update = jax.shard_map(
        tx.update,
        mesh=mesh,
        in_specs=(SPECS, layout, SPECS),
        out_specs=(SPECS, layout),
    )
    _, after = jax.jit(update)(broken, opt_state, params)
    found = mj.find_state(after)
    assert (found.step, found.events.skipped) == (0, 1)


def test_pmap_with_parts_stacked_along_its_axis():
    tx = make(axis_name="x")
    kernel = PARAMS["split"]["kernel"].reshape(DEVICES, -1, 6)
    params = {"kernel": jnp.asarray(kernel)}

    def masks_of(params):
        return mj.find_state(train(tx, params, tx.init(params))[1]).masks

    got = jax.pmap(masks_of, "x", devices=jax.devices()[:DEVICES])(params)["kernel"]
    expected = mj.find_state(train_whole(make())[1]).masks["split"]["kernel"]
    np.testing.assert_array_equal(np.asarray(got).reshape(64, 6), expected)


def test_what_reads_whole_shapes_is_refused():
    with pytest.raises(
        ValueError, match="reads the shapes of whole .*`axis_name` splits"
    ):
        train_split(make(mj.ErdosRenyi(), axis_name="x"))


def test_noise_cannot_be_tracked_over_parts():
    with pytest.raises(ValueError, match="`track_noise` averages over .* or `jit`"):
        make(axis_name="x", track_noise=True)
