"""Exact top-k as a mask: by counting, without a sort, on any sharding.

The ``k``-th lowest score is found by multi-section search: every pass over the scores
counts, for a few candidate thresholds at once, how many scores lie at or below them.
Ties at the threshold are settled by flat index with the same counts. Only counts cross
devices, nothing the size of a tensor is stored, and nothing is flattened.

Candidate thresholds live on an integer axis of *keys*: key 0 stands for zero and all
subnormals (accelerators flush them, so they must tie), and every step of one is the
next float32. ``score <= float(key)`` is the only comparison made; a NaN is never below
anything, so it is never dropped.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

CANDIDATES = 3  # per pass: what a TPU counts in the time it takes to read the scores
MAX_COUNT = 2**31 - 1
_LARGEST_SUBNORMAL = 0x007FFFFF
_TOP = 0x7F800000 - _LARGEST_SUBNORMAL + 1  # one above the key of +inf
_SEARCHING, _TIES, _DONE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor as the ranking sees it.

    Attributes:
      name: its ``/``-joined path.
      shape: its shape.
      stacked: number of leading axes whose slices are ranked separately.
      block: where groups of weights are ranked, how many of them a group spans along
        each axis; else ``()``.
    """

    name: str
    shape: tuple[int, ...]
    stacked: int = 0
    block: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.size > MAX_COUNT:
            raise ValueError(
                f"{self.name!r} ranks {self.size} weights together, more than "
                f"{MAX_COUNT}. Rank its leading axis by slices with `stacked=`."
            )

    @property
    def segments(self) -> int:
        """Number of slices that are ranked separately."""
        return math.prod(self.shape[: self.stacked])

    @property
    def size(self) -> int:
        """Number of weights in each of them."""
        return math.prod(self.shape[self.stacked :])


def sizes(tensors: Sequence[Tensor]) -> np.ndarray:
    """Weights in every segment of every tensor, in order. Shape ``(segments,)``."""
    return np.concatenate([np.full(t.segments, t.size, np.int64) for t in tensors])


def keep_top(scores: jax.Array, n_keep: jax.typing.ArrayLike) -> jax.Array:
    """Mask of the ``n_keep`` highest scores of one array.

    Exact for every size, dtype and tie: among equal scores the lower flat index is
    kept, NaN ranks above everything, -0.0 equals 0.0 and subnormals equal zero. No
    sort; the array is read a few times, stays where it is sharded, and needs no
    temporary memory.

    Args:
      scores: floats of any shape, ranked as float32.
      n_keep: how many to keep, may be traced. Values outside ``[0, size]`` are
        clipped.

    Returns:
      True where a score is kept. Shape of ``scores``, bool.

    Raises:
      TypeError: if ``n_keep`` is no integer.
      ValueError: if ``scores`` has more than 2**31 - 1 elements.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> print(mj.keep_top(jnp.array([3.0, 1.0, 2.0, 2.0]), 2))
      [ True False  True False]
    """
    scores = jnp.asarray(scores)
    tensor = Tensor("scores", scores.shape)
    if not tensor.size:
        return jnp.ones_like(scores, dtype=bool)
    if not jnp.issubdtype(jnp.result_type(n_keep), jnp.integer):
        raise TypeError(f"`n_keep` must be a count, an integer, got {n_keep}.")
    if isinstance(n_keep, int):
        n_keep = min(max(n_keep, 0), tensor.size)
    n_keep = jnp.clip(jnp.asarray(n_keep, jnp.int32), 0, tensor.size)
    return keep_masks([scores], [tensor], (tensor.size - n_keep)[None])[0]


def tally(
    predicates: Sequence[jax.Array], axes: Sequence[int] | None = None
) -> tuple[jax.Array, ...]:
    """How often each of several predicates holds, in one pass over them all.

    Args:
      predicates: at least two bool arrays of one shape, different from each other:
        XLA for CPU stores the operand of a lone integer sum as int32 first.
      axes: to count over; default all.

    Returns:
      One int32 array per predicate.
    """
    return tuple(
        lax.reduce(
            tuple(p.astype(jnp.int32) for p in predicates),
            tuple(np.int32(0) for _ in predicates),
            lambda a, b: tuple(p + q for p, q in zip(a, b)),
            tuple(range(predicates[0].ndim)) if axes is None else tuple(axes),
        )
    )


