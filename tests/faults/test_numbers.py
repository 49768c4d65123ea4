"""Numbers that are not finite, too small, too large, or equal."""

import contextlib
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import movement_jax as mj
from movement_jax import counting, wide
from movement_jax.allocation import drop_count, drop_total
from movement_jax.schedules import Target

from . import naive
from .subjects import (
    HALF,
    KERNEL,
    NAIVE,
    OURS,
    PARAMS,
    SORTING,
    alike,
    all_finite,
    bits,
    both,
    mask_of,
    pull,
    train,
)


def poisoned(tree, value, index=(1, 2)):
    return {"kernel": tree["kernel"].at[index].set(value)}


@both("the NaN stays in the average, and no score lies above a quantile of NaN")
def test_A1_one_nan_weight_does_not_cost_the_layer(subject):
    tx = optax.chain(optax.sgd(0.1), subject.pruning())
    good, opt_state = train(tx)
    _, opt_state = train(tx, (poisoned(good, np.nan), opt_state), 1)
    state = train(tx, (good, opt_state), 20)
    _, opt_state = subject.prune(state, 0.5)
    assert mask_of(subject, opt_state).sum() == HALF
    assert all_finite(subject.state(opt_state).scores)


@both("as for a weight")
def test_A2_one_nan_gradient_does_not_cost_the_layer(subject):
    tx = subject.by_gradient(optax.sgd(0.1))
    good, opt_state = train(tx)
    grads = poisoned(pull(good), np.nan)
    _, opt_state = train(tx, (good, opt_state), 1, grads)
    state = train(tx, (good, opt_state), 20)
    _, opt_state = subject.prune(state, 0.5)
    assert mask_of(subject, opt_state).sum() == HALF
    assert all_finite(subject.state(opt_state).scores)


@both("the score becomes -Inf, and then NaN")
def test_A3_infinities_of_both_signs_stay_out_of_the_score(subject):
    tx = subject.by_gradient(optax.sgd(0.1))
    good, opt_state = train(tx)
    for value in (np.inf, -np.inf):
        grads = poisoned(pull(good), value)
        _, opt_state = train(tx, (good, opt_state), 1, grads)
    state = train(tx, (good, opt_state), 5)
    _, opt_state = subject.prune(state, 0.5)
    assert mask_of(subject, opt_state).sum() == HALF
    assert all_finite(subject.state(opt_state).scores)


@both("the threshold is NaN, and everything goes", naive=SORTING)
def test_A4_nan_in_more_than_half_of_the_scores_drops_no_other(subject):
    """NaN is kept, not ranked lowest: what cannot be ranked is not destroyed."""
    rng = np.random.default_rng(0)
    scores = rng.permutation(np.r_[np.arange(2047.0), np.full(2049, np.nan)])
    scores = scores.astype(np.float32)
    mask = np.asarray(subject.keep(jnp.asarray(scores), 0.25))
    assert mask.sum() == 3072  # what is asked for
    assert mask[np.isnan(scores)].all()  # what cannot be ranked is not destroyed
    np.testing.assert_array_equal(np.sort(scores[~mask]), np.arange(1024.0))


@both("everything is at the threshold, and nothing above it")
def test_A5_scores_that_are_all_zero_are_pruned_by_count(subject):
    tx = subject.by_gradient(optax.sgd(0.1))
    state = train(tx, grads=jax.tree.map(jnp.zeros_like, PARAMS))
    _, opt_state = subject.prune(state, 0.5)
    mask = mask_of(subject, opt_state)
    np.testing.assert_array_equal(mask.ravel(), np.arange(64) < HALF)


def test_A5_nothing_is_pruned_by_scores_that_no_step_has_made():
    tx = OURS.by_gradient(optax.apply_if_finite(optax.sgd(0.1), 100))
    state = train(tx, grads=poisoned(PARAMS, np.nan))
    with pytest.raises(ValueError, match="Nothing has been scored yet.*Train first"):
        mj.prune(state, 0.5)
    _, opt_state = jax.jit(mj.prune)(state, 0.5)
    assert mask_of(OURS, opt_state).all() and opt_state.events.refused == 1


@pytest.mark.parametrize("errors", [0, 1, 3])
@both("the weight is NaN from then on, and with it the threshold")
def test_A6_scores_stay_finite_when_apply_if_finite_gives_up(subject, errors):
    chain = optax.chain(optax.sgd(0.1), subject.pruning())
    tx = optax.apply_if_finite(chain, errors)
    good, opt_state = train(tx)
    state = train(tx, (good, opt_state), 5, poisoned(pull(good), np.nan))
    assert np.isnan(state[0]["kernel"][1, 2])
    state = train(tx, state, 2, pull(good))
    _, opt_state = subject.prune(state, 0.5)
    assert mask_of(subject, opt_state).sum() == HALF
    assert all_finite(subject.state(opt_state).scores)


