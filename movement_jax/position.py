"""Whether updates reach the weights as they were meant, and a remedy if they do not.

A transformation does not see what follows it in a chain. It can see that pruned
weights are alive one update after it sent them to zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from movement_jax import counting
from movement_jax import tree as _tree
from movement_jax.state import TURNED, MovementState

LOOK_AT = 2  # tensors
LOOK_EVERY = 32  # steps; and always after masks changed or pruned weights were alive
JUDGE_EVERY = 256  # steps: whether a turn has helped
# How often the direction of pruned weights' updates was changed: straight to zero if
# nothing seems to follow, by descent if an optimizer does. If that does not shrink
# them, none does, and something else revives them: back, for good.
_GROWTH = (1.5, 4.0, float("inf"))  # of their sum, after which to try the next


def look(state: MovementState, weights: Any) -> tuple[MovementState, jax.Array]:
    """Looks, every now and then, whether pruned weights are at zero.

    Alive once, they may have been revived on purpose. If they are alive again after
    the update that sent them to zero, something undoes it. What shrinks updates still
    lets them reach zero. An optimizer takes them for gradients and
    drives the weights away: where they grow, the direction is turned.

    Args:
      state: before its masks change in this step.
      weights: params with holes like ``state.masks``.

    Returns:
      ``state`` with its events brought up to date, and the :func:`total` that was
      seen, 0 if it was not time to look.
    """
    events, axis_name = state.events, state.config.axis_name
    due = (events.alive > 0) | (state.step % LOOK_EVERY == 0)
    _, now = lax.while_loop(  # zero or one trips, as for masks
        lambda carry: carry[0],
        lambda _: (
            jnp.bool_(False),
            total(state.masks, weights, axis_name),
        ),
        (due, jnp.float32(0)),
    )
    again = (events.alive > 0) & jnp.isfinite(events.alive) & (now > 0)
    grown = now > jnp.asarray(_GROWTH)[events.turned] * events.alive
    judged = (events.turned == TURNED) & (state.step % JUDGE_EVERY == 0)
    grown = again & (grown | (judged & (now > events.alive)))
    events = events._replace(
        undone=events.undone + again.astype(jnp.int32),
        turned=events.turned + grown.astype(jnp.int32),
        alive=jnp.where(again & ~grown, events.alive, now),
    )
    return state._replace(events=events), now


def total(masks: Any, weights: Any, axis_name: tuple[str, ...] = ()) -> jax.Array:
    """Sum of the magnitudes of pruned weights that are finite. Shape (), float32.

    Of the largest tensors only: what follows in a chain sees all of them alike.
    """
    result: jax.Array = jnp.float32(0)
    pairs = zip(jax.tree.leaves(masks), jax.tree.leaves(weights))
    for mask, weight in sorted(pairs, key=lambda pair: -pair[0].size)[:LOOK_AT]:
        size = jnp.abs(weight.astype(jnp.float32))
        counts = ~mask & jnp.isfinite(size)
        # Two sums at once, as XLA for CPU stores the operand of a lone one first.
        size, n = lax.reduce(
            (jnp.where(counts, size, 0), counts.astype(jnp.float32)),
            (np.float32(0), np.float32(0)),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            tuple(range(weight.ndim)),
        )
        size = jnp.where(n > 0, size, 0)
        result += counting.sum_over(size, counting.split_axes(mask, axis_name))
    return result


def after_change(alive: jax.Array, seen: jax.Array, now: jax.Array) -> jax.Array:
    """``events.alive`` after masks changed: what was dropped now adds to the rest.

    Args:
      alive: before the change.
      seen: the total of this step before the change.
      now: the total after it.
    """
    return jnp.where(alive > 0, alive + now - seen, jnp.inf)


def project(state: MovementState, updates: Any, params: Any) -> Any:
    """Updates that bring pruned weights to exactly zero, if applied as they are."""
    direction = jnp.where(state.events.turned == TURNED, 1.0, -1.0)

    def zero(mask: Any, update: Any, param: Any) -> Any:
        if _tree.is_hole(mask):
            return update
        # In the wider of both dtypes: a rounded -param would not cancel.
        dtype = jnp.promote_types(update.dtype, param.dtype)
        return jnp.where(
            mask, update.astype(dtype), direction.astype(dtype) * param.astype(dtype)
        )

    return jax.tree.map(zero, state.masks, updates, params, is_leaf=_tree.is_hole)
