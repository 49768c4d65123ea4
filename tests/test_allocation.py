from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import movement_jax as mj
from movement_jax import selection
from movement_jax.allocation import drop_count, most_dropped
from movement_jax.counting import Tensor
from movement_jax.schedules import Target

LARGEST = 2**31 - 1
SIZES = st.one_of(
    st.integers(1, 100),
    st.integers(1, LARGEST),
    st.integers(-2, 2).map(lambda d: 2**24 + d),
    st.integers(0, 2).map(lambda d: LARGEST - d),
)
FRACTIONS = st.one_of(
    st.floats(0, 1, width=32),
    st.sampled_from([0.0, 1.0, 0.5, 0.25, 2**-24, 2**-31, 2**-40, 1 - 2**-24]),
)
SHAPES = {"big": (8, 8), "long": (4, 16), "small": (2, 8)}
TENSORS = [Tensor(name, shape) for name, shape in SHAPES.items()]
COUNTS = np.array([64, 64, 16])

pytestmark = pytest.mark.computes


def dropped(allocation, sparsity, tensors=TENSORS, scores=None):
    if scores is None:
        scores = [jnp.zeros(t.shape) for t in tensors]
    target = sparsity if isinstance(sparsity, Target) else Target(sparsity)
    counts, _ = allocation.n_drop(target, tensors, scores, None)
    return np.asarray(counts)


@settings(max_examples=examples(250))
@given(FRACTIONS, st.integers(1, LARGEST), st.integers(0, 3))
def test_a_traced_fraction_of_any_size_is_rounded_exactly(sparsity, size, spread):
    sizes = np.array([size, LARGEST - spread, 2**24 + spread, spread + 1])
    got = drop_count(Target(jnp.float32(sparsity)), sizes)
    exact = Fraction(float(np.float32(sparsity)))
    assert got.tolist() == [round(exact * int(n)) for n in sizes]


@settings(max_examples=examples(300))
@given(st.floats(0, 1), SIZES)
def test_a_python_fraction_is_rounded_on_the_host(sparsity, size):
    got = drop_count(Target(sparsity), np.array([size]))
    assert got.tolist() == [round(sparsity * size)]
    error = abs(Fraction(sparsity) * size - int(got[0]))
    assert error <= Fraction(1, 2) + Fraction(1, 2**21)  # the product is a float64


def test_a_float32_product_would_have_been_wrong():
    size = 30_198_992
    assert drop_count(Target(0.9), np.array([size])).tolist() == [27_179_093]
    assert drop_count(Target(0.0), np.array([2**24 + 1])).tolist() == [0]
    assert drop_count(Target(1), np.array([2**24 + 1])).tolist() == [2**24 + 1]


def test_the_end_of_a_schedule_counts_with_the_exact_final_sparsity():
    size = np.array([1_000_000_007])
    schedule = mj.cubic(0.9, begin=0, end=10)
    count = jax.jit(lambda step: drop_count(schedule.target(step), size))
    assert count(10).tolist() == [900_000_006]
    nine_tenths = Fraction(float(np.float32(0.9)))
    assert round(nine_tenths * 1_000_000_007) != 900_000_006  # float32 is off by 17


def test_an_allocation_of_ones_own_without_a_floor_may_empty_a_tensor():
    assert most_dropped(np.array([5, 1]), object()).tolist() == [5, 1]


def test_halves_are_rounded_to_even():
    sizes = np.array([1, 3, 5, 7])
    assert drop_count(Target(0.5), sizes).tolist() == [0, 2, 2, 4]
    assert drop_count(Target(jnp.float32(0.5)), sizes).tolist() == [0, 2, 2, 4]


def test_uniform_gives_every_tensor_the_same_sparsity():
    np.testing.assert_array_equal(dropped(mj.Uniform(), 0.75), [48, 48, 12])


def test_uniform_counts_every_layer_of_a_stack():
    tensors = [Tensor("layers", (3, 2, 5), stacked=1), Tensor("head", (4, 2))]
    np.testing.assert_array_equal(dropped(mj.Uniform(), 0.5, tensors), [5, 5, 5, 4])


