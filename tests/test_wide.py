"""Counts in two parts against Python's integers, with parts small enough to carry."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import movement_jax as mj
from movement_jax import counting, masking, selection, wide
from movement_jax.allocation import Global, drop_total
from movement_jax.counting import Tensor
from movement_jax.schedules import Target

BITS = (3, 16)
counts = st.lists(st.integers(0, 300), min_size=1, max_size=20)
large = st.integers(0, 2**33)


@pytest.fixture(params=BITS, autouse=True)
def bits(request, monkeypatch, traced_anew):
    monkeypatch.setattr(wide, "BITS", request.param)


def value(number):
    high, low = np.asarray(number.high), np.asarray(number.low)
    assert (low >= 0).all() and (low < 2**wide.BITS).all()
    return (high.astype(np.int64) << wide.BITS) + low


@settings(deadline=None, max_examples=examples(50))
@given(counts)
def test_sums_carry(numbers):
    array = jnp.asarray(numbers, jnp.int32)
    assert value(wide.total(array)) == sum(numbers)
    after = [sum(numbers[i + 1 :]) for i in range(len(numbers))]
    np.testing.assert_array_equal(value(wide.sums_after(array)), after)
    before = [sum(numbers[:i]) for i in range(len(numbers))]
    np.testing.assert_array_equal(value(wide.sums_before(array)), before)


@pytest.mark.parametrize("n", [2**15 - 1, 2**15, 2**15 + 1, 100_003])
def test_sums_carry_however_many_there_are(n):
    most = min(2 ** (31 + wide.BITS) // n, 2**31) - 1
    full = np.full(n, (most + 1 >> wide.BITS << wide.BITS) - 1)  # low digits of ones
    near = np.random.default_rng(n).integers(most - 3, most, n, endpoint=True)
    for numbers in (near, full):
        array, total = jnp.asarray(numbers, jnp.int32), numbers.sum()
        assert value(wide.total(array)) == total
        np.testing.assert_array_equal(value(wide.total(array[None], -1)), [total])
        after = total - np.cumsum(numbers)
        np.testing.assert_array_equal(value(wide.sums_after(array)), after)


@settings(deadline=None, max_examples=examples(100))
@given(large, large, st.integers(0, 2**31 - 1))
def test_numbers_compare_and_subtract(a, b, most):
    x, y = wide.from_int(a), wide.from_int(b)
    assert value(x) == a
    assert wide.at_least(x, y) == (a >= b)
    assert value(wide.minimum(x, y)) == min(a, b)
    assert value(wide.minus(x, y)) == a - b
    assert wide.clipped(wide.minus(x, y), jnp.int32(most)) == min(max(a - b, 0), most)


@pytest.mark.parametrize("number", [0, 1, 7, 8, 65_537, 10**6 - 1, 2**33 + 12345])
def test_a_number_is_the_nearest_float_or_nearly(number):
    got = float(wide.to_float(wide.from_int(number)))
    assert abs(got - number) <= number * 2**-23


@pytest.mark.parametrize("n_drop", [0, 1, 7, 8, 9, 63, 64, 65, 200, 299, 300])
def test_a_common_threshold_is_exact_when_counts_carry(n_drop):
    rng = np.random.default_rng(n_drop)
    scores = [rng.integers(0, 9, (10, 10)).astype(np.float32) for _ in range(3)]
    tensors = [Tensor(str(i), (10, 10)) for i in range(3)]
    most = jnp.full(3, 100, jnp.int32)
    got, _ = selection.common_threshold(
        [jnp.asarray(s) for s in scores], tensors, wide.from_int(n_drop), most=most
    )
    joined = np.concatenate([s.ravel() for s in scores])
    order = np.lexsort((-np.arange(300), joined))[:n_drop]  # of ties the last first
    np.testing.assert_array_equal(got, np.bincount(order // 100, minlength=3))


def test_slices_of_one_tensor_under_a_common_threshold_are_ranked_as_a_whole(
    monkeypatch,
):
    monkeypatch.setattr("movement_jax.counting.MAX_COUNT", 50)
    tensor = Tensor("large", (4, 5, 6))
    assert tensor.segments == 4
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.integers(0, 5, (4, 5, 6)), jnp.float32)
    n_drop, hint = Global().n_drop(Target(0.55), [tensor], [scores], None)
    (mask,), _ = selection.keep_masks([scores], [tensor], n_drop, hint=hint)
    order = np.lexsort((-np.arange(120), np.asarray(scores).ravel()))
    expected = np.ones(120, bool)
    expected[order[:66]] = False
    np.testing.assert_array_equal(np.asarray(mask).ravel(), expected)


def test_more_slices_than_low_parts_can_be_added_are_ranked_as_a_whole():
    tensor = Tensor("many", (40_000, 3), stacked=1)
    scores = np.random.default_rng(0).integers(0, 5, tensor.shape).astype(np.float32)
    allocation, arrays = Global(min_keep=0), [jnp.asarray(scores)]
    n_drop, hint = allocation.n_drop(Target(0.55), [tensor], arrays, None)
    (mask,), _ = selection.keep_masks(arrays, [tensor], n_drop, hint=hint)
    expected = np.ones(120_000, bool)
    expected[np.lexsort((-np.arange(120_000), scores.ravel()))[:66_000]] = False
    np.testing.assert_array_equal(np.ravel(mask), expected)


@pytest.mark.parametrize("size", [1, 1000, 2**31 + 5, 7 * 10**9 + 3, 2**40 + 1])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.999, 1.0])
def test_a_share_of_a_large_total_is_rounded_exactly(size, sparsity):
    if size >= 2 ** (31 + wide.BITS):
        return
    exact = np.float32(sparsity).item()
    assert value(drop_total(Target(exact), size)) == round(exact * size)
    if wide.BITS == 16:
        traced = drop_total(Target(jnp.float32(sparsity)), size)
        assert value(traced) == round(Fraction(exact) * size)
    jax.config.update("jax_enable_x64", True)
    try:
        traced = drop_total(Target(jnp.float64(sparsity)), size)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert value(traced) == round(sparsity * size)


def test_the_end_of_a_schedule_counts_a_total_with_the_exact_final_sparsity():
    if wide.BITS != 16:
        return
    schedule = mj.cubic(0.9, begin=0, end=10)
    total = jax.jit(lambda step: drop_total(schedule.target(step), 10**9 + 7))
    assert value(total(10)) == 900_000_006  # a float32 is off by 17


def test_what_changes_in_a_large_tensor_is_told_right(monkeypatch):
    old = np.random.default_rng(0).random((5, 6, 7)) < 0.5
    new = np.random.default_rng(1).random((5, 6, 7)) < 0.4
    moved = min((old & ~new).sum(), (~old & new).sum())
    for most in (2**31 - 1, 50, 8):
        monkeypatch.setattr("movement_jax.counting.MAX_COUNT", most)
        churn = masking.churn_of({"a": jnp.asarray(old)}, {"a": jnp.asarray(new)}, ())
        assert churn == np.float32(2 * moved / 210)
        dropped, kept = counting.tally_all((~jnp.asarray(old), jnp.asarray(old)))
        assert (dropped, kept) == ((~old).sum(), old.sum())


@pytest.mark.parametrize(
    "criterion", [mj.Taylor(), mj.SoftMovement(penalty=1.0)], ids=["sparsity", "soft"]
)
def test_weights_beyond_an_int32_in_one_tensor_may_come_back(criterion):
    params = {"kernel": jax.ShapeDtypeStruct((4, 2**15, 2**15), jnp.float32)}
    tx = mj.movement_pruning(
        mj.cubic(0.9, 0, 9) if isinstance(criterion, mj.Taylor) else None,
        criterion,
        allocation=mj.Global(),
        inner=optax.sgd(0.1),
        regrow=True,
    )
    state = jax.eval_shape(tx.init, params)
    _, new = jax.eval_shape(tx.update, params, state, params)
    assert new.events.churn.shape == ()
