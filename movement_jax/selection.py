"""Exact top-k as a mask: by counting, without a sort, on any sharding.

The ``k``-th lowest score is found by multi-section search: every pass over the scores
counts, for a few candidate thresholds at once, how many scores lie at or below them.
Ties at the threshold are settled by flat index with the same counts. Only counts cross
devices, nothing the size of a tensor is stored, and nothing is flattened.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from movement_jax import wide
from movement_jax.arguments import plain
from movement_jax.counting import (
    CANDIDATES,
    MAX_COUNT,
    NO_KEY,
    TOP_KEY,
    Ranked,
    Tensor,
    count,
    distance,
    masks,
    segment_starts,
    sizes,
    split,
)
from movement_jax.wide import Wide

_SEARCHING, _TIES, _DONE = 0, 1, 2
# Around a key from an earlier search, in steps of the key axis: the same and within 3 %,
# then within 25 %, before it is forgotten.
_REACH = (2**18, 2**21)
# Intervals of keys in which scores are taken to be spread evenly, and half the width of
# what the guess then leaves, in standard deviations of its count.
_EVEN = 21  # bits
_SPREAD = 1.5
# Passes that guesses may cost in the worst case, also after a hint that was wrong.
_PATIENCE = (2, 6)


def keep_top(scores: jax.Array, n_keep: jax.typing.ArrayLike) -> jax.Array:
    """Mask of the ``n_keep`` highest scores of one array.

    Exact for every size, dtype and tie: among equal scores the lower flat index is
    kept, NaN is kept whatever ``n_keep`` says, -0.0 equals 0.0 and subnormals equal
    zero. No sort; the array is read a few times, stays where it is sharded, and needs
    no temporary memory.

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
    if scores.size > MAX_COUNT:
        raise ValueError(
            f"`scores` has {scores.size} elements, more than {MAX_COUNT}. Rank its "
            "slices, with `jax.vmap(keep_top)`."
        )
    if not scores.size:
        return jnp.ones_like(scores, dtype=bool)
    if not jnp.issubdtype(jnp.result_type(n_keep), jnp.integer):
        raise TypeError(f"`n_keep` must be a count, an integer, got {n_keep}.")
    n_keep = plain(n_keep)
    if isinstance(n_keep, int):
        n_keep = min(max(n_keep, 0), scores.size)
    if jnp.issubdtype(jnp.result_type(n_keep), jnp.unsignedinteger):
        n_keep = jnp.minimum(jnp.asarray(n_keep, jnp.uint32), np.uint32(scores.size))
    n_keep = jnp.clip(jnp.asarray(n_keep, jnp.int32), 0, scores.size)
    tensor = Tensor("scores", scores.shape)
    return keep_masks([scores], [tensor], (scores.size - n_keep)[None])[0][0]


def keep_masks(
    scores: Sequence[jax.Array],
    tensors: Sequence[Tensor],
    n_drop: jax.Array,
    *,
    kept: Sequence[jax.Array] | None = None,
    hint: jax.Array | None = None,
    starts: Sequence[jax.Array] | None = None,
) -> tuple[list[jax.Array], jax.Array]:
    """Masks that drop the lowest scores of every segment.

    Args:
      scores: one array per tensor.
      tensors: what they are.
      n_drop: how many to drop in every segment. Shape ``(segments,)``, int32.
      kept: masks so far; what they drop ranks below everything.
      hint: keys to search around first. Shape ``()`` or ``(segments,)``, int32.
      starts: from :func:`segment_starts`, made outside of the loop this is called in.

    Returns:
      One bool mask per tensor, True where kept, and the keys of the thresholds.
    """
    n_drop = jnp.asarray(n_drop, jnp.int32)
    size = jnp.asarray(sizes(tensors), jnp.int32)
    if hint is None:
        hint = jnp.int32(NO_KEY)
    if starts is None:
        starts = segment_starts(tensors, _zero(n_drop))
    ranked = Ranked(scores, kept, tensors, starts)

    def body(carry: _Search) -> _Search:
        tries, at, cut = _candidates(carry, n_drop, size)
        counts = count(ranked, carry.below, at, cut)
        return _narrow(carry, tries, counts, n_drop, size)

    end = lax.while_loop(
        lambda carry: jnp.any(carry.phase != _DONE), body, _start(n_drop, size, hint)
    )
    return masks(ranked, end.below, end.at, size - end.high), end.at