def keep_masks(
    scores: Sequence[jax.Array],
    tensors: Sequence[Tensor],
    n_drop: jax.Array,
    *,
    kept: Sequence[jax.Array] | None = None,
    hint: jax.Array | None = None,
) -> list[jax.Array]:
    """Masks that drop the lowest scores of every segment.

    Args:
      scores: one array per tensor.
      tensors: what they are.
      n_drop: how many to drop in every segment. Shape ``(segments,)``, int32.
      kept: masks so far; what they drop ranks below everything.
      hint: key to try first, from :func:`common_threshold`. Shape ``()``, int32.

    Returns:
      One bool mask per tensor, True where kept.
    """
    n_drop = jnp.asarray(n_drop, jnp.int32)
    size = jnp.asarray(sizes(tensors), jnp.int32)
    count = functools.partial(_count, scores, kept, tensors)

    def body(carry: _Search) -> _Search:
        at, cut = _candidates(carry)
        counts = count(carry.below, at, cut)
        return _narrow(carry, at, cut, counts, n_drop)

    start = _start(n_drop, size, hint)
    end = lax.while_loop(lambda c: jnp.any(c.phase != _DONE), body, start)
    end, ones = lax.optimization_barrier((end, _ones(scores)))  # as in _count
    below, at, cut = _per_tensor(tensors, end.below, end.high, end.cut_low)
    kept_list = [None] * len(scores) if kept is None else kept
    return [
        _keeps(_ranked(x, m), _index(x, t, one), b, a, c)
        for x, m, t, b, a, c, one in zip(
            scores, kept_list, tensors, below, at, cut, ones
        )
    ]


