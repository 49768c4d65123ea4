"""On eight devices masks are those of one device, and stay where the params are."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import movement_jax as mj

P = PartitionSpec
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
# Name: layout of the plain kernel (16, 32), of the stacked one (8, 4, 24).
LAYOUTS = {
    "rows": (P("x"), P(None, "x")),
    "columns": (P(None, "y"), P(None, None, "y")),
    "both": (P("x", "y"), P(None, "x", "y")),
    "replicated": (P(), P()),
    "layers": (P("x"), P("x", None, "y")),
    "layers on all": (P(None, ("x", "y")), P(("x", "y"))),
}
CRITERIA = {
    "ema": mj.EmaMagnitude(half_life=3),
    "magnitude": mj.Magnitude(),
    "movement": mj.Movement(),
    "taylor": mj.Taylor(),
    "random": mj.Random(3),
    "peak": mj.PeakMagnitude(half_life=3),
    "confidence": mj.UpperConfidence(half_life=3),
    "dormancy": mj.Dormancy(0.5, half_life=3),
    "sensitivity": mj.Sensitivity(),
    "fisher": mj.Fisher(),
    "rigl": mj.RigL(end=9, every=2, drop_fraction=0.5, seed=1),
    "set": mj.SET(end=None, every=2, drop_fraction=0.5),
    "soft": mj.SoftMovement(target_sparsity=mj.cubic(0.8, begin=1, end=3)),
}
SIZES = [16 * 32, *8 * [4 * 24]]  # of what is ranked: the kernel, then each layer
SMALL = 4096  # bytes; counts are smaller, tensors larger

needs_eight = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (see conftest.py)"
)
pytestmark = needs_eight


def weights(ties=True):
    """Weights of few distinct values, so that ties cross the devices."""
    rng = np.random.default_rng(0)
    draw = {"a": rng.normal(size=(16, 32)), "blocks": rng.normal(size=(8, 4, 24))}
    if ties:
        draw = {name: np.round(value, 1) + 0.05 for name, value in draw.items()}
    params = {k: {"kernel": v.astype(np.float32)} for k, v in draw.items()}
    params["a"]["bias"] = np.ones(32, np.float32)
    return params


def mesh_of(mode):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(MODES[mode],) * 2)


def shardings_of(mesh, layout):
    plain, stacked = (NamedSharding(mesh, spec) for spec in LAYOUTS[layout])
    return {
        "a": {"kernel": plain, "bias": NamedSharding(mesh, P())},
        "blocks": {"kernel": stacked},
    }


def on_mesh(mode, layout, ties=True):
    return jax.device_put(weights(ties), shardings_of(mesh_of(mode), layout))


def masks_of(opt_state):
    masks = mj.find_state(opt_state).masks
    return [np.asarray(masks[name]["kernel"]) for name in ("a", "blocks")]


def segments(tree):
    return [tree["a"]["kernel"], *tree["blocks"]["kernel"]]


def lowest(scores, n_drop):
    """True where kept; of equal scores the lower flat index is."""
    order = np.argsort(-scores, axis=None, kind="stable")
    mask = np.ones(scores.size, bool)
    mask[order[scores.size - n_drop :]] = False
    return mask.reshape(scores.shape)


def prune_by_numpy(params, sparsity, together):
    """Masks by a sort, for every segment or for all of them together."""
    scores = [np.abs(x) for x in segments(params)]
    if together:
        flat = np.concatenate([x.ravel() for x in scores])
        flat = lowest(flat, round(sparsity * flat.size))
        parts = np.split(flat, np.cumsum(SIZES)[:-1])
        masks = [m.reshape(x.shape) for m, x in zip(parts, scores)]
    else:
        masks = [lowest(x, round(sparsity * x.size)) for x in scores]
    return [masks[0], np.stack(masks[1:])]


def assert_same_layout(tree, template):
    """Every array lies, and says it lies, as its counterpart does."""
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(template)):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
        assert jax.typeof(got).sharding.spec == jax.typeof(want).sharding.spec


def kernels(params):
    return {"a": {"kernel": params["a"]["kernel"]}, "blocks": params["blocks"]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_one_threshold_over_all_tensors_is_that_of_a_sort(mode, layout):
    tx = mj.movement_pruning(
        None, mj.Magnitude(), allocation=mj.Global(), stacked="blocks"
    )
    params = on_mesh(mode, layout)
    pruned, opt_state = jax.jit(mj.prune)((params, tx.init(params)), 0.8)
    want = prune_by_numpy(weights(), 0.8, together=True)
    for got, mask in zip(masks_of(opt_state), want):
        np.testing.assert_array_equal(got, mask)
    assert_same_layout(pruned, params)
    assert_same_layout(mj.find_state(opt_state).masks, kernels(params))


@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_for_every_tensor_and_layer_is_that_of_a_sort(mode):
    tx = mj.movement_pruning(None, mj.Magnitude(), stacked="blocks")
    params = on_mesh(mode, "layers")
    _, opt_state = jax.jit(mj.prune)((params, tx.init(params)), 0.7)
    want = prune_by_numpy(weights(), 0.7, together=False)
    for got, mask in zip(masks_of(opt_state), want):
        np.testing.assert_array_equal(got, mask)


@pytest.mark.parametrize("mode", MODES)
def test_pruning_works_without_jit(mode):
    tx = mj.movement_pruning(None, mj.Magnitude(), stacked="blocks")
    params = on_mesh(mode, "layers")
    pruned, opt_state = mj.prune((params, tx.init(params)), 0.7)
    want = prune_by_numpy(weights(), 0.7, together=False)
    for got, mask in zip(masks_of(opt_state), want):
        np.testing.assert_array_equal(got, mask)
    assert_same_layout(pruned, params)


@pytest.mark.parametrize(
    "allocation", [mj.ErdosRenyi(), mj.PerPath({"blocks": 0.5})], ids=repr
)
def test_every_allocation_gives_the_masks_of_one_device(allocation):
    tx = mj.movement_pruning(
        None, mj.Magnitude(), allocation=allocation, stacked="blocks"
    )
    got, want = [
        masks_of(jax.jit(mj.prune)((params, tx.init(params)), 0.8)[1])
        for params in (on_mesh("explicit", "layers"), weights())
    ]
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_thresholds_of_layers_are_those_of_one_device(mode):
    rng = np.random.default_rng(0)
    specs = {
        "blocks/up": ((8, 4, 24), P("x", None, "y")),
        "blocks/down": ((8, 24, 4), P(None, "x", "y")),
        "layer_0/up": ((16, 32), P("x", "y")),
        "layer_0/down": ((16, 8), P(("x", "y"))),
        "head": ((16, 4), P()),
    }
    params = {
        name: {"kernel": np.round(rng.normal(size=shape), 1).astype(np.float32)}
        for name, (shape, _) in specs.items()
    }
    mesh = mesh_of(mode)
    layout = {
        k: {"kernel": NamedSharding(mesh, spec)} for k, (_, spec) in specs.items()
    }
    spread = jax.device_put(params, layout)
    tx = mj.movement_pruning(
        mj.cubic(0.6, 0, 1),
        mj.Magnitude(),
        allocation=mj.Global(per=r"blocks/|layer_\d+"),
        stacked="blocks",
    )

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(grads, state, params)
        return mj.prune((optax.apply_updates(params, updates), state), 0.8)

    got, state = step(spread, tx.init(spread))
    want, whole = step(params, tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(
        mj.find_state(state).thresholds, mj.find_state(whole).thresholds
    )
    assert_same_layout(got, spread)
    up, down = (np.asarray(got[f"blocks/{k}"]["kernel"]) for k in ("up", "down"))
    for i in range(8):
        assert (up[i] == 0).sum() + (down[i] == 0).sum() == round(0.8 * 192)


def train(params, criterion):
    """Three steps of a rising schedule; the state before and after."""
    adaptive = criterion == "fisher"
    tx = mj.movement_pruning(
        None if criterion == "soft" else mj.cubic(0.8, begin=1, end=3),
        CRITERIA[criterion],
        inner=optax.rmsprop(1e-3) if adaptive else optax.sgd(0.1, momentum=0.9),
        stacked="blocks",
        regrow=criterion in ("movement", "soft"),
    )

    @jax.jit
    def step(params, opt_state):
        grads = jax.tree.map(lambda p: 0.3 * p - 0.1 * jnp.sin(9 * p), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    first = params, opt_state = params, tx.init(params)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    return first, (params, opt_state)


@functools.cache
def masks_on_one_device(criterion):
    params = jax.tree.map(jnp.asarray, weights(ties=False))
    return masks_of(train(params, criterion)[1][1])


@pytest.mark.parametrize(
    "mode, criterion",
    [("explicit, set", criterion) for criterion in CRITERIA]
    + [("explicit", "random"), ("auto", "random"), ("auto", "ema")],
)
def test_training_gives_the_masks_of_one_device_and_keeps_the_layout(mode, criterion):
    mode, _, entered = mode.partition(", ")
    context = jax.set_mesh(mesh_of(mode)) if entered else contextlib.nullcontext()
    with context:
        params = on_mesh(mode, "layers", ties=False)
        (_, opt_state), (new_params, new_opt_state) = train(params, criterion)
    for got, want in zip(masks_of(new_opt_state), masks_on_one_device(criterion)):
        np.testing.assert_array_equal(got, want)
    assert_same_layout(new_params, params)
    assert_same_layout(mj.find_state(new_opt_state).masks, kernels(params))
    for got, want in zip(jax.tree.leaves(new_opt_state), jax.tree.leaves(opt_state)):
        if entered or got.ndim > 1:  # outside of a mesh what is new belongs to none
            assert jax.typeof(got) == jax.typeof(want)


def opt_state_shardings(tx, params, mesh, shardings):
    """The recipe of the documentation: arrays like params lie as they do."""
    return optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def test_the_recipe_for_out_shardings_lays_out_a_jitted_init():
    mesh, params = mesh_of("auto"), on_mesh("auto", "both")
    shardings = shardings_of(mesh, "both")
    tx = optax.chain(optax.adamw(1e-2), mj.movement_pruning(stacked="blocks"))
    out = opt_state_shardings(tx, params, mesh, shardings)
    opt_state = jax.jit(tx.init, out_shardings=out)(params)
    state = mj.find_state(opt_state)
    assert_same_layout(state.masks, kernels(params))
    assert_same_layout(state.scores, kernels(params))
    assert_same_layout(optax.tree_utils.tree_get(opt_state, "mu"), params)


def test_a_train_step_with_out_shardings_keeps_the_layout():
    mesh, params = mesh_of("auto"), on_mesh("auto", "both")
    shardings = shardings_of(mesh, "both")
    schedule = mj.cubic(0.8, begin=1, end=2)
    tx = optax.chain(optax.adamw(1e-2), mj.movement_pruning(schedule, stacked="blocks"))
    out = shardings, opt_state_shardings(tx, params, mesh, shardings)

    @functools.partial(jax.jit, out_shardings=out, donate_argnums=(0, 1))
    def step(params, opt_state):
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(tx.init, out_shardings=out[1])(params)
    template = on_mesh("auto", "both")
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    assert step._cache_size() == 1
    assert_same_layout(params, template)
    assert_same_layout(mj.find_state(opt_state).scores, kernels(template))
    assert_same_layout(mj.find_state(opt_state).masks, kernels(template))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("allocation", [mj.Uniform(), mj.Global()], ids=repr)
def test_a_mask_change_moves_counts_between_devices_and_sorts_nothing(mode, allocation):
    mesh = mesh_of(mode)
    shardings = {
        "a": {"kernel": NamedSharding(mesh, P("x", "y"))},
        "blocks": {"kernel": NamedSharding(mesh, P("x", None, "y"))},
    }
    shapes = {"a": {"kernel": (512, 512)}, "blocks": {"kernel": (8, 128, 128)}}
    params = jax.tree.map(
        lambda shape, sharding: jax.device_put(jnp.ones(shape), sharding),
        shapes,
        shardings,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    tx = mj.movement_pruning(allocation=allocation, stacked="blocks")
    opt_state = tx.init(params)
    text = jax.jit(mj.prune).lower((params, opt_state), 0.8).compile().as_text()
    assert re.search(r" all-(reduce|gather)\(", text)  # of counts
    assert not re.search(r"= [^=]* sort\(", text)
    moved = r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\("
    for shape in re.findall(moved, text):
        assert _bytes(shape) <= SMALL, shape


def _bytes(shapes):
    found = re.findall(r"(pred|[a-z]+(\d+))\[([\d,]*)\]", shapes)
    return sum(
        int(bits or 8) // 8 * np.prod([int(d) for d in dims.split(",") if d], dtype=int)
        for _, bits, dims in found
    )
