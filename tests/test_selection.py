import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import movement_jax as mj
from movement_jax import counting, selection, wide
from movement_jax.counting import NO_KEY, TOP_KEY, Tensor

SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
SPECIAL = [
    *(0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0),
    *(1e-45, -1e-45, 1.1754942e-38, -1.1754942e-38),  # subnormals
    *(SMALLEST_NORMAL, -SMALLEST_NORMAL),
    *(3.4028235e38, -3.4028235e38, np.nextafter(np.float32(1), np.float32(2))),
]
SPECIAL = [float(x) for x in np.float32(SPECIAL)]
SHAPES = [(1,), (7,), (64,), (5, 6), (2, 3, 4)]
# Global ranking over a vector, a matrix, and a stack of two ranked layer by layer.
TENSORS = [Tensor("a", (6,)), Tensor("b", (3, 4)), Tensor("c", (2, 3, 2), stacked=1)]

keep_top = jax.jit(mj.keep_top)


def rank_order(scores):
    """Flat indices from the first to drop to the last; NaN are left out."""
    x = np.asarray(scores, np.float32).ravel().astype(np.float64)
    x[np.abs(x) < SMALLEST_NORMAL] = 0.0
    order = np.lexsort((-np.arange(x.size), x))
    return order[~np.isnan(x[order])]


def oracle(scores, n_drop):
    mask = np.ones(np.size(scores), bool)
    mask[rank_order(scores)[: max(n_drop, 0)]] = False
    return mask.reshape(np.shape(scores))


@st.composite
def score_arrays(draw, shapes=SHAPES):
    shape = draw(st.sampled_from(shapes))
    kind = draw(st.sampled_from(["any", "special", "few", "bfloat16", "constant"]))
    floats = st.floats(width=32)
    elements = {
        "any": floats,
        "special": st.sampled_from(SPECIAL),
        "few": st.integers(-2, 2).map(float),
        "bfloat16": st.floats(-2, 2, width=32),
        "constant": floats,
    }[kind]
    if kind == "constant":
        return np.full(shape, draw(st.one_of(elements, st.sampled_from(SPECIAL))))
    scores = draw(hnp.arrays(np.float32, shape, elements=elements, fill=elements))
    if kind == "bfloat16":
        scores = scores.astype(ml_dtypes.bfloat16).astype(np.float32)
    return scores


@settings(max_examples=examples(1200))
@given(score_arrays(), st.floats(0, 1))
def test_the_highest_scores_are_kept_and_ties_settled_by_index(scores, part):
    n_keep = round(part * scores.size)
    got = keep_top(jnp.asarray(scores, jnp.float32), n_keep)
    np.testing.assert_array_equal(got, oracle(scores, scores.size - n_keep))


def test_counts_outside_a_tensor_are_clipped_and_touch_no_other():
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 9, s).astype(np.float32) for s in ((4, 3), (7,), (2, 2))]
    tensors = [Tensor(str(i), x.shape) for i, x in enumerate(scores)]
    for n_drop in ([-1, 2, 9], [-(2**31), 7, -3], [12, 2**31 - 1, 1]):
        counts = jnp.array(n_drop, jnp.int32)
        got, _ = jax.jit(lambda x, n: selection.keep_masks(x, tensors, n))(
            [jnp.asarray(x) for x in scores], counts
        )
        for mask, x, n in zip(got, scores, n_drop):
            np.testing.assert_array_equal(mask, oracle(x, n))


@functools.partial(jax.jit, static_argnames="stacked")
def drop_in_slices(scores, n_drop, hint, stacked):
    tensor = Tensor("scores", scores.shape, stacked)
    return selection.keep_masks([scores], [tensor], n_drop, hint=hint)[0][0]


@settings(max_examples=examples(300))
@given(score_arrays([(2, 3, 4)]), st.lists(st.integers(0, 12), min_size=6, max_size=6))
def test_slices_of_a_stack_are_ranked_separately(scores, n_drop):
    for stacked, slices in ((1, 2), (2, 6)):
        rows = scores.reshape(slices, -1)
        counts = np.minimum(n_drop[:slices], rows.shape[1])
        want = np.stack([oracle(r, n) for r, n in zip(rows, counts)])
        got = drop_in_slices(jnp.asarray(scores, jnp.float32), counts, None, stacked)
        np.testing.assert_array_equal(got, want.reshape(scores.shape))


