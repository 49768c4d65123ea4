"""What a structure keeps and drops, against NumPy and by hand."""

import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from budget import examples
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import movement_jax as mj
from movement_jax import grouping
from movement_jax.allocation import window_drop
from movement_jax.counting import Tensor
from movement_jax.schedules import Target
from movement_jax.structure import groups_of

P = PartitionSpec
# Path: shape, and the size of a group of it under each structure.
SHAPES = {
    "attention/query/kernel": (10, 4, 6),
    "conv/kernel": (3, 3, 6, 9),
    "dense/kernel": (12, 16),
}
GROUPINGS = {
    "blocks": (
        mj.Block((4, 4)),
        {"attention": (1, 4, 4), "conv": (1, 1, 4, 4), "dense": (4, 4)},
    ),
    "sums of blocks": (
        mj.Block((5, 7), "sum"),
        {"attention": (1, 4, 6), "conv": (1, 1, 5, 7), "dense": (5, 7)},
    ),
    "runs": (
        mj.Block((5,)),
        {"attention": (1, 1, 5), "conv": (1, 1, 1, 5), "dense": (1, 5)},
    ),
    "columns": (
        mj.Axis(-1),
        {"attention": (10, 4, 1), "conv": (3, 3, 6, 1), "dense": (12, 1)},
    ),
    "rows": (
        mj.Axis(-2, "sum"),
        {"attention": (10, 1, 6), "conv": (3, 3, 1, 9), "dense": (1, 16)},
    ),
    "pairs": (
        mj.Axis((0, 1)),
        {"attention": (1, 1, 6), "conv": (1, 1, 6, 9), "dense": (1, 1)},
    ),
    "single": (
        mj.Unstructured(),
        {"attention": (1, 1, 1), "conv": (1, 1, 1, 1), "dense": (1, 1)},
    ),
}
WINDOWS = {"attention": 0, "conv": 2, "dense": 0}  # axes summed over


def nested(flat):
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def kernels(tree):
    return dict(zip(SHAPES, jax.tree.leaves(tree)))


def draw(seed=0, shapes=SHAPES, round_to=None):
    rng = np.random.default_rng(seed)
    flat = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    if round_to is not None:  # exact in binary, so that sums of them tie
        flat = {k: np.round(v * round_to) / round_to for k, v in flat.items()}
    return flat


def group_scores(x, block, reduce):
    """By NumPy in float64; a partial block is the mean of what there is of it."""
    sums, counts = np.abs(x.astype(np.float64)), np.ones(x.shape)
    for axis, b in enumerate(block):
        starts = np.arange(0, x.shape[axis], b)
        sums = np.add.reduceat(sums, starts, axis)
        counts = np.add.reduceat(counts, starts, axis)
    return (sums / counts if reduce == "mean" else sums).astype(np.float32)


def lowest(scores, n_drop):
    """True where kept; of equal scores the lower flat index is."""
    order = np.argsort(-scores, axis=None, kind="stable")
    mask = np.ones(scores.size, bool)
    mask[order[scores.size - n_drop :]] = False
    return mask.reshape(scores.shape)


def spread(mask, block, shape):
    for axis, b in enumerate(block):
        mask = np.repeat(mask, b, axis)
    return mask[tuple(slice(d) for d in shape)]


def windows(x, axis, m, n_drop):
    """True where kept, one window after the other."""
    keep = np.zeros(x.shape, bool)
    for line in itertools.product(
        *(range(d) for i, d in enumerate(x.shape) if i != axis)
    ):
        values = x[line[:axis] + (slice(None),) + line[axis:]]
        for start in range(0, len(values), m):
            some = range(start, min(start + m, len(values)))
            best = sorted(some, key=lambda i: (not np.isnan(values[i]), -values[i], i))
            for i in best[: max(m - n_drop, 0)]:
                keep[line[:axis] + (i,) + line[axis:]] = True
    return keep


UNIFORM = mj.Uniform()


def prune(flat, sparsity, structure, allocation=UNIFORM, **options):
    params = jax.tree.map(jnp.asarray, nested(flat))
    tx = mj.movement_pruning(
        criterion=mj.Magnitude(), structure=structure, allocation=allocation, **options
    )
    return jax.jit(mj.prune, static_argnums=1)((params, tx.init(params)), sparsity)


def masks_of(state):
    found = mj.find_state(state[1])
    return {k: np.asarray(v) for k, v in kernels(found.masks).items()}


@pytest.mark.parametrize("name", GROUPINGS)
def test_the_lowest_groups_are_dropped_whole(name):
    structure, blocks = GROUPINGS[name]
    flat = draw(round_to=2)
    got = masks_of(prune(flat, 0.4, structure))
    for path, x in flat.items():
        block = blocks[path.split("/")[0]]
        scores = group_scores(x, block, structure.reduce)
        want = spread(lowest(scores, round(0.4 * scores.size)), block, x.shape)
        np.testing.assert_array_equal(got[path], want, err_msg=path)


@pytest.mark.parametrize("structure", [mj.NM(2, 4), mj.NM(1, 5)], ids=repr)
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_the_lowest_of_every_window_are_dropped(structure, sparsity):
    flat = draw(round_to=2)
    got = masks_of(prune(flat, sparsity, structure))
    for path, x in flat.items():
        axis, m = WINDOWS[path.split("/")[0]], structure.m
        want = windows(np.abs(x), axis, m, round(sparsity * m))
        np.testing.assert_array_equal(got[path], want, err_msg=path)