def common_threshold(
    scores: Sequence[jax.Array],
    tensors: Sequence[Tensor],
    n_drop: Wide,
    *,
    most: jax.Array,
    kept: Sequence[jax.Array] | None = None,
    hint: jax.Array | None = None,
    each: np.ndarray | int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Splits one count over all segments by a threshold they share.

    Args:
      scores: one array per tensor.
      tensors: what they are.
      n_drop: how many to drop in total.
      most: the most that may be dropped in each segment. Shape ``(segments,)``, int32.
      kept: masks so far; what they drop ranks below everything.
      hint: key to search around first. Shape ``()``, int32.
      each: what one score of each segment counts for in ``n_drop``.

    Returns:
      How many each segment drops, shape ``(segments,)``, and the threshold's key. Of
      scores equal to the threshold, those of earlier segments are kept.
    """
    weigh = np.broadcast_to(np.asarray(each, np.int32), most.shape)
    most = jnp.asarray(most, jnp.int32) * weigh
    nothing = jnp.full_like(most, NO_KEY)
    uncut = jnp.zeros((CANDIDATES, *most.shape), jnp.int32)
    starts = segment_starts(tensors, _zero(most))
    ranked = Ranked(scores, kept, tensors, starts)
    hint = jnp.int32(NO_KEY) if hint is None else hint

    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, count_low, count_high, passes = carry
        behind = wide.total(count_low)
        missing = wide.to_float(wide.minus(n_drop, behind))
        between = wide.to_float(wide.minus(wide.total(count_high), behind))
        tries = _tries(low, high, missing, between, hint, passes)
        at = jnp.broadcast_to(tries[:, None], uncut.shape)
        counts = count(ranked, nothing, at, uncut)
        for key, n in zip(tries, counts):
            n = jnp.minimum(n * weigh, most)
            enough = wide.at_least(wide.total(n), n_drop)
            raises, lowers = ~enough & (key > low), enough & (key < high)
            low = jnp.where(raises, key, low)
            count_low = jnp.where(raises, n, count_low)
            high = jnp.where(lowers, key, high)
            count_high = jnp.where(lowers, n, count_high)
        return low, high, count_low, count_high, passes + 1

    ends = jnp.int32(NO_KEY), jnp.int32(TOP_KEY)
    start = (*ends, jnp.zeros_like(most), most, jnp.int32(0))

    def goes_on(carry: tuple[jax.Array, ...]) -> jax.Array:
        low, high, _, count_high, _ = carry
        # Not if it was counted exactly: then all that was counted is dropped.
        return (distance(low, high) > 1) & ~wide.at_least(
            n_drop, wide.total(count_high)
        )

    _, high, count_low, count_high, _ = lax.while_loop(goes_on, body, start)
    ties = count_high - count_low
    missing = wide.minus(n_drop, wide.total(count_low))
    quota = wide.clipped(wide.minus(missing, wide.sums_after(ties)), ties)
    anything = wide.at_least(n_drop, wide.from_int(1))
    return jnp.where(anything, (count_low + quota) // weigh, 0), high


# One search per segment, all in one loop: every field has one entry per segment, but
# for `passes`. It looks for the key that the last dropped score has; then, if scores
# are tied there, for how many of the trailing indices are dropped of them.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    phase: jax.Array
    low: jax.Array  # with this key, or this many trailing indices, too few are dropped
    high: jax.Array  # and with this one enough
    count_low: jax.Array  # how many are dropped with these
    count_high: jax.Array
    below: jax.Array  # key up to which everything is dropped
    at: jax.Array  # key up to which trailing indices are dropped
    hint: jax.Array
    passes: jax.Array


def _start(n_drop: jax.Array, size: jax.Array, hint: jax.Array) -> _Search:
    lowest = jnp.full_like(n_drop, NO_KEY)
    nothing = n_drop <= 0
    return _Search(
        phase=jnp.where(nothing, _DONE, _SEARCHING).astype(jnp.int32),
        low=lowest,
        high=jnp.where(nothing, size, -lowest),
        count_low=jnp.zeros_like(n_drop),
        count_high=size,
        below=lowest,
        at=lowest,
        hint=jnp.broadcast_to(hint, n_drop.shape),
        passes=jnp.int32(0),
    )


def _candidates(
    carry: _Search, n_drop: jax.Array, size: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What to try next; as keys and as index cuts to count at."""
    searching = carry.phase == _SEARCHING
    hint = jnp.where(searching, carry.hint, NO_KEY)
    missing = (n_drop - carry.count_low).astype(jnp.float32)
    between = (carry.count_high - carry.count_low).astype(jnp.float32)
    tries = _tries(carry.low, carry.high, missing, between, hint, carry.passes)
    at = jnp.where(searching, tries, carry.at)
    cut = jnp.where(searching, 0, size - tries)
    return tries, at, cut


def _tries(
    low: jax.Array,
    high: jax.Array,
    missing: jax.Array,
    between: jax.Array,
    hint: jax.Array,
    passes: jax.Array,
) -> jax.Array:
    """Values to count at.

    Around the hint; then cuts of the interval, or where the value must lie if counts
    rise evenly within it. If they do not, guesses end before they have cost much.

    Args:
      low: lower end of the interval. Of any shape, int32.
      high: upper end.
      missing: how many more than at ``low`` are to be counted. float32.
      between: how many more are counted at ``high``.
      hint: a value to look around first, ``NO_KEY`` if there is none.
      passes: how many were made. Shape ``()``, int32.

    Returns:
      Shape ``(CANDIDATES, *low.shape)``, int32.
    """
    steps = np.array([-1, 0, 1]).reshape(3, *(1 for _ in low.shape))
    unknown = (low == NO_KEY) | (high == TOP_KEY)
    given = hint > NO_KEY
    hinted = unknown & given & (passes < len(_REACH))
    reach = jnp.where(passes == 0, *(np.int32(reach) for reach in _REACH))
    # Short of `high`: beyond +inf nothing would be counted, and the search not end.
    around = jnp.clip(hint + steps.astype(np.int32) * reach, low, high - 1)

    width = distance(low, high)
    most = 32 + 2 * jnp.where(given, _PATIENCE[1], _PATIENCE[0]) - 2 * passes
    even = (width > 2 * (CANDIDATES + 1)) & (
        width <= jnp.uint32(1) << jnp.clip(most, 0, _EVEN).astype(jnp.uint32)
    )
    between = jnp.maximum(between, 1)
    part = jnp.clip((missing - 0.5) / between, 0, 1)
    error = _SPREAD * jnp.sqrt(part * (1 - part) / between) + 0.5 / between
    length = jnp.where(even, width, 2).astype(jnp.float32)
    guess = part * length + steps.astype(np.float32) * jnp.maximum(error * length, 1)
    guess = low + jnp.clip(guess, 1, length - 1).astype(jnp.int32)

    cuts = jnp.where(even, guess, split(low, high))
    return jnp.where(hinted, around, cuts)


def _narrow(
    carry: _Search,
    tries: jax.Array,
    counts: jax.Array,
    n_drop: jax.Array,
    size: jax.Array,
) -> _Search:
    enough = counts >= n_drop
    # One reduction of all: to XLA for CPU five programs else, each of which would make
    # its candidates anew. Counts rise with what they are counted at.
    lowest, highest = np.int32(-(2**31)), np.int32(2**31 - 1)
    low, high, count_low, count_high, hit = lax.reduce(
        (
            jnp.where(enough, carry.low, jnp.maximum(carry.low, tries)),
            jnp.where(enough, jnp.minimum(carry.high, tries), carry.high),
            jnp.where(enough, carry.count_low, counts),
            jnp.where(enough, counts, carry.count_high),
            counts == n_drop,
        ),
        (lowest, highest, lowest, highest, np.bool_(False)),
        lambda a, b: (
            jnp.maximum(a[0], b[0]),
            jnp.minimum(a[1], b[1]),
            jnp.maximum(a[2], b[2]),
            jnp.minimum(a[3], b[3]),
            a[4] | b[4],
        ),
        (0,),
    )
    settled = hit | (distance(low, high) <= 1)
    searching, ties = carry.phase == _SEARCHING, carry.phase == _TIES

    # A key that was counted exactly is the threshold, with all that are tied there.
    found, tied = searching & hit, searching & settled & ~hit
    phase = jnp.where(tied, _TIES, carry.phase)
    phase = jnp.where(found | (ties & settled), _DONE, phase)
    done = carry.phase == _DONE
    low, high = jnp.where(done, carry.low, low), jnp.where(done, carry.high, high)
    return _Search(
        phase=phase,
        below=jnp.where(tied, low, carry.below),
        at=jnp.where(found | tied, high, carry.at),
        low=jnp.where(tied, 0, low),
        high=jnp.where(found | tied, size, high),
        count_low=count_low,
        count_high=count_high,
        hint=carry.hint,
        passes=carry.passes + 1,
    )


def _zero(counts: jax.Array) -> jax.Array:
    return counts[0] >> 31  # they are not negative