@pytest.mark.parametrize(
    "min_keep, want", [(1, [63, 63, 15]), (0, [64, 64, 16]), (0.1, [57, 57, 14])]
)
@pytest.mark.parametrize("allocation", [mj.Uniform, mj.Global, mj.ErdosRenyi])
def test_no_tensor_falls_below_its_floor(allocation, min_keep, want):
    got = dropped(allocation(min_keep=min_keep), 1.0)
    np.testing.assert_array_equal(got, want)


def test_a_common_threshold_takes_the_lowest_scores_wherever_they_are():
    scores = [jnp.full((8, 8), 3.0), jnp.full((4, 16), 1.0), jnp.full((2, 8), 2.0)]
    got = dropped(mj.Global(min_keep=0), 0.5, scores=scores)
    np.testing.assert_array_equal(got, [0, 64, 8])


def test_a_tensor_of_small_scores_keeps_its_floor_under_a_common_threshold():
    scores = [jnp.full((8, 8), 3.0), jnp.full((4, 16), 1e-9), jnp.full((2, 8), 2.0)]
    got = dropped(mj.Global(min_keep=0.25), 0.5, scores=scores)
    np.testing.assert_array_equal(got, [12, 48, 12])


def test_erdos_renyi_densities_follow_the_shapes():
    # Raw densities: 16/64, 20/64, 10/16. Half of 144 weights stay, so the scale is
    # 72 / (16 + 20 + 10) and the tensors keep 25.04, 31.3 and 15.65.
    np.testing.assert_array_equal(dropped(mj.ErdosRenyi(), 0.5), [39, 33, 0])


def test_erdos_renyi_fills_a_tensor_before_it_gives_to_others():
    # Keeping 108: the scale 108/46 would give the small tensor 1.47 of its weights.
    # It is full at 16, and 92 are left for 16 + 20: 40.9 and 51.1.
    np.testing.assert_array_equal(dropped(mj.ErdosRenyi(), 0.25), [64 - 41, 64 - 51, 0])


@settings(max_examples=examples(60))
@given(st.floats(0, 1), st.sampled_from([0, 1, 3]))
def test_erdos_renyi_reaches_the_total_exactly(sparsity, min_keep):
    got = dropped(mj.ErdosRenyi(min_keep=min_keep), sparsity)
    assert got.sum() == min(round(sparsity * 144), 144 - 3 * min_keep)
    assert np.all(got >= 0) and np.all(got <= COUNTS - min_keep)


def test_the_first_pattern_found_in_a_path_wins():
    rules = {"^long": 0.25, "l": 0.5}
    np.testing.assert_array_equal(dropped(mj.PerPath(rules), 0.75), [48, 16, 8])


def test_rules_rise_in_proportion_to_the_schedule():
    allocation = mj.PerPath({"long": 0.5})
    target = mj.linear(0.8, begin=0, end=4).target(2)
    np.testing.assert_array_equal(dropped(allocation, target), [26, 16, 6])


def test_rules_end_at_their_exact_sparsity():
    tensors = [Tensor("a", (1000, 30_199)), Tensor("b", (10, 10))]
    allocation = mj.PerPath({"a": 0.9})
    target = mj.cubic(0.8, begin=0, end=4).target(4)
    got = allocation.n_drop(target, tensors, [], None)[0]
    np.testing.assert_array_equal(got, [round(0.9 * 30_199_000), 80])


def test_a_rule_keeps_its_floor():
    allocation = mj.PerPath({"small": 1.0, ".": 0.0}, min_keep=2)
    np.testing.assert_array_equal(dropped(allocation, 0.5), [0, 0, 14])


