"""How many scores lie at or below a threshold, in one pass over any sharding.

Thresholds live on an integer axis of *keys*: key 0 stands for zero and all subnormals
(accelerators flush them, so they must tie), and every step of one is the next float32.
``score <= float(key)`` is the only comparison made; a NaN is never below anything.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from movement_jax import tracing

ValuesT = TypeVar("ValuesT")

MAX_COUNT = 2**31 - 1
_LARGEST_SUBNORMAL = 0x007FFFFF
TOP_KEY = 0x7F800000 - _LARGEST_SUBNORMAL + 1  # one above the key of +inf
NO_KEY = -TOP_KEY  # one below the key of -inf


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor as the ranking sees it.

    Attributes:
      name: its ``/``-joined path.
      shape: its shape, on each device of ``axes``.
      stacked: number of leading axes whose slices are ranked separately.
      block: where groups of weights are ranked, how many of them a group spans along
        each axis; else ``()``.
      axes: manual mesh axes (of ``shard_map`` or ``pmap``) that it is split over.
      absolute: whether its scores are weights, to be ranked by their magnitude.
    """

    name: str
    shape: tuple[int, ...]
    stacked: int = 0
    block: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    absolute: bool = False

    @property
    def leading(self) -> int:
        """Number of leading axes whose slices are counted separately.

        More than ``stacked`` if together they would be too many for an int32.
        """
        leading = self.stacked
        while math.prod(self.shape[leading:]) * self._parts > MAX_COUNT:
            leading += 1
        return leading

    @property
    def segments(self) -> int:
        """Number of slices that are counted separately."""
        return math.prod(self.shape[: self.leading])

    @property
    def size(self) -> int:
        """Number of weights in each of them, on all devices together."""
        return math.prod(self.shape[self.leading :]) * self._parts

    @property
    def _parts(self) -> int:
        return math.prod(lax.axis_size(axis) for axis in self.axes)


def split_axes(x: jax.Array, axis_name: Sequence[str]) -> tuple[str, ...]:
    """Those manual mesh axes, of where this is called, that an array is split over."""
    bound = [axis for axis in axis_name if _is_bound(axis)]
    # `shard_map` knows which arrays differ between devices, unless told not to check.
    known = any(_varying(lax.axis_index(axis)) for axis in bound)
    varying = _varying(x) if known else bound
    return tuple(axis for axis in bound if axis in varying)


def _varying(x: jax.Array) -> frozenset[str]:
    kind: Any = jax.typeof(x)
    # JAX moved it between 0.7 and 0.10.
    has_vma = hasattr(kind, "vma")
    names: frozenset[str] = kind.vma if has_vma else kind.manual_axis_type.varying
    return names


def _is_bound(axis: str) -> bool:
    try:
        lax.axis_size(axis)
    except NameError:
        return False
    return True


class Ranked(NamedTuple):
    """What is counted.

    Attributes:
      scores: one array per tensor.
      kept: masks so far, or None; what they drop ranks below everything.
      tensors: what they are.
      starts: first segment of every tensor. Shapes ``()``, int32.
    """

    scores: Sequence[jax.Array]
    kept: Sequence[jax.Array] | None
    tensors: Sequence[Tensor]
    starts: Sequence[jax.Array]


def sizes(tensors: Sequence[Tensor]) -> np.ndarray:
    """Weights in every segment of every tensor, in order. Shape ``(segments,)``."""
    return np.concatenate([np.full(t.segments, t.size, np.int64) for t in tensors])


def segment_starts(tensors: Sequence[Tensor], zero: jax.Array) -> tuple[jax.Array, ...]:
    """First segment of every tensor, as values that XLA cannot see through.

    With a constant in it, the program of each tensor is one of its own. With a value
    that comes from outside of a loop, XLA for CPU compiles one for all tensors of a
    shape.

    Args:
      tensors: what is to be ranked.
      zero: 0 in a way that only we know of. Shape ``()``, int32.
    """
    if not tensors:
        return ()
    ends = np.cumsum([t.segments for t in tensors])
    rows = [np.array([0, end - t.segments], np.int32) for end, t in zip(ends, tensors)]
    return _reduce([zero + row for row in rows], 0, jnp.maximum, (0,))