@pytest.mark.parametrize("n", [3, 7])
def test_an_interval_is_cut_into_parts_that_are_as_equal_as_can_be(n):
    for width in [*range(2, 300), 10**6 + 1, 2 * TOP_KEY]:
        low = jnp.int32(NO_KEY)
        high = jax.lax.bitcast_convert_type(np.uint32(width), jnp.int32) + low
        inside = np.asarray(counting.split(low, high, n)).ravel().astype(np.int64)
        edges = np.array([NO_KEY, *inside, NO_KEY + width])
        assert inside.min() > NO_KEY and inside.max() < NO_KEY + width
        assert np.diff(edges).min() >= 0
        assert np.diff(edges).max() <= -(-width // (n + 1))


@settings(max_examples=examples(400))
@given(
    score_arrays([(64,), (5, 6)]),
    st.floats(0, 1),
    st.one_of(
        st.integers(-TOP_KEY, TOP_KEY),
        st.sampled_from([-2, -1, 0, 1, 2]).map(lambda d: d + TOP_KEY),
        st.sampled_from([-2, -1, 0, 1, 2]).map(lambda d: d - TOP_KEY),
    ),
)
def test_a_wrong_hint_changes_no_mask(scores, part, hint):
    n_drop = round(part * scores.size)
    scores = jnp.asarray(scores, jnp.float32)
    got = drop_in_slices(scores, jnp.array([n_drop]), jnp.int32(hint), 0)
    np.testing.assert_array_equal(got, oracle(scores, n_drop))


def distributions(n=20_000):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=n).astype(np.float32)
    return {
        "normal": normal,
        "magnitudes": np.abs(normal),
        "lognormal": np.exp(4 * normal),
        "uniform": rng.random(n, np.float32),
        "bfloat16": normal.astype(ml_dtypes.bfloat16).astype(np.float32),
        "mostly zero": np.where(rng.random(n) < 0.6, 0, normal).astype(np.float32),
        "few values": np.round(normal),
        "two far clusters": np.where(rng.random(n) < 0.5, 1e-30, 1e30) * normal,
        "two near clusters": 1
        + np.float32(1e-3) * (rng.random(n) < 0.5)
        + 1e-6 * normal,
        "a spike in the middle": np.where(rng.random(n) < 0.9, 0.5, normal),
        "infinite": np.where(rng.random(n) < 0.5, -np.inf, normal),
    }


@pytest.fixture
def passes(monkeypatch, traced_anew):
    """How often scores were read, in each of both searches."""
    passes = {"count": 0, "count_ties": 0}

    def counted(name):
        original = getattr(selection, name)

        def count(*args):
            jax.debug.callback(lambda: passes.update({name: passes[name] + 1}))
            return original(*args)

        monkeypatch.setattr(selection, name, count)

    for name in passes:
        counted(name)
    return passes


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": mj.Uniform()},
        {"allocation": mj.Global(0.1)},
        {"allocation": mj.Global(per="[ab]")},
        {"allocation": mj.ErdosRenyi(), "structure": mj.Axis(0)},
        {"allocation": mj.Global(), "criterion": mj.UpperConfidence()},
    ],
    ids=str,
)
def test_no_score_is_read_on_steps_that_do_not_prune(passes, options):
    schedule = mj.cubic(0.8, begin=2, end=8, every=3)
    tx = mj.movement_pruning(schedule, **options)
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=(24, 3)), jnp.float32)}
        for name in "ab"
    }
    state, update, read = tx.init(params), jax.jit(tx.update), []
    for step in range(12):
        grads = jax.tree.map(lambda w: -0.1 * w, params)
        if step == 10:
            grads = jax.tree.map(lambda g: g * jnp.nan, grads)
        before = sum(passes.values())
        _, state = update(grads, state, params)
        jax.effects_barrier()
        read += [step + 1] if sum(passes.values()) > before else []
    assert read == [5, 8]  # at 2 it begins with nothing
    assert abs(float(mj.sparsity_of((params, state))) - 0.8) < 0.05