SKIPPING = {
    # The wrapper, and the steps it has applied after every call, the second a bad one.
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, 100),
        [1, 1, 2, 3, 4, 5, 6, 7],
    ),
    "MultiSteps": (
        lambda tx: optax.MultiSteps(
            tx, 2, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        [0, 0, 1, 1, 2, 2, 3, 3],
    ),
}


RISING = mj.cubic(0.5, begin=0, end=6)


def _called(tx, prune):
    """``(params, opt_state)`` after every call, the second with a bad gradient."""
    state = PARAMS, tx.init(PARAMS)
    for call in range(8):
        grads = poisoned(PARAMS, np.inf) if call == 1 else PARAMS
        state = prune(train(tx, state, 1, grads), call + 1)
        yield state


def our_schedule(wrap):
    tx = wrap(optax.chain(optax.sgd(0.1), mj.movement_pruning(RISING, mj.Magnitude())))
    for _, opt_state in _called(tx, lambda state, call: state):
        found = mj.find_state(opt_state)
        yield int(found.step), float(found.sparsity)


def schedule_of_a_loop(wrap):
    """Prunes in the loop around the steps, by the number of the round."""
    tx = wrap(optax.chain(optax.sgd(0.1), naive.pruning()))

    def prune(state, call):
        asked.append(float(RISING(call)))
        return naive.prune(state, asked[-1])

    asked = []
    for _, opt_state in _called(tx, prune):
        yield int(naive.find_state(opt_state).step), asked[-1]


@pytest.mark.parametrize("wrap, applied", SKIPPING.values(), ids=SKIPPING)
@both("the loop counts what is skipped", ours=our_schedule, naive=schedule_of_a_loop)
def test_A7_a_schedule_runs_on_the_steps_that_were_applied(subject, wrap, applied):
    steps, sparsity = zip(*subject(wrap))
    assert [*steps] == applied
    want = [0.5 * (1 - (1 - min(step / 6, 1)) ** 3) for step in applied]
    np.testing.assert_allclose(sparsity, want, rtol=1e-6)


@both("stalls at half of the average, in the dtype of the weights")
def test_A8_a_slow_average_of_bfloat16_weights_does_not_stall(subject):
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    tx = mj.movement_pruning(None, mj.EmaMagnitude(0.999))
    if subject is NAIVE:
        tx = naive.pruning(decay=0.999)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def run(state):
        def step(state, _):
            return tx.update(zeros, state, params)[1], None

        return jax.lax.scan(step, state, length=3000)[0]

    scores = subject.state(run(tx.init(params))).scores["kernel"]
    want = 1 - 0.999**3000
    np.testing.assert_allclose(np.asarray(scores, np.float32), want, rtol=1e-4)


@pytest.mark.parametrize("weight, grad", [(1e-2, 1e-6), (2.0, 6e4)])
@both("the product is zero, or infinite, in float16")
def test_A9_products_of_float16_are_scored_in_float32(subject, weight, grad):
    params = {"kernel": jnp.full((2, 2), weight, jnp.float16)}
    grads = {"kernel": jnp.full((2, 2), grad, jnp.float16)}
    tx = subject.by_gradient(optax.identity())
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    scores = subject.state(state).scores
    values = np.abs(jax.tree.leaves(scores)[0].astype(np.float32))
    want = float(params["kernel"][0, 0]) * float(grads["kernel"][0, 0])
    np.testing.assert_allclose(values, want, rtol=1e-6)


@both("bfloat16 has few distinct values, and all that tie go together")
def test_A10_a_million_bfloat16_scores_are_split_exactly(subject):
    scores = np.abs(np.random.default_rng(0).normal(size=2**20))
    scores = jnp.asarray(scores, jnp.bfloat16)
    assert np.sum(subject.keep(scores, 0.9)) == 2**20 - round(0.9 * 2**20)


@both("sorts what it then compares as equal", naive=SORTING)
def test_A11_subnormals_and_both_zeros_tie_as_zero(subject):
    zeros = np.float32([-1e-45, 0.0, 1e-40, -0.0, 1e-45, -1e-40])
    scores = jnp.asarray(np.r_[np.float32([2, 1]), zeros])
    for select in (subject.keep, jax.jit(subject.keep, static_argnums=1)):
        mask = select(scores, 0.5)  # of ties the lower index is kept
        np.testing.assert_array_equal(mask, [1, 1, 1, 1, 0, 0, 0, 0])


