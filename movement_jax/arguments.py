"""Numbers that users give: taken from NumPy as from Python."""

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