@pytest.mark.parametrize(
    "structure, block",
    [(mj.Block((3, 2)), (3, 2)), (mj.Axis(0), (1, 7)), (mj.Axis(-1), (5, 1))],
    ids=repr,
)
def test_layers_of_a_stack_are_ranked_each_by_itself(structure, block):
    x = draw(shapes={"layers/kernel": (3, 5, 7)})["layers/kernel"]
    x *= np.array([1, 10, 100], np.float32)[:, None, None]
    _, state = prune({"layers/kernel": x}, 0.5, structure, stacked="layers")
    got = mj.find_state(state).masks["layers"]["kernel"]
    for layer, mask in zip(x, got):
        scores = group_scores(layer, block, structure.reduce)
        want = spread(lowest(scores, round(scores.size / 2)), block, layer.shape)
        np.testing.assert_array_equal(mask, want)


def test_windows_of_a_stack_never_lie_along_the_layers():
    shapes = {"layers/query/kernel": (4, 6, 2, 3), "layers/out/kernel": (4, 2, 6, 3)}
    flat = draw(shapes=shapes)
    _, state = prune(flat, 0.5, mj.NM(1, 2), stacked="layers")
    masks = mj.find_state(state).masks["layers"]
    for name, axis in (("query", 1), ("out", 2)):
        x = np.abs(flat[f"layers/{name}/kernel"])
        want = windows(x, axis, 2, 1)
        np.testing.assert_array_equal(masks[name]["kernel"], want)


SCORES = st.sampled_from(
    [0.0, -0.0, 1e-40, -1e-40, 0.5, 1.0, 1.0, -1.0, 3.0]
    + [math.nan, math.inf, -math.inf, 3e38, 2e-38]
)


@functools.partial(jax.jit, static_argnums=(1, 2))
def keep_in_windows(x, axis, m, n_drop, kept):
    return grouping.keep_in_windows(x, axis, m, n_drop, kept)


@settings(max_examples=examples(80))
@given(
    st.lists(SCORES, min_size=42, max_size=42),
    st.sampled_from([(0, 4), (1, 4), (1, 3), (0, 10)]),
    st.integers(0, 4),
    st.lists(st.booleans(), min_size=42, max_size=42),
)
def test_windows_rank_as_everything_ranks(values, how, n_drop, kept):
    axis, m = how
    x = np.array(values, np.float32).reshape(6, 7)
    flushed = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    got = keep_in_windows(jnp.asarray(x), axis, m, n_drop, None)
    np.testing.assert_array_equal(got, windows(flushed, axis, m, n_drop))
    # What is dropped already ranks below everything, also below -inf.
    kept = np.array(kept).reshape(6, 7)
    got = keep_in_windows(jnp.asarray(x), axis, m, n_drop, jnp.asarray(kept))
    rank = {v: i for i, v in enumerate([-math.inf, -1, 0, 2e-38, 0.5, 1, 3, 3e38])}
    rank = {np.float32(v): i for v, i in rank.items()} | {np.float32(math.inf): 8}
    level = [9.0 if np.isnan(v) else rank[np.float32(v)] for v in flushed.ravel()]
    level = np.where(kept, np.reshape(level, x.shape), -1.0)
    np.testing.assert_array_equal(got, windows(level, axis, m, n_drop))


def test_single_weights_are_no_groups_and_are_not_copied():
    x = jnp.ones((3, 4))
    assert grouping.group_scores(x, (1, 1), "mean") is x
    assert grouping.group_any(x, (1, 1)) is x
    assert grouping.spread(x, (1, 1), x) is x


