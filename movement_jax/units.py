"""Units that span several tensors: what they are worth, and masks of whole ones.

A unit of a model, such as an attention head or a hidden neuron, is a slice of several
tensors along an axis of each. Which, is plain data, found by
:func:`movement_jax.shrink.find_groups`.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from movement_jax import grouping
from movement_jax.counting import Tensor
from movement_jax.grouping import Reduce

_MOST_MEMBERS = 2**30
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Slices:
    """Where the units of a group lie along one axis of one tensor.

    Attributes:
      path: of the tensor.
      axis: along which they lie.
      index: the unit at each position, -1 where there is none: int32 as bytes, whose
        hash Python keeps.
    """

    path: str
    axis: int
    index: bytes = dataclasses.field(repr=False)

    @classmethod
    def of(cls, path: str, axis: int, index: np.ndarray) -> "Slices":
        """Slices from an array of units. Shape ``(positions,)``, any integers."""
        return cls(path, axis, index.astype(np.int32).tobytes())

    @property
    def unit_at(self) -> np.ndarray:
        """The unit at each position. Shape ``(positions,)``, int32."""
        return np.frombuffer(self.index, np.int32)

    @property
    def positions(self) -> np.ndarray:
        """The positions of each unit. Shape ``(units, positions of one)``, int."""
        order = np.argsort(self.unit_at, kind="stable")
        order = order[np.count_nonzero(self.unit_at < 0) :]
        return order.reshape(int(self.unit_at.max()) + 1, -1)


@dataclasses.dataclass(frozen=True)
class UnitGroup:
    """Units of one size that compete with each other.

    Attributes:
      name: of the group.
      size: number of units.
      weights: of each unit, over all tensors.
      slices: where they lie.
    """

    name: str
    size: int
    weights: int
    slices: tuple[Slices, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Units:
    """Whole units of a model are kept or dropped as one, in all tensors they span.

    Made by ``groups.units()``, or from ``movement_pruning(structure=groups)``. What
    counts as sparsity are units: under ``Uniform()`` and ``PerPath`` (whose patterns
    are searched for in the names of groups) the fraction of the units of every group,
    of which ``min_keep`` stay; under ``Global()`` that of the weights of all units,
    where one that two units share (a head and a channel of the stream) counts for both.

    Attributes:
      groups: of units.
      shapes: path and shape of every tensor that has a slice.
      reduce: ``"mean"`` or ``"sum"`` of the scores of its weights is what a unit is
        worth. They differ under ``Global()``, where units of different size compare.

    Raises:
      ValueError: if ``reduce`` is none of these or there are no groups; at ``init``, if
        tensors with slices are not pruned or have another shape.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> from movement_jax import shrink
      >>> def model(params, x):
      ...     return (x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> units = shrink.find_groups(model, params, jnp.ones((1, 3))).units()
      >>> units.groups[0].name, units.groups[0].size, units.groups[0].weights
      ('up:1', 8, 5)
      >>> tx = mj.movement_pruning(0.5, structure=units, allocation=mj.Global())
    """

    groups: tuple[UnitGroup, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum"):
            raise ValueError(
                f"`reduce` must be 'mean' or 'sum', got {self.reduce!r}. Write "
                "`groups.units('mean')`."
            )
        if not self.groups:
            raise ValueError(
                "`structure` has no units to prune: no group is prunable. "
                "`print(groups)` tells why."
            )

    def __repr__(self) -> str:
        n_units = sum(group.size for group in self.groups)
        return (
            f"Units({n_units} units in {len(self.groups)} groups, "
            f"reduce={self.reduce!r}, sha256={self._digest[:16]!r})"
        )

    def __hash__(self) -> int:
        return hash(self._digest)

    @functools.cached_property
    def _digest(self) -> str:
        """Of all that it says; computed once, where every call under jit hashes."""
        data = hashlib.sha256(repr((self.groups, self.shapes, self.reduce)).encode())
        for group in self.groups:
            for own in group.slices:
                data.update(own.index)
        return data.hexdigest()

    @property
    def tensors(self) -> list[Tensor]:
        """The groups, as tensors to be ranked: one entry a unit."""
        return [Tensor(g.name, (g.size,), block=(g.weights,)) for g in self.groups]

    @property
    def pattern(self) -> str:
        """Regular expression for the paths of all tensors with slices."""
        paths = "|".join(re.escape(path) for path, _ in self.shapes)
        return rf"\A(?:{paths})\Z"

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Refuses tensors that are not those of the model the units were found in."""
        have = {tensor.name: tensor.shape for tensor in tensors}
        missing = [path for path, _ in self.shapes if path not in have]
        if missing:
            raise ValueError(
                f"`structure` has units with weights in {missing[:_SHOWN]}, which are "
                "no prunable leaves: left alone, they would keep the unit alive. Leave "
                "out `prunable`, or find the groups with the params that `tx.init` is "
                f"given. Prunable: {list(have)[:20]}"
            )
        for path, shape in self.shapes:
            if have[path] != shape:
                raise ValueError(
                    f"`structure` was found with {path!r} of shape {shape}, and the "
                    f"params have {have[path]}. Call `find_groups` with these params."
                )
            if math.prod(shape) > _MOST_MEMBERS * min(shape):
                raise ValueError(
                    f"`structure` makes one unit of more than {_MOST_MEMBERS} weights "
                    f"of {path!r} of shape {shape}."
                )

    def scores(self, leaves: Mapping[str, jax.Array]) -> list[jax.Array]:
        """What every unit is worth, the same bits on every sharding.

        Args:
          leaves: path -> scores of the weights.

        Returns:
          One float32 array of shape ``(size,)`` per group.
        """

        def add(x: jax.Array, block: tuple[int, ...]) -> jax.Array:
            return grouping.group_scores(x, block, "sum")

        totals = self._reduced(leaves, add)
        if self.reduce == "sum":
            return totals
        return [x / np.float32(g.weights) for x, g in zip(totals, self.groups)]

    def alive(self, leaves: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Which units have any weight left.

        Args:
          leaves: path -> mask.

        Returns:
          One bool array of shape ``(size,)`` per group.
        """
        return self._reduced(leaves, grouping.group_any)

    def masks(
        self, keep: Sequence[jax.Array], leaves: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Masks that drop every weight of the units that go.

        Args:
          keep: per group which units stay. Shape ``(size,)``, bool.
          leaves: path -> array with the shape and the sharding of its mask.

        Returns:
          Path -> mask; True where no unit has a slice.
        """
        masks = {path: jnp.ones_like(x, dtype=bool) for path, x in leaves.items()}
        stays = jnp.concatenate([*keep, jnp.ones(1, bool)])
        starts = np.cumsum([0] + [group.size for group in self.groups])
        rows: dict[tuple[str, int], list[np.ndarray]] = {}
        for start, group in zip(starts, self.groups):
            for own in group.slices:
                at = np.where(own.unit_at < 0, starts[-1], start + own.unit_at)
                rows.setdefault((own.path, own.axis), []).append(at)
        for (path, axis), at in rows.items():
            x = leaves[path]
            row = jnp.all(stays[np.stack(at, 1)], 1)
            row = row.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
            masks[path] &= grouping.spread(row, _all_but(axis, x.shape), x)
        return masks

    def densities(self, kept: Sequence[float]) -> dict[str, float]:
        """What is left of each tensor, given the fractions of the groups that stay."""
        shapes = dict(self.shapes)
        axes = {
            (path, axis): np.ones(d)
            for path, shape in shapes.items()
            for axis, d in enumerate(shape)
        }
        for group, share in zip(self.groups, kept):
            for own in group.slices:
                axes[own.path, own.axis][own.unit_at >= 0] *= share
        left = dict.fromkeys(shapes, 1.0)
        for (path, _), row in axes.items():
            left[path] *= float(row.mean())
        return left

    def cut(self, positions: Mapping[str, Mapping[int, Sequence[int]]]) -> "Units":
        """The units of the model that is left after a cut.

        Args:
          positions: path -> axis -> those that stay.
        """
        groups = []
        for group in self.groups:
            slices, weights, size = [], 0, group.size
            shapes = {path: list(shape) for path, shape in self.shapes}
            for own in group.slices:
                index = own.unit_at
                at = positions.get(own.path, {}).get(own.axis)
                if at is not None:
                    index = index[list(at)]
                left = np.unique(index[index >= 0])
                index = np.where(index < 0, -1, np.searchsorted(left, index))
                slices.append(Slices.of(own.path, own.axis, index))
                size = len(left)
                shape = _cut_shape(shapes[own.path], positions.get(own.path, {}))
                count = int(np.count_nonzero(index >= 0)) // size
                weights += count * math.prod(shape) // shape[own.axis]
            groups.append(UnitGroup(group.name, size, weights, tuple(slices)))
        left_shapes = tuple(
            (path, tuple(_cut_shape(shape, positions.get(path, {}))))
            for path, shape in self.shapes
        )
        return Units(tuple(groups), left_shapes, self.reduce)

    def _reduced(
        self,
        leaves: Mapping[str, jax.Array],
        reduce: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    ) -> list[jax.Array]:
        """Every tensor along each axis, then the positions of each unit.

        Returns:
          One array of shape ``(size,)`` per group.
        """
        along, starts, length = [], {}, 0
        for path, axis in self._places:
            x = leaves[path]
            row = _everywhere(reduce(x, _all_but(axis, x.shape))).reshape(-1)
            along.append(row)
            starts[path, axis] = length
            length += len(row)
        whole = jnp.concatenate(along)
        # The groups of one shape at once: the same layer in several blocks.
        shapes: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for i, group in enumerate(self.groups):
            own = [starts[s.path, s.axis] + s.positions for s in group.slices]
            at = np.concatenate(own, 1)
            shapes.setdefault(at.shape, []).append((i, at))
        found = {}
        for shape, rows in shapes.items():
            at = np.stack([at for _, at in rows])
            values = reduce(whole[at], (1, 1, shape[1]))
            for (i, _), value in zip(rows, values):
                found[i] = value.reshape(-1)
        return [found[i] for i in range(len(found))]

    @property
    def _places(self) -> list[tuple[str, int]]:
        """Path and axis of all slices, each once."""
        every = [(own.path, own.axis) for g in self.groups for own in g.slices]
        return list(dict.fromkeys(every))


class HasUnits(Protocol):
    """Groups of a model, of which units can be made."""

    def units(self) -> Units:
        """The units of all groups."""
        ...


def _everywhere(x: jax.Array) -> jax.Array:
    """On an explicit mesh, all of ``x`` on every device."""
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return x
    x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return x


def _all_but(axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i == axis else d for i, d in enumerate(shape))


def _cut_shape(
    shape: Sequence[int], positions: Mapping[int, Sequence[int]]
) -> list[int]:
    return [len(positions.get(axis, range(d))) for axis, d in enumerate(shape)]
