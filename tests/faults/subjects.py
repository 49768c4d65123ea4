"""What a fault is put to: this library, which must survive it, and naive code."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

from . import naive

HALF = 32
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
PARAMS = {"kernel": KERNEL}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One way to prune.

    Attributes:
      pruning: makes the transformation that goes last in a chain.
      around: joins it with an optimizer, whose gradients it may read.
      by_gradient: the same with the first-order score.
      prune: takes ``(params, opt_state)`` and a sparsity.
      state: finds what has ``step``, ``scores`` and ``masks``.
      keep: mask of an array of scores at a sparsity.
      apply: masks params.
      reports: whether it says that something undoes its updates.
    """

    pruning: Callable[..., Any]
    around: Callable[..., Any]
    by_gradient: Callable[..., Any]
    prune: Callable[..., Any]
    state: Callable[..., Any]
    keep: Callable[..., Any]
    apply: Callable[..., Any]
    reports: Callable[..., bool]


def _keep(scores, sparsity):
    return mj.keep_top(scores, scores.size - round(sparsity * scores.size))


OURS = Subject(
    pruning=mj.movement_pruning,
    around=lambda optimizer: mj.movement_pruning(inner=optimizer),
    by_gradient=lambda optimizer: mj.movement_pruning(
        None, mj.Movement(optax.sgd(1.0)), inner=optimizer
    ),
    prune=mj.prune,
    state=mj.find_state,
    keep=_keep,
    apply=mj.apply_masks,
    reports=lambda opt_state: bool(mj.find_state(opt_state).events.undone > 0),
)
NAIVE = Subject(
    pruning=lambda **_: naive.pruning(),
    around=lambda optimizer: optax.chain(optimizer, naive.pruning()),
    by_gradient=lambda optimizer: optax.chain(
        optimizer, naive.pruning(first_order=True)
    ),
    prune=naive.prune,
    state=naive.find_state,
    keep=naive.by_quantile,
    apply=naive.apply_masks,
    reports=lambda opt_state: False,
)
SORTING = dataclasses.replace(
    NAIVE,
    prune=functools.partial(naive.prune, select=naive.by_sort),
    keep=naive.by_sort,
)


def both(reason, *, ours=OURS, naive=NAIVE, raises=()):
    """Puts a test to ours and to naive code, which must fail, and as expected.

    Args:
      reason: what naive code does.
      ours: what passes.
      naive: what fails.
      raises: exceptions that naive code may end with, besides a failed assertion.
    """
    values = [
        pytest.param(ours, id="ours"),
        failing(naive, reason=reason, raises=raises),
    ]
    return pytest.mark.parametrize("subject", values)


def failing(*values, reason, raises=(), id="naive"):
    """A parameter of naive code; its id must begin with that word."""
    expected = (AssertionError, pytest.fail.Exception, *raises)
    fails = pytest.mark.xfail(strict=True, reason=reason, raises=expected)
    return pytest.param(*values, id=id, marks=fails)


def alike(*, ours=OURS, naive=NAIVE):
    """Puts a test to ours and to naive code, and both pass.

    For the rows in `catalogue.NAIVE_SURVIVES`.
    """
    values = [pytest.param(ours, id="ours"), pytest.param(naive, id="naive")]
    return pytest.mark.parametrize("subject", values)


@functools.cache
def stepper(tx):
    """A compiled train step on given gradients."""

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def pull(params):
    """Gradients that draw weights towards zero."""
    return jax.tree.map(lambda p: 0.1 * p, params)


def train(tx, state=None, steps=3, grads=None):
    """``(params, opt_state)`` after some steps."""
    params, opt_state = (PARAMS, tx.init(PARAMS)) if state is None else state
    step = stepper(tx)
    for _ in range(steps):
        now = pull(params) if grads is None else grads
        params, opt_state = step(params, opt_state, now)
    return params, opt_state


def mask_of(subject, opt_state):
    return np.asarray(subject.state(opt_state).masks["kernel"])


def all_finite(tree):
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return all(np.isfinite(x).all() for x in leaves if x.dtype.kind == "f")


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])
