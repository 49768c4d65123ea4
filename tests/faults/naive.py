"""The algorithm of the course chapter as people write it, to show faults on.

Scores are a running average of the magnitudes; what lies above their quantile is kept,
and weights are multiplied by the mask.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ChapterState(NamedTuple):
    step: Any
    scores: Any
    masks: Any


def by_quantile(scores, sparsity):
    return scores > jnp.quantile(scores, sparsity)


def by_sort(scores, sparsity):
    n_keep = jnp.round(jnp.float32(scores.size) * (1 - sparsity)).astype(jnp.int32)
    return scores >= jnp.sort(scores.ravel())[-jnp.maximum(n_keep, 1)]


def by_top_k(scores, sparsity):
    """The same by a number to keep, as `torch.topk` wants it."""
    n_keep = int(round(scores.size * (1 - sparsity)))
    return scores >= jax.lax.top_k(scores.ravel(), n_keep)[0][-1]


def n_keep(size, sparsity):
    return int(jnp.round(jnp.float32(size) * (1 - jnp.float32(sparsity))))


def n_kept(mask):
    return jnp.sum(mask, dtype=jnp.float32)


def apply_masks(params, masks):
    return jax.tree.map(lambda p, m: p * m.astype(p.dtype), params, masks)


def pruning(decay=0.9, first_order=False, start_at_weights=False):
    """The score and the mask as a transformation at the end of a chain."""

    def init_fn(params):
        scores = params if start_at_weights else jax.tree.map(jnp.zeros_like, params)
        masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
        return ChapterState(jnp.int32(0), scores, masks)

    def update_fn(updates, state, params=None):
        def average(s, w, u):
            return decay * s + (1 - decay) * jnp.abs(w + u)

        def moved(s, w, u):  # takes updates for gradients
            return s - w * u

        rule = moved if first_order else average
        scores = jax.tree.map(rule, state.scores, params, updates)
        updates = jax.tree.map(
            lambda w, u, m: (w + u) * m - w, params, updates, state.masks
        )
        return updates, ChapterState(state.step + 1, scores, state.masks)

    return optax.GradientTransformation(init_fn, update_fn)


def guarded(tx):
    """Leaves out steps with a gradient that is not finite, of the leaves that count."""

    def is_none(x):
        return x is None

    def counts(leaf):
        return leaf is not None and jnp.issubdtype(leaf.dtype, jnp.floating)

    def update_fn(updates, state, params=None):
        watched = map(counts, jax.tree.leaves(params, is_leaf=is_none))
        good = jnp.bool_(True)
        for update, watch in zip(jax.tree.leaves(updates), watched):
            good &= jnp.isfinite(update).all() if watch else True
        new_updates, new_state = tx.update(updates, state, params)
        new_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new_state, state)
        return jax.tree.map(lambda u: jnp.where(good, u, 0), new_updates), new_state

    return optax.GradientTransformation(tx.init, update_fn)


def find_state(opt_state):
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ChapterState))
    return next(x for x in nodes if isinstance(x, ChapterState))


def prune(state, sparsity, select=by_quantile):
    """Masks every tensor by its scores, and multiplies."""
    params, opt_state = state
    old = find_state(opt_state)
    masks = jax.tree.map(lambda s: select(s, sparsity), old.scores)
    opt_state = jax.tree.map(
        lambda x: x._replace(masks=masks) if isinstance(x, ChapterState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, ChapterState),
    )
    return apply_masks(params, masks), opt_state


def prune_globally(state, sparsity):
    """The same by one threshold for all tensors."""
    scores = jax.tree.leaves(find_state(state[1]).scores)
    threshold = jnp.quantile(jnp.concatenate([s.ravel() for s in scores]), sparsity)
    return prune(state, threshold, select=lambda s, threshold: s > threshold)