MAGNITUDES = st.floats(-38, 37).map(lambda e: float(np.float32(10.0**e)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def scores_of(x, block, reduce):
    return grouping.group_scores(x, block, reduce)


@settings(max_examples=examples(80))
@given(
    st.one_of(
        st.lists(MAGNITUDES, min_size=12, max_size=12),
        st.lists(st.floats(0.5, 2), min_size=12, max_size=12),
        st.floats(1e-37, 1e37).map(lambda v: [v] * 12),
    ),
    st.lists(st.sampled_from([-1, 1]), min_size=12, max_size=12),
    st.permutations(range(12)),
)
def test_a_sum_is_accurate_and_the_same_bits_in_any_order(values, signs, order):
    x = np.array(values, np.float32) * np.array(signs, np.float32)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    for reduce in ("sum", "mean"):
        got = scores_of(jnp.asarray(x)[None], (1, 12), reduce)
        shuffled = scores_of(jnp.asarray(x[order])[None], (1, 12), reduce)
        assert np.asarray(got).tobytes() == np.asarray(shuffled).tobytes()
        exact = math.fsum(map(float, x)) / (12 if reduce == "mean" else 1)
        bound = 2.0**-22 * abs(exact) + 2.0**-40 * np.abs(x).max() + 2e-38
        assert abs(float(got[0, 0]) - exact) <= bound


def test_a_mean_of_the_largest_floats_does_not_overflow():
    x = jnp.full((2, 64), jnp.finfo(jnp.float32).max)
    np.testing.assert_allclose(scores_of(x, (2, 64), "mean"), x[:1, :1], rtol=1e-6)
    assert scores_of(x, (2, 64), "sum") == jnp.inf


def test_groups_of_many_members_are_summed_to_the_last_bits():
    x = np.random.default_rng(0).normal(size=(1, 2**17)).astype(np.float32)
    got = float(scores_of(jnp.asarray(x), x.shape, "sum")[0, 0])
    np.testing.assert_allclose(got, math.fsum(map(float, x[0])), rtol=1e-6)


@pytest.mark.parametrize(
    "members, want",
    [
        ([math.nan, 1], math.nan),
        ([math.inf, 1], math.inf),
        ([-math.inf, 1], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([1e-40, -1e-40], 0),
    ],
)
def test_what_is_no_number_stays_in_its_group(members, want):
    x = jnp.array([members, [2.0, 4.0]], jnp.float32)
    got = scores_of(x, (1, 2), "mean")
    np.testing.assert_array_equal(got, [[want], [3]])


def test_a_group_with_a_nan_is_kept():
    x = np.ones((4, 4), np.float32)
    x[2:, :2] = [[np.nan, 1e-3], [1e-3, 1e-3]]
    _, state = prune({"kernel": x}, 0.75, mj.Block((2, 2)))
    want = spread(np.array([[False, False], [True, False]]), (2, 2), x.shape)
    np.testing.assert_array_equal(mj.find_state(state).masks["kernel"], want)


def test_blocks_of_one_are_single_weights():
    flat = draw(round_to=2)
    _, want = prune(flat, 0.7, mj.Unstructured(), mj.Global())
    _, got = prune(flat, 0.7, mj.Block((1, 1)), mj.Global())
    jax.tree.map(np.testing.assert_array_equal, got.masks, want.masks)


MIXED = {
    "attention": mj.Axis(1),
    "conv": mj.Block((4, 4)),
    ".": mj.Unstructured(),
}
MIXED_BLOCKS = {"attention": (10, 1, 6), "conv": (1, 1, 4, 4), "dense": (1, 1)}


def test_a_common_threshold_counts_a_group_for_the_weights_it_holds():
    flat = draw()
    got = masks_of(prune(flat, 0.6, MIXED, mj.Global(min_keep=0)))
    entries, sizes = [], {}
    for path, x in flat.items():
        block = MIXED_BLOCKS[path.split("/")[0]]
        scores = group_scores(x, block, "mean")
        sizes[path] = math.prod(block)
        entries += [(s, path, i) for i, s in enumerate(scores.ravel())]
    # Nominal members: partial blocks of the convolution count as full ones.
    budget = round(0.6 * sum(sizes[path] for _, path, _ in entries))
    want = {path: [] for path in flat}
    for _, path, i in sorted(entries):
        if sizes[path] > budget:
            break
        budget -= sizes[path]
        want[path].append(i)
    assert all(want.values())
    for path, x in flat.items():
        block = MIXED_BLOCKS[path.split("/")[0]]
        mask = np.ones(-(-np.array(x.shape) // block), bool)
        mask.flat[want[path]] = False
        np.testing.assert_array_equal(got[path], spread(mask, block, x.shape))


def test_a_common_threshold_over_groups_of_one_size_is_that_of_a_sort():
    flat = draw(round_to=2, shapes={"a/kernel": (8, 12), "b/kernel": (4, 8)})
    _, state = prune(flat, 0.7, mj.Block((4, 4)), mj.Global(min_keep=0))
    scores = [group_scores(x, (4, 4), "mean") for x in flat.values()]
    joined = lowest(np.concatenate([s.ravel() for s in scores]), round(0.7 * 8))
    for name, part, x in zip("ab", np.split(joined, [6]), flat.values()):
        want = spread(part.reshape(-(-np.array(x.shape) // 4)), (4, 4), x.shape)
        np.testing.assert_array_equal(mj.find_state(state).masks[name]["kernel"], want)


def test_blocks_of_a_layer_share_a_threshold_and_count_for_their_weights():
    shapes = {f"layer_{i}/{k}/kernel": (8, 12) for i in range(3) for k in "ab"}
    flat = draw(shapes=shapes)
    structure = {"/a/": mj.Block((4, 4)), ".": mj.Block((2, 2))}
    allocation = mj.Global(min_keep=0, per=r"layer_\d")
    state = mj.find_state(prune(flat, 0.5, structure, allocation)[1])
    got = {k: np.asarray(v["kernel"]) for k, v in nested_masks(state).items()}
    for i in range(3):
        entries = []
        for k, b in (("a", 4), ("b", 2)):
            scores = group_scores(flat[f"layer_{i}/{k}/kernel"], (b, b), "mean")
            entries += [(s, k, b * b) for s in scores.ravel()]
        budget, left = 96, {"a": 96, "b": 96}
        for _, k, weights in sorted(entries):
            if weights > budget:
                break
            budget -= weights
            left[k] -= weights
        assert {k: int(got[f"layer_{i}/{k}"].sum()) for k in "ab"} == left


def test_blocks_cut_short_count_as_whole_and_a_summary_tells_what_went():
    x = np.ones((130, 130), np.float32)
    x[:128, :128] = 0.5
    for allocation in (mj.Uniform(), mj.Global(), mj.ErdosRenyi()):
        state = prune({"kernel": x}, 0.5, mj.Block((128, 128)), allocation)
        total = mj.summary(state).total
        assert total.asked == 0.5
        assert total.kept == 2 * 2 * 128 and round(total.sparsity, 3) == 0.970


def test_a_schedule_beyond_a_pattern_is_asked_for_and_not_reached():
    params = {"kernel": jnp.asarray(draw(shapes={"k": (16, 8)})["k"])}
    schedule = optax.linear_schedule(0.0, 0.9, 4)
    tx = mj.movement_pruning(schedule, mj.Magnitude(), structure=mj.NM(2, 4))
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert mj.sparsity_of(state) == 0.5
    assert state.sparsity == np.float32(0.9)
    logged = mj.metrics(state)
    assert logged["pruning/sparsity"] == 0.5
    assert logged["pruning/sparsity_asked"] == np.float32(0.9)


@pytest.mark.parametrize(
    "name, shape, axis",
    [
        ("dense", (16, 8), 0),
        ("conv", (3, 64, 32), 1),
        ("Conv_0", (4, 2, 2), 1),
        ("conv", (3, 3, 64, 128), 2),
        ("value", (3, 3, 64, 128), 2),
        ("attn/query", (64, 4, 16), 0),
        ("attn/key", (2048, 4, 64), 0),
        ("attn/value", (3072, 16, 256), 0),
        ("attn/out", (4, 16, 64), 1),
        ("attn/q_proj", (64, 4, 16), 0),
        ("attn/k_proj", (48, 4, 16), 0),
        ("attn/to_v", (48, 4, 16), 0),
        ("attn/o_proj", (4, 16, 64), 1),
        ("attn/dense", (64, 4, 16), 0),
        ("qkv", (64, 3, 4, 16), 0),
        ("kv", (64, 2, 4, 16), 0),
        ("qkv", (64, 3, 64), 0),
        ("experts/up", (8, 64, 128), 1),
        # Layers of a scan that are not said to be.
        ("blocks/mlp", (12, 64, 128), 1),
        ("blocks/query", (8, 16, 16), 1),
        ("blocks/query", (8, 16, 4, 4), 1),
        ("blocks/attention/query", (6, 64, 4, 16), 1),
        ("blocks/k_proj", (6, 48, 4, 16), 1),
        ("blocks/out", (6, 4, 16, 64), 2),
        ("blocks/qkv", (6, 64, 3, 4, 16), 1),
    ],
)
def test_windows_lie_along_what_a_layer_sums_over(name, shape, axis):
    tensor = Tensor(f"{name}/kernel", shape)
    assert mj.NM(2, 4).axis_of(tensor) == axis
    if name.startswith("blocks"):
        tensor = Tensor(f"{name}/kernel", shape, stacked=1)
        assert mj.NM(2, 4).axis_of(tensor) == axis


@pytest.mark.parametrize("shape", [(16, 16, 16), (6, 8, 8, 4)])
def test_an_axis_that_cannot_be_told_is_to_be_said(shape):
    params = {"blocks": {"query": {"kernel": jnp.ones(shape)}}}
    tx = mj.movement_pruning(structure=mj.NM(2, 4))
    with pytest.raises(
        ValueError, match=r"cannot tell what 'blocks/query/kernel'.*`stacked=`, or say"
    ):
        tx.init(params)
    mj.movement_pruning(structure=mj.NM(2, 4, axis=-1)).init(params)
    if len(shape) == 3:
        tx = mj.movement_pruning(structure=mj.NM(2, 4), stacked="blocks")
        tx.init(params)


def nested_masks(state):
    return {
        f"{layer}/{name}": mask
        for layer, masks in state.masks.items()
        for name, mask in masks.items()
    }


def tensors_in_groups(structures, shapes):
    tensors = [Tensor(name, shape) for name, shape in shapes.items()]
    return [groups_of(own, t) for own, t in zip(structures, tensors)]


def test_erdos_renyi_densities_follow_the_shapes_of_the_weights():
    # Raw densities of the weights: 16/64, 20/64, 10/16. 18 of 36 blocks stay: the scale
    # is 18 / (4 + 5 + 2.5), and the tensors keep 6.26, 7.83 and 3.91 of their blocks.
    shapes = {"big": (8, 8), "long": (4, 16), "small": (2, 8)}
    groups = tensors_in_groups([mj.Block((2, 2))] * 3, shapes)
    n_drop, _ = mj.ErdosRenyi().n_drop(Target(0.5), groups, [], None)
    np.testing.assert_array_equal(n_drop, [16 - 6, 16 - 8, 4 - 4])


@settings(max_examples=examples(40))
@given(st.floats(0, 1))
def test_erdos_renyi_comes_within_a_group_of_the_total(sparsity):
    shapes = {"big": (8, 8), "long": (4, 16), "small": (2, 8)}
    structures = [mj.Axis(0), mj.Block((2, 4)), mj.Unstructured()]
    groups = tensors_in_groups(structures, shapes)
    allocation = mj.ErdosRenyi(min_keep=0)
    n_drop, _ = allocation.n_drop(Target(sparsity), groups, [], None)
    assert np.all(n_drop >= 0) and np.all(np.asarray(n_drop) <= [8, 8, 16])
    dropped = int(np.dot(n_drop, [8, 8, 1]))
    assert abs(dropped - round(sparsity * 144)) <= 8


def test_a_floor_counts_groups():
    flat = {"kernel": draw(shapes={"": (8, 8)})[""]}
    for allocation in (mj.Uniform(min_keep=3), mj.Global(min_keep=3)):
        _, state = prune(flat, 0.99, mj.Axis(-1), allocation)
        kept = np.asarray(mj.find_state(state).masks["kernel"])
        assert kept.all(axis=0).sum() == 3 and kept.sum() == 24


def test_rules_of_sparsity_and_of_structure_go_together():
    flat = draw()
    structure = {"query": mj.NM(2, 4), "conv": mj.Block((3, 3))}
    rules = {"query": 0.5, "conv": 0.75}
    got = masks_of(prune(flat, 0.9, structure, mj.PerPath(rules)))
    kept = {path: int(mask.sum()) for path, mask in got.items()}
    # 10 inputs are two windows and half of one, which keeps both of its weights.
    assert kept["attention/query/kernel"] == 6 * 24
    assert kept["conv/kernel"] == (54 - 40) * 9
    assert kept["dense/kernel"] == 192 - round(0.9 * 192)


@pytest.mark.parametrize("allocation", [mj.Global(), mj.ErdosRenyi()], ids=repr)
def test_windows_take_the_target_and_leave_the_rest_to_the_allocation(allocation):
    flat = draw()
    alone = {k: v for k, v in flat.items() if "query" not in k}
    both = masks_of(prune(flat, 0.5, {"query": mj.NM(2, 4)}, allocation))
    _, state = prune(alone, 0.5, mj.Unstructured(), allocation)
    without = mj.find_state(state).masks
    np.testing.assert_array_equal(both["dense/kernel"], without["dense"]["kernel"])
    np.testing.assert_array_equal(both["conv/kernel"], without["conv"]["kernel"])
    x = flat["attention/query/kernel"]
    want = windows(np.abs(x), 0, 4, 2)
    np.testing.assert_array_equal(both["attention/query/kernel"], want)


def test_a_pattern_tightens_as_the_schedule_rises():
    schedule = mj.linear(0.5, begin=0, end=8)
    drops = [
        int(window_drop(mj.Uniform(), schedule.target(step), "a", 8))
        for step in range(10)
    ]
    assert drops == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4]  # round(s * 8), halves to even


def train(params, structure, *, regrow, steps=5, sparsity=0.5):
    """A rising schedule under adamw: masks and params after every step."""
    tx = mj.movement_pruning(
        mj.cubic(sparsity, begin=1, end=4),
        mj.Movement(optax.sgd(1.0)) if regrow else mj.EmaMagnitude(half_life=2),
        structure=structure,
        inner=optax.adamw(3e-2, weight_decay=0.1),
        regrow=regrow,
    )
    traces = []

    @jax.jit
    def step(params, opt_state, t):
        traces.append(None)
        effective = mj.effective_params(params, opt_state)
        grads = jax.tree.map(lambda p: jnp.sin(9 * p + t).astype(p.dtype), effective)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, history = tx.init(params), []
    for t in range(steps):
        params, opt_state = step(params, opt_state, jnp.float32(t))
        history.append((params, opt_state))
    assert len(traces) == 1
    return history


ALL_KINDS = {"query": mj.NM(2, 4), "conv": mj.Block((4, 4)), "dense": mj.Axis(-1)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_masks_shrink_by_whole_groups_and_zeros_are_exact(dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), nested(draw()))
    history = train(params, ALL_KINDS, regrow=False)
    before = [np.ones(shape, bool) for shape in SHAPES.values()]
    for step, (params, opt_state) in enumerate(history):
        masks = masks_of((params, opt_state))
        for old, mask, weight in zip(before, masks.values(), jax.tree.leaves(params)):
            assert not (mask & ~old).any()
            np.testing.assert_array_equal(np.asarray(weight)[~mask], 0)
            assert weight.dtype == dtype
            if step:
                assert np.asarray(weight)[mask].all()
        before = list(masks.values())
    query, conv, dense = before
    assert [query[i : i + 4].sum(0).max() for i in (0, 4, 8)] == [2, 2, 2]
    whole = [mask.all() or not mask.any() for mask in _blocks(conv, 4)]
    assert len(whole) == 9 * 2 * 3 and all(whole)
    np.testing.assert_array_equal(dense.any(0), dense.all(0))
    assert dense.any(0).sum() == 8


def _blocks(mask, size):
    for place in np.ndindex(mask.shape[:2]):
        for i, j in itertools.product(*(range(0, d, size) for d in mask.shape[2:])):
            yield mask[place][i : i + size, j : j + size]


def test_groups_come_back_whole_with_regrow():
    params = jax.tree.map(jnp.asarray, nested(draw()))
    history = train(params, ALL_KINDS, regrow=True, steps=8)
    masks = [masks_of(state) for state in history[3:]]
    back = {
        path: sum((new[path] & ~old[path]).sum() for old, new in zip(masks, masks[1:]))
        for path in SHAPES
    }
    assert back["attention/query/kernel"] > 0 and back["dense/kernel"] > 0
    for mask in masks:
        columns = mask["dense/kernel"]
        np.testing.assert_array_equal(columns.any(0), columns.all(0))
        assert columns.any(0).sum() == 8
        query = mask["attention/query/kernel"]
        assert (query[:4].sum(0) == 2).all() and (query[4:8].sum(0) == 2).all()


def test_pruning_twice_keeps_what_is_gone():
    flat = draw()
    params, opt_state = prune(flat, 0.25, ALL_KINDS)
    first = masks_of((params, opt_state))
    params = jax.tree.map(lambda x: jnp.where(x == 0, 99.0, x), params)
    second = masks_of(jax.jit(mj.prune)((params, opt_state), 0.5))
    fresh = masks_of(prune(flat, 0.5, ALL_KINDS))
    for path in SHAPES:
        assert not (second[path] & ~first[path]).any()
        assert (first[path] & ~second[path]).any()
        np.testing.assert_array_equal(second[path], fresh[path])


def test_a_group_counts_as_kept_while_a_member_is():
    x = jnp.arange(1.0, 17).reshape(4, 4)
    tx = mj.movement_pruning(criterion=mj.Magnitude(), structure=mj.Block((2, 2)))
    opt_state = tx.init({"kernel": x})
    some = jnp.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    opt_state = opt_state._replace(masks={"kernel": some})
    _, opt_state = jax.jit(mj.prune)(({"kernel": x}, opt_state), 0.5)
    # The second block is gone; of those with anything left the first is lowest.
    want = some.at[:2].set(False)
    np.testing.assert_array_equal(opt_state.masks["kernel"], want)


class Attentive(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3,))(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16)(x)
        return nn.Dense(6)(x)


def windows_full(mask, axis):
    """The most that any aligned window of four along an axis keeps."""
    mask = np.moveaxis(np.asarray(mask), axis, 0)
    return max(mask[i : i + 4].sum(0).max() for i in range(0, len(mask), 4))


def test_windows_lie_along_what_flax_layers_sum_over():
    x = jnp.ones((2, 5, 8))
    params = jax.jit(Attentive().init)(jax.random.key(0), x)["params"]
    tx = mj.movement_pruning(criterion=mj.Magnitude(), structure=mj.NM(2, 4))
    _, state = jax.jit(mj.prune)((params, tx.init(params)), 0.5)
    attention = state.masks["MultiHeadDotProductAttention_0"]
    assert attention["query"]["kernel"].shape == (12, 2, 8)
    assert attention["out"]["kernel"].shape == (2, 8, 12)
    summed = {"Conv_0": (state.masks["Conv_0"], -2), "out": (attention["out"], 1)}
    summed |= {name: (attention[name], 0) for name in ("query", "key", "value")}
    summed["Dense_0"] = (state.masks["Dense_0"], 0)
    for name, (leaf, axis) in summed.items():
        mask = leaf["kernel"]
        assert windows_full(mask, axis) == 2, name
        assert all(
            windows_full(mask, i) > 2
            for i in range(mask.ndim)
            if i != axis % mask.ndim and mask.shape[i] >= 4
        ), name
        assert mask.mean() == 0.5


def test_windows_of_nnx_modules_lie_along_their_inputs():
    import movement_jax.nnx as mnnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 12, rngs=rngs, decode=False)
            self.head = nnx.Linear(12, 8, rngs=rngs)

    model = Net(nnx.Rngs(0))
    tx = mj.movement_pruning(None, mj.Magnitude(), structure=mj.NM(2, 4))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.jit(mnnx.prune)(model, optimizer, 0.5)
    for kernel, axis in (
        (model.attention.query.kernel, 0),
        (model.attention.out.kernel, 1),
        (model.head.kernel, 0),
    ):
        assert windows_full(kernel[...] != 0, axis) == 2
    assert windows_full(model.head.kernel[...] != 0, 1) > 2


def test_an_axis_can_be_named():
    flat = {"fused/kernel": draw(shapes={"": (8, 3, 4)})[""]}
    for axis in (0, 2, -1):
        _, state = prune(flat, 0.5, {"fused": mj.NM(2, 4, axis=axis)})
        want = windows(np.abs(flat["fused/kernel"]), axis % 3, 4, 2)
        np.testing.assert_array_equal(
            mj.find_state(state).masks["fused"]["kernel"], want
        )


def test_a_summary_asks_for_whole_groups_and_for_what_patterns_reach():
    state = prune(draw(), 0.5, ALL_KINDS)
    report = mj.summary(state)
    rows = {row.name: row for row in report.tensors}
    # Windows of 4, 4 and 2 inputs: 2 + 2 + 0 of 10 go. 27 of 54 blocks, 8 of 16
    # columns.
    query = rows["attention/query/kernel"]
    assert query.asked == query.sparsity == 0.4
    assert rows["conv/kernel"].asked == 0.5
    assert rows["dense/kernel"].asked == rows["dense/kernel"].sparsity == 0.5
    assert rows["dense/kernel"].dead_columns == 8
    want = (0.4 * 240 + 0.5 * 486 + 0.5 * 192) / 918
    np.testing.assert_allclose(report.total.asked, want)
    report = mj.summary(prune(draw(), 0.55, mj.Axis(-1)))
    asked = [round(0.55 * n) / n for n in (6, 9, 16)]
    assert [row.asked for row in report.tensors] == asked
    assert [row.sparsity for row in report.tensors] == pytest.approx(asked)


def test_health_does_not_take_a_pattern_for_a_collapse():
    # Of the windows of 4, 4 and 2 inputs 3 + 3 + 1 of 10 go.
    rules = {"query": 0.75, "conv": 0.97}
    state = prune(draw(), 0.97, {"query": mj.NM(1, 4)}, mj.PerPath(rules))
    findings = {f.name: f for f in mj.health(state).findings}
    assert findings["collapse"].level == "ok"
    opt_state = mj.find_state(state[1])
    empty = jax.tree.map(jnp.zeros_like, opt_state.masks["attention"])
    opt_state = opt_state._replace(masks={**opt_state.masks, "attention": empty})
    findings = {f.name: f for f in mj.health((state[0], opt_state)).findings}
    assert "attention/query/kernel" in findings["collapse"].message


def test_an_agreement_compares_rankings_of_groups():
    flat = draw()
    params = jax.tree.map(jnp.asarray, nested(flat))
    tx = mj.movement_pruning(criterion=mj.Magnitude(), structure=ALL_KINDS)
    state = (params, tx.init(params))
    report = mj.agreement(state, mj.Random(0), sparsity=0.5)
    rows = {row.name: row for row in report.tensors}
    dropped = {name: row.both + row.only_a for name, row in rows.items()}
    assert list(map(dropped.get, SHAPES)) == [96, _dropped(flat), 96]
    assert rows["dense/kernel"].only_a % 12 == 0 and rows["dense/kernel"].only_a > 0


def _dropped(flat):
    scores = group_scores(flat["conv/kernel"], (1, 1, 4, 4), "mean")
    keep = lowest(scores, 27)
    return int((~spread(keep, (1, 1, 4, 4), (3, 3, 6, 9))).sum())


def test_the_structure_is_kept_with_the_state_and_hashes():
    tx = mj.movement_pruning(structure={"conv": mj.Axis([0, np.int64(1)])})
    config = tx.init(nested(draw())).config
    assert config.structure == (("conv", mj.Axis((0, 1))),)
    hash(config)
    assert mj.Block([2, np.int32(3)]) == mj.Block((2, 3))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: mj.Block(4),
            ValueError,
            r"`shape` takes integers .* got 4.*Block\(\(",
        ),
        (lambda: mj.Block(()), ValueError, r"at least 1, got \(\)"),
        (lambda: mj.Block((4, 0)), ValueError, r"got \(4, 0\)"),
        (lambda: mj.Block((4, 2.0)), ValueError, r"got \(4, 2.0\)"),
        (
            lambda: mj.Block((4,), 4),
            ValueError,
            r"got 4. Several sizes or axes go in a tuple, as .*Block\(",
        ),
        (lambda: mj.Axis("rows"), ValueError, r"got \('rows',\). Write `Axis"),
        (lambda: mj.Axis(True), ValueError, "True"),
        (lambda: mj.Axis(()), ValueError, r"got \(\).*Axis\(-1\)"),
        (lambda: mj.Axis(0, "max"), ValueError, "`reduce` .*got 'max'"),
        (lambda: mj.NM(4, 2), ValueError, r"`n` must be less than `m`, got NM\(4, 2\)"),
        (lambda: mj.NM(0, 4), ValueError, r"`n` takes .*at least 1, got \(0,\)"),
        (lambda: mj.NM(2, 4, axis=0.5), ValueError, "`axis` takes integers"),
        (
            lambda: mj.movement_pruning(structure=mj.NM),
            TypeError,
            "`structure` must be",
        ),
        (
            lambda: mj.movement_pruning(structure={"a": "2:4"}),
            TypeError,
            r"`structure`\['a'\] must be .*got '2:4'",
        ),
        (
            lambda: mj.movement_pruning(structure=mj.Axis(0), axis_name="x"),
            ValueError,
            "A `structure` groups weights of whole tensors, .* `axis_name` splits",
        ),
        (
            lambda: mj.movement_pruning(structure={"(": mj.NM(2, 4)}),
            ValueError,
            r"`structure` takes regular expressions, and '\('",
        ),
        (
            lambda: mj.movement_pruning(0.9, structure=mj.NM(2, 4)),
            ValueError,
            r"NM\(2, 4\) drops at most 0.5 of every tensor.*asks for 0.9.*PerPath",
        ),
        (
            lambda: mj.movement_pruning(mj.cubic(0.9, 0, 9), structure=mj.NM(2, 4)),
            ValueError,
            "asks for 0.9",
        ),
    ],
)
def test_a_wrong_structure_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "structure, message",
    [
        (
            {"nothing": mj.Axis(0)},
            r"(?s)`structure` has patterns .*'nothing'.*conv/kernel\n  dense/kernel",
        ),
        ({"": mj.Axis(0), "conv": mj.Axis(1)}, r"decide nothing: \['conv'\]"),
        (mj.Block((2, 2, 2)), r"more axes than 'dense/kernel' of shape \(12, 16\)"),
        (
            mj.Axis(2),
            r"`=.* needs axis 2, which 'dense/kernel' .*Give this path a structure",
        ),
        (mj.Axis((0, -2)), r"names an axis of 'dense/kernel' .* twice"),
        ({"dense": mj.NM(1, 9, -3)}, r"needs axis -3, which 'dense/kernel'"),
        ({"dense": mj.NM(2, 4)}, r"'dense/kernel', and `sparsity` asks for 0.8"),
    ],
    ids=repr,
)
def test_a_structure_that_does_not_fit_is_refused_with_the_path(structure, message):
    tx = mj.movement_pruning(0.8, structure=structure)
    with pytest.raises(ValueError, match=message):
        tx.init(jax.tree.map(jnp.asarray, nested(draw())))


def test_a_group_of_more_than_can_be_summed_is_refused():
    tx = mj.movement_pruning(structure=mj.Block((2**15, 2**15 + 1)))
    params = {"kernel": jax.ShapeDtypeStruct((2**15, 2**15 + 1), jnp.float32)}
    with pytest.raises(ValueError, match="makes one group of more than 1073741824"):
        jax.eval_shape(tx.init, params)


def test_a_rule_beyond_what_a_pattern_reaches_is_refused():
    params = {"kernel": jnp.ones((4, 4))}
    rules = mj.PerPath({"kernel": 0.75})
    tx = mj.movement_pruning(structure=mj.NM(2, 4), allocation=rules)
    with pytest.raises(ValueError, match="asks for 0.75"):
        tx.init(params)


def test_pruning_by_hand_beyond_a_pattern_is_refused_and_traced_it_is_capped():
    params = {"kernel": jnp.arange(1.0, 17).reshape(4, 4)}
    tx = mj.movement_pruning(None, mj.Magnitude(), structure=mj.NM(2, 3))
    state = (params, tx.init(params))
    with pytest.raises(ValueError, match=r"drops at most 0.333333 of 'kernel'"):
        mj.prune(state, 0.5)
    for sparsity in (jnp.float32(0.9), jnp.float32(1 / 3)):
        _, opt_state = jax.jit(mj.prune)(state, sparsity)
        want = windows(np.asarray(params["kernel"]), 0, 3, 1)
        np.testing.assert_array_equal(opt_state.masks["kernel"], want)
    mj.prune(state, 1 / 3)


# --- on eight devices -----------------------------------------------------------------

needs_eight = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (see conftest.py)"
)
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
PLACED = {
    "columns/kernel": ((16, 32), P("x", "y")),
    "cut/kernel": ((20, 36), P("x", "y")),  # devices end within blocks
    "layers/kernel": ((4, 8, 24), P("x", None, "y")),
    "windows/kernel": ((32, 16), P("x", "y")),
    "windows_cut/kernel": ((12, 10), P("x", "y")),
}
PLACED_STRUCTURE = {
    "columns": mj.Axis(-1),
    "cut": mj.Block((3, 4)),
    "layers": mj.Block((4, 4)),
    "windows": mj.NM(2, 4),
}


