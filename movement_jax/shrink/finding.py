"""Finding the groups: which slices of which parameters go together, and why not."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from movement_jax.arguments import compiled
from movement_jax.shrink import analysis, dims
from movement_jax.shrink.analysis import Analysis
from movement_jax.shrink.dims import Atom, Layout
from movement_jax.shrink.flows import Exactness
from movement_jax.shrink.groups import Group, Groups, Member, Status


def find_groups(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    pin: str | Sequence[str] = (),
    pin_outputs: bool | Callable[[str], bool] = True,
) -> Groups:
    """Finds the slices of parameters that can only be removed together.

    Traces ``fn(params, *inputs)`` and follows every axis through the program: a column
    of one kernel is the row of the next. Nothing is computed and no layer is known by
    name, so that any pure function of any library will do. What is not understood is
    pinned, never guessed. Layers stacked for a scan lose the same units: their axis is
    pinned, as the length of the scan.

    Removal of a prunable unit is exact: with its weights at zero the function gives the
    same as with them cut out (:func:`movement_jax.shrink.shrunk`). Normalisation over
    an axis in two passes, a softmax over it, or a bias added after a sigmoid can make
    its group inexact.

    Args:
      fn: pure function; dropout off, batch statistics among the params or fixed.
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      *inputs: further arguments, as in a call. Their axes are pinned.
      pin: regular expressions for ``"path:axis"`` of axes to leave alone.
      pin_outputs: whether the axes of results are pinned, or for which paths of them.

    Returns:
      The groups, prunable or not, of at least two units.

    Raises:
      ValueError: if ``params`` is no tree of arrays, or a pattern of ``pin`` is none
        or found nowhere.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from movement_jax import shrink
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> groups = shrink.find_groups(model, params, jnp.ones((1, 3)))
      >>> [(g.name, g.size, g.status) for g in groups.groups if g.status == "prunable"]
      [('up:1', 8, 'prunable')]
    """
    shapes = analysis.abstract(params)
    found = analysis.analyse(fn, shapes, inputs)
    _pin_outputs(found, pin_outputs)
    _pin_by_name(found, (pin,) if isinstance(pin, str) else pin)
    exact = found.exactness()
    members: dict[Atom, list[Member]] = {}
    weights: dict[Atom, int] = {}
    sizes = [tuple(map(dims.size, axes)) for axes in found.axes]
    factors: dict[tuple[str, int], list[Atom]] = {}
    for name, axes, shape in zip(found.names, found.axes, sizes):
        for axis, layout in enumerate(axes):
            factors[name, axis] = list(dims.leaves(layout))
            for leaf, index in dims.units(layout):
                if not leaf.size:
                    continue
                member = Member(name, axis, _told(layout, leaf), index)
                members.setdefault(leaf, []).append(member)
                each = int(np.prod(shape)) // leaf.size
                weights.setdefault(leaf, 0)
                share = np.count_nonzero(index >= 0) / max(len(index), 1)
                weights[leaf] += int(round(each * share))
    groups = []
    for leaf, own in members.items():
        unique = list({(m.path, m.axis): m for m in own}.values())
        first = _foremost(unique, dict(zip(found.names, sizes)))
        several = factors[first.path, first.axis]
        name = f"{first.path}:{first.axis}"
        if len(set(several)) > 1:
            name += f"[{several.index(leaf)}]"
        status, reason = _status(leaf, exact)
        groups.append(
            Group(name, leaf.size, status, reason, tuple(own), weights[leaf], leaf)
        )
    return Groups(tuple(groups), tuple(zip(found.names, sizes)), found)


def _pin_outputs(found: Analysis, which: bool | Callable[[str], bool]) -> None:
    for name, axes in zip(found.out_names, found.frame.results):
        if which(name) if callable(which) else which:
            for i, layout in enumerate(axes):
                dims.pin(layout, f"axis {i} of output {name}".rstrip())


def _pin_by_name(found: Analysis, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        hits, search = 0, compiled("pin", pattern).search
        for name, axes in zip(found.names, found.axes):
            for axis, layout in enumerate(axes):
                if search(f"{name}:{axis}"):
                    dims.pin(layout, f"pinned by {pattern!r}")
                    hits += 1
        if not hits:
            raise ValueError(
                f"`pin` has a pattern that is found in no `path:axis`: {pattern!r}. "
                f"Paths: {list(found.names)[:20]}"
            )


def _status(leaf: Atom, exact: Exactness) -> tuple[Status, str]:
    if leaf.pin is not None:
        return "pinned", leaf.pin
    if leaf in exact.poles:
        return "inexact", exact.poles[leaf]
    if not exact.units(leaf).all():
        return "inexact", exact.why[leaf]
    if leaf not in exact.eliminated:
        return "pinned", "not used up in this call"
    return "prunable", ", ".join(sorted(leaf.notes))


def _foremost(members: list[Member], shapes: dict[str, tuple[int, ...]]) -> Member:
    """The member to name a group after: outputs of a kernel, if there are any."""

    def rank(member: Member) -> tuple[bool, bool]:
        ndim = len(shapes[member.path])
        return (ndim < 2 or member.axis != ndim - 1, ndim < 2)

    return min(members, key=rank)


def _told(layout: Layout, leaf: Atom) -> str:
    parts = []
    for atom in dims.expand(layout):
        if atom.segments is not None:
            inner = [_told(segment, leaf) or "1" for segment in atom.segments]
            parts.append(f"({'+'.join(inner)})")
        else:
            parts.append(f"[{atom.size}]" if atom is leaf else str(atom.size))
    return "*".join(parts)
