"""What the positions along an axis are: atoms, their products and sums.

An axis is a *layout*, a row-major product of atoms. An axis of size 1 is the empty
product. Atoms are equal by union-find. One that something looks into is defined in
terms of others, as a product (a reshape split the axis) or as a sum of segments (it was
concatenated, sliced or padded). Atoms without a definition are *leaves*: the units that
can be removed are their positions.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(eq=False)
class Atom:
    """A dimension of its own.

    Attributes:
      size: number of positions, at least 2 (or 0).
      parent: the atom that this one was found equal to.
      factors: definition as a product.
      segments: definition as a sum.
      pin: why no position of it can be removed.
      notes: what else is known, such as that its positions are counted by ``iota``.
    """

    size: int
    parent: "Atom | None" = None
    factors: "Layout | None" = None
    segments: "tuple[Layout, ...] | None" = None
    pin: str | None = None
    notes: frozenset[str] = frozenset()


Layout = tuple[Atom, ...]


def new(size: int, note: str | None = None) -> Layout:
    """An axis of which nothing is known."""
    notes = frozenset() if note is None else frozenset({note})
    return () if size == 1 else (Atom(int(size), notes=notes),)


def size(layout: Layout) -> int:
    """Number of positions."""
    return math.prod(atom.size for atom in layout)


def expand(layout: Layout) -> Layout:
    """The same product in leaves and sums."""
    out: list[Atom] = []
    for atom in layout:
        atom = _root(atom)
        if atom.factors is not None:
            out += expand(atom.factors)
        else:
            out.append(atom)
    return tuple(out)


def leaves(layout: Layout) -> Iterator[Atom]:
    """All leaves, in order, those met twice twice."""
    for atom in expand(layout):
        if atom.segments is None:
            yield atom
        else:
            for segment in atom.segments:
                yield from leaves(segment)


def pin(layout: Layout, why: str) -> None:
    """No position may be removed."""
    for leaf in leaves(layout):
        leaf.pin = leaf.pin or why


def note(layout: Layout, text: str) -> None:
    """Notes something about all leaves."""
    for leaf in leaves(layout):
        leaf.notes |= {text}


def unify(a: Layout, b: Layout, why: str) -> None:
    """The positions of two axes are the same.

    Args:
      a: one axis.
      b: another one of the same size.
      why: what to say of leaves that must be pinned since the two do not fit.
    """
    left, right = expand(a), expand(b)
    if left == right:
        return
    if size(left) != size(right):
        raise AssertionError(f"axes of {size(left)} and {size(right)} positions")
    left, right = _match_ends(left, right, why, last=True)
    left, right = _match_ends(left, right, why, last=False)
    pin(left + right, why)


def concatenate(parts: Sequence[Layout]) -> Layout:
    """One axis of several, end to end."""
    parts = [part for part in parts if size(part)]
    if len(parts) == 1:
        return parts[0]
    return (Atom(sum(map(size, parts)), segments=tuple(parts)),)


def split(layout: Layout, low: int) -> tuple[Layout, Layout] | None:
    """Splits an axis into ``(size // low, low)``; None if it has no such factors."""
    rest = list(expand(layout))
    lows: list[Atom] = []
    while low > 1:
        if not rest:
            return None
        last = rest.pop()
        if last.size and low % last.size == 0:
            lows.insert(0, last)
            low //= last.size
            continue
        parts = _factor(last, low)
        if parts is None:
            return None
        rest += parts[0]
        lows[:0] = parts[1]
        low = 1
    return tuple(rest), tuple(lows)


def cut(layout: Layout, points: Sequence[int]) -> list[Layout] | None:
    """Cuts an axis into segments.

    Args:
      layout: the axis.
      points: where, increasing, from 0 to its size.

    Returns:
      Segments between the points; None if these lie inside of inner factors.
    """
    layout = expand(layout)
    if len(points) == 2:
        return [layout]
    first, rest = layout[0], layout[1:]
    inner = size(rest)
    if inner > 1:
        if any(point % inner for point in points):
            return None
        parts = cut((first,), [point // inner for point in points])
        return None if parts is None else [part + rest for part in parts]
    if first.segments is None:
        segments = [_child(first, b - a) for a, b in zip(points, points[1:])]
        first.segments = tuple(segments)
        return segments
    pieces, at = [], 0
    for segment in first.segments:
        end = at + size(segment)
        within = [point - at for point in points if at < point < end]
        parts = cut(segment, [0, *within, end - at])
        if parts is None:
            return None
        pieces += parts
        at = end
    first.segments = tuple(pieces)
    out, at = [], 0
    for end in points[1:]:
        chosen = []
        while at < end:
            chosen.append(pieces.pop(0))
            at += size(chosen[-1])
        out.append(concatenate(chosen))
    return out


def units(layout: Layout) -> list[tuple[Atom, np.ndarray]]:
    """Which unit of which leaf every position belongs to.

    Returns:
      Every occurrence of a leaf, with the unit at each position, -1 where there is
      none. Shapes ``(size,)``.
    """
    out: list[tuple[Atom, np.ndarray]] = []
    atoms = expand(layout)
    for i, atom in enumerate(atoms):
        before, after = size(atoms[:i]), size(atoms[i + 1 :])
        for leaf, index in _units_of(atom):
            out.append((leaf, np.tile(np.repeat(index, after), before)))
    return out


def kept(layout: Layout, keep: dict[Atom, np.ndarray]) -> np.ndarray | None:
    """Which positions stay, given which units of leaves do.

    Returns:
      Shape ``(size,)``, bool; None where all stay.
    """
    if not any(leaf in keep for leaf in leaves(layout)):
        return None
    stays = np.ones(size(layout), bool)
    for leaf, index in units(layout):
        if leaf in keep:
            stays &= keep[leaf][index] | (index < 0)
    return None if stays.all() else stays


def _units_of(atom: Atom) -> Iterator[tuple[Atom, np.ndarray]]:
    if atom.segments is None:
        yield atom, np.arange(atom.size)
        return
    at = 0
    for segment in atom.segments:
        for leaf, index in units(segment):
            whole = np.full(atom.size, -1)
            whole[at : at + len(index)] = index
            yield leaf, whole
        at += size(segment)


def _root(atom: Atom) -> Atom:
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def _child(atom: Atom, count: int) -> Layout:
    return () if count == 1 else (Atom(count, pin=atom.pin, notes=atom.notes),)


def _match_ends(
    left: Layout, right: Layout, why: str, last: bool
) -> tuple[Layout, Layout]:
    """Equates atoms from one end on; what is left of both where they do not fit."""
    while left and right:
        end = -1 if last else 0
        u, v = left[end], right[end]
        if u.size == v.size:
            _merge(u, v, why)
            inner = slice(None, -1) if last else slice(1, None)
            left, right = left[inner], right[inner]
        else:
            small, large = sorted((u, v), key=lambda atom: atom.size)
            if not small.size or large.size % small.size:
                break
            low = small.size if last else large.size // small.size
            if _factor(large, low) is None:
                break
        left, right = expand(left), expand(right)
    return left, right


def _merge(u: Atom, v: Atom, why: str) -> None:
    """Equates two atoms of one size, neither of which is a product."""
    if u is v:
        return
    if u.segments is not None and v.segments is not None:
        points = sorted({*_points(u), *_points(v)})
        ours, theirs = cut((u,), points), cut((v,), points)
        if ours is None or theirs is None:
            pin((u, v), why)
            return
        for a, b in zip(ours, theirs):
            unify(a, b, why)
        return
    if u.segments is not None:
        u, v = v, u
    u.parent = v
    if u.pin is not None:
        pin((v,), u.pin)
    for text in u.notes:
        note((v,), text)


def _points(atom: Atom) -> list[int]:
    points = [0]
    for segment in atom.segments or ():
        points.append(points[-1] + size(segment))
    return points


def _factor(atom: Atom, low: int) -> tuple[Layout, Layout] | None:
    """Defines a leaf or a sum as a product ``(size // low, low)``."""
    if low <= 1 or low >= atom.size or atom.size % low:
        return None
    if atom.segments is None:
        high, lows = _child(atom, atom.size // low), _child(atom, low)
        atom.factors = high + lows
        return high, lows
    if any(size(segment) % low for segment in atom.segments):
        return None
    parts = [split(segment, low) for segment in atom.segments]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    for _, other in found[1:]:
        unify(found[0][1], other, "its parts are reshaped together")
    high, lows = concatenate([part[0] for part in found]), found[0][1]
    atom.factors, atom.segments = high + lows, None
    return high, lows
