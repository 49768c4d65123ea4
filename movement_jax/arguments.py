"""Numbers that users give: taken from NumPy as from Python."""

import math
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """A NumPy scalar as the Python number it is; everything else unchanged.

    Examples:
      >>> import numpy as np
      >>> plain(np.int64(5)), plain("5")
      (5, '5')
    """
    return value.item() if isinstance(value, np.generic) else value


def make_plain(instance: Any, *names: str) -> None:
    """Does the same to fields of a frozen dataclass that is being made."""
    for name in names:
        object.__setattr__(instance, name, plain(getattr(instance, name)))


def decay_of(half_life: float) -> float:
    """The decay that halves in so many steps."""
    if isinstance(half_life, bool) or not isinstance(half_life, int | float):
        raise TypeError(f"`half_life` must be a number of steps, got {half_life!r}.")
    if not (half_life > 0 and math.isfinite(half_life)):
        raise ValueError(
            f"`half_life` is a number of steps and must be positive, got {half_life}."
        )
    return float(0.5 ** (1 / half_life))


def check_every(name: str, value: Any) -> None:
    """Refuses what is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a number of steps, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1 step, got {value}.")


def check_fraction(name: str, value: Any) -> None:
    """Refuses what is no number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number in [0, 1), got {value!r}.")
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
