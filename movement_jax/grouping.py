"""Arrays seen in groups: what a block is worth, and masks of blocks and windows.

A tensor is cut into blocks by splitting its axes, ``(d,)`` into ``(d / b, b)``. Where
that cuts along the boundaries between devices nothing moves but sums. Nothing is
flattened or gathered, and only group scores are stored: ``1 / b`` of the tensor.

All is traced once for tensors of a shape, and compiled once in eager code.
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

from movement_jax import tracing

Reduce = Literal["mean", "sum"]
_SMALLEST_NORMAL = 0x00800000  # as bits of a float32
_INFINITY = 0x7F800000
_DROPPED = -(2**31)  # ranks below every score
_LIMB = 31  # bits of an integer sum
_LEAST_BITS = 32  # that a sum keeps of the largest member
_BYTE = 8  # bits
_TILE = 8  # rows of a TPU's registers


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
    return x if math.prod(block) == 1 else _group_scores(x, block, reduce)


@tracing.once(1, 2)
def _group_scores(x: jax.Array, block: tuple[int, ...], reduce: Reduce) -> jax.Array:
    score = functools.partial(_score, reduce=reduce)
    return _by_parts(score, x.astype(jnp.float32), block)


def group_any(mask: jax.Array, block: tuple[int, ...]) -> jax.Array:
    """Whether a block has any True."""
    return mask if math.prod(block) == 1 else _group_any(mask, block)


@tracing.once(1)
def _group_any(mask: jax.Array, block: tuple[int, ...]) -> jax.Array:
    return _by_parts(_any, mask, block)


def spread(groups: jax.Array, block: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Gives every member the value of its block.

    Args:
      groups: one value per block.
      block: its size along each axis.
      like: has the shape and the sharding of the result.
    """
    return groups if math.prod(block) == 1 else _spread(groups, block, like)


@tracing.once(1)
def _spread(groups: jax.Array, block: tuple[int, ...], like: jax.Array) -> jax.Array:
    # The last axis first: while there are few rows, since it is split at a price.
    for axis, (b, d) in reversed(list(enumerate(zip(block, like.shape)))):
        if b > 1 and groups.shape[axis] > 1:
            groups = jnp.expand_dims(groups, axis + 1)
            shape = (*groups.shape[: axis + 1], b, *groups.shape[axis + 2 :])
            groups = _join(jnp.broadcast_to(groups, shape), axis)
            if groups.shape[axis] > d:
                groups = lax.slice_in_dim(groups, 0, d, axis=axis)
    return _laid_out(jnp.broadcast_to(groups, like.shape), like)


@tracing.once(1, 2)
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
    size = x.shape[axis]
    rest = size % window
    if not rest:
        return _laid_out(_keep_in_windows(x, kept, axis, window, n_drop), x)

    def part(x: Any, start: int, stop: int) -> Any:
        whole = _within_devices(x, axis, window)
        return lax.slice_in_dim(whole, start, stop, axis=axis)

    last, old = jax.tree.map(lambda a: part(a, size - rest, size), (x, kept))
    mask = _keep_in_windows(last, old, axis, rest, n_drop - (window - rest))
    if size > window:
        whole, old = jax.tree.map(lambda a: part(a, 0, size - rest), (x, kept))
        whole = _keep_in_windows(whole, old, axis, window, n_drop)
        mask = jnp.concatenate([whole, mask], axis)
    return _laid_out(mask, x)


def _keep_in_windows(
    x: jax.Array, kept: jax.Array | None, axis: int, window: int, n_drop: jax.Array
) -> jax.Array:
    """Counts what is above each score in its window. All windows are whole.

    No ranks are stored: XLA fuses what they are made of into where they are compared.
    For a CPU that is the scores at one place of every window, and for others those at
    one distance from each.
    """

    def by_place(x: jax.Array, kept: jax.Array | None) -> jax.Array:
        rank, index = _ranks(x, kept, axis, window)
        key = rank(lambda a: a, index)
        above = jnp.zeros_like(key)
        for j in range(window):
            one = functools.partial(
                lax.slice_in_dim, start_index=j, limit_index=j + 1, axis=axis + 1
            )
            above += (rank(one, j) + (j < index) > key).astype(jnp.int32)
        return _join(above < window - n_drop, axis)

    def by_distance(x: jax.Array, kept: jax.Array | None) -> jax.Array:
        # A TPU splits off whole tiles for free, and windows at a price.
        tiles = math.lcm(window, _TILE)
        even = x.shape[axis] % (tiles * _shards(x, axis)) == 0
        rank, index = _ranks(x, kept, axis, tiles if even else window)
        key, place = rank(lambda a: a, index), index % window
        above = jnp.zeros_like(key)
        for k in range(1, window):
            after, before = (
                rank(functools.partial(_shifted, axis=axis + 1, by=by), index + by)
                for by in (k, -k)
            )
            above += ((place + k < window) & (after > key)).astype(jnp.int32)
            above += ((place >= k) & (before >= key)).astype(jnp.int32)
        return _join(above < window - n_drop, axis)

    mask: jax.Array = lax.platform_dependent(x, kept, cpu=by_place, default=by_distance)
    return mask