def test_a_search_ends_after_few_passes_whatever_the_scores_and_the_hint(
    passes, capsys
):
    @jax.jit
    def drop(scores, n_drop, hint):
        tensors = [Tensor("scores", scores.shape)]
        (mask,), keys = selection.keep_masks([scores], tensors, n_drop, hint=hint)
        return mask, keys

    def took(scores, n_drop, hint):
        passes.update(count=0, count_ties=0)
        mask, keys = drop(jnp.asarray(scores, jnp.float32), jnp.array([n_drop]), hint)
        jax.effects_barrier()
        np.testing.assert_array_equal(mask, oracle(np.float32(scores), n_drop))
        assert passes["count"] <= 13 and passes["count_ties"] <= 14, passes
        return keys[0], passes["count"] + passes["count_ties"]

    cold, warm = {}, {}
    for name, scores in distributions().items():
        for n_drop in (2_000, 9_999, 15_000, 19_500):
            hint, cold[name, n_drop] = took(scores, n_drop, jnp.int32(NO_KEY))
            _, warm[name, n_drop] = took(scores, n_drop + 40, hint)
            took(scores, n_drop, jnp.int32(TOP_KEY - 1))
            took(scores, n_drop, -hint)
    smooth = [(name, n) for name, n in cold if name in ("normal", "uniform")]
    assert np.mean([cold[key] for key in smooth]) < 6.4
    assert np.mean([warm[key] for key in smooth]) < 3.0
    with capsys.disabled():
        print(f"\npasses: {np.mean([*cold.values()]):.1f} cold", end=", ")
        print(f"{np.mean([*warm.values()]):.1f} warm, of smooth scores", end=" ")
        print(f"{np.mean([cold[key] for key in smooth]):.1f}", end=" and ")
        print(f"{np.mean([warm[key] for key in smooth]):.1f}")


@jax.jit
def drop_more(scores, kept, n_drop):
    tensor = Tensor("scores", scores.shape)
    return selection.keep_masks([scores], [tensor], n_drop, kept=[kept])[0][0] & kept


