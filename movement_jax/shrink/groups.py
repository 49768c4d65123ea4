"""Groups of parameter slices that must go together, and what their units are worth."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import report
from movement_jax import tree as _tree
from movement_jax.arguments import compiled
from movement_jax.grouping import Reduce
from movement_jax.shrink import dims
from movement_jax.shrink.analysis import Analysis
from movement_jax.shrink.dims import Atom
from movement_jax.shrink.plan import Plan
from movement_jax.units import Slices, UnitGroup, Units

Status = Literal["prunable", "inexact", "pinned"]
Reduction = Literal["sum", "mean", "l2", "max"]
Keep = Mapping[str, Any]
_REDUCTIONS = ("sum", "mean", "l2", "max")


@dataclasses.dataclass(frozen=True)
class Member:
    """Slices of one parameter along one axis.

    Attributes:
      path: of the parameter.
      axis: along which the units lie.
      layout: of the axis; ``"2*[4]*(8+8)"`` are 4 units of this group inside of 2
        others, each of two halves of 8.
      index: the unit at each position, -1 where there is none. Shape ``(positions,)``.
    """

    path: str
    axis: int
    layout: str
    index: np.ndarray = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Group:
    """Units, each of which is a slice of every member.

    Attributes:
      name: path and axis of one member, ``"mlp/up/kernel:1"``; with the number of the
        factor, ``"query/kernel:1[0]"``, if the axis has several.
      size: number of units.
      status: ``"prunable"``; ``"inexact"`` if the result would change by more than the
        units' contribution; ``"pinned"`` if they cannot be cut out.
      reason: what stands against it, with the operation and its line; of prunable
        groups what is peculiar, often nothing.
      members: which slices.
      weights: parameters of one unit.
    """

    name: str
    size: int
    status: Status
    reason: str
    members: tuple[Member, ...]
    weights: int
    leaf: Atom = dataclasses.field(repr=False, compare=False)

    @property
    def kind(self) -> str:
        """What the same groups of other layers share: all names without numbers."""
        members = sorted(f"{m.path}:{m.axis} {m.layout}" for m in self.members)
        return "|".join(re.sub(r"\d+(?=[^:]*:)", "#", member) for member in members)


@dataclasses.dataclass(frozen=True)
class Groups:
    """All groups of a model; made by :func:`find_groups`, prints as a table.

    A *keep* maps names of groups to masks of their units, bool of shape ``(size,)``,
    True for those that stay. Groups that it does not name stay whole.

    Attributes:
      groups: in the order of the params.
      shapes: path and shape of every parameter.
    """

    groups: tuple[Group, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    analysis: Analysis = dataclasses.field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {[g.name for g in self.groups]}")

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that can be cut exactly."""
        return tuple(g for g in self.groups if g.status == "prunable")

    def __str__(self) -> str:
        return report.rendered(self)

    def __rich__(self) -> Any:
        columns = ("Group", "Units", "Weights each", "Status", "Members")
        table = report.new_table(*columns, title="Coupled dimensions")
        for group in self.groups:
            members = [f"{m.path}:{m.axis} {m.layout}" for m in group.members]
            lines = members[:6] + [f"... {len(members) - 6} more"] * (len(members) > 6)
            reason = f"{group.status}: {group.reason}" if group.reason else group.status
            report.add_row(
                table,
                group.name,
                f"{group.size:,}",
                f"{group.weights:,}",
                reason,
                "\n".join(lines),
            )
        return table

    def only(self, pattern: str) -> "Groups":
        """The groups in whose names a regular expression is found.

        Raises:
          ValueError: if it is found in none, or is no regular expression.

        Examples:
          >>> import jax.numpy as jnp
          >>> from movement_jax import shrink
          >>> def model(params, x):
          ...     return (x @ params["up"]) @ params["down"]
          >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
          >>> groups = shrink.find_groups(model, params, jnp.ones((1, 3)))
          >>> [group.name for group in groups.only("up:1").groups]
          ['up:1']
        """
        search = compiled("pattern", pattern).search
        found = tuple(g for g in self.groups if search(g.name))
        if not found:
            raise ValueError(
                f"`pattern` is found in no name of a group: {pattern!r}. Groups: "
                f"{[g.name for g in self.groups][:20]}"
            )
        return dataclasses.replace(self, groups=found)

    def units(self, reduce: Reduce = "mean") -> Units:
        """The prunable groups as a structure for :func:`movement_jax.movement_pruning`.

        Which takes the groups themselves, too: ``structure=groups``. It scores, ranks
        and masks whole units in every step, by any criterion and on any schedule.

        Args:
          reduce: ``"mean"`` or ``"sum"`` of the scores of its weights is what a unit is
            worth.

        Raises:
          ValueError: if no group is prunable, or ``reduce`` is neither.

        Examples:
          >>> import jax.numpy as jnp, movement_jax as mj
          >>> from movement_jax import shrink
          >>> def model(params, x):
          ...     return (x @ params["up"]) @ params["down"]
          >>> params = {"up": jnp.array([[1.0, 2, 3, 4]]), "down": jnp.ones((4, 1))}
          >>> groups = shrink.find_groups(model, params, jnp.ones((1, 1)))
          >>> tx = mj.movement_pruning(0.5, mj.Magnitude(), structure=groups)
          >>> params, state = mj.prune((params, tx.init(params)), 0.5)
          >>> print(params["up"][0], params["down"][:, 0])
          [0. 0. 3. 4.] [0. 0. 1. 1.]
          >>> groups.kept(state.masks)
          {'up:1': array([False, False,  True,  True])}
        """
        found = tuple(
            UnitGroup(
                group.name,
                group.size,
                group.weights,
                tuple(Slices.of(m.path, m.axis, m.index) for m in group.members),
            )
            for group in self.prunable
        )
        paths = {own.path for group in found for own in group.slices}
        shapes = tuple((name, shape) for name, shape in self.shapes if name in paths)
        return Units(found, shapes, reduce)

    def kept(self, masks: Any) -> dict[str, np.ndarray]:
        """Which units masks have left anything of.

        Args:
          masks: tree like params of bools, such as ``find_state(opt_state).masks``.
            Leaves may be missing where no unit goes.

        Returns:
          A keep of the prunable groups.

        Raises:
          ValueError: if a unit goes that has weights in leaves that are missing.
        """
        leaves, keep = self._matched("masks", masks), {}
        for group in self.prunable:
            alive, missing = np.zeros(group.size, bool), []
            for member in group.members:
                if member.path not in leaves:
                    missing.append(member.path)
                    continue
                mask = np.moveaxis(np.asarray(leaves[member.path]), member.axis, 0)
                rows = mask.reshape(len(mask), -1).any(1)
                alive[member.index[rows & (member.index >= 0)]] = True
            if len(missing) == len(group.members):
                alive[:] = True
            elif missing and not alive.all():
                raise ValueError(
                    f"`masks` drop units of {group.name!r} with weights in "
                    f"{missing[:5]}, which they leave dense. Prune with "
                    "`movement_pruning(structure=groups)`."
                )
            keep[group.name] = alive
        return keep

    def unit_scores(self, scores: Any, reduce: Reduction = "sum") -> dict[str, Any]:
        """What every unit of the prunable groups is worth.

        Works under ``jit``.

        Args:
          scores: tree like params of what each weight is worth. Leaves may be missing
            (holes), such as biases, and do not count.
          reduce: of the scores of all weights of a unit: ``"sum"``, ``"mean"``,
            ``"l2"`` (root of the sum of squares) or ``"max"``.

        Returns:
          Name of the group -> float32 of shape ``(size,)``; 0 without any score.

        Raises:
          ValueError: if ``reduce`` is none of these, or a leaf has another shape than
            the parameter of its path.
        """
        if reduce not in _REDUCTIONS:
            raise ValueError(f"`reduce` must be one of {_REDUCTIONS}, got {reduce!r}.")
        leaves = self._matched("scores", scores)
        found = {}
        for group in self.prunable:
            rows = [
                _per_unit(leaves[m.path], m, group.size, reduce)
                for m in group.members
                if m.path in leaves
            ]
            values = jnp.zeros((2, group.size), jnp.float32)
            if rows:
                stacked = jnp.stack(rows)
                top = jnp.max(stacked, 0) if reduce == "max" else jnp.sum(stacked, 0)
                values = top
            total, count = values[0], values[1]
            if reduce == "mean":
                total = total / jnp.maximum(count, 1)
            found[group.name] = jnp.sqrt(total) if reduce == "l2" else total
        return found

    def masks(self, keep: Keep, allow_inexact: bool = False) -> Any:
        """Masks of all params: False where any unit that goes has a weight.

        Args:
          keep: units that stay.
          allow_inexact: also mask groups that cannot be cut exactly.

        Returns:
          Tree like params of bool arrays.
        """
        stays = self._kept(keep, allow_inexact)
        out = []
        for (_, shape), axes in zip(self.shapes, self.analysis.axes):
            mask = np.ones(shape, bool)
            for axis, layout in enumerate(axes):
                own = dims.kept(layout, stays)
                if own is not None:
                    mask &= own.reshape(
                        [-1 if i == axis else 1 for i in range(len(shape))]
                    )
            out.append(jnp.asarray(mask))
        return self.analysis.tree.unflatten(out)

    def mask(self, params: Any, keep: Keep, allow_inexact: bool = False) -> Any:
        """``params`` with the weights of units that go set to 0."""
        return self.plan(keep, allow_inexact).mask(params)

    def dead(self, params: Any) -> dict[str, np.ndarray]:
        """Which units do something, given the weights that are zero already.

        A unit is dead if cutting it changes no result: all that feeds it is zero and
        stays so (ReLU, GELU), or nothing reads it. It reads the weights on the host.

        Args:
          params: the (masked) weights.

        Returns:
          A keep of the prunable groups. One unit of each stays, dead or not.
        """
        leaves = self._matched("params", params, holes=False)
        exact = self.analysis.exactness([np.asarray(x) for x in leaves.values()])
        keep = {}
        for group in self.prunable:
            alive = ~exact.units(group.leaf)
            alive[0] |= not alive.any()
            keep[group.name] = alive
        return keep

    def plan(self, keep: Keep, allow_inexact: bool = False) -> Plan:
        """What to cut from which axis of which parameter.

        Args:
          keep: units that stay.
          allow_inexact: also cut groups that cannot be cut exactly.

        Raises:
          ValueError: if a name is no group or the group is not prunable, if a mask has
            another shape or dtype, or if no unit of a group stays.
        """
        stays = self._kept(keep, allow_inexact)
        cuts = {}
        for (name, _), axes in zip(self.shapes, self.analysis.axes):
            own = {}
            for axis, layout in enumerate(axes):
                positions = dims.kept(layout, stays)
                if positions is not None:
                    own[axis] = tuple(np.flatnonzero(positions).tolist())
            if own:
                cuts[name] = own
        sizes = {
            g.name: (int(stays[g.leaf].sum()), g.size)
            for g in self.groups
            if g.leaf in stays
        }
        inexact = any(g.status == "inexact" for g in self.groups if g.leaf in stays)
        return Plan(shapes=dict(self.shapes), cuts=cuts, units=sizes, inexact=inexact)

    def _matched(self, what: str, tree: Any, holes: bool = True) -> dict[str, Any]:
        shapes, leaves = dict(self.shapes), dict(_tree.named_leaves(tree))
        for name, leaf in leaves.items():
            if shapes.get(name) != jnp.shape(leaf):
                raise ValueError(
                    f"`{what}` does not fit the groups: leaf {name!r} has shape "
                    f"{jnp.shape(leaf)}, the groups were found with "
                    f"{shapes.get(name, 'no such leaf')}. Call `find_groups` with "
                    "params of these shapes."
                )
        missing = [name for name in shapes if name not in leaves]
        if missing and not holes:
            raise ValueError(
                f"`{what}` does not fit the groups: {missing[:5]} missing. Give the "
                "whole tree that `find_groups` was given."
            )
        return leaves

    def _kept(self, keep: Keep, allow_inexact: bool) -> dict[Atom, np.ndarray]:
        """Masks of leaves, of those only that lose units."""
        if not isinstance(keep, Mapping):
            raise ValueError(
                f"`keep` maps names of groups to masks, got {type(keep).__name__}. "
                "`choose(groups, scores, 0.5)` makes one."
            )
        by_name = {group.name: group for group in self.groups}
        stays = {}
        for name, mask in keep.items():
            if name not in by_name:
                raise ValueError(
                    f"`keep` names {name!r}, which is no group. Groups: "
                    f"{list(by_name)[:20]}"
                )
            group, mask = by_name[name], np.asarray(mask)
            if mask.shape != (group.size,) or mask.dtype != bool:
                raise ValueError(
                    f"`keep`[{name!r}] must be a bool array of shape "
                    f"{(group.size,)}, got {mask.dtype} of shape {mask.shape}."
                )
            if mask.all():
                continue
            if not mask.any():
                raise ValueError(
                    f"`keep`[{name!r}] keeps no unit. Layers cannot be removed whole: "
                    "keep at least one, as `choose(..., min_keep=1)` does."
                )
            allowed = ("prunable", "inexact") if allow_inexact else ("prunable",)
            if group.status not in allowed:
                hint = " or pass `allow_inexact=True`" * (group.status == "inexact")
                raise ValueError(
                    f"`keep` cuts {name!r}, which is {group.status}: {group.reason}. "
                    f"Leave it out{hint}."
                )
            stays[group.leaf] = mask
        return stays


def _per_unit(x: Any, member: Member, size: int, reduce: str) -> jax.Array:
    """Totals and counts of one member. Shape ``(2, size)``, float32."""
    x = jnp.asarray(x, jnp.float32)
    rest = tuple(i for i in range(x.ndim) if i != member.axis)
    each = x.size // max(len(member.index), 1)
    index = jnp.asarray(np.where(member.index < 0, size, member.index))
    if reduce == "max":
        lowest = jnp.full(size + 1, -jnp.inf, jnp.float32)
        top = lowest.at[index].max(jnp.max(x, rest) if rest else x)
        return jnp.stack([top[:size], jnp.zeros(size, jnp.float32)])
    row = jnp.sum(x * x if reduce == "l2" else x, rest)
    total = jnp.zeros(size + 1, jnp.float32).at[index].add(row)
    count = jnp.zeros(size + 1, jnp.float32).at[index].add(each)
    return jnp.stack([total, count])[:, :size]