def _ranks(
    x: jax.Array, kept: jax.Array | None, axis: int, size: int
) -> tuple[Callable[[Callable[[jax.Array], jax.Array], Any], jax.Array], np.ndarray]:
    """Splits an axis, and says how to rank what is taken from some place of it."""
    x = _together(_split_axis(x, axis, size), axis + 1)
    index = np.arange(size, dtype=np.int32).reshape(size, *[1] * (x.ndim - axis - 2))
    index = np.expand_dims(index, tuple(range(axis + 1)))
    bits = None
    if kept is not None:
        # As numbers, since bools a TPU would first store in another layout.
        kept = _split_axis(kept.astype(jnp.uint8), axis, size)
        kept = _together(kept, axis + 1)
    if kept is not None and size <= _BYTE:
        # Of the neighbours, for masks to be updated in place.
        bits = lax.reduce(
            kept << index.astype(np.uint8), np.uint8(0), lax.add, (axis + 1,)
        )
        bits = jnp.expand_dims(bits, axis + 1).astype(jnp.int32)

    def rank(take: Callable[[jax.Array], jax.Array], place: Any) -> jax.Array:
        key = _rank_key(take(x))
        if kept is None:
            return key
        alive = take(kept) if bits is None else bits >> place & 1
        return jnp.where(alive > 0, key, _DROPPED)

    return rank, index


def _shifted(x: jax.Array, axis: int, by: int) -> jax.Array:
    """What lies ``by`` places on along an axis, and zeros where nothing does."""
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (-by, by, 0)
    return lax.pad(x, np.zeros((), x.dtype), edges)


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
    def of(dtype: Any, mask: jax.Array) -> jax.Array:
        number = mask.astype(dtype)
        (found,) = _fold(lambda a, b: (lax.max(*a, *b),), (number,), block)
        return found.astype(jnp.bool_)

    def of_two(mask: jax.Array) -> jax.Array:
        number = mask.astype(jnp.int32)
        most, total = _fold(
            lambda a, b: (lax.max(a[0], b[0]), a[1] + b[1]), (number, number), block
        )
        return (most > 0) | (total > 0)

    # For a CPU, XLA stores what bools are converted to; for a TPU it would store bools
    # in another layout. On a GPU it would transpose on every step what is reduced along
    # a middle axis, but not for two results at once.
    result: jax.Array = lax.platform_dependent(
        mask,
        cpu=functools.partial(of, jnp.bool_),
        tpu=functools.partial(of, jnp.int32),
        default=of_two,
    )
    return result


def _score(x: jax.Array, block: tuple[int, ...], reduce: Reduce) -> jax.Array:
    members = math.prod(block)
    if members == 1:
        return x
    bits = lax.bitcast_convert_type(x, jnp.int32)
    size = bits & 0x7FFFFFFF
    real = jnp.where((size >= _SMALLEST_NORMAL) & (size < _INFINITY), x, 0)
    size = jnp.where(size < _SMALLEST_NORMAL, 0, size)
    # As integers, since floats XLA for a CPU stores before it folds them.
    above, below = _fold(
        lambda a, b: (lax.max(a[0], b[0]), lax.max(a[1], b[1])),
        (jnp.where(bits < 0, 0, size), jnp.where(bits < 0, size, 0)),
        block,
    )
    top = jnp.maximum(above, below)
    exponent = (top >> 23).clip(1, 254)

    carry = (members - 1).bit_length()
    widths = [_LIMB - 2 - carry]  # members are below 4 in their unit
    while sum(widths) < _LEAST_BITS:
        widths.append(_LIMB - carry)
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
    total, unit = jnp.zeros(top.shape, jnp.float32), sum(widths)
    for limb, width in zip(reversed(sums), reversed(widths)):
        total += limb.astype(jnp.float32) * np.float32(2.0**-unit)
        unit -= width
    if reduce == "mean":
        total /= np.float32(members)
    # In two factors: the power of two of tiny scores has no place in float32.
    total = total * np.float32(0.5) * _power_of_two(exponent - 127)
    special = jnp.where(above < _INFINITY, -np.inf, np.inf)
    mixed = (top > _INFINITY) | (jnp.minimum(above, below) == _INFINITY)
    return jnp.where(top < _INFINITY, total, jnp.where(mixed, np.nan, special))


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
    if x.shape[axis] % (_shards(x, axis) * size) == 0:
        return x
    return _together(x, axis)


def _together(x: jax.Array, axis: int) -> jax.Array:
    """On an explicit mesh, an array of which one axis is not cut."""
    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is None:
        return x
    spec = list(sharding.spec)
    spec[axis] = None
    x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    return x


def _shards(x: jax.Array, axis: int) -> int:
    """Into how many parts an explicit mesh cuts an axis."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


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
    highest = jnp.int32(_INFINITY + 1)
    return jnp.where(size >= highest, highest, jnp.where(bits < 0, -size, size))
