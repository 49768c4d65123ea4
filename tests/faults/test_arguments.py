"""Sparsities that are no fractions, or fractions at the ends of what there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

from . import naive
from .subjects import (
    HALF,
    KERNEL,
    PARAMS,
    bits,
    both,
    mask_of,
    pull,
    stepper,
    train,
)


@functools.cache
def trained(subject):
    """A state with scores, and half of the weights pruned."""
    tx = optax.chain(optax.sgd(0.1), subject.pruning())
    return subject.prune(train(tx), 0.5)


def scored(subject, scores):
    """A state with scores as given."""
    params = {"kernel": jnp.asarray(scores)}
    tx = subject.pruning()
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, opt_state = jax.jit(tx.update)(zeros, tx.init(params), params)
    return params, opt_state


@pytest.mark.parametrize("value", [80, 80.0, np.float32(80), jnp.float32(80)], ids=repr)
@both("an error of XLA, or a layer of zeros", raises=[TypeError, ValueError])
def test_B1_a_percentage_is_refused_and_the_fraction_said(subject, value):
    message = "`sparsity` is the fraction .* in .0, 1., got 80.*Did you mean 0.8?"
    with pytest.raises(ValueError, match=message):
        subject.prune(trained(subject), value)


@both("keeps everything", raises=[ValueError])
def test_B2_a_negative_sparsity_is_refused(subject):
    with pytest.raises(ValueError, match="`sparsity` .* in .0, 1., got -0.1"):
        subject.prune(trained(subject), -0.1)


@both("drops everything", raises=[ValueError])
def test_B3_nan_is_refused(subject):
    with pytest.raises(ValueError, match="`sparsity` .* in .0, 1., got nan"):
        subject.prune(trained(subject), float("nan"))


@pytest.mark.parametrize(
    "value, said",
    [
        (True, "got True of type bool"),
        ("0.5", "got '0.5' of type str"),
        (None, "got None of type NoneType"),
    ],
)
@both("an error from inside of JAX", raises=[TypeError, ValueError])
def test_B4_what_is_no_number_is_refused_by_its_type(subject, value, said):
    with pytest.raises(TypeError, match=f"`sparsity` must .*{said}.*`sparsity=0.8`"):
        subject.prune(trained(subject), value)


@pytest.mark.parametrize("value", [np.nan, -0.5, 1.5, 80.0, np.inf, -np.inf])
@both("masks change, most often to nothing kept")
def test_B5_a_traced_sparsity_out_of_range_leaves_the_masks(subject, value):
    before = trained(subject)
    params, opt_state = jax.jit(subject.prune)(before, jnp.float32(value))
    np.testing.assert_array_equal(
        mask_of(subject, opt_state), mask_of(subject, before[1])
    )
    np.testing.assert_array_equal(params["kernel"], before[0]["kernel"])
    assert subject.state(opt_state).events.refused == 1


@both("nothing lies below the lowest score, which is not above itself either")
def test_B6_sparsity_zero_prunes_nothing(subject):
    tx = optax.chain(optax.sgd(0.1), subject.pruning())
    state = train(tx)
    params, opt_state = subject.prune(state, 0.0)
    assert mask_of(subject, opt_state).all()
    np.testing.assert_array_equal(bits(params["kernel"]), bits(state[0]["kernel"]))


@both("nothing is kept")
def test_B7_sparsity_one_is_refused_unless_asked_for_twice(subject):
    message = r"empty every tensor.*`allocation=Uniform\(min_keep=0\)`"
    with pytest.raises(ValueError, match=message):
        subject.prune(trained(subject), 1.0)


@pytest.mark.parametrize("sparsity", [0.99, 0.9999])
@both("equal scores fall together, down to the last")
def test_B7_every_tensor_keeps_its_best(subject, sparsity):
    scores = np.float32([[1.0, 1.0], [1.0, 1.0]])
    _, opt_state = subject.prune(scored(subject, scores), sparsity)
    assert mask_of(subject, opt_state).sum() == 1


@both("equal scores fall together")
def test_B8_equal_scores_are_split_by_count(subject):
    _, opt_state = subject.prune(scored(subject, jnp.full((8, 8), 0.3)), 0.5)
    mask = mask_of(subject, opt_state)
    np.testing.assert_array_equal(mask.ravel(), np.arange(64) < HALF)


@both("all zeros fall together: half instead of three tenths")
def test_B9_zeros_among_the_scores_are_split_by_count(subject):
    scores = jnp.where(jnp.arange(64) % 2, KERNEL.ravel(), 0).reshape(8, 8)
    _, opt_state = subject.prune(scored(subject, scores), 0.3)
    assert mask_of(subject, opt_state).sum() == 64 - round(0.3 * 64)


def _ours_on_schedule(steps):
    schedule = mj.cubic(0.9, begin=0, end=steps, every=10)
    tx = optax.chain(optax.sgd(1e-3), mj.movement_pruning(schedule))
    params, opt_state = train(tx, steps=steps)
    assert mj.find_state(opt_state).events.changes == steps // 10
    assert abs(mj.sparsity_of(opt_state) - 0.9) < 1 / 64
    return stepper(tx)._cache_size()


def _naive_on_schedule(steps):
    tx = optax.chain(optax.sgd(1e-3), naive.pruning())
    prune = jax.jit(naive.prune, static_argnums=1)
    schedule = mj.cubic(0.9, begin=0, end=steps)
    state = PARAMS, tx.init(PARAMS)
    for step in range(10, steps + 1, 10):
        state = prune(train(tx, state, 10, pull(PARAMS)), float(schedule(step)))
    return prune._cache_size()


@both(
    "compiles anew for each sparsity", ours=_ours_on_schedule, naive=_naive_on_schedule
)
def test_B10_a_rising_sparsity_is_compiled_once(subject):
    assert subject(100) == 1
