"""When masks change, and what to: scores, allocation and selection brought together."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from movement_jax import counting, position, schedules, selection
from movement_jax.state import MovementState, tensors_of


def on_schedule(
    state: MovementState,
    weights: Any,
    sparsity: optax.ScalarOrSchedule | None,
    finite: jax.Array,
    seen_alive: jax.Array | None = None,
) -> MovementState:
    """Changes the masks if the schedule says so, at no cost if it does not.

    Args:
      state: before the change.
      weights: params with holes like ``state.masks``.
      sparsity: as given to :func:`movement_jax.movement_pruning`.
      finite: whether this is a good step. Shape ``()``, bool.
      seen_alive: what :func:`movement_jax.position.look` saw; None with ``regrow``.
    """
    if sparsity is None:
        return state
    regrow, criterion = state.config.regrow, state.config.criterion
    # At this point of the update the step counter still tells the steps before it,
    # except with regrow, where the step has been counted.
    after = state.step if regrow else state.step + 1
    if isinstance(sparsity, schedules.Polynomial):
        target = sparsity.target(after)
    else:
        target = schedules.Target(sparsity(after) if callable(sparsity) else sparsity)
    if isinstance(target.sparsity, int | float):
        schedules.check_sparsity("sparsity", target.sparsity)
    due = sparsity.due(after) if hasattr(sparsity, "due") else jnp.bool_(True)
    asked = jnp.asarray(target.sparsity, jnp.float32)
    if isinstance(sparsity, schedules.Polynomial):
        # Made up for, if nothing was scored yet when it was due.
        due |= (after >= sparsity.end) & (state.sparsity < asked)
    valid = (asked >= 0) & (asked <= 1)
    scored = (state.step > 0) | (not getattr(criterion, "accumulates", True))
    changes = finite & due & scored
    if not regrow:
        changes &= ~(asked <= state.sparsity)

    starts = counting.segment_starts(tensors_of(state), state.step >> 31)

    def change(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, masks, churn, alive = carry
        new = change_masks(state._replace(masks=masks), weights, target, starts)
        if seen_alive is None:
            churn = _churn(masks, new, state.config.axis_name)
        else:
            now = position.total(new, weights, state.config.axis_name)
            alive = position.after_change(alive, seen_alive, now)
        return jnp.bool_(False), new, churn, alive

    # A loop of zero or one trips: its carry is aliased, so that steps which do not
    # prune touch neither masks nor scores. A conditional copies both.
    _, masks, churn, alive = lax.while_loop(
        lambda carry: carry[0],
        change,
        (changes & valid, state.masks, state.events.churn, state.events.alive),
    )
    done = (changes & valid).astype(jnp.int32)
    events = state.events._replace(
        refused=state.events.refused + (changes & ~valid).astype(jnp.int32),
        changes=state.events.changes + done,
        churn=churn,
        alive=alive,
    )
    reached = jnp.where(changes & valid, asked, state.sparsity)
    return state._replace(masks=masks, sparsity=reached, events=events)


def change_masks(
    state: MovementState,
    weights: Any,
    target: schedules.Target,
    starts: Sequence[jax.Array] | None = None,
) -> Any:
    """Masks at the given sparsity, from the scores in ``state``.

    Args:
      state: as carried by the optimizer.
      weights: params with holes like ``state.masks``.
      target: fraction to drop, and how far a schedule has come.
      starts: as for :func:`movement_jax.selection.keep_masks`.

    Returns:
      New masks, like ``state.masks``.
    """
    scores = state.config.criterion.scores(state.scores, weights)
    kept = None if state.config.regrow else state.masks
    return masks_from(scores, state, target, kept, starts)


def masks_from(
    scores: Any,
    state: MovementState,
    target: schedules.Target,
    kept: Any = None,
    starts: Sequence[jax.Array] | None = None,
) -> Any:
    """Masks of the highest of any scores, spread as ``state`` is configured to.

    Args:
      scores: tree like ``state.masks``.
      state: gives the allocation and the stacked paths.
      target: fraction to drop, and how far a schedule has come.
      kept: masks that may only shrink, or None.
      starts: as for :func:`movement_jax.selection.keep_masks`.

    Returns:
      New masks, like ``state.masks``.
    """
    tensors = tensors_of(state)
    if not tensors:
        return state.masks
    structure = jax.tree.structure(state.masks)
    leaves = structure.flatten_up_to(scores)
    old = None if kept is None else structure.flatten_up_to(kept)
    n_drop, hint = state.config.allocation.n_drop(target, tensors, leaves, old)
    new = selection.keep_masks(
        leaves, tensors, n_drop, kept=old, hint=hint, starts=starts
    )
    if old is not None:
        new = [a & b for a, b in zip(new, old)]
    return structure.unflatten(new)


def check_emptying(allocation: Any) -> None:
    """Refuses sparsity 1 unless it was asked for twice."""
    if getattr(allocation, "min_keep", 0):
        name = type(allocation).__name__
        raise ValueError(
            f"`sparsity`=1 would empty every tensor. If you mean it, say so with "
            f"`allocation={name}(min_keep=0)`; else give a fraction below 1."
        )


def _churn(old: Any, new: Any, axis_name: tuple[str, ...]) -> jax.Array:
    """Fraction of the weights that changed places: one dropped, another revived."""
    dropped = revived = total = jnp.float32(0)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)):
        axes = counting.split_axes(a, axis_name)
        counts = counting.tally((a & ~b, ~a & b))
        counts = counting.sum_over(jnp.stack([*counts, jnp.int32(a.size)]), axes)
        dropped, revived = dropped + counts[0], revived + counts[1]
        total += counts[2]
    return 2 * jnp.minimum(dropped, revived) / jnp.maximum(total, 1)
