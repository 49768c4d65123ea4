"""Drop and grow: weights leave the masks, as many others come in and start afresh."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from movement_jax import counting, grouping, masking, packing, position, selection
from movement_jax import structure as _structure
from movement_jax import tree as _tree
from movement_jax.state import MovementState, PruningConfig, tensors_of
from movement_jax.structure import NM, Unstructured
from movement_jax.units import Units


def on_schedule(
    state: MovementState,
    carried: Any,
    updates: Any,
    params: Any,
    weights: Any,
    grads: Any,
    inner: optax.GradientTransformationExtraArgs,
    finite: jax.Array,
    seen_alive: jax.Array,
) -> tuple[MovementState, Any, Any]:
    """Exchanges weights if the criterion says so.

    Args:
      state: after masks changed by the schedule, with the new state of the optimizer.
      carried: its masks as they are kept, packed or not.
      updates: of the optimizer.
      params: all of them, as they enter the step.
      weights: those with holes like ``state.masks``.
      grads: raw gradients, likewise.
      inner: the wrapped optimizer.
      finite: whether this is a good step. Shape ``()``, bool.
      seen_alive: what :func:`movement_jax.position.look` saw.

    Returns:
      The state with new masks, and with what the optimizer remembers of weights that
      grew put back to its beginning; its masks as they are kept; updates that are zero
      for all prunable tensors, if weights were exchanged.
    """
    criterion: Any = state.config.criterion
    treedef = jax.tree.structure(state.masks)
    if not hasattr(criterion, "exchange") or not jax.tree.leaves(state.masks):
        return state, carried, updates
    fraction = criterion.exchange(state.step + 1)
    due = finite & (fraction > 0)
    starts = masking.starts_of(state)

    memory, rebuild = jax.tree.flatten(state.inner_state)
    owners = _owners(state.inner_state, params, state.masks)

    def change(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, carried, memory, updates, thresholds, churn, alive = carry
        masks = packing.unpack(carried)
        before = state._replace(masks=masks, thresholds=thresholds)
        masks = jax.tree.leaves(masks)
        growth = criterion.growth(state.scores, weights, grads)
        new, thresholds = _swapped(before, weights, growth, fraction, starts)
        grown = [now & ~old for now, old in zip(new, masks)]
        first = jax.tree.leaves(inner.init(params))
        memory = {
            i: _restarted(x, first[i], grown[owners[i]]) for i, x in memory.items()
        }
        churn = masking.churn_of(masks, new, state.config.axis_name)
        now = position.total(new, weights, state.config.axis_name)
        alive = position.after_change(alive, seen_alive, now)
        updates = jax.tree.map(jnp.zeros_like, updates)
        kept = packing.like(carried, jax.tree.unflatten(treedef, new))
        return jnp.bool_(False), kept, memory, updates, thresholds, churn, alive

    # A loop of zero or one trips, as in `masking.on_schedule`. Updates go through it so
    # that they are made before what they are made from is put back.
    events, touched = state.events, {i: memory[i] for i in owners}
    own_updates = _tree.punch(state.masks, updates, "updates")
    rest = (state.thresholds, events.churn, events.alive)
    _, carried, touched, own_updates, thresholds, churn, alive = lax.while_loop(
        lambda carry: carry[0], change, (due, carried, touched, own_updates, *rest)
    )
    memory = [touched.get(i, leaf) for i, leaf in enumerate(memory)]
    state = state._replace(
        masks=packing.unpack(carried),
        thresholds=thresholds,
        inner_state=jax.tree.unflatten(rebuild, memory),
        events=events._replace(
            changes=events.changes + due.astype(jnp.int32), churn=churn, alive=alive
        ),
    )
    return state, carried, _filled(own_updates, updates)


def check(criterion: Any, inner: Any, regrow: bool) -> None:
    """Refuses to exchange weights where they could not start afresh."""
    if not hasattr(criterion, "exchange"):
        return
    name = type(criterion).__name__
    right = (
        f"`movement_pruning(0.9, {name}(end=7_500), allocation=ErdosRenyi(), "
        "inner=optax.adamw(1e-3))`"
    )
    if inner is None:
        raise ValueError(
            f"`{name}` resets what the optimizer remembers of the weights that it "
            "grows, which a transformation at the end of a chain cannot reach. Wrap "
            f"the optimizer instead: {right}."
        )
    if regrow:
        raise ValueError(
            f"`{name}` grows weights by itself, from zero, where regrow=True would "
            f"bring them back as they were. Leave it out: {right}."
        )


def check_structure(config: PruningConfig) -> None:
    """Refuses groups of weights that cannot be exchanged."""
    if not hasattr(config.criterion, "exchange"):
        return
    name, structure = type(config.criterion).__name__, config.structure
    if isinstance(structure, Units):
        raise ValueError(
            f"`{name}` cannot grow whole units: with all their weights at zero they "
            "get no gradient. Give `structure=` single weights, `Block` or `Axis`."
        )
    rules = structure if isinstance(structure, tuple) else (("", structure),)
    if any(isinstance(own, NM) for _, own in rules):
        raise ValueError(
            f"`{name}` exchanges weights of a whole tensor, where an N:M pattern keeps "
            f"as many in each of its windows: got structure={structure}. Use single "
            "weights, `Block` or `Axis`."
        )


def _filled(holed: Any, tree: Any) -> Any:
    """What has no holes; where there is one, the leaf of the other tree."""
    return jax.tree.map(
        lambda ours, theirs: theirs if _tree.is_hole(ours) else ours,
        holed,
        tree,
        is_leaf=_tree.is_hole,
    )


def _swapped(
    state: MovementState,
    weights: Any,
    growth: Any,
    fraction: jax.Array,
    starts: Sequence[jax.Array],
) -> tuple[list[jax.Array], jax.Array]:
    """Masks without the smallest of the kept weights, with the most worth growing.

    Weights dropped here may grow again, and are then as they were. Those that are off
    but have not reached zero yet do not, as they could not start there.
    """
    olds, small, large, tensors, blocks = [], [], [], [], []
    leaves = zip(*(jax.tree.leaves(tree) for tree in (state.masks, weights, growth)))
    structure: Any = state.config.structure
    for tensor, (mask, weight, worth) in zip(tensors_of(state), leaves):
        own: Any = _structure.structure_of(structure, tensor.name)
        block = own.block(tensor)
        if not isinstance(own, Unstructured):
            weight = jnp.abs(weight)
        waits = ~mask & (weight != 0)
        worth = jnp.where(waits | jnp.isnan(worth), -jnp.inf, worth)
        blocks.append(block)
        tensors.append(_structure.groups_of(own, tensor))
        olds.append(grouping.group_any(mask, block))
        small.append(grouping.group_scores(weight, block, own.reduce))
        large.append(grouping.group_scores(worth, block, own.reduce))

    n_kept = counting.count_kept(olds, tensors)
    n_off = jnp.asarray(counting.sizes(tensors), jnp.int32) - n_kept
    n_drop = jnp.round(fraction * n_kept.astype(jnp.float32)).astype(jnp.int32)
    stay, thresholds = selection.keep_masks(
        small,
        [dataclasses.replace(tensor, absolute=True) for tensor in tensors],
        n_off + n_drop,
        kept=olds,
        hint=state.thresholds,
        starts=starts,
    )
    stay = [a & b for a, b in zip(stay, olds)]
    most = jnp.finfo(jnp.float32).max
    ranked = [
        jnp.where(s, jnp.inf, jnp.minimum(worth.astype(jnp.float32), most))
        for s, worth in zip(stay, large)
    ]
    new, _ = selection.keep_masks(ranked, tensors, n_off, starts=starts)
    like = jax.tree.leaves(state.masks)
    return [grouping.spread(*each) for each in zip(new, blocks, like)], thresholds


def _owners(inner_state: Any, params: Any, masks: Any) -> dict[int, int]:
    """Which tensor an array of the optimizer's state belongs to, by path and shape.

    Its path ends with that of the parameter; of several, with the longest. The last
    axes must be those of the parameter, which leaves out sums over some of them.

    Returns:
      From the number of a leaf of ``inner_state`` to that of a leaf of ``masks``. What
      belongs to a parameter that is not pruned, or to none, is not in it.
    """
    with_path = jax.tree_util.tree_flatten_with_path
    numbers: dict[Any, int | None] = {path: None for path, _ in with_path(params)[0]}
    numbers |= {path: i for i, (path, _) in enumerate(with_path(masks)[0])}
    shapes = [mask.shape for mask in jax.tree.leaves(masks)]
    owners = {}
    for i, (path, leaf) in enumerate(with_path(inner_state)[0]):
        ends = [path[start:] for start in range(len(path) + 1)]
        number = next((numbers[end] for end in ends if end in numbers), None)
        if number is not None:
            shape = shapes[number]
            if jnp.shape(leaf)[jnp.ndim(leaf) - len(shape) :] == shape:
                owners[i] = number
    return owners


def _restarted(memory: jax.Array, first: jax.Array, grown: jax.Array) -> jax.Array:
    """What the optimizer remembers, as at first where a weight grew."""
    grown = jnp.broadcast_to(grown, memory.shape)
    return jnp.where(grown, first.astype(memory.dtype), memory)