def mesh_of(mode):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(MODES[mode],) * 2)


def placed(mode, shapes=PLACED):
    flat = draw(shapes={path: shape for path, (shape, _) in shapes.items()})
    if mode is None:
        return jax.tree.map(jnp.asarray, nested(flat))
    mesh = mesh_of(mode)
    return nested(
        {
            path: jax.device_put(x, NamedSharding(mesh, shapes[path][1]))
            for path, x in flat.items()
        }
    )


def run_placed(mode):
    """Two steps of a rising schedule."""
    params = placed(mode)
    tx = mj.movement_pruning(
        mj.cubic(0.5, begin=0, end=2),
        mj.Magnitude(),
        structure=PLACED_STRUCTURE,
        allocation=mj.Global(),
        stacked="layers",
    )

    @jax.jit
    def step(params, opt_state):
        updates = jax.tree.map(lambda p: -0.1 * p, params)
        updates, opt_state = tx.update(updates, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(2):
        params, opt_state = step(params, opt_state)
    return opt_state.masks


@functools.cache
def unsharded():
    return [np.asarray(mask) for mask in jax.tree.leaves(run_placed(None))]


@needs_eight
@pytest.mark.parametrize("mode", MODES)
def test_on_a_mesh_masks_are_those_of_one_device(mode):
    masks = jax.tree.leaves(run_placed(mode))
    for mask, want, first in zip(masks, unsharded(), jax.tree.leaves(placed(mode))):
        np.testing.assert_array_equal(mask, want)
        assert 0 < want.mean() < 1
        assert mask.sharding.is_equivalent_to(first.sharding, mask.ndim)
        assert jax.typeof(mask).sharding.spec == jax.typeof(first).sharding.spec


@needs_eight
@pytest.mark.parametrize("mode", MODES)
def test_a_change_of_groups_moves_sums_and_counts_between_devices(mode):
    shapes = {
        "blocks/kernel": ((512, 512), P("x", "y")),
        "columns/kernel": ((512, 512), P("x", "y")),
        "layers/kernel": ((8, 128, 128), P("x", None, "y")),
        "windows/kernel": ((512, 512), P("x", "y")),
    }
    structure = {
        "blocks|layers": mj.Block((4, 16)),
        "columns": mj.Axis(-1),
        "windows": mj.NM(2, 4),
    }
    params = placed(mode, shapes)
    tx = mj.movement_pruning(structure=structure, stacked="layers")
    lowered = jax.jit(mj.prune).lower((params, tx.init(params)), 0.5)
    moved = collective_bytes(lowered.compile().as_text())
    # Bytes: the sums of 256 columns that each of four devices has a part of.
    assert moved and max(moved) <= 4 * 256 * 4
    # Devices that end within blocks have to bring these together.
    tx = mj.movement_pruning(structure={"blocks": mj.Block((3, 16))})
    lowered = jax.jit(mj.prune).lower((params, tx.init(params)), 0.5)
    assert max(collective_bytes(lowered.compile().as_text())) > 100_000


def collective_bytes(text):
    """Bytes of the result of every operation that moves data between devices."""
    ops = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return [
        sum(
            int(bits or 8) // 8 * math.prod(int(d) for d in dims.split(",") if d)
            for bits, dims in re.findall(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]", shape)
        )
        for shape in re.findall(rf"= (.*?) (?:{ops})(?:-start)?\(", text)
    ]


@pytest.mark.parametrize("sparsity", [0.5, mj.cubic(0.5, begin=1, end=3)], ids=str)
def test_patterns_alone_follow_a_schedule(sparsity):
    tx = mj.movement_pruning(sparsity, mj.Magnitude(), structure=mj.NM(2, 4))
    params = {"kernel": jnp.arange(1.0, 65.0).reshape(8, 8)}
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert int((params["kernel"] == 0).sum()) == 32
