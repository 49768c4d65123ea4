"""Numbers that users give: taken from NumPy as from Python."""

import math
import re
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
    check_number("half_life", half_life)
    if not (half_life > 0 and math.isfinite(half_life)):
        raise ValueError(
            f"`half_life` is a number of steps and must be positive, got {half_life}."
        )
    return float(0.5 ** (1 / half_life))


def resolve_decay(instance: Any, default: float) -> None:
    """Sets ``decay`` of a frozen dataclass that takes it or ``half_life``.

    Raises:
      ValueError: if both are given and differ, or something is out of range.
    """
    make_plain(instance, "decay", "half_life")
    decay, half_life = instance.decay, instance.half_life
    if decay is not None and half_life is not None:
        if decay != decay_of(half_life):
            raise ValueError(
                f"`{type(instance).__name__}` takes `decay` or `half_life`, not both: "
                f"got decay={decay}, half_life={half_life}."
            )
        return
    if half_life is not None:
        decay = decay_of(half_life)
    decay = default if decay is None else decay
    check_fraction("decay", decay)
    object.__setattr__(instance, "decay", float(decay))


def check_number(name: str, value: Any) -> None:
    """Refuses what is no Python number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{name}` must be a number, got {value!r} of type {type(value).__name__}."
        )


def check_positive(name: str, value: Any) -> None:
    """Refuses what is no finite number above 0."""
    check_number(name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive, got {value}.")


def check_not_negative(name: str, value: Any) -> None:
    """Refuses what is no finite number of at least 0."""
    check_number(name, value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be at least 0, got {value}.")


def check_every(name: str, value: Any) -> None:
    """Refuses what is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number of steps, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1 step, got {value}.")


def check_fraction(name: str, value: Any) -> None:
    """Refuses what is no number in [0, 1)."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}.")


def check_seed(value: Any) -> None:
    """Refuses what is no integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`seed` must be an integer, got {value!r}. For example `seed=0`."
        )


def compiled(name: str, pattern: Any) -> re.Pattern[str]:
    """A regular expression, ready to search with; refuses what is none."""
    try:
        regex: re.Pattern[str] = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`{name}` takes regular expressions, and {pattern!r} is none ({error}). "
            "To find a path as it stands, give `re.escape(path)`."
        ) from None
    return regex