@settings(max_examples=examples(300))
@given(score_arrays([(7,), (5, 6)]), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_dropped_scores_stay_dropped_and_count(scores, part, bits):
    kept = np.random.default_rng(bits).random(scores.shape) < 0.6
    scores = np.where(scores == -np.inf, -1.0, scores).astype(np.float32)
    n_drop = max(round(part * scores.size), int((~kept).sum()))
    ranked = np.where(kept, scores, -np.inf)
    got = drop_more(jnp.asarray(scores), kept, jnp.array([n_drop]))
    np.testing.assert_array_equal(got, oracle(ranked, n_drop))


def test_a_score_of_minus_infinity_does_not_take_the_place_of_a_dropped_one():
    scores = jnp.array([1.0, 5.0, 3.0, -jnp.inf])
    kept = jnp.array([False, True, True, True])
    got = drop_more(scores, kept, jnp.array([1]))
    np.testing.assert_array_equal(got, [False, True, True, True])


@jax.jit
def drop_globally(scores, n_drop, most):
    n_drop = wide.total(n_drop[None])
    counts, hint = selection.common_threshold(scores, TENSORS, n_drop, most=most)
    return counts, selection.keep_masks(scores, TENSORS, counts, hint=hint)[0]


def global_oracle(segments, n_drop, most):
    """Drops from the lowest score up, sparing the segments that gave their most."""
    joined = np.concatenate([s.ravel() for s in segments])
    owner = np.repeat(np.arange(len(segments)), [s.size for s in segments])
    room, mask, left = list(most), np.ones(joined.size, bool), n_drop
    for i in rank_order(joined):
        if left and room[owner[i]]:
            mask[i] = False
            room[owner[i]] -= 1
            left -= 1
    return mask


@settings(max_examples=examples(400))
@given(
    score_arrays([(30,)]),
    st.integers(0, 30),
    st.lists(st.integers(0, 12), min_size=4, max_size=4),
)
def test_one_threshold_over_all_tensors_spares_what_must_be_kept(scores, n_drop, floor):
    a, b, c = scores[:6], scores[6:18].reshape(3, 4), scores[18:].reshape(2, 3, 2)
    segments = [a, b, c[0], c[1]]
    most = np.array([max(s.size - f, 0) for s, f in zip(segments, floor)], np.int32)
    n_drop = min(n_drop, int(most.sum()))
    arrays = [jnp.asarray(x, jnp.float32) for x in (a, b, c)]
    _, masks = drop_globally(arrays, n_drop, most)
    got = np.concatenate([np.ravel(m) for m in masks])
    np.testing.assert_array_equal(got, global_oracle(segments, n_drop, most))


@functools.partial(jax.jit, static_argnames="group")
def drop_by_groups(scores, kept, n_drop, most, hint, group):
    n_drop = wide.Wide(n_drop >> wide.BITS, n_drop & (1 << wide.BITS) - 1)
    counts, hint = selection.common_threshold(
        scores, TENSORS, n_drop, most=most, kept=kept, hint=hint, group=np.array(group)
    )
    return counts, selection.keep_masks(scores, TENSORS, counts, kept=kept, hint=hint)


def split(flat):
    """One part per segment of `TENSORS`."""
    return np.split(np.asarray(flat), np.cumsum([6, 12, 6]))


def arrays_of(flat):
    return [flat[:6], flat[6:18].reshape(3, 4), flat[18:].reshape(2, 3, 2)]


@settings(max_examples=examples(400))
@given(
    score_arrays([(30,)]),
    st.sampled_from([(0, 0, 0, 1), (0, 1, 0, 1), (0, 1, 1, 2), (0, 1, 2, 3)]),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
    st.integers(0, 2**32 - 1),
    st.one_of(st.just(NO_KEY), st.integers(-TOP_KEY, TOP_KEY)),
)
def test_every_group_shares_a_threshold_of_its_own(
    scores, group, parts, floor, bits, hint
):
    scores = np.where(scores == -np.inf, -1.0, scores).astype(np.float32)
    kept = np.random.default_rng(bits).random(30) < 0.7
    kept |= bits % 3 == 0  # or nothing is dropped so far
    most = np.array([max(len(s) - f, 0) for s, f in zip(split(scores), floor)])
    room = np.bincount(group, most).astype(int)
    n_drop = [round(part * n) for part, n in zip(parts, room)]
    counts, (got, keys) = drop_by_groups(
        *(list(map(jnp.asarray, arrays_of(x))) for x in (scores, kept)),
        jnp.array(n_drop, jnp.int32),
        most.astype(np.int32),
        jnp.full(4, hint, jnp.int32),
        group,
    )
    ranked = split(np.where(kept, scores, -np.inf))
    for number, n in enumerate(n_drop):
        own = [i for i in range(4) if group[i] == number]
        want = global_oracle([ranked[i] for i in own], n, most[own])
        masks = split(np.concatenate([np.ravel(m) for m in got]))
        np.testing.assert_array_equal(np.concatenate([masks[i] for i in own]), want)
        enough = sum(np.count_nonzero(~np.isnan(ranked[i])) for i in own) >= n
        assert sum(int(counts[i]) for i in own) == n or not enough


def test_infinite_scores_everywhere_do_not_stall_a_common_threshold():
    arrays = [jnp.full(t.shape, jnp.inf) for t in TENSORS]
    counts, masks = drop_globally(arrays, 15, np.array([6, 12, 6, 6], np.int32))
    np.testing.assert_array_equal(counts, [0, 3, 6, 6])  # later segments first
    assert sum(int(m.sum()) for m in masks) == 15


def test_a_million_scores_with_ten_values_are_split_exactly():
    scores = np.random.default_rng(0).integers(0, 10, (1000, 1000)).astype(np.float32)
    for n_keep in (1, 333_333, 999_999):
        got = keep_top(scores, n_keep)
        np.testing.assert_array_equal(got, oracle(scores, scores.size - n_keep))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_float_dtype_is_split_exactly(dtype):
    scores = jnp.asarray(np.random.default_rng(1).standard_normal((64, 64)), dtype)
    got = mj.keep_top(scores, 410)
    np.testing.assert_array_equal(got, oracle(np.asarray(scores, np.float32), 3686))


@pytest.mark.parametrize("n_keep, want", [(-3, 0), (0, 0), (4, 4), (9, 4), (2**40, 4)])
def test_a_count_outside_the_array_is_clipped(n_keep, want):
    assert mj.keep_top(jnp.arange(4.0), n_keep).sum() == want


def test_a_scalar_and_an_empty_array_are_handled():
    assert mj.keep_top(jnp.float32(2.0), 1)
    assert not mj.keep_top(jnp.float32(2.0), 0)
    assert mj.keep_top(jnp.zeros((0, 3)), 1).shape == (0, 3)


@pytest.mark.parametrize("n_keep", [2**40, np.int64(2**40), np.uint32(2**32 - 1)])
def test_more_than_there_is_keeps_everything(n_keep):
    assert mj.keep_top(jnp.arange(4.0), n_keep).all()
    traced = jnp.uint32(2**32 - 1)
    assert jax.jit(mj.keep_top)(jnp.arange(4.0), traced).all()


def test_a_fraction_instead_of_a_count_is_refused():
    with pytest.raises(TypeError, match="`n_keep` must be a count, an integer"):
        mj.keep_top(jnp.arange(4.0), 0.5)


def test_a_tensor_too_large_to_count_is_refused_by_name():
    huge = Tensor("huge", (2**16, 2**15))
    for allocation in (mj.Uniform(), mj.ErdosRenyi(), mj.PerPath({"huge": 0.5})):
        with pytest.raises(
            ValueError, match="'huge' ranks more than 2147483647.*stacked="
        ):
            allocation.check([huge])
        allocation.check([Tensor("huge", (2**16, 2**15), stacked=1)])
    mj.Global().check([huge])


def test_an_array_as_large_as_a_count_can_be_is_ranked():
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    most = jax.eval_shape(mj.keep_top, array((2**31 - 1,)), array((), dtype=jnp.int32))
    assert (most.shape, most.dtype) == ((2**31 - 1,), bool)
    with pytest.raises(ValueError, match="`scores` has 2147483648 elements, more than"):
        jax.eval_shape(mj.keep_top, array((2**31,)), array((), dtype=jnp.int32))


def test_a_common_threshold_counts_tensors_too_large_for_one_number_by_slices():
    tensor = Tensor("huge", (4, 2**15, 2**15))
    assert (tensor.leading, tensor.segments, tensor.size) == (1, 4, 2**30)
    mj.Global().check([tensor])


def test_only_the_mask_depends_on_the_scores_under_a_derivative():
    def kept_sum(sparsity, scores):
        n_keep = jnp.int32(4 - jnp.round(sparsity * 4))
        return jnp.where(mj.keep_top(scores, n_keep), scores, 0.0).sum()

    slopes = jax.grad(kept_sum, argnums=(0, 1))(0.5, jnp.array([3.0, 1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(slopes[0], 0.0)
    np.testing.assert_array_equal(slopes[1], [1.0, 0.0, 0.0, 1.0])


MILLION = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)


def compiled_step(sparsity):
    tx = mj.movement_pruning(sparsity, allocation=mj.Global())

    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = {"kernel": MILLION}
    opt_state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, params)


def temporary_bytes(lowered):
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "program",
    [lambda: keep_top.lower(MILLION, 500), lambda: compiled_step(mj.cubic(0.9, 0, 9))],
    ids=["keep_top", "train step"],
)
def test_nothing_is_sorted_or_gathered(program):
    text = program().compile().as_text()
    for operation in (" sort(", " gather(", "top-k", "topk", "TopK", "all-gather"):
        assert operation not in text


def test_ranking_needs_less_than_a_hundredth_of_the_scores_as_temporary_memory():
    scores = MILLION.size * 4
    assert temporary_bytes(keep_top.lower(MILLION, 500)) < 0.01 * scores
    only_tracking = temporary_bytes(compiled_step(None))
    pruning = temporary_bytes(compiled_step(mj.cubic(0.9, 0, 9)))
    assert pruning - only_tracking < 0.01 * scores


@pytest.mark.parametrize(
    "value", [0.0, 1e-40, 2.0**-126, 1.0, 3e38, -(2.0**-126), -7.0]
)
def test_a_key_stands_for_the_largest_float_that_has_it(value):
    key = counting.key_of(value)
    found = np.asarray(counting.to_float(jnp.int32(key)))
    assert counting.key_of(found) == key
    with np.errstate(under="ignore"):
        assert counting.key_of(np.nextafter(found, np.float32(np.inf))) == key + 1


def test_all_that_is_too_small_to_count_has_one_key():
    assert np.asarray(counting.to_float(jnp.int32(0))).view(np.int32) == 0x007FFFFF
