"""Trees of any shape, with leaves of any kind: what is pruned, and what is not."""

import functools
import math
import re
import tempfile
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import movement_jax as mj
from movement_jax import transform
from tests.budget import examples


class Pair(NamedTuple):
    """One more kind of node."""

    kernel: Any
    bias: Any


NAMES = ["kernel", "weight", "w", "a/kernel", "bias", "scale", "embedding", "norm_1"]
NAMES += ["Kernel", "kernel.0", "0", "", "é"]
OTHERS = {
    "vector": lambda: jnp.float32([1.0, -0.0, 1e-40]),
    "scalar": lambda: jnp.bfloat16(0.5),
    "number": lambda: 0.25,
    "numpy": lambda: np.float32([np.inf, 2.0]),
    "empty": lambda: jnp.zeros((0, 3)),
    "int": lambda: jnp.arange(6).reshape(2, 3),
    "bool": lambda: jnp.array([[True], [False]]),
    "complex": lambda: jnp.array([[1 + 2j, 0.5j]], jnp.complex64),
    "key": lambda: jax.random.split(jax.random.key(3), 2).reshape(1, 2),
    "none": lambda: None,
}
# What can be pruned is of these in turn, so that few programs are compiled.
KINDS = [((3, 5), jnp.float32), ((2, 2, 3), jnp.bfloat16), ((4, 2), jnp.float16)]
MOST = 4
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, np.nan, np.inf, -np.inf]
SPECIAL += [1e-40, -1e-40, 2e-38, 6e-8, -6e-8, 1e-3]
SPECIAL = [float(np.float32(x)) for x in SPECIAL]
FORMS = {
    "Uniform": (mj.Magnitude(), mj.Uniform()),
    "Global": (mj.EmaMagnitude(), mj.Global()),
}
SPARSITY = 0.5


def nodes(depth):
    leaves = st.sampled_from([*5 * ["matrix"], *OTHERS])
    if not depth:
        return leaves
    inner = nodes(depth - 1)
    return st.one_of(
        leaves,
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
        st.sampled_from(["norm_1", "embedding"]).map(
            lambda name: {name: {"weight": "matrix", "kernel": "matrix"}}
        ),
    )


# Something is to be pruned beside a tree, or within.
WITH_KERNELS = st.one_of(
    nodes(3).map(lambda tree: {"w": "matrix", "é": tree}),
    nodes(3).map(lambda tree: Pair("matrix", tree)),
    st.tuples(nodes(2), st.just({"kernel": "matrix"}), nodes(2)),
)


def is_prunable(path, kind):
    """Whether a leaf of the strategy is, told by its path as the README tells it."""
    *parents, last = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    dense = last == "weight" and any(re.search("embed|norm", p) for p in parents)
    return kind == "matrix" and last in ("kernel", "w", "weight") and not dense


class Case(NamedTuple):
    """Params, and what of them is to be pruned: paths, and places among all leaves."""

    params: Any
    paths: list[str]
    at: list[int]

    def put(self, weights, tree=None):
        leaves, structure = jax.tree.flatten(self.params if tree is None else tree)
        for i, weight in zip(self.at, weights):
            leaves[i] = weight
        return structure.unflatten(leaves)

    def take(self, tree):
        leaves = jax.tree.leaves(tree)
        return [leaves[i] for i in self.at]


@st.composite
def cases(draw, trees):
    tree = draw(trees)
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    chosen = [i for i, (path, kind) in enumerate(flat) if is_prunable(path, kind)]
    leaves, at, paths = [], [], []
    for i, (path, kind) in enumerate(flat):
        if i in chosen[:MOST]:
            shape, dtype = KINDS[len(at) % len(KINDS)]
            leaf = draw(weights_of(shape)).astype(dtype)
            paths.append(jax.tree_util.keystr(path, simple=True, separator="/"))
            at.append(i - sum(kind == "none" for _, kind in flat[:i]))
        elif i in chosen:
            leaf = OTHERS["vector"]()
        else:
            leaf = jnp.ones((2, 3)) if kind == "matrix" else OTHERS[kind]()
        leaves.append(leaf)
    return Case(jax.tree.structure(tree).unflatten(leaves), paths, at)


def weights_of(shape):
    """Most often with ties; seldom any numbers."""
    one = st.sampled_from(SPECIAL) | st.floats(-4, 4, width=16)
    return hnp.arrays(np.float32, shape, elements=one, fill=st.sampled_from(SPECIAL))


