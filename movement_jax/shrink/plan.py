"""What to cut from which parameter: plain data, and what it does to trees."""

import dataclasses
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import packing, report
from movement_jax import state as _state
from movement_jax import tree as _tree
from movement_jax.units import Units

_FORMAT = 1  # of the JSON


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which positions of which axes of which parameters stay.

    Made by ``groups.plan(keep)``. It holds no arrays and no function, and prints as a
    table. It is made for one set of shapes and refuses others.

    Attributes:
      shapes: path -> shape, of all params before the cut.
      cuts: path -> axis -> positions that stay, increasing.
      units: name of the group -> how many of its units stay, and how many there were.
      inexact: whether groups are cut that cannot be cut exactly.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from movement_jax import shrink
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
      >>> groups = shrink.find_groups(model, params, jnp.ones((1, 3)))
      >>> plan = groups.plan({"up:1": jnp.array([True, False, False, True])})
      >>> plan == shrink.Plan.from_json(plan.to_json())
      True
      >>> jax.tree.map(jnp.shape, plan.shrink(params))
      {'down': (2, 2), 'up': (3, 2)}
    """

    shapes: dict[str, tuple[int, ...]]
    cuts: dict[str, dict[int, tuple[int, ...]]]
    units: dict[str, tuple[int, int]]
    inexact: bool = False

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that :meth:`to_json` wrote.

        Raises:
          ValueError: if ``text`` is none, or its positions do not fit its shapes.
        """
        try:
            read = json.loads(text)
            if read.pop("format") != _FORMAT:
                raise ValueError("another format")
            plan = cls(
                shapes={name: _integers(d) for name, d in read["shapes"].items()},
                cuts={
                    name: {int(axis): _integers(at) for axis, at in own.items()}
                    for name, own in read["cuts"].items()
                },
                units={name: (n, of) for name, (n, of) in read["units"].items()},
                inexact=bool(read["inexact"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`text` is no plan ({error!r}). Give what `plan.to_json()` returned."
            ) from None
        plan._check()
        return plan

    def small_shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of all params after the cut.

        They are the sizes to pass, where a smaller module is to be built by hand. It
        computes the same where no number is taken from a size that changes: a narrower
        hidden layer, fewer heads (if ``qkv_features`` is passed too, or ``head_dim``
        would grow), fewer channels of a convolution. It computes something else,
        without an error, with a smaller ``head_dim``, since queries are divided by its
        root, and with a narrower stream under a LayerNorm or RMSNorm, whose means are
        over the new width. ``verify(fn, params, plan, x, rebuilt=small_fn)`` tells.
        :func:`movement_jax.shrink.shrunk` always keeps the old numbers.
        """
        return {
            name: tuple(
                len(self.cuts[name][axis]) if axis in self.cuts.get(name, {}) else d
                for axis, d in enumerate(shape)
            )
            for name, shape in self.shapes.items()
        }

    def shrink(self, tree: Any) -> Any:
        """Cuts params, or a tree like them such as masks or scores.

        Works under ``jit``.

        Args:
          tree: leaves with the paths and shapes of the params. Leaves may be missing.

        Raises:
          ValueError: if a leaf has another path or shape.
        """

        def pick(path: Any, x: Any) -> Any:
            name = _tree.path_name(path)
            self._check_leaf("tree", name, x, self.shapes)
            return self._cut(name, x)

        return jax.tree_util.tree_map_with_path(pick, tree)

    def shrink_like(self, state: Any) -> Any:
        """Cuts all that lies like the params in an optimizer's state.

        A leaf whose path ends in that of a parameter is cut like it: moments, masks,
        scores, running averages. A state of :func:`movement_jax.movement_pruning` with
        groups as its ``structure`` goes on with the units that are left: a sparsity
        higher than before the cut then counts these.

        Args:
          state: of an optimizer, or any tree that holds trees like the params.

        Returns:
          The same tree; what belongs to no parameter that is cut is as it was.

        Raises:
          ValueError: if such a leaf has another shape than its parameter (a factored
            moment, say), or nothing in ``state`` but scalars belongs to a parameter.
        """
        before = state
        state = _each_state(_state.shown, state)
        arrays = [n for n, x in _tree.named_leaves(state) if jnp.ndim(x)]
        owners = self.owners(arrays)

        def pick(path: Any, x: Any) -> Any:
            name = _tree.path_name(path)
            own = owners.get(name)
            if own not in self.cuts or not jnp.ndim(x):
                return x
            if jnp.shape(x) != self.shapes[own] and jnp.size(x) == 1:
                return x  # a placeholder
            self._check_leaf("state", own, x, self.shapes, at=name)
            return self._cut(own, x)

        out = jax.tree_util.tree_map_with_path(pick, state)
        out = _each_state(self._cut_units, out)
        out = _each_state(_packed_like, out, before)
        if arrays and not owners:
            raise ValueError(
                "`state` holds nothing whose path ends in that of a parameter; it has "
                f"{arrays[:5]}. `optax.flatten` hides the paths: shrink the params and "
                "start its state anew."
            )
        return out

    def mask(self, params: Any) -> Any:
        """``params`` with 0 where the plan cuts: a dense model equal to the cut one."""

        def pick(path: Any, x: Any) -> Any:
            name = _tree.path_name(path)
            self._check_leaf("params", name, x, self.shapes)
            mask = np.ones(self.shapes[name], bool)
            for axis, at in self.cuts.get(name, {}).items():
                stays = np.zeros(mask.shape[axis], bool)
                stays[list(at)] = True
                mask &= stays.reshape(
                    [-1 if i == axis else 1 for i in range(mask.ndim)]
                )
            return x if mask.all() else jnp.where(mask, x, jnp.zeros_like(x))

        return jax.tree_util.tree_map_with_path(pick, params)

    def summary(self) -> "PlanSummary":
        """Sizes before and after, to print or to read."""
        small = self.small_shapes()
        before = sum(int(np.prod(shape)) for shape in self.shapes.values())
        after = sum(int(np.prod(shape)) for shape in small.values())
        cut = {n: (self.shapes[n], small[n]) for n in self.shapes if n in self.cuts}
        return PlanSummary(before, after, dict(self.units), cut)

    def __str__(self) -> str:
        return str(self.summary())

    def check_small(self, params: Any) -> None:
        """Refuses params that do not have the shapes after the cut."""
        small = self.small_shapes()
        named = dict(_tree.named_leaves(params))
        missing = [name for name in small if name not in named]
        if missing:
            raise ValueError(
                f"`params` does not fit the plan: {missing[:5]} missing. Give the "
                "whole tree that `plan.shrink(params)` returns."
            )
        for name, x in named.items():
            self._check_leaf("params", name, x, small)

    def _check_leaf(
        self,
        what: str,
        name: str,
        x: Any,
        shapes: dict[str, tuple[int, ...]],
        at: str | None = None,
    ) -> None:
        if name not in shapes:
            raise ValueError(
                f"`{what}` does not fit the plan, which knows no leaf {name!r}. It was "
                f"made for {list(shapes)[:5]}..."
            )
        if jnp.shape(x) != shapes[name]:
            raise ValueError(
                f"`{what}` does not fit the plan: leaf {at or name!r} has shape "
                f"{jnp.shape(x)}, the plan says {shapes[name]}."
            )

    def owners(self, names: Sequence[str]) -> dict[str, str]:
        """Path -> the parameter that it ends in, of paths that end in any.

        If a path ends in several, as ``mu/w`` in ``w`` and in ``mu/w``, it is the
        longest of those with a tree before them that holds nothing but params.
        """
        splits = {}
        for name in names:
            parts = name.split("/")
            pairs = ("/".join(parts[:i]) for i in range(len(parts)))
            splits[name] = [(p, name[len(p) + 1 if p else 0 :]) for p in pairs]
        others = {
            p for rows in splits.values() for p, n in rows if n not in self.shapes
        }
        found = {}
        for name, rows in splits.items():
            own = [(prefix, n) for prefix, n in rows if n in self.shapes]
            whole = [n for prefix, n in own if prefix not in others]
            if own:
                found[name] = (whole or [own[0][1]])[0]
        return found

    def _cut(self, name: str, x: Any) -> Any:
        for axis, at in self.cuts.get(name, {}).items():
            x = jnp.take(x, np.asarray(at), axis=axis)
        return x

    def _cut_units(self, node: _state.MovementState) -> _state.MovementState:
        """The units that a pruning state is configured with, cut too."""
        units = node.config.structure
        if not isinstance(units, Units) or dict(units.shapes) != {
            path: self.shapes.get(path) for path, _ in units.shapes
        }:
            return node
        config = dataclasses.replace(node.config, structure=units.cut(self.cuts))
        return node._replace(config=config)

    def _check(self) -> None:
        for name, own in self.cuts.items():
            for axis, at in own.items():
                shape = self.shapes.get(name, ())
                size = shape[axis] if 0 <= axis < len(shape) else 0
                rising = all(a < b for a, b in zip(at, at[1:]))
                if not at or not rising or at[0] < 0 or at[-1] >= size:
                    raise ValueError(
                        f"`text` is no plan: axis {axis} of {name!r}, which has shape "
                        f"{shape}, cannot keep {list(at)[:5]}..."
                    )


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(operator.index(value) for value in values)


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    """Sizes before and after a cut; prints as a table.

    Attributes:
      before: number of parameters.
      after: how many are left.
      units: name of the group -> how many units stay, and how many there were.
      shapes: path -> shape before and after, of the params that are cut.
    """

    before: int
    after: int
    units: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        left = self.after / max(self.before, 1)
        total = f"{self.before:,} parameters, {self.after:,} left ({left:.1%})."
        return f"{report.rendered(self)}\n\n{total}"

    def __rich__(self) -> Any:
        table = report.new_table("Group", "Units", "Left", title="Cut")
        for name, (n, of) in self.units.items():
            report.add_row(table, name, f"{of:,}", f"{n:,}")
        return table


def _each_state(change: Callable[..., Any], *trees: Any) -> Any:
    """A tree with its states of ``movement_pruning`` changed."""
    return jax.tree.map(
        lambda node, *others: change(node, *others) if _state.is_state(node) else node,
        *trees,
        is_leaf=_state.is_state,
    )


def _packed_like(
    state: _state.MovementState, before: _state.MovementState
) -> _state.MovementState:
    if not packing.has_packed(before.masks):
        return state
    return state._replace(masks=packing.pack(state.masks))
