"""Scores stored in two bytes instead of four, without standing still.

A bfloat16 keeps eight bits. A slow running average moves by less than half of the last
one in a step, and rounding to nearest takes it back every time. Rounding up must come
as often as what is rounded lies above: here in turns, which a fixed sequence deals out
more evenly than chance would. It needs no generator, is the same for every weight, on
every mesh and after a restart, and leaves errors of about one last bit, where those
that chance makes add up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

DTYPES = ("float32", "bfloat16")
_CUT = 1 << 16  # what a float32 counts between two neighbours in bfloat16
# Odd, so that every one of these offsets has its turn once in 2**16 updates; and like
# the golden section (no large partial quotient), so that they are spread evenly over
# fewer: any number of turns in a row rounds up as often as it should, give or take 6.
_STRIDE = 40447


class RoundedScores(NamedTuple):
    """State of a criterion with ``scores_dtype="bfloat16"``.

    Attributes:
      values: the scores. Like params, bfloat16.
      updates: how often they were updated: whose turn it is. Shape ``()``, int32.
    """

    values: Any
    updates: jax.Array


def check_dtype(dtype: Any) -> str:
    """The name of a dtype that scores can be stored in.

    Raises:
      ValueError: if it is another one.
    """
    try:
        name: str = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(
            f"`scores_dtype` must be {' or '.join(map(repr, DTYPES))}, got {name!r}. "
            "For two bytes a weight write `EmaMagnitude(scores_dtype='bfloat16')`."
        )
    return name


def zeros(params: Any, dtype: str) -> Any:
    """Scores to begin with: zeros like ``params``, or :class:`RoundedScores`."""
    values = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.dtype(dtype)), params)
    if dtype == "float32":
        return values
    return RoundedScores(values, jnp.zeros([], jnp.int32))


def values_of(scores: Any) -> Any:
    """The tree of scores, however they are stored."""
    return scores.values if isinstance(scores, RoundedScores) else scores


def update(rule: Callable[..., jax.Array], scores: Any, *trees: Any) -> Any:
    """Applies ``rule(score, *leaves)`` in float32 and stores what it returns.

    Args:
      rule: element-wise; takes and returns float32 scores.
      scores: as made by :func:`zeros`, or as returned by the previous update.
      *trees: like the scores.

    Returns:
      Scores stored as they were.
    """
    if not isinstance(scores, RoundedScores):
        return jax.tree.map(rule, scores, *trees)

    def rounded(score: jax.Array, *leaves: jax.Array) -> jax.Array:
        new = rule(score.astype(jnp.float32), *leaves)
        return round_in_turn(new, scores.updates)

    values = jax.tree.map(rounded, scores.values, *trees)
    return RoundedScores(values, scores.updates + 1)


def round_in_turn(x: jax.Array, turn: jax.Array) -> jax.Array:
    r"""Rounds to a neighbour in bfloat16, up in as many turns as ``x`` lies above.

    Of ``2**16`` turns in a row, those that round up are exactly the fraction of the
    way from the lower neighbour to the upper that ``x`` has come; of any ``n`` in a
    row, that fraction of ``n``, give or take 6.

    Args:
      x: any shape, float32.
      turn: how often was rounded before. Shape ``()``, int32.

    Returns:
      Like ``x``, bfloat16. What is not finite stays as it is.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.float32(1 + 0.75 * 2**-7)  # between 1 and 1.0078125
      >>> print([float(round_in_turn(x, jnp.int32(turn))) for turn in range(4)])
      [1.0, 1.0078125, 1.0, 1.0078125]
    """
    offset = (turn.astype(jnp.uint32) * np.uint32(_STRIDE)) % np.uint32(_CUT)
    raised = lax.bitcast_convert_type(x, jnp.uint32) + offset
    cut = lax.bitcast_convert_type(raised & ~np.uint32(_CUT - 1), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