@both("-1 times False is -0.0, and Inf or NaN times False is NaN")
def test_A12_masked_weights_have_no_bit_set(subject):
    params = {"kernel": jnp.array([[-1.0, np.nan, np.inf, -np.inf, 1.0]])}
    masks = {"kernel": jnp.array([[False, False, False, False, True]])}
    got = subject.apply(params, masks)["kernel"]
    assert bits(got).tolist() == [[0, 0, 0, 0, bits(np.float32(1))]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@both("NaN minus NaN is NaN, and so is NaN times False")
def test_A13_a_pruned_weight_that_became_nan_is_zero_when_masks_are_applied(
    subject, value
):
    tx = optax.chain(optax.sgd(0.1), subject.pruning())
    params, opt_state = subject.prune(train(tx), 0.5)
    mask = mask_of(subject, opt_state)
    broken = {"kernel": jnp.where(mask, params["kernel"], value)}
    masks = subject.state(opt_state).masks
    assert not bits(subject.apply(broken, masks)["kernel"])[~mask].any()
    if subject is OURS:
        for repaired in (
            mj.prune((broken, opt_state), 0.5)[0],
            mj.finalize((broken, opt_state))[0],
            mj.effective_params(broken, opt_state),
        ):
            assert not bits(repaired["kernel"])[~mask].any()


def exact_n_keep(size, sparsity):
    if size < 2**31:
        return size - int(drop_count(Target(sparsity), np.array([size]))[0])
    dropped = drop_total(Target(sparsity), size)
    return size - ((int(dropped.high) << wide.BITS) + int(dropped.low))


@both("a float32 product", ours=exact_n_keep, naive=naive.n_keep)
@pytest.mark.parametrize(
    "size, sparsity",
    [(2**24 + 1, 0.0), (10**9 + 7, 0.9), (30_198_991, 0.9), (2**40 - 1, 0.7)],
)
def test_A14_a_count_is_exact_whatever_the_size(subject, size, sparsity):
    assert subject(size, sparsity) == size - round(sparsity * size)


@settings(max_examples=250)
@given(st.floats(0, 1, width=32), st.integers(1, 2**40))
def test_A14_counts_are_those_of_fractions_up_to_a_million_million(sparsity, size):
    want = size - round(Fraction(sparsity) * size)
    traced = size < 2**31
    if traced:
        got = drop_count(Target(jnp.float32(sparsity)), np.array([size]))
        assert size - int(got[0]) == want
    total = drop_total(Target(jnp.float32(sparsity)), size)
    assert size - ((int(total.high) << wide.BITS) + int(total.low)) == want


def counted(mask):
    return counting.tally((mask, ~mask))[0]


@both("float32 has no 2**24 + 1", ours=counted, naive=naive.n_kept)
def test_A15_weights_are_counted_in_integers(subject):
    mask = jnp.ones(2**24 + 1, bool)
    assert int(jax.jit(subject)(mask)) == 2**24 + 1


@both("counts and indices wrap at 2**31 without a word")
def test_A16_more_than_an_int32_counts_is_refused_by_name(subject):
    scores = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="`scores` has 2147483648 elements, more"):
        jax.eval_shape(lambda x: subject.keep(x, 0.5), scores)


def test_A16_one_threshold_is_exact_where_counts_carry(monkeypatch, traced_anew):
    monkeypatch.setattr(counting, "MAX_COUNT", 20)
    monkeypatch.setattr(wide, "BITS", 3)
    tx = mj.movement_pruning(None, mj.Magnitude(), allocation=mj.Global(0))
    params = {"a": {"kernel": KERNEL}, "b": {"kernel": 0.3 * KERNEL}}
    prune = jax.jit(lambda state: mj.prune(state, 0.55))
    _, opt_state = prune((params, tx.init(params)))
    masks = [np.asarray(m).ravel() for m in jax.tree.leaves(opt_state.masks)]
    size = np.abs(np.concatenate([x.ravel() for x in jax.tree.leaves(params)]))
    want = np.ones(128, bool)
    want[np.argsort(size)[: round(0.55 * 128)]] = False
    np.testing.assert_array_equal(np.concatenate(masks), want)


@both("-2147483648 comes after 2147483647")
def test_A17_the_step_counter_does_not_wrap(subject):
    tx = subject.pruning()
    last = tx.init(PARAMS)._replace(step=jnp.int32(2**31 - 1))
    _, state = jax.jit(tx.update)(pull(PARAMS), last, PARAMS)
    assert state.step == 2**31 - 1


@contextlib.contextmanager
def sixty_four_bits():
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@alike()
def test_A18_no_dtype_changes_with_sixty_four_bits(subject, dtype):
    with sixty_four_bits():
        params = {"kernel": jnp.asarray(np.asarray(KERNEL), dtype)}
        pruning = naive.pruning()
        if subject is OURS:
            pruning = mj.movement_pruning(mj.cubic(0.5, begin=0, end=2))
        tx = optax.chain(optax.adam(0.1), pruning)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        end, _ = jax.lax.scan(step, start, length=3)
        for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True):
            assert a.dtype == b.dtype
        if subject is OURS:
            assert mj.find_state(end[1]).scores["kernel"].dtype == jnp.float32
            assert math.isclose(float(mj.sparsity_of(end)), 0.5)
