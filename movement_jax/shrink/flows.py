"""What is known of zeros in a value, and what that says of cutting its axes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from movement_jax.shrink import dims
from movement_jax.shrink.dims import Atom
from movement_jax.shrink.rules import Axes, Site

Zero = dict[tuple[int, Atom], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of a value.

    Attributes:
      value: the number that it is everywhere.
      zero: (axis, leaf) -> for every unit of the leaf, whether the value is zero at all
        positions of that unit along that axis. Shapes ``(units,)``, bool.
    """

    value: float | None = None
    zero: Zero = dataclasses.field(default_factory=dict)

    def at(self, axis: int, leaf: Atom) -> np.ndarray:
        """Units of a leaf at which the value is zero along an axis."""
        found = self.zero.get((axis, leaf))
        return np.full(leaf.size, self.value == 0) if found is None else found


class Exactness:
    """Collects what eliminates each leaf, and for which units that is exact.

    Attributes:
      exact: of every leaf, the units that can go. Shapes ``(units,)``, bool.
      why: of leaves with others, the first operation that stands against it.
      eliminated: leaves that were summed over.
      poles: leaves at whose removed units something is divided by zero.
    """

    def __init__(self) -> None:
        self.exact: dict[Atom, np.ndarray] = {}
        self.why: dict[Atom, str] = {}
        self.eliminated: set[Atom] = set()
        self.poles: dict[Atom, str] = {}

    def eliminate(self, site: Site, leaf: Atom, zero: np.ndarray, why: str) -> None:
        """An axis goes; ``zero`` says at which of its units nothing is lost."""
        self.eliminated.add(leaf)
        if not zero.all():
            self.exact[leaf] = self.units(leaf) & zero
            self.why.setdefault(leaf, "" if leaf.pin else site.told(why))

    def divide(self, site: Site, leaf: Atom, units: np.ndarray) -> None:
        """The result is no number at some units."""
        if units.any() and not leaf.pin:
            self.poles.setdefault(leaf, site.told("removed units give no number"))

    def units(self, leaf: Atom) -> np.ndarray:
        """The units of a leaf that can go."""
        return self.exact.get(leaf, np.ones(leaf.size, bool))


ZeroRule = Callable[[Exactness, Site, list[Flow], list[Axes], list[Axes]], list[Flow]]


def parameter(axes: Axes, value: Any = None) -> Flow:
    """A parameter: zero at the removed units of all its axes, or where it really is.

    Args:
      axes: its layouts.
      value: its values, to find where they are zero; None for wherever units go.
    """
    zero: Zero = {}
    for axis, layout in enumerate(axes):
        alive = np.zeros(dims.size(layout), bool)
        if value is not None:
            rest = tuple(i for i in range(len(axes)) if i != axis)
            alive = (np.asarray(value) != 0).any(rest)
        for leaf, index in dims.units(layout):
            found = zero.setdefault((axis, leaf), np.ones(leaf.size, bool))
            found[index[alive & (index >= 0)]] = False
    return Flow(zero=zero)


def meet(a: Flow, b: Flow) -> Flow:
    """What holds for both of two values."""
    if a.value is not None and a.value == b.value:
        return Flow(a.value)
    return Flow(None, {key: a.at(*key) & b.at(*key) for key in {**a.zero, **b.zero}})


def same(a: Flow, b: Flow) -> bool:
    """Whether the same is known of two values."""
    if a.value != b.value or a.zero.keys() != b.zero.keys():
        return False
    return all(np.array_equal(a.zero[key], b.zero[key]) for key in a.zero)


def moved(flow: Flow, where: dict[int, int]) -> Flow:
    """The same with axes renumbered; those not named are forgotten."""
    zero = {
        (where[i], a): z for (i, a), z in flow.zero.items() if where.get(i, -1) >= 0
    }
    return Flow(flow.value, zero)


def restricted(flow: Flow, axes: Axes) -> Flow:
    """Only what concerns leaves that an axis still has."""
    found = [set(dims.leaves(layout)) for layout in axes]
    zero = {(i, a): z for (i, a), z in flow.zero.items() if a in found[i]}
    return Flow(flow.value, zero)