@pytest.mark.parametrize(
    "rules, unused", [({"head": 0.5}, "head"), ({"": 0.5, "long": 0.1}, "long")]
)
def test_a_pattern_that_decides_nothing_is_refused_with_the_paths(rules, unused):
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in SHAPES.items()}
    tx = mj.movement_pruning(0.5, allocation=mj.PerPath(rules))
    with pytest.raises(
        ValueError,
        match=rf"(?s)`PerPath` has patterns .*'{unused}'.*big/kernel\n  long/",
    ):
        tx.init(params)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: mj.Uniform(min_keep=-1),
            ValueError,
            "`min_keep` must be a count of at least 0 or a fraction",
        ),
        (lambda: mj.Global(min_keep=1.5), ValueError, "got 1.5"),
        (lambda: mj.Global(min_keep=float("nan")), ValueError, "got nan"),
        (
            lambda: mj.ErdosRenyi(min_keep=True),
            TypeError,
            "`min_keep` must be a number, got True of type bool",
        ),
        (lambda: mj.PerPath({"a": 0.5}, min_keep="1"), TypeError, "got '1'"),
        (lambda: mj.PerPath({"a": 50}), ValueError, r"rules\['a'\].*mean 0.5"),
        (
            lambda: mj.PerPath({"(": 0.5}),
            ValueError,
            r"`rules` takes regular expressions, and '\('",
        ),
        (
            lambda: mj.Global(per="("),
            ValueError,
            r"`per` takes regular expressions, and '\('",
        ),
        (lambda: mj.Global(per=3), ValueError, "expressions, and 3 is none"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_too_many_weights_of_one_tensor_in_groups_of_a_size_are_refused():
    tensors = [Tensor("a", (2**29,), block=(8,)), Tensor("b", (4,), block=(1,))]
    for allocation in (mj.Global(), mj.ErdosRenyi()):
        name = type(allocation).__name__
        with pytest.raises(
            ValueError, match=rf"`{name}\(\)` with groups of different sizes counts"
        ):
            allocation.n_drop(Target(0.5), tensors, [], None)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_erdos_renyi_reaches_a_total_beyond_an_int32_exactly(sparsity):
    shapes = [(2**15, 2**15), (2**15, 2**14), (2**13, 2**15), (2**15, 2**15)]
    shapes += [(2**10, 2**8), (1000, 30), (64, 7)]
    tensors = [Tensor(str(i), shape) for i, shape in enumerate(shapes)]
    total = sum(t.size for t in tensors)
    assert total > 2**31
    exact = Fraction(float(np.float32(sparsity)))
    for level, want in ((sparsity, round(sparsity * total)), (None, None)):
        want = round(exact * total) if want is None else want
        level = jnp.float32(sparsity) if level is None else level
        got = dropped(mj.ErdosRenyi(min_keep=0), level, tensors, []).astype(np.int64)
        assert got.sum() == want
        kept = np.array([t.size for t in tensors]) - got
        if sparsity == 0.999:
            sums = np.array([sum(t.shape) for t in tensors])
            density = (kept / sums)[:-3]  # the small one is full
            np.testing.assert_allclose(density, density[0], rtol=1e-4)


LAYERS = {
    "layer_1/up": (4, 3),
    "layer_10/up": (2, 2),
    "layer_1/down": (8,),
    "head": (5, 2),
    "blocks/up": (3, 4, 2),
    "blocks/down": (3, 6),
    "tail": (4,),
}
STACKED = [Tensor(k, v, int(k.startswith("blocks"))) for k, v in LAYERS.items()]


def numpy_by_layer(scores, sparsity, key):
    """Masks by a sort of all scores of a group, in the order of the tensors."""
    flat, owner = [], []
    for tensor, x in zip(STACKED, scores):
        layers = len(x) if tensor.stacked else 1
        flat.append(np.ravel(x))
        for layer in range(layers):
            owner += [key(tensor.name, layer)] * (x.size // layers)
    flat, mask = np.concatenate(flat), np.ones(len(owner), bool)
    for each in set(owner):
        at = np.array([i for i, own in enumerate(owner) if own == each])
        order = np.lexsort((-at, flat[at]))[: round(sparsity * len(at))]
        mask[at[order]] = False
    return np.split(mask, np.cumsum([x.size for x in scores])[:-1])


@pytest.mark.parametrize(
    "per, key",
    [
        (r"layer_\d+", lambda name, _: name.split("/")[0] if "layer" in name else ""),
        ("blocks/", lambda name, layer: layer if "blocks" in name else -1),
        (
            r"layer_\d+|blocks",
            lambda name, i: (name.split("/")[0], i) if "/" in name else "",
        ),
        (
            "up|down",
            lambda name, i: (name.split("/")[1], i, "b" in name) if "/" in name else "",
        ),
        (".*", lambda name, layer: (name, layer)),
        ("", lambda name, layer: (layer, "blocks" in name)),
    ],
)
@pytest.mark.parametrize("most", [2**31 - 1, 5])
def test_every_layer_has_a_threshold_of_its_own(
    per, key, most, monkeypatch, traced_anew
):
    monkeypatch.setattr("movement_jax.counting.MAX_COUNT", most)
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 6, s).astype(np.float32) for s in LAYERS.values()]
    arrays = list(map(jnp.asarray, scores))
    allocation = mj.Global(min_keep=0, per=per)
    allocation.check(STACKED)
    hint = None
    for sparsity in (0.3, 0.7):
        target = Target(jnp.float32(sparsity))
        n_drop, key_at = allocation.n_drop(target, STACKED, arrays, None, hint)
        got, hint = selection.keep_masks(arrays, STACKED, n_drop, hint=key_at)
        want = numpy_by_layer(scores, sparsity, key)
        for mask, expected in zip(got, want):
            np.testing.assert_array_equal(np.ravel(mask), expected)