def common_threshold(
    scores: Sequence[jax.Array],
    tensors: Sequence[Tensor],
    n_drop: jax.Array,
    *,
    most: jax.Array,
    kept: Sequence[jax.Array] | None = None,
    each: np.ndarray | int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Splits one count over all segments by a threshold they share.

    Args:
      scores: one array per tensor.
      tensors: what they are.
      n_drop: how many to drop in total. Shape ``()``, int32.
      most: the most that may be dropped in each segment. Shape ``(segments,)``.
      kept: masks so far; what they drop ranks below everything.
      each: what one score of each segment counts for in ``n_drop``.

    Returns:
      How many each segment drops, shape ``(segments,)``, and the threshold's key. Of
      scores equal to the threshold, those of earlier segments are kept.
    """
    total = int((sizes(tensors) * each).sum())
    if total > MAX_COUNT:
        raise ValueError(
            f"`Global()` ranks {total} weights together, more than {MAX_COUNT}. Use "
            "`Uniform()` or `ErdosRenyi()`, or prune fewer tensors with `prunable=`."
        )
    weigh = np.broadcast_to(np.asarray(each, np.int32), most.shape)
    most = jnp.asarray(most, jnp.int32) * weigh
    nothing = jnp.full(most.shape, -_TOP, jnp.int32)
    uncut = jnp.zeros(most.shape, jnp.int32)
    step = jnp.arange(1, CANDIDATES + 1, dtype=jnp.uint32)

    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, count_low, count_high = carry
        at = _split(low, high, step)
        counts = _count(
            scores,
            kept,
            tensors,
            nothing,
            jnp.broadcast_to(at, (*most.shape, CANDIDATES)),
            jnp.broadcast_to(uncut[:, None], (*most.shape, CANDIDATES)),
        )
        counts = jnp.minimum(counts * weigh[:, None], most[:, None])
        for j in range(CANDIDATES):
            enough = counts[:, j].sum() >= n_drop
            raises = ~enough & (at[j] > low)
            lowers = enough & (at[j] < high)
            low = jnp.where(raises, at[j], low)
            count_low = jnp.where(raises, counts[:, j], count_low)
            high = jnp.where(lowers, at[j], high)
            count_high = jnp.where(lowers, counts[:, j], count_high)
        return low, high, count_low, count_high

    start: tuple[jax.Array, ...] = jnp.int32(-_TOP), jnp.int32(_TOP), 0 * most, most
    _, high, count_low, count_high = lax.while_loop(
        lambda c: _distance(c[0], c[1]) > 1, body, start
    )
    ties = count_high - count_low
    later = jnp.cumsum(ties[::-1])[::-1] - ties
    quota = jnp.clip(n_drop - count_low.sum() - later, 0, ties)
    return jnp.where(n_drop > 0, (count_low + quota) // weigh, 0), high


# One search per segment, all in one loop: every field has one entry per segment.
# The dropped scores are those at or below key `below`, and those at or below key
# `high` whose flat index is at least `cut_low`.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    phase: jax.Array
    low: jax.Array  # fewer than n_drop scores lie at or below this key,
    high: jax.Array  # and at least n_drop at or below this one
    below: jax.Array  # key under which everything is dropped
    cut_low: jax.Array  # dropping ties from this index on drops enough,
    cut_high: jax.Array  # and from this one too few
    hint: jax.Array  # key to try first, or -_TOP


def _start(n_drop: jax.Array, size: jax.Array, hint: jax.Array | None) -> _Search:
    key = jnp.full(n_drop.shape, -_TOP, jnp.int32)
    first = key if hint is None else jnp.broadcast_to(hint, n_drop.shape)
    nothing = n_drop <= 0
    return _Search(
        phase=jnp.where(nothing, _DONE, _SEARCHING).astype(jnp.int32),
        low=key,
        high=jnp.where(nothing, key, -key),
        below=key,
        cut_low=jnp.zeros_like(n_drop),
        cut_high=size,
        hint=first,
    )


def _candidates(carry: _Search) -> tuple[jax.Array, jax.Array]:
    """Keys and index cuts to count at. Shapes ``(segments, CANDIDATES)``."""
    step = jnp.arange(1, CANDIDATES + 1, dtype=jnp.uint32)[None]
    low, high = carry.low[:, None], carry.high[:, None]
    # Short of `high`: beyond +inf nothing would be counted, and the search not end.
    around = jnp.clip(carry.hint[:, None] + step.astype(jnp.int32) - 2, low, high - 1)
    at = jnp.where(carry.hint[:, None] > -_TOP, around, _split(low, high, step))
    ties = (carry.phase != _SEARCHING)[:, None]
    cut = _split(carry.cut_low[:, None], carry.cut_high[:, None], step)
    return jnp.where(ties, high, at), jnp.where(ties, cut, 0)


def _narrow(
    carry: _Search,
    at: jax.Array,
    cut: jax.Array,
    counts: jax.Array,
    n_drop: jax.Array,
) -> _Search:
    enough = counts >= n_drop[:, None]
    exact = counts == n_drop[:, None]
    hit = jnp.any(exact, axis=1)
    searching, ties = carry.phase == _SEARCHING, carry.phase == _TIES

    # A key counted exactly is the threshold, with all its ties dropped.
    low = jnp.max(jnp.where(enough, carry.low[:, None], at), axis=1)
    high = jnp.min(jnp.where(enough, at, carry.high[:, None]), axis=1)
    low = jnp.where(searching, jnp.maximum(low, carry.low), carry.low)
    high = jnp.where(searching, jnp.minimum(high, carry.high), carry.high)
    found = searching & hit
    high = jnp.where(found, jnp.min(jnp.where(exact, at, _TOP), axis=1), high)
    adjacent = searching & ~hit & (_distance(low, high) <= 1)

    # Later indices drop first: the more is cut, the lower the index it starts from.
    cut_low = jnp.max(jnp.where(enough, cut, carry.cut_low[:, None]), axis=1)
    cut_high = jnp.min(jnp.where(enough, carry.cut_high[:, None], cut), axis=1)
    cut_low = jnp.where(ties, jnp.maximum(cut_low, carry.cut_low), carry.cut_low)
    cut_high = jnp.where(ties, jnp.minimum(cut_high, carry.cut_high), carry.cut_high)
    settled = ties & (hit | (_distance(cut_low, cut_high) <= 1))

    phase = jnp.where(adjacent, _TIES, carry.phase)
    phase = jnp.where(found | settled, _DONE, phase)
    return _Search(
        phase=phase,
        low=low,
        high=high,
        below=jnp.where(adjacent, low, carry.below),
        cut_low=cut_low,
        cut_high=cut_high,
        hint=jnp.full_like(carry.hint, -_TOP),
    )


def _count(
    scores: Sequence[jax.Array],
    kept: Sequence[jax.Array] | None,
    tensors: Sequence[Tensor],
    below: jax.Array,
    at: jax.Array,
    cut: jax.Array,
) -> jax.Array:
    """Scores dropped by each candidate. Shape ``(segments, CANDIDATES)``, int32."""
    # The barrier keeps XLA from computing ranks and indices once, outside the loop,
    # and storing them: four bytes a weight.
    scores, kept, at, ones = lax.optimization_barrier(
        (tuple(scores), kept, at, _ones(scores))
    )
    below, at = _to_float(below), _to_float(at)
    kept_list = [None] * len(scores) if kept is None else kept
    counts = []
    offset = 0
    for x, mask, tensor, one in zip(scores, kept_list, tensors, ones):
        rows = slice(offset, offset + tensor.segments)
        offset += tensor.segments
        counts.append(
            _count_one(_ranked(x, mask), tensor, below[rows], at[rows], cut[rows], one)
        )
    return jnp.concatenate(counts)


def _ones(scores: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    # Each tensor its own: an index that two of them share would carry the sharding of
    # one over to the other.
    return tuple(jnp.int32(1) for _ in scores)


def _count_one(
    x: jax.Array,
    tensor: Tensor,
    below: jax.Array,
    at: jax.Array,
    cut: jax.Array,
    one: jax.Array,
) -> jax.Array:
    index = _index(x, tensor, one)
    operands = tuple(
        _dropped(
            x,
            index,
            _spread(below, tensor),
            _spread(at[:, j], tensor),
            _spread(cut[:, j], tensor),
        )
        for j in range(CANDIDATES)
    )
    sums = tally(operands, tuple(range(tensor.stacked, len(tensor.shape))))
    return jnp.stack([_replicated(s).reshape(tensor.segments) for s in sums], axis=1)


def _replicated(counts: jax.Array) -> jax.Array:
    """The counts on every device: slices of a stacked tensor may be spread."""
    sharding = jax.typeof(counts).sharding
    if all(axis is None for axis in sharding.spec):  # also on every automatic axis
        return counts
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.sharding.reshard(counts, everywhere)


def _dropped(
    x: jax.Array,
    index: jax.Array,
    below: jax.Array,
    at: jax.Array,
    cut: jax.Array,
) -> jax.Array:
    return (x <= below) | ((x <= at) & (index >= cut))


# Compiled in eager code too, where `jax_debug_nans` would stop at a NaN threshold.
@functools.partial(jax.jit, inline=True)
def _keeps(
    x: jax.Array,
    index: jax.Array,
    below: jax.Array,
    at: jax.Array,
    cut: jax.Array,
) -> jax.Array:
    return ~_dropped(x, index, _to_float(below), _to_float(at), cut)


def _ranked(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    x = x.astype(jnp.float32)
    if kept is None:
        return x
    # What is dropped already lies strictly below everything, also below -inf.
    return jnp.where(kept, jnp.maximum(x, jnp.finfo(x.dtype).min), -jnp.inf)


def _index(x: jax.Array, tensor: Tensor, one: jax.typing.ArrayLike) -> jax.Array:
    """Flat index of every score within its segment, without flattening."""
    index = jnp.zeros_like(x, dtype=jnp.int32)
    stride = 1
    for axis in reversed(range(tensor.stacked, len(tensor.shape))):
        index += stride * one * lax.broadcasted_iota(jnp.int32, tensor.shape, axis)
        stride *= tensor.shape[axis]
    return index


def _spread(values: jax.Array, tensor: Tensor) -> jax.Array:
    """One value per segment, shaped to compare with the tensor."""
    lead = tensor.shape[: tensor.stacked]
    return values.reshape(lead + (1,) * (len(tensor.shape) - tensor.stacked))


def _per_tensor(
    tensors: Sequence[Tensor], *vectors: jax.Array
) -> list[list[jax.Array]]:
    ends = np.cumsum([t.segments for t in tensors])
    return [
        [_spread(v[end - t.segments : end], t) for t, end in zip(tensors, ends)]
        for v in vectors
    ]


def _split(low: jax.Array, high: jax.Array, step: jax.Array) -> jax.Array:
    """Cuts the interval into ``CANDIDATES + 1`` parts, inside its ends if it can."""
    width = _distance(low, high)
    part = width // (CANDIDATES + 1) + (width % (CANDIDATES + 1) > 0)
    offset = jnp.minimum(step * part, jnp.maximum(width, 1) - 1)
    return low + lax.bitcast_convert_type(offset, jnp.int32)


def _distance(low: jax.Array, high: jax.Array) -> jax.Array:
    as_uint = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint32)
    return as_uint(high) - as_uint(low)


def _to_float(key: jax.Array) -> jax.Array:
    """The largest float32 with the given key; NaN beyond both infinities."""
    bits = jnp.abs(key) + _LARGEST_SUBNORMAL
    sign = jnp.where(key < 0, jnp.int32(-(2**31)), jnp.int32(0))
    return lax.bitcast_convert_type(bits | sign, jnp.float32)