def raw(leaf):
    if getattr(leaf, "dtype", None) == jax.dtypes.float0:
        return leaf.shape
    keys = jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(leaf) if keys else leaf)
    return str(array.dtype), array.shape, array.tobytes()


def assert_same(got, want):
    """Also in their bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a is b or raw(a) == raw(b)


PROGRAMS = {}


def compiled(function, *args):
    """Compiled once for all trees that make the same program of their leaves."""
    traced = jax.jit(function).trace(*args)
    consts = [raw(const) for const in traced.jaxpr.consts]
    program = f"{traced.jaxpr} {consts}"
    if program not in PROGRAMS:
        PROGRAMS[program] = traced.lower().compile()
    return PROGRAMS[program]


class Run:
    """Steps of one tree, of which only what can be pruned goes into programs."""

    def __init__(self, case, form):
        criterion, allocation = FORMS[form]
        self.case = case
        self.tx = mj.movement_pruning(
            SPARSITY, criterion, allocation=allocation, check_finite=False
        )
        self.state = self.tx.init(case.params)
        self.structure = jax.tree.structure(self.state)
        self.weights = case.take(case.params)

    def _step(self, weights, grads, leaves):
        state, given = self.structure.unflatten(leaves), gradients(self.case.params)
        updates, state = self.tx.update(
            self.case.put(grads, given), state, self.case.put(weights)
        )
        assert jax.tree.structure(state) == self.structure
        own = self.case.take(updates)
        assert [u.dtype for u in own] == [g.dtype for g in grads]
        assert_same(self.case.put(grads, updates), self.case.put(grads, given))
        return [w + u for w, u in zip(weights, own)], jax.tree.leaves(state)

    def _cut(self, weights, leaves, sparsity):
        state = self.case.put(weights), self.structure.unflatten(leaves)
        params, state = mj.prune(state, sparsity)
        assert jax.tree.structure(state) == self.structure
        assert_same(self.case.put(weights, params), self.case.put(weights))
        return self.case.take(params), jax.tree.leaves(state)

    @functools.cached_property
    def step(self):
        leaves = jax.tree.leaves(self.state)
        return compiled(self._step, self.weights, self.weights, leaves)

    @functools.cached_property
    def cut(self):
        leaves = jax.tree.leaves(self.state)
        return compiled(self._cut, self.weights, leaves, jnp.float32(0))

    def _keep(self, weights, leaves):
        """What comes is like what was before it."""
        old = jax.tree.leaves(self.state)
        for before, after in zip(
            [*self.weights, *old], [*weights, *leaves], strict=True
        ):
            assert (before.shape, before.dtype) == (after.shape, after.dtype)
        self.weights, self.state = weights, self.structure.unflatten(leaves)

    def update(self, grads):
        before = self.weights
        self._keep(*self.step(before, grads, jax.tree.leaves(self.state)))
        for weight, old, mask in zip(self.weights, before, self.masks):
            pruned = np.asarray(weight)[~mask & np.isfinite(np.float32(old))]
            assert not pruned.view(f"u{pruned.dtype.itemsize}").any()

    def prune(self, sparsity):
        before = self.weights
        leaves = jax.tree.leaves(self.state)
        self._keep(*self.cut(before, leaves, jnp.float32(sparsity)))
        for weight, old, mask in zip(self.weights, before, self.masks):
            assert_same(weight, np.where(mask, old, np.zeros_like(old)))

    @property
    def masks(self):
        return [np.asarray(mask) for mask in jax.tree.leaves(self.state.masks)]

    @property
    def scores(self):
        if isinstance(self.state.config.criterion, mj.Magnitude):
            return [np.abs(np.float32(w)) for w in self.weights]
        return [np.asarray(score) for score in jax.tree.leaves(self.state.scores)]


def gradients(params):
    """Like params, as JAX makes them: of integers they have no dtype."""

    def one(leaf):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            return np.zeros(jnp.shape(leaf), jax.dtypes.float0)
        return leaf

    return jax.tree.map(one, params)


def by_numpy(scores, masks, sparsity, together):
    """Masks that drop as many as are asked for, one to be kept of each tensor.

    What is off is first to go, then the lowest; of ties the last. NaN stays.
    """
    entries, new = [], [mask.copy() for mask in masks]
    for number, (score, mask) in enumerate(zip(scores, masks)):
        for place, (x, kept) in enumerate(zip(score.ravel().tolist(), mask.ravel())):
            x = 0.0 if abs(x) < np.finfo(np.float32).tiny else x
            if not (kept and math.isnan(x)):
                entries.append((kept, kept * x if kept else 0, -number, -place))
    for group in [range(len(masks))] if together else [[i] for i in range(len(masks))]:
        left = round(sparsity * sum(masks[i].size for i in group))
        most = {i: masks[i].size - 1 for i in group}
        for _, _, number, place in sorted(entries):
            if left and most.get(-number, 0):
                new[-number].flat[-place] = False
                most[-number] -= 1
                left -= 1
    return new


def check_masks(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def prune_nothing(run):
    weights, masks = run.weights, run.masks
    run.prune(0.0)
    assert_same(run.weights, weights)
    check_masks(run.masks, masks)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=examples(4))
@given(cases(WITH_KERNELS), st.integers(0, 15), st.data())
def test_in_any_tree_masks_are_those_of_a_sort(form, case, sixteenths, data):
    run, together = Run(case, form), form == "Global"
    prune_nothing(run)
    for step in range(2):
        want = run.masks
        if step == run.state.config.criterion.accumulates:  # which is scored by then
            want = by_numpy(run.scores, want, SPARSITY, together)
        run.update(
            [data.draw(weights_of(w.shape)).astype(w.dtype) for w in run.weights]
        )
        check_masks(run.masks, want)
    want = by_numpy(run.scores, run.masks, sixteenths / 16, together)
    run.prune(sixteenths / 16)
    check_masks(run.masks, want)
    prune_nothing(run)
    report = mj.summary((case.put(run.weights), run.state))
    assert [row.name for row in report.tensors] == case.paths
    kept = sum(mask.sum() for mask in run.masks)
    assert report.total.size * (1 - report.total.sparsity) == pytest.approx(kept)


@settings(max_examples=examples(200))
@given(cases(nodes(3).filter(lambda tree: jax.tree.leaves(tree))))
def test_in_any_tree_what_is_pruned_is_told_by_path_and_kind(case):
    tx = mj.movement_pruning()
    if not jax.tree.leaves(case.params):
        assert not jax.tree.leaves(tx.init(case.params).masks)
    elif not case.at:
        with pytest.raises(
            ValueError, match="There is nothing to prune: no float leaf"
        ):
            tx.init(case.params)
    else:
        state = tx.init(case.params)
        for tree, dtype in ((state.masks, bool), (state.scores, jnp.float32)):
            flat = jax.tree_util.tree_flatten_with_path(tree)[0]
            names = [
                jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat
            ]
            assert names == case.paths
            for (_, leaf), weight in zip(flat, case.take(case.params)):
                assert (leaf.shape, leaf.dtype) == (weight.shape, dtype)


@settings(max_examples=examples(15))
@given(cases(nodes(3)), st.data())
def test_in_any_tree_one_bad_number_is_seen(case, data):
    good = jax.tree.map(clean, case.params)
    assert transform._all_finite(good, ())
    leaves, structure = jax.tree.flatten(good)
    places = [i for i, leaf in enumerate(leaves) if can_be_bad(leaf)]
    assume(places)
    i = data.draw(st.sampled_from(places))
    bad = np.array(leaves[i])
    bad.flat[data.draw(st.integers(0, bad.size - 1))] = data.draw(
        st.sampled_from([np.nan, np.inf, -np.inf])
    )
    leaves[i] = bad
    assert not transform._all_finite(structure.unflatten(leaves), ())


def can_be_bad(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and jnp.size(leaf) > 0


def clean(leaf):
    if not can_be_bad(leaf):
        return leaf
    array = np.array(leaf)
    array[~np.isfinite(array)] = 1
    return array


@settings(max_examples=examples(5))
@given(cases(WITH_KERNELS), st.data())
def test_any_tree_comes_back_from_a_checkpoint(case, data):
    state = mj.movement_pruning(track_start=True).init(case.params)
    masks = [data.draw(hnp.arrays(bool, m.shape)) for m in jax.tree.leaves(state.masks)]
    masks = jax.tree.structure(state.masks).unflatten(masks)
    state = case.params, state._replace(masks=masks)
    with tempfile.TemporaryDirectory() as directory:
        if any(jnp.size(leaf) == 0 for leaf in jax.tree.leaves(case.params)):
            with pytest.raises(ValueError, match="saves no arrays of size zero: .'0/"):
                mj.checkpoint.save(directory, 1, state)
            return
        mj.checkpoint.save(directory, 1, state)
        restored = mj.checkpoint.restore(directory, like=state)
    as_saved = [
        jnp.asarray(x) if isinstance(x, float) else x for x in jax.tree.leaves(state)
    ]
    assert_same(restored, jax.tree.structure(state).unflatten(as_saved))