def tally(
    predicates: Sequence[jax.Array], axes: Sequence[int] | None = None
) -> tuple[jax.Array, ...]:
    """How often each of several predicates holds, in one pass over them all.

    Args:
      predicates: at least two arrays of bools, or of 0 and 1, of one shape, different
        from each other: XLA for CPU stores the operand of a lone integer sum first.
      axes: to count over; default all.

    Returns:
      One int32 array per predicate.
    """
    axes = tuple(range(predicates[0].ndim)) if axes is None else tuple(axes)
    ones = [p.astype(jnp.int32) for p in predicates]
    return _reduce(ones, 0, jnp.add, axes)


def tally_all(
    predicates: Sequence[jax.Array], axes: tuple[str, ...] = ()
) -> list[jax.Array]:
    """How often each of several predicates holds, in arrays of any size.

    Args:
      predicates: as for :func:`tally`.
      axes: manual mesh axes that they are split over.

    Returns:
      One float32 per predicate, which is exact as far as a float32 can be.
    """
    tensor = Tensor("", predicates[0].shape, axes=axes)
    return [jnp.sum(s, dtype=jnp.float32) for s in _sums(predicates, tensor)]


def count_kept(kept: Sequence[jax.Array], tensors: Sequence[Tensor]) -> jax.Array:
    """How many entries of every segment masks keep. Shape ``(segments,)``, int32."""
    pairs = zip(kept, tensors)
    return jnp.concatenate([_sums([mask, ~mask], tensor)[0] for mask, tensor in pairs])


