from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import movement_jax as mj
from movement_jax.allocation import drop_count
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
    with pytest.raises(ValueError, match=rf"(?s)\['{unused}'\].*big/kernel\n  long/"):
        tx.init(params)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: mj.Uniform(min_keep=-1), ValueError, "at least 0 or a fraction"),
        (lambda: mj.Global(min_keep=1.5), ValueError, "got 1.5"),
        (lambda: mj.Global(min_keep=float("nan")), ValueError, "got nan"),
        (lambda: mj.ErdosRenyi(min_keep=True), TypeError, "must be a number, got True"),
        (lambda: mj.PerPath({"a": 0.5}, min_keep="1"), TypeError, "got '1'"),
        (lambda: mj.PerPath({"a": 50}), ValueError, r"rules\['a'\].*mean 0.5"),
        (lambda: mj.PerPath({"(": 0.5}), ValueError, r"no regular expression: '\('"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_too_many_weights_of_one_tensor_in_groups_of_a_size_are_refused():
    tensors = [Tensor("a", (2**29,), block=(8,)), Tensor("b", (4,), block=(1,))]
    with pytest.raises(
        ValueError, match=r"`Global\(\)` with groups of different sizes"
    ):
        mj.Global().n_drop(Target(0.5), tensors, [], None)


def test_too_many_weights_for_one_density_scale_are_refused():
    tensors = [Tensor("a", (2**30,)), Tensor("b", (2**30,))]
    with pytest.raises(ValueError, match=r"`ErdosRenyi\(\)` counts 2147483648"):
        mj.ErdosRenyi().n_drop(Target(0.5), tensors, [], None)


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
