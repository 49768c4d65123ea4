"""Which units stay, given what each is worth."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from movement_jax.arguments import compiled
from movement_jax.shrink.groups import Group, Groups

Scope = Literal["group", "by_kind", "global"]
_SCOPES = ("group", "by_kind", "global")


def choose(
    groups: Groups,
    scores: Mapping[str, Any],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "group",
    round_to: int = 1,
    min_keep: int = 1,
) -> dict[str, np.ndarray]:
    """Keeps the units that are worth most.

    Args:
      groups: of the model.
      scores: name of the group -> what each unit is worth, as ``groups.unit_scores``
        gives it. Groups without scores stay whole.
      sparsity: fraction of the units to drop, in [0, 1); or regular expressions for
        names of groups -> fractions. The first found in the name wins, and groups in
        which none is found stay whole.
      scope: what competes with what: the units of each group among themselves, those
        of all groups of one kind (the same layer in several blocks), or all units.
        Units of different kinds compare by their scores as they are.
      round_to: the number of units that stay is rounded up to a multiple of this, as
        hardware may like: 8 on GPUs, 128 on TPUs.
      min_keep: so many units of each group stay at least.

    Returns:
      A keep: name -> bool of shape ``(size,)``, True for units that stay.

    Raises:
      ValueError: if an argument is out of range, a pattern decides nothing, scores
        have another shape than their group, or name none that is prunable.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from movement_jax import shrink
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
      >>> groups = shrink.find_groups(model, params, jnp.ones((1, 3)))
      >>> scores = {"up:1": jnp.array([0.1, 3.0, 2.0, 0.2])}
      >>> shrink.choose(groups, scores, 0.5)
      {'up:1': array([False,  True,  True, False])}
    """
    if scope not in _SCOPES:
        raise ValueError(f"`scope` must be one of {_SCOPES}, got {scope!r}.")
    for name, value in (("round_to", round_to), ("min_keep", min_keep)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{name}` must be an integer of at least 1, got {value!r}."
            )
    if not isinstance(scores, Mapping):
        raise ValueError(
            "`scores` maps names of groups to arrays, got "
            f"{type(scores).__name__}. `groups.unit_scores(tree)` makes one."
        )
    prunable = {group.name: group for group in groups.prunable}
    wrong = [name for name in scores if name not in prunable]
    if wrong:
        raise ValueError(
            f"`scores` names {wrong[:5]}, which are no prunable groups. Prunable: "
            f"{list(prunable)[:20]}"
        )
    chosen = [prunable[name] for name in scores]
    levels = _levels(sparsity, chosen)
    pools: dict[Any, list[tuple[Group, np.ndarray, float]]] = {}
    for group in chosen:
        if group.name in levels:
            values = _checked(group, scores[group.name])
            level = levels[group.name]
            pool = {"group": group.name, "by_kind": group.kind, "global": 0}[scope]
            pools.setdefault((pool, level), []).append((group, values, level))
    keep = {group.name: np.ones(group.size, bool) for group in chosen}
    for rows in pools.values():
        values = np.concatenate([row[1] for row in rows])
        n_keep = len(values) - round(rows[0][2] * len(values))
        # Among equals the first stay, as in `keep_top`.
        top = np.zeros(len(values), bool)
        top[np.argsort(-values, kind="stable")[:n_keep]] = True
        at = 0
        for group, own, _ in rows:
            count = int(top[at : at + group.size].sum())
            at += group.size
            count = max(min_keep, math.ceil(count / round_to) * round_to)
            mask = np.zeros(group.size, bool)
            mask[np.argsort(-own, kind="stable")[: min(count, group.size)]] = True
            keep[group.name] = mask
    return keep


def _levels(sparsity: Any, groups: list[Group]) -> dict[str, float]:
    rules = sparsity if isinstance(sparsity, Mapping) else {"": sparsity}
    for value in rules.values():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1:
            raise ValueError(
                "`sparsity` is the fraction of the units to drop, in [0, 1), got "
                f"{value!r}. A fraction for each group is "
                "`{'mlp/up': 0.5, 'query': 0.25}`."
            )
    levels, used = {}, set()
    searches = {pattern: compiled("sparsity", pattern).search for pattern in rules}
    for group in groups:
        for pattern, value in rules.items():
            if searches[pattern](group.name):
                levels[group.name] = float(value)
                used.add(pattern)
                break
    unused = [p for p in rules if p not in used]
    if unused and groups:
        raise ValueError(
            f"`sparsity` has patterns that decide nothing: {unused}. Groups: "
            f"{[g.name for g in groups][:20]}"
        )
    return levels


def _checked(group: Group, scores: Any) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.shape != (group.size,):
        raise ValueError(
            f"`scores`[{group.name!r}] must have shape {(group.size,)}, got "
            f"{values.shape}."
        )
    return np.where(np.isnan(values), np.inf, values)  # NaN ranks highest