def anywhere(predicates: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Whether each of several predicates holds anywhere, in one pass over them all.

    Args:
      predicates: as for :func:`tally`.

    Returns:
      One bool per predicate.
    """
    axes = tuple(range(predicates[0].ndim))
    return _reduce(predicates, False, jnp.logical_or, axes)


@tracing.once(1, 2, 3)
def _reduce(
    operands: Sequence[jax.Array], start: Any, combine: Any, axes: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """Several reductions by one program, which XLA for CPU makes no copies for."""
    reduced: tuple[jax.Array, ...] = lax.reduce(
        tuple(operands),
        tuple(np.asarray(start, operand.dtype) for operand in operands),
        lambda a, b: tuple(combine(x, y) for x, y in zip(a, b)),
        axes,
    )
    return reduced


def count(ranked: Ranked, keys: jax.Array) -> jax.Array:
    """How many scores of every segment lie at or below each of several keys.

    Args:
      ranked: what is counted.
      keys: shape ``(n, segments)``, int32.

    Returns:
      Shape ``(n, segments)``, int32.
    """
    thresholds = to_float(keys)
    tops = thresholds
    if ranked.kept is not None:
        # Counts what :func:`_rank` ranks, which XLA for GPU would store first, to
        # compare it with so many: what is dropped lies below all thresholds but NaN.
        lowest = jnp.finfo(tops.dtype).min
        tops = jnp.where(thresholds < lowest, jnp.nan, thresholds)
    counts = _counts(
        [
            _count_keys(x, kept, table, tensor, start)
            for (x, kept, table, _), tensor, start in _hidden(ranked, tops)
        ]
    )
    return jnp.where(jnp.isnan(thresholds), 0, counts)


def count_ties(
    ranked: Ranked, below: jax.Array, at: jax.Array, cut: jax.Array
) -> jax.Array:
    """How many scores are dropped in every segment, for each of several cuts.

    Those at or below key ``below``, and those at or below key ``at`` whose flat index
    is at least ``cut``.

    Args:
      ranked: what is counted.
      below: shape ``(1, segments)``, int32.
      at: shape ``(1, segments)``, int32.
      cut: shape ``(n, segments)``, int32.

    Returns:
      Shape ``(n, segments)``, int32.
    """
    table = _table([below, at], cut)
    return _counts(
        [
            _count_cuts(*operands, tensor, start)
            for operands, tensor, start in _hidden(ranked, table)
        ]
    )


def masks(
    ranked: Ranked, below: jax.Array, at: jax.Array, cut: jax.Array
) -> list[jax.Array]:
    """What is kept if everything is dropped that :func:`count_ties` would count.

    Args:
      ranked: what is counted.
      below: shape ``(1, segments)``, int32.
      at: shape ``(1, segments)``, int32.
      cut: shape ``(1, segments)``, int32.
    """
    return _masks(*apart(ranked), below, at, cut)


def apart(ranked: Ranked) -> tuple[Ranked, tuple[Tensor, ...]]:
    """The arrays, and what they are but for their names: what is traced once for all.

    In eager code, what is traced once is compiled once as well.
    """
    tensors = tuple(dataclasses.replace(t, name="") for t in ranked.tensors)
    return ranked._replace(tensors=()), tensors


# In eager code too: there `jax_debug_nans` would stop at a threshold that is NaN.
@tracing.once(1)
def _masks(
    ranked: Ranked,
    tensors: tuple[Tensor, ...],
    below: jax.Array,
    at: jax.Array,
    cut: jax.Array,
) -> list[jax.Array]:
    table = _table([below, at], cut)
    return [
        _mask_one(*operands, tensor, start)
        for operands, tensor, start in _hidden(ranked._replace(tensors=tensors), table)
    ]


def key_of(value: float) -> int:
    """The key of a float32 that is finite."""
    bits = int(np.abs(np.float32(value)).view(np.int32))
    key = max(bits - _LARGEST_SUBNORMAL, 0)
    return -key if value < 0 else key


def sum_over(values: ValuesT, axes: tuple[str, ...]) -> ValuesT:
    """Sum over manual mesh axes, if there are any."""
    if axes:
        values = lax.psum(values, axes)
    return values


def split(low: jax.Array, high: jax.Array, n: int) -> jax.Array:
    """Cuts intervals into ``n + 1`` parts, inside their ends if it can."""
    width = distance(low, high)
    part = width // (n + 1) + (width % (n + 1) > 0)
    parts = np.arange(1, n + 1, dtype=np.uint32)[:, None]
    offsets = jnp.minimum(part * parts, jnp.maximum(width, 1) - 1)
    return low + lax.bitcast_convert_type(offsets, jnp.int32)


def distance(low: jax.Array, high: jax.Array) -> jax.Array:
    """``high - low`` as uint32, which holds it for any two int32."""
    as_uint = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint32)
    return as_uint(high) - as_uint(low)


def _table(keys: Sequence[jax.Array], *cuts: jax.Array) -> jax.Array:
    """Thresholds and cuts in one array: what XLA for CPU computes for all tensors."""
    thresholds = [lax.bitcast_convert_type(to_float(x), jnp.int32) for x in keys]
    return jnp.concatenate([*thresholds, *cuts])


def _counts(found: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """A table of what was counted in each tensor, by one concatenation."""
    n = len(found[0])
    table = jnp.concatenate([one[j] for j in range(n) for one in found])
    return table.reshape(n, -1)


def _hidden(ranked: Ranked, table: jax.Array) -> Iterator[tuple[Any, ...]]:
    """All of each tensor, behind a barrier together with what changes in the loop.

    It keeps XLA from computing ranks and indices once, outside of the loop, and storing
    them: four bytes a weight. Each tensor has its own, and its own 1 for the index to
    be made of: what two of them share would carry the sharding of one to the other.
    """
    none = [None] * len(ranked.scores)
    kept: Sequence[jax.Array | None] = ranked.kept or none
    for x, mask, tensor, start in zip(
        ranked.scores, kept, ranked.tensors, ranked.starts, strict=True
    ):
        yield lax.optimization_barrier((x, mask, table, jnp.int32(1))), tensor, start


# Functions of their own, to be traced once for all tensors of a shape.
@functools.partial(jax.jit, static_argnums=3)
def _count_keys(
    x: jax.Array,
    kept: jax.Array | None,
    table: jax.Array,
    tensor: Tensor,
    start: jax.Array,
) -> list[jax.Array]:
    x = _score(x, tensor)
    below = [(x <= top).astype(jnp.int32) for top in _rows(table, tensor, start)]
    if kept is not None:  # as integers, which XLA for CPU widens but once
        dropped = jnp.where(kept, jnp.int32(0), jnp.int32(1))
        below = [dropped | b for b in below]
    return _sums(below, tensor)


@functools.partial(jax.jit, static_argnums=4)
def _count_cuts(
    x: jax.Array,
    kept: jax.Array | None,
    table: jax.Array,
    one: jax.Array,
    tensor: Tensor,
    start: jax.Array,
) -> list[jax.Array]:
    x, index = _rank(x, kept, tensor), _index(x, tensor, one)
    rows = _rows(table, tensor, start)
    below, at = _as_float(rows[:2])
    return _sums([_dropped(x, index, below, at, cut) for cut in rows[2:]], tensor)


@functools.partial(jax.jit, static_argnums=4)
def _mask_one(
    x: jax.Array,
    kept: jax.Array | None,
    table: jax.Array,
    one: jax.Array,
    tensor: Tensor,
    start: jax.Array,
) -> jax.Array:
    x, index = _rank(x, kept, tensor), _index(x, tensor, one)
    *keys, cut = _rows(table, tensor, start)
    below, at = _as_float(keys)
    return ~_dropped(x, index, below, at, cut)


def _rows(table: jax.Array, tensor: Tensor, start: jax.Array) -> list[jax.Array]:
    """What a table says of a tensor, row by row, shaped to compare with it."""
    own = lax.dynamic_slice(
        table,
        (np.int32(0), start),
        (len(table), tensor.segments),
        allow_negative_indices=False,
    )
    lead = tensor.shape[: tensor.leading]
    own = own.reshape(len(table), *lead, *(1 for _ in tensor.shape[tensor.leading :]))
    return list(own)


def _as_float(rows: Sequence[jax.Array]) -> list[jax.Array]:
    return [lax.bitcast_convert_type(row, jnp.float32) for row in rows]


def _sums(predicates: Sequence[jax.Array], tensor: Tensor) -> list[jax.Array]:
    """How often each holds in every segment, on all devices."""
    sums = tally(predicates, tuple(range(tensor.leading, len(tensor.shape))))
    counts = [_replicated(s).reshape(tensor.segments) for s in sums]
    return sum_over(counts, tensor.axes)


def _replicated(counts: jax.Array) -> jax.Array:
    """The counts on every device: slices of a stacked tensor may be spread."""
    sharding = jax.typeof(counts).sharding
    if all(axis is None for axis in sharding.spec):  # also on every automatic axis
        return counts
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    counts = jax.sharding.reshard(counts, everywhere)
    return counts


def _dropped(
    x: jax.Array,
    index: jax.Array,
    below: jax.Array,
    at: jax.Array,
    cut: jax.Array,
) -> jax.Array:
    # One comparison a candidate, with a threshold that depends on the place: a third
    # faster than to compare with both.
    return x <= jnp.where(index >= cut, at, below)


def _score(x: jax.Array, tensor: Tensor) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.abs(x) if tensor.absolute else x


def _rank(x: jax.Array, kept: jax.Array | None, tensor: Tensor) -> jax.Array:
    x = _score(x, tensor)
    if kept is None:
        return x
    # What is dropped already lies strictly below everything, also below -inf.
    return jnp.where(kept, jnp.maximum(x, jnp.finfo(x.dtype).min), -jnp.inf)


def _index(x: jax.Array, tensor: Tensor, one: jax.Array) -> jax.Array:
    """Flat index of every score within its segment, without flattening."""
    shape, index = tensor.shape, jnp.zeros_like(x, dtype=jnp.int32)  # sharded as x is
    stride = 1
    for axis in reversed(range(tensor.leading, len(shape))):
        index += one * stride * lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    for name in reversed(tensor.axes):  # one device's part after the other's
        index += lax.axis_index(name) * stride
        stride *= lax.axis_size(name)
    return index


def to_float(key: jax.Array) -> jax.Array:
    """The largest float32 with the given key; NaN, above nothing, for the lowest."""
    bits = jnp.abs(jnp.minimum(key, TOP_KEY - 1)) + _LARGEST_SUBNORMAL
    sign = jnp.where(key < 0, jnp.int32(-(2**31)), jnp.int32(0))
    return lax.bitcast_convert_type(bits | sign, jnp.float32)
