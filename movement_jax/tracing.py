"""Functions that are traced once for all arrays of a kind, and compiled once if eager.

Without it eager code compiles a loop, and a reduction by a function, at every call.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def once(*static: int) -> Callable[[FunctionT], FunctionT]:
    """Decorates a function of arrays; in other programs it leaves no trace.

    Args:
      static: places of arguments that are no arrays, but can be hashed.
    """

    def decorate(function: FunctionT) -> FunctionT:
        jitted = jax.jit(function, static_argnums=static, inline=True)
        return cast(FunctionT, jitted)

    return decorate
