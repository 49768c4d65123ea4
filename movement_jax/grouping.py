"""Arrays seen in groups: what a block is worth, and masks of blocks and windows.

A tensor is cut into blocks by splitting its axes, ``(d,)`` into ``(d / b, b)``. Where
that cuts along the boundaries between devices nothing moves but sums. Nothing is
flattened or gathered, and only group scores are stored: ``1 / b`` of the tensor.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Reduce = Literal["mean", "sum"]
_SMALLEST_NORMAL = 0x00800000  # as bits of a float32
_DROPPED = -(2**31)  # ranks below every score
_LIMB = 31  # bits of an integer sum
_LEAST_BITS = 32  # that a sum keeps of the largest member


def group_shape(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks lie along each axis, the last of which may be partial."""
    return tuple(-(-d // b) for d, b in zip(shape, block))


def group_scores(x: jax.Array, block: tuple[int, ...], reduce: Reduce) -> jax.Array:
    """The sum or mean of every block, the same bits on every sharding.

    Integers are summed, since sums of floats depend on how the members are spread over
    devices: each member in units of the largest of its block, to at least 32 bits.
    A NaN in a block makes it NaN, an infinity infinite.

    Args:
      x: scores of any float dtype.
      block: its size along each axis of ``x``.
      reduce: ``"mean"`` (of the members that there are) or ``"sum"``.

    Returns:
      One score per block, float32; ``x`` itself for blocks of one.
    """
    if math.prod(block) == 1:
        return x
    score = functools.partial(_score, reduce=reduce)
    return _by_parts(score, x.astype(jnp.float32), block)


def group_any(mask: jax.Array, block: tuple[int, ...]) -> jax.Array:
    """Whether a block has any True."""
    if math.prod(block) == 1:
        return mask
    return _by_parts(_any, mask, block)


def spread(groups: jax.Array, block: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Gives every member the value of its block.

    Args:
      groups: one value per block.
      block: its size along each axis.
      like: has the shape and the sharding of the result.
    """
    if math.prod(block) == 1:
        return groups
    # The last axis first: while there are few rows, since it is split at a price.
    for axis, (b, d) in reversed(list(enumerate(zip(block, like.shape)))):
        if b > 1 and groups.shape[axis] > 1:
            groups = jnp.expand_dims(groups, axis + 1)
            shape = (*groups.shape[: axis + 1], b, *groups.shape[axis + 2 :])
            groups = _join(jnp.broadcast_to(groups, shape), axis)
            if groups.shape[axis] > d:
                groups = lax.slice_in_dim(groups, 0, d, axis=axis)
    return _laid_out(jnp.broadcast_to(groups, like.shape), like)


def keep_in_windows(
    x: jax.Array,
    axis: int,
    window: int,
    n_drop: jax.Array,
    kept: jax.Array | None = None,
) -> jax.Array:
    """Mask that drops the lowest of every few consecutive scores along an axis.

    They are compared pair by pair, and rank as in :func:`movement_jax.keep_top`: the
    lower index is kept among equals, NaN is highest, -0.0 and subnormals are zero. What
    the last window lacks counts as dropped.

    Args:
      x: scores.
      axis: along which the windows lie.
      window: scores in each.
      n_drop: how many to drop in each. Shape ``()``, int32.
      kept: mask so far; what it drops ranks below everything.

    Returns:
      True where kept. Shape of ``x``, bool.
    """
    key, size = _rank_key(x), x.shape[axis]
    if kept is not None:
        key = jnp.where(kept, key, _DROPPED)
    rest = size % window
    if not rest:
        return _laid_out(_keep_in_windows(key, axis, window, n_drop), x)
    key = _within_devices(key, axis, window)
    last = lax.slice_in_dim(key, size - rest, size, axis=axis)
    mask = _keep_in_windows(last, axis, rest, n_drop - (window - rest))
    if size > window:
        whole = lax.slice_in_dim(key, 0, size - rest, axis=axis)
        whole = _keep_in_windows(whole, axis, window, n_drop)
        mask = jnp.concatenate([whole, mask], axis)
    return _laid_out(mask, x)


def _keep_in_windows(
    key: jax.Array, axis: int, window: int, n_drop: jax.Array
) -> jax.Array:
    key = _split_axis(key, axis, window)
    index = lax.broadcasted_iota(jnp.int32, key.shape, axis + 1)
    above = jnp.zeros_like(key)
    for j in range(window):
        other = lax.slice_in_dim(key, j, j + 1, axis=axis + 1)
        above += (other + (j < index).astype(jnp.int32) > key).astype(jnp.int32)
    return _join(above < window - n_drop, axis)


def _by_parts(
    reduce: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    x: jax.Array,
    block: tuple[int, ...],
) -> jax.Array:
    """Reduces whole blocks, and apart from them those that an axis cuts short."""
    for axis, (d, b) in enumerate(zip(x.shape, block)):
        rest = d % b
        if rest:
            x = _within_devices(x, axis, b)
            last = (*block[:axis], rest, *block[axis + 1 :])
            whole = lax.slice_in_dim(x, 0, d - rest, axis=axis)
            x = lax.slice_in_dim(x, d - rest, d, axis=axis)
            parts = [_by_parts(reduce, whole, block), _by_parts(reduce, x, last)]
            return jnp.concatenate(parts, axis)
    return reduce(x, block)


def _any(mask: jax.Array, block: tuple[int, ...]) -> jax.Array:
    # Of bools, XLA for TPU would first store a copy in another layout.
    number = mask.astype(jnp.float32)
    (found,) = _fold(lambda a, b: (lax.max(*a, *b),), (number,), block)
    return found > 0


def _score(x: jax.Array, block: tuple[int, ...], reduce: Reduce) -> jax.Array:
    members = math.prod(block)
    if members == 1:
        return x
    finite = jnp.isfinite(x)
    real = jnp.where(finite & (jnp.abs(x) >= np.finfo(np.float32).tiny), x, 0)
    top, special = _fold(  # of zeros, infinities and NaN the order is free
        lambda a, b: (lax.max(a[0], b[0]), a[1] + b[1]),
        (jnp.abs(real), jnp.where(finite, 0, x)),
        block,
    )
    exponent = jnp.maximum(lax.bitcast_convert_type(top, jnp.int32) >> 23, 1)

    bits = (members - 1).bit_length()
    widths = [_LIMB - 2 - bits]  # members are below 4 in their unit
    while sum(widths) < _LEAST_BITS:
        widths.append(_LIMB - bits)
    rest, limbs = real * _power_of_two(128 - spread(exponent, block, x)), []
    for width in widths:
        rest *= np.float32(2.0**width)
        limbs.append(jnp.trunc(rest))
        rest -= limbs[-1]
    sums = _fold(
        lambda a, b: tuple(p + q for p, q in zip(a, b)),
        tuple(limb.astype(jnp.int32) for limb in limbs),
        block,
    )
    total, unit = jnp.zeros_like(top), sum(widths)
    for limb, width in zip(reversed(sums), reversed(widths)):
        total += limb.astype(jnp.float32) * np.float32(2.0**-unit)
        unit -= width
    if reduce == "mean":
        total /= np.float32(members)
    # In two factors: the power of two of tiny scores has no place in float32.
    return total * np.float32(0.5) * _power_of_two(exponent - 127) + special


def _fold(
    join: Callable[[Any, Any], Any], xs: tuple[jax.Array, ...], block: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """Reduces whole blocks. The order must not matter to ``join``."""
    zeros = tuple(np.zeros((), x.dtype) for x in xs)

    def by_axis(*xs: jax.Array) -> tuple[jax.Array, ...]:
        for axis, b in enumerate(block):
            if b > 1:
                parts = tuple(_split_axis(x, axis, b) for x in xs)
                xs = lax.reduce(parts, zeros, join, (axis + 1,))
        return xs

    def at_once(*xs: jax.Array) -> tuple[jax.Array, ...]:
        axes: list[int] = []
        for axis in reversed(range(len(block))):
            if block[axis] > 1:
                xs = tuple(_split_axis(x, axis, block[axis]) for x in xs)
                axes = [axis + 1, *(a + 1 for a in axes)]
        xs = lax.reduce(xs, zeros, join, axes)
        return xs

    # Once the last axis is split, a TPU stores a tile of 128 for every block along it;
    # by then little should be left. A CPU reads rows faster than columns.
    xs = lax.platform_dependent(*xs, cpu=at_once, default=by_axis)
    return xs


def _split_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """``(d,)`` to ``(d / size, size)``."""
    x, parts = _within_devices(x, axis, size), x.shape[axis] // size
    spec, new = jax.typeof(x).sharding.spec, axis if parts == 1 else axis + 1
    return _reshaped(
        x,
        (*x.shape[:axis], parts, size, *x.shape[axis + 1 :]),
        (*spec[:new], None, *spec[new:]),
    )


def _within_devices(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Brings an axis together on which an explicit mesh would cut through blocks."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis]
    if names is None or size == x.shape[axis]:
        return x
    names = names if isinstance(names, tuple) else (names,)
    shards = math.prod(sharding.mesh.shape[name] for name in names)
    if x.shape[axis] % (shards * size) == 0:
        return x
    spec = list(sharding.spec)
    spec[axis] = None
    x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    return x


def _join(x: jax.Array, axis: int) -> jax.Array:
    """Undoes :func:`_split_axis`."""
    parts, size = x.shape[axis : axis + 2]
    spec, gone = jax.typeof(x).sharding.spec, axis if parts == 1 else axis + 1
    return _reshaped(
        x,
        (*x.shape[:axis], parts * size, *x.shape[axis + 2 :]),
        (*spec[:gone], *spec[gone + 1 :]),
    )


def _reshaped(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> jax.Array:
    """Says how the result is sharded, which old JAX takes amiss for axes of one."""
    if all(names is None for names in spec):
        return x.reshape(shape)
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
    return jnp.reshape(x, shape, out_sharding=sharding)


def _laid_out(mask: jax.Array, like: jax.Array) -> jax.Array:
    """On an explicit mesh, ``mask`` with the sharding of ``like``."""
    have, want = jax.typeof(mask).sharding, jax.typeof(like).sharding
    return mask if have.spec == want.spec else jax.sharding.reshard(mask, want)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _rank_key(x: jax.Array) -> jax.Array:
    """Integers in the order of the scores."""
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    size = bits & 0x7FFFFFFF
    size = jnp.where(size < _SMALLEST_NORMAL, 0, size)
    highest = jnp.int32(0x7F800001)
    return jnp.where(size >= highest, highest, jnp.where(bits < 0, -size, size))
