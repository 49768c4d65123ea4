"""When masks change, and what to: scores, allocation and selection brought together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from movement_jax import allocation as _allocation
from movement_jax import (
    counting,
    grouping,
    packing,
    position,
    schedules,
    selection,
    threshold,
)
from movement_jax import structure as _structure
from movement_jax.counting import Ranked, Tensor
from movement_jax.criteria import EmaMagnitude, Magnitude, Movement, Taylor
from movement_jax.dynamics import PeakMagnitude
from movement_jax.state import MovementState, PruningConfig, scores_of, tensors_of
from movement_jax.structure import NM, Unstructured
from movement_jax.units import Units

_ROUNDING = 1e-6  # of a third, written down
# Criteria whose scores are arrays that they store, and allocations that read scores in
# searches only, or not at all.
_STORED = (EmaMagnitude, Magnitude, PeakMagnitude, Taylor, Movement)
_SEARCHING = (
    _allocation.Uniform,
    _allocation.Global,
    _allocation.ErdosRenyi,
    _allocation.PerPath,
)


def on_schedule(
    state: MovementState,
    carried: Any,
    weights: Any,
    sparsity: optax.ScalarOrSchedule | None,
    finite: jax.Array,
    seen_alive: jax.Array | None = None,
) -> tuple[MovementState, Any]:
    """Changes the masks if the schedule says so, at no cost if it does not.

    Args:
      state: before the change.
      carried: its masks as they are kept, packed or not.
      weights: params with holes like ``state.masks``.
      sparsity: as given to :func:`movement_jax.movement_pruning`.
      finite: whether this is a good step. Shape ``()``, bool.
      seen_alive: what :func:`movement_jax.position.look` saw; None with ``regrow``.
    """
    regrow, criterion = state.config.regrow, state.config.criterion
    if sparsity is None and not hasattr(criterion, "target"):
        return state, carried
    # At this point of the update the step counter still tells the steps before it,
    # except with regrow, where the step has been counted.
    after = state.step if regrow else state.step + 1
    if sparsity is None:
        own: Any = criterion
        target, sparsity = own.target(state.scores), own
    elif isinstance(sparsity, schedules.Polynomial):
        target = sparsity.target(after)
    else:
        target = schedules.Target(sparsity(after) if callable(sparsity) else sparsity)
    if isinstance(target.sparsity, int | float):
        schedules.check_sparsity("sparsity", target.sparsity)
    unknown = target.sparsity is None  # how much goes, before it is gone
    due = sparsity.due(after) if hasattr(sparsity, "due") else jnp.bool_(True)
    asked = jnp.asarray(0 if unknown else target.sparsity, jnp.float32)
    if isinstance(sparsity, schedules.Polynomial):
        # Made up for, if nothing was scored yet when it was due.
        due |= (after >= sparsity.end) & (state.sparsity < asked)
    valid = (asked >= 0) & (asked <= 1)
    scored = (state.step > 0) | (not getattr(criterion, "accumulates", True))
    changes = finite & due & scored
    if not regrow:
        changes &= ~(asked <= state.sparsity)
    now = changes & valid

    starts = starts_of(state)
    found = None
    if not unknown and not packing.has_packed(carried):  # which searches would unpack
        found = _cuts_ahead(state, weights, target._replace(now=now), starts)

    def change(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, carried, thresholds, churn, alive = carry
        masks = packing.unpack(carried)
        before = state._replace(masks=masks, thresholds=thresholds)
        if found is None:
            new, thresholds = change_masks(before, weights, target, starts)
        else:
            new, thresholds = _cut(before, *found)
        if seen_alive is None:
            churn = churn_of(masks, new, state.config.axis_name)
        else:
            total = position.total(new, weights, state.config.axis_name)
            alive = position.after_change(alive, seen_alive, total)
        new = packing.like(carried, new)
        return jnp.bool_(False), new, thresholds, churn, alive

    # A loop of zero or one trips: its carry is aliased, so that steps which do not
    # prune touch neither masks nor scores. A conditional copies both.
    carry = (carried, state.thresholds, state.events.churn, state.events.alive)
    _, carried, thresholds, churn, alive = lax.while_loop(
        lambda carry: carry[0], change, (now, *carry)
    )
    masks = packing.unpack(carried)
    events = state.events._replace(
        refused=state.events.refused + (changes & ~valid).astype(jnp.int32),
        changes=state.events.changes + now.astype(jnp.int32),
        churn=churn,
        alive=alive,
    )
    if unknown:
        asked = _dropped_fraction(masks, state.config.axis_name)
    reached = jnp.where(now, asked, state.sparsity)
    state = state._replace(
        masks=masks, thresholds=thresholds, sparsity=reached, events=events
    )
    return state, carried


def starts_of(state: MovementState) -> tuple[jax.Array, ...]:
    """Where the groups of every tensor start: see :func:`counting.segment_starts`."""
    groups = _structure.ranked_groups(state.config.structure, tensors_of(state))
    return counting.segment_starts(groups, state.step >> 31)


def _cuts_ahead(
    state: MovementState,
    weights: Any,
    target: schedules.Target,
    starts: Sequence[jax.Array],
) -> tuple[Ranked, selection.Cuts] | None:
    """What is ranked, and where it is cut, by loops of no trip if masks do not change.

    In a loop around them XLA for TPU would have its own layout of all that they read,
    and copy it on every step. None if that must be: what they read is only made then,
    or much is computed beside them.
    """
    config = state.config
    if (
        config.structure != Unstructured()
        or type(config.criterion) not in _STORED
        or type(config.allocation) not in _SEARCHING
        or getattr(config.allocation, "per", None) is not None
        or not jax.tree.leaves(state.masks)
    ):
        return None
    absolute = type(config.criterion) is Magnitude
    scores = jax.tree.leaves(weights if absolute else scores_of(state, weights))
    kept = None if config.regrow else jax.tree.leaves(state.masks)
    tensors = [dataclasses.replace(t, absolute=absolute) for t in tensors_of(state)]
    ranked = Ranked(scores, kept, tensors, starts)
    n_drop, hint = _n_drop(ranked, state, target)
    return ranked, selection.find_cuts(ranked, n_drop, hint, target.now)


def _cut(
    state: MovementState, ranked: Ranked, cuts: selection.Cuts
) -> tuple[Any, jax.Array]:
    """As :func:`change_masks`, from what was found ahead."""
    structure: Any = jax.tree.structure(state.masks)
    old = jax.tree.leaves(state.masks)
    kept = None if state.config.regrow else old
    new = counting.masks(ranked._replace(kept=kept), *cuts)
    return structure.unflatten(_within(kept, new)), cuts.at[0]


def change_masks(
    state: MovementState,
    weights: Any,
    target: schedules.Target,
    starts: Sequence[jax.Array] | None = None,
) -> tuple[Any, jax.Array]:
    """Masks at the given sparsity, from the scores in ``state``.

    Args:
      state: as carried by the optimizer.
      weights: params with holes like ``state.masks``.
      target: fraction to drop, and how far a schedule has come.
      starts: as for :func:`movement_jax.selection.keep_masks`.

    Returns:
      New masks and thresholds, like those of ``state``.
    """
    kept = None if state.config.regrow else state.masks
    if type(state.config.criterion) is Magnitude:
        return masks_from(weights, state, target, kept, starts, absolute=True)
    scores = scores_of(state, weights)
    return masks_from(scores, state, target, kept, starts)


def masks_from(
    scores: Any,
    state: MovementState,
    target: schedules.Target,
    kept: Any = None,
    starts: Sequence[jax.Array] | None = None,
    absolute: bool = False,
) -> tuple[Any, jax.Array]:
    """Masks of the highest of any scores, spread as ``state`` is configured to.

    Args:
      scores: tree like ``state.masks``.
      state: gives the allocation, the structure, the stacked paths, and the thresholds
        to search around first.
      target: fraction to drop, and how far a schedule has come.
      kept: masks that may only shrink, or None.
      starts: as for :func:`movement_jax.selection.keep_masks`.
      absolute: whether the magnitude of ``scores`` counts, which is not stored then.

    Returns:
      New masks and thresholds, like those of ``state``.
    """
    if not jax.tree.leaves(state.masks):
        return state.masks, state.thresholds
    structure: Any = jax.tree.structure(state.masks)
    leaves = structure.flatten_up_to(scores)
    old = None if kept is None else structure.flatten_up_to(kept)
    new, thresholds = _masks_from(leaves, state, target, old, starts, absolute)
    return structure.unflatten(_within(old, new)), thresholds


def _within(kept: list[jax.Array] | None, new: list[jax.Array]) -> list[jax.Array]:
    """New masks without what those before had dropped, if they may only shrink."""
    return new if kept is None else [a & b for a, b in zip(new, kept)]


def _masks_from(
    scores: list[jax.Array],
    state: MovementState,
    target: schedules.Target,
    kept: list[jax.Array] | None,
    starts: Sequence[jax.Array] | None,
    absolute: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Windows by themselves; all else as groups, ranked by the allocation's counts."""
    config, structure, masks = state.config, state.config.structure, {}
    if isinstance(structure, Units):
        return _masks_of_units(scores, state, target, kept, starts, absolute)
    ranked, groups, worth = [], [], []
    alive: list[jax.Array] | None = None if kept is None else []
    for i, (x, tensor) in enumerate(zip(scores, tensors_of(state))):
        own, old = _structure.structure_of(structure, tensor.name), None
        if kept is not None:
            old = kept[i]
        if isinstance(own, Unstructured):
            tensor = dataclasses.replace(tensor, absolute=absolute)
        elif absolute:
            x = jnp.abs(x)
        if isinstance(own, NM):
            n_drop = _allocation.window_drop(
                config.allocation, target, tensor.name, own.m
            )
            masks[i] = own.keep(x, tensor, n_drop, old)
            continue
        block = own.block(tensor)
        ranked.append((i, block))
        groups.append(_structure.groups_of(own, tensor))
        worth.append(grouping.group_scores(x, block, own.reduce))
        if alive is not None and old is not None:
            alive.append(grouping.group_any(old, block))
    thresholds = state.thresholds
    if ranked:
        tops, thresholds = _tops(
            Ranked(worth, alive, groups, starts or ()), state, target
        )
        for (i, block), top in zip(ranked, tops):
            masks[i] = grouping.spread(top, block, scores[i])
    return [masks[i] for i in range(len(scores))], thresholds