def test_a_layer_keeps_the_floor_of_its_tensors_and_its_own_total():
    tensors = [Tensor(name, (6, 2)) for name in ("0/a", "0/b", "1/a", "1/b")]
    scores = [jnp.full((6, 2), x) for x in (1.0, 2.0, 4.0, 3.0)]
    got = dropped(mj.Global(min_keep=0.25, per=r"\d"), 0.5, tensors, scores)
    np.testing.assert_array_equal(got, [9, 3, 3, 9])
    got = dropped(mj.Global(min_keep=2, per=r"\d"), 1.0, tensors, scores)
    np.testing.assert_array_equal(got, [10, 10, 10, 10])


def test_layers_follow_a_schedule_to_its_exact_end():
    tensors = [Tensor(name, (1000, 1000)) for name in ("0/a", "0/b", "1/a")]
    scores = [jnp.arange(1e6, dtype=jnp.float32).reshape(1000, 1000)] * 3
    target = mj.cubic(0.9, begin=0, end=10).target(10)
    got = dropped(mj.Global(per=r"\d"), target, tensors, scores)
    np.testing.assert_array_equal(got, [900_000] * 3)


def test_a_pattern_of_layers_must_be_found_in_a_path():
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in SHAPES.items()}
    tx = mj.movement_pruning(0.5, allocation=mj.Global(per="layer_"))
    with pytest.raises(
        ValueError, match=r"(?s)per='layer_'\)` groups nothing.*big/kernel\n  long/"
    ):
        tx.init(params)
    mj.movement_pruning(0.5, allocation=mj.Global(per="big")).init(params)
    tx = mj.movement_pruning(allocation=mj.Global(per="big"), structure=mj.NM(2, 4))
    tx.init(params)  # the pattern is right, though windows have no threshold


def test_what_a_threshold_is_shared_by_is_part_of_how_it_was_pruned():
    assert repr(mj.Global(min_keep=3)) == "Global(min_keep=3)"
    assert repr(mj.Global(per="a/")) == "Global(min_keep=1, per='a/')"
    assert mj.Global(per="a/") != mj.Global()


class ScannedMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(8, name="down")(nn.Dense(16, name="up")(x)), None

        split = {"params": True}
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs=split, length=3)
        return nn.Dense(4, name="head")(scan(name="blocks")(x, None)[0])


def layer_of(params, i):
    return jax.tree.map(lambda w: w[i], params["blocks"])


