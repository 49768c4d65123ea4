"""Counts beyond 2**31, in two int32 parts: JAX has no int64 unless it is asked to."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BITS = 16  # of the low part


class Wide(NamedTuple):
    """The number ``high * 2**BITS + low``, not negative.

    Attributes:
      high: int32.
      low: less than ``2**BITS``, int32.
    """

    high: jax.Array
    low: jax.Array


def from_int(value: int | np.ndarray) -> Wide:
    """A Python number below ``2**(31 + BITS)``, or an array of them, int64."""
    return Wide(jnp.int32(value >> BITS), jnp.int32(value & _mask()))


def total(counts: jax.Array, axis: int | None = None) -> Wide:
    """Sum of int32 counts over all axes or one."""
    n = counts.size if axis is None else counts.shape[axis]
    return _added(counts, n, lambda part: part.sum(axis))


def sums_after(counts: jax.Array) -> Wide:
    """For every entry of a vector of counts, the sum of those that follow it."""

    def after(part: jax.Array) -> jax.Array:
        return jnp.cumsum(part[::-1])[::-1] - part

    return _added(counts, len(counts), after)


def sums_before(counts: jax.Array) -> Wide:
    """For every entry of a vector of counts, the sum of those that precede it."""
    return Wide(*(x[::-1] for x in sums_after(counts[::-1])))


def to_float(a: Wide) -> jax.Array:
    """The nearest float32, or nearly."""
    return a.high.astype(jnp.float32) * 2.0**BITS + a.low.astype(jnp.float32)


def at_least(a: Wide, b: Wide) -> jax.Array:
    """``a >= b``, bool."""
    return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def minus(a: Wide, b: Wide) -> Wide:
    """``a - b``, negative if ``high`` is."""
    return _carried(a.high - b.high, a.low - b.low)


def minimum(a: Wide, b: Wide) -> Wide:
    """The smaller of both."""
    first = at_least(b, a)
    return Wide(jnp.where(first, a.high, b.high), jnp.where(first, a.low, b.low))


def clipped(a: Wide, most: jax.Array) -> jax.Array:
    """``clip(a, 0, most)`` for counts ``most``, int32."""
    limit = Wide(most >> BITS, most & _mask())
    a = minimum(a, limit)
    return jnp.where(a.high < 0, 0, (a.high << BITS) + a.low)


def _added(counts: jax.Array, n: int, add: Callable[[jax.Array], jax.Array]) -> Wide:
    """Adds up to ``n`` counts by their digits, of as many bits as an int32 has room."""
    width = min(BITS, 31 - (n - 1).bit_length())
    digit = add(counts & (1 << width) - 1)
    low, carry = digit & (1 << width) - 1, digit >> width
    for place in range(width, BITS, width):
        bits = min(width, BITS - place)
        digit = add(counts >> place & (1 << bits) - 1) + carry
        low += (digit & (1 << bits) - 1) << place
        carry = digit >> bits
    return Wide(add(counts >> BITS) + carry, low)


def _carried(high: jax.Array, low: jax.Array) -> Wide:
    return Wide(high + (low >> BITS), low & _mask())


def _mask() -> int:
    return (1 << BITS) - 1