def _masks_of_units(
    scores: list[jax.Array],
    state: MovementState,
    target: schedules.Target,
    kept: list[jax.Array] | None,
    starts: Sequence[jax.Array] | None,
    absolute: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Units of several tensors, ranked like the entries of one tensor per group."""
    units: Any = state.config.structure
    names = [tensor.name for tensor in tensors_of(state)]
    if absolute:
        scores = [jnp.abs(x) for x in scores]
    alive = None if kept is None else units.alive(dict(zip(names, kept)))
    leaves = dict(zip(names, scores))
    worth = units.scores(leaves)
    ranked = Ranked(worth, alive, units.tensors, starts or ())
    tops, thresholds = _tops(ranked, state, target)
    masks = units.masks(tops, leaves)
    return [masks[name] for name in names], thresholds


def _tops(
    ranked: Ranked, state: MovementState, target: schedules.Target
) -> tuple[list[jax.Array], jax.Array]:
    """Which groups of each tensor stay, and the new thresholds.

    Without ``ranked.starts`` they are made of the counts.
    """
    scores, kept, tensors, starts = ranked
    n_drop, hint = _n_drop(ranked, state, target)
    return selection.keep_masks(
        scores, tensors, n_drop, kept=kept, hint=hint, starts=starts or None
    )


def _n_drop(
    ranked: Ranked, state: MovementState, target: schedules.Target
) -> tuple[jax.Array, jax.Array]:
    """How many groups of each tensor go, and keys to search around first."""
    scores, kept, tensors, starts = ranked
    allocation, thresholds = state.config.allocation, state.thresholds
    common: jax.Array | None
    if target.sparsity is None:
        assert starts  # on a schedule only is it not known
        n_drop, common = threshold.drop_at_zero(
            allocation, tensors, scores, kept, starts
        )
    else:
        if target.shared:
            allocation = _allocation.Global(getattr(allocation, "min_keep", 0))
            allocation.check(tensors)
        n_drop, common = allocation.n_drop(target, tensors, scores, kept, thresholds)
    return n_drop, thresholds if common is None else common


def check_reach(
    config: PruningConfig, tensors: list[Tensor] | None, sparsity: Any
) -> None:
    """Refuses a sparsity, if it is a number, that N:M patterns cannot reach.

    Args:
      config: gives the structure, and the rules of an allocation.
      tensors: what is to be pruned; None while that is not known.
      sparsity: asked for overall.
    """
    if tensors is None:
        if isinstance(config.structure, NM) and not isinstance(
            config.allocation, _allocation.PerPath
        ):
            _check_reach(config.structure, sparsity, "every tensor")
        return
    if isinstance(config.structure, Units):
        return
    for tensor in tensors:
        own = _structure.structure_of(config.structure, tensor.name)
        if isinstance(own, NM):
            level = _allocation.rule_of(config.allocation, tensor.name, sparsity)
            _check_reach(own, level, repr(tensor.name))


def _check_reach(own: NM, level: Any, where: str) -> None:
    if isinstance(level, int | float) and level > own.most + _ROUNDING:
        raise ValueError(
            f"`structure`=NM({own.n}, {own.m}) drops at most {own.most:.6g} of "
            f"{where}, and `sparsity` asks for {level:g}. Lower it, keep fewer of "
            f"every {own.m}, or give these tensors a sparsity of their own with "
            f"`allocation=PerPath({{'pattern': {own.most:.6g}}})`."
        )


def check_decider(config: PruningConfig) -> None:
    """Refuses a structure for a criterion that decides how much is dropped."""
    if hasattr(config.criterion, "target") and config.structure != Unstructured():
        raise ValueError(
            f"`{type(config.criterion).__name__}` finds the threshold for single "
            f"weights, where groups would drop another share: got "
            f"structure={config.structure}. Leave it out, or use `Movement()`, which "
            "takes a `sparsity`."
        )


def check_emptying(allocation: Any) -> None:
    """Refuses sparsity 1 unless it was asked for twice."""
    if getattr(allocation, "min_keep", 0):
        name = type(allocation).__name__
        raise ValueError(
            f"`sparsity`=1 would empty every tensor. If you mean it, say so with "
            f"`allocation={name}(min_keep=0)`; else give a fraction below 1."
        )


def _dropped_fraction(masks: Any, axis_name: tuple[str, ...]) -> jax.Array:
    dropped: jax.Array = jnp.float32(0)
    total = dropped
    for mask in jax.tree.leaves(masks):
        axes = counting.split_axes(mask, axis_name)
        kept, gone = counting.tally_all((mask, ~mask), axes)
        dropped, total = dropped + gone, total + kept + gone
    return dropped / jnp.maximum(total, 1)


def churn_of(old: Any, new: Any, axis_name: tuple[str, ...]) -> jax.Array:
    """Fraction of the weights that changed places: one dropped, another revived.

    Shape ``()``, float32.
    """
    dropped = revived = total = jnp.float32(0)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)):
        axes = counting.split_axes(a, axis_name)
        gone, back = counting.tally_all((a & ~b, ~a & b), axes)
        dropped, revived = dropped + gone, revived + back
        total += counting.sum_over(jnp.float32(a.size), axes)
    return 2 * jnp.minimum(dropped, revived) / jnp.maximum(total, 1)