def test_layers_of_a_scanned_model_are_pruned_as_those_of_one_without():
    x = jax.random.normal(jax.random.key(0), (4, 8))
    scanned = ScannedMLP().init(jax.random.key(1), x)["params"]
    apart = {f"layer_{i}": layer_of(scanned, i) for i in range(3)}
    apart["head"] = scanned["head"]

    def pruned(params, **options):
        tx = mj.movement_pruning(mj.cubic(0.8, 0, 3), mj.Magnitude(), **options)
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            grads = jax.tree.map(jnp.ones_like, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(4):
            params, state = step(params, state)
        assert step._cache_size() == 1
        params, state = jax.jit(mj.prune)((params, state), 0.9)
        report = mj.agreement((params, state), mj.Random(0), sparsity=0.9)
        assert report.total.both + report.total.only_a == sum(
            round(0.9 * n) for n in [256] * 3 + [32]
        )
        assert mj.summary((params, state)).total.asked == 0.9
        return params

    got = pruned(scanned, allocation=mj.Global(per="blocks/"), stacked="blocks/")
    want = pruned(apart, allocation=mj.Global(per=r"layer_\d"))
    np.testing.assert_array_equal(got["head"]["kernel"], want["head"]["kernel"])
    for i in range(3):
        layer = layer_of(got, i)
        jax.tree.map(np.testing.assert_array_equal, layer, want[f"layer_{i}"])
        zeros = [int((layer[k]["kernel"] == 0).sum()) for k in ("up", "down")]
        assert sum(zeros) == round(0.9 * 256)


def traced_step(params, **options):
    tx = mj.movement_pruning(mj.cubic(0.5, 0, 9), mj.Magnitude(), **options)
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state, params)
    return state


def test_a_common_threshold_takes_any_number_of_slices():
    params = {"kernel": jax.ShapeDtypeStruct((2**17, 2, 2), jnp.float32)}
    state = traced_step(params, allocation=mj.Global(), stacked=".")
    assert state.thresholds.shape == (2**17,)
    params = {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    state = traced_step(params, allocation=mj.Global())
    assert state.thresholds.shape == (2**16,)


@pytest.mark.parametrize(
    "structure, groups", [(mj.Block((16, 16)), 1), (mj.NM(2, 4), 0)], ids=repr
)
@pytest.mark.parametrize(
    "allocation",
    [mj.Uniform(), mj.Global(), mj.ErdosRenyi(), mj.PerPath({"kernel": 0.25})],
    ids=repr,
)
def test_only_what_is_ranked_must_be_countable(allocation, structure, groups):
    params = {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    state = traced_step(params, allocation=allocation, structure=structure)
    assert state.thresholds.shape == (groups,)


def test_a_pattern_may_decide_for_windows_alone():
    structure = {"a": mj.NM(2, 4), ".": mj.Block((2, 2))}
    params = {name: {"kernel": jnp.ones((8, 8))} for name in "ab"}
    allocation = mj.PerPath({"a": 0.25})
    tx = mj.movement_pruning(
        None, mj.Magnitude(), allocation=allocation, structure=structure
    )
    params, _ = mj.prune((params, tx.init(params)), 0.5)
    assert [int(jnp.sum(params[k]["kernel"] == 0)) for k in "ab"] == [16, 32]


def test_rules_prune_nothing_at_an_overall_sparsity_of_zero():
    tx = mj.movement_pruning(
        criterion=mj.Magnitude(), allocation=mj.PerPath({"a": 0.9})
    )
    params = {"a": {"kernel": jnp.ones((5, 4))}, "b": {"kernel": jnp.ones((5, 4))}}
    state = (params, tx.init(params))
    for prune in (mj.prune, jax.jit(mj.prune)):
        assert mj.sparsity_of(prune(state, 0.0)) == 0
        assert mj.sparsity_of(prune(state, 0.5)) == np.float32(28 / 40)


def test_a_last_rule_of_zero_leaves_all_other_tensors_dense():
    allocation = mj.PerPath({"a": 0.9, ".": 0.0})
    tx = mj.movement_pruning(criterion=mj.Magnitude(), allocation=allocation)
    params = {"a": {"kernel": jnp.ones((5, 4))}, "b": {"kernel": jnp.ones((5, 4))}}
    params, _ = mj.prune((params, tx.init(params)), 0.5)
    assert [int(jnp.sum(params[k]["kernel"] == 0)) for k in "ab"] == [18, 0]
