"""Exact top-k as a mask: by counting, without a sort, on any sharding.

The ``k``-th lowest score is found by multi-section search: every pass over the scores
counts, for a few candidate thresholds at once, how many scores lie at or below them.
Ties at the threshold are settled by flat index with the same counts. Only counts cross
devices, nothing the size of a tensor is stored, and nothing is flattened.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from movement_jax import tracing, wide
from movement_jax.arguments import plain
from movement_jax.counting import (
    MAX_COUNT,
    NO_KEY,
    Ranked,
    Tensor,
    apart,
    count,
    count_ties,
    distance,
    key_of,
    masks,
    segment_starts,
    sizes,
    split,
)
from movement_jax.wide import Wide

# Candidates are as many a pass as a TPU counts in the time it takes to read the scores,
# and fewer where their places are compared as well.
CANDIDATES = 7
_TIES = 3
# Around a key from an earlier search, in steps of the key axis: the same, within .4, 2
# and 6 % above it, as thresholds rise on a schedule, and up to twice it or half of it.
_REACH = np.array([-(2**22), -(2**18), 0, 2**15, 2**17, 2**19, 2**23], np.int32)
# Without one: where the magnitudes of weights usually lie, every few octaves.
_USUAL = np.array([key_of(2.0**e) for e in (-16, -10, -7, -5, -3, 0, 5)], np.int32)
# Around a guess: so many times its distance from the lower end, and so many standard
# deviations of the count up to it. Two are far from it, should it be wrong.
_TIMES = {CANDIDATES: (1 / 3, 1, 1, 1, 1, 1, 3), _TIES: (1, 1, 1)}
_SPREAD = {CANDIDATES: (0, -2, -0.7, 0, 0.7, 2, 0), _TIES: (-1.5, 0, 1.5)}
_EVEN = 2**22  # widest interval in which values are guessed to be spread evenly
_GUESSES = 6  # passes in which it may be guessed; two or three are lost if it is wrong


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


class Cuts(NamedTuple):
    """What is dropped of every segment. Shapes ``(1, segments)``, int32.

    Attributes:
      below: scores at or below this key are.
      at: and those at or below this one,
      first: if their flat index is at least this.
    """

    below: jax.Array
    at: jax.Array
    first: jax.Array


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
      n_drop: how many to drop in every segment, clipped to what there is. Shape
        ``(segments,)``, int32.
      kept: masks so far; what they drop ranks below everything.
      hint: keys to search around first. Shape ``()`` or ``(segments,)``, int32.
      starts: from :func:`movement_jax.counting.segment_starts`, made outside of the
        loop this is called in.

    Returns:
      One bool mask per tensor, True where kept, and the keys of the thresholds.
    """
    n_drop = jnp.maximum(jnp.asarray(n_drop, jnp.int32), 0)
    if starts is None:
        starts = segment_starts(tensors, _zero(n_drop))
    ranked = Ranked(scores, kept, tensors, starts)
    cuts = find_cuts(ranked, n_drop, hint)
    return masks(ranked, *cuts), cuts.at[0]


def find_cuts(
    ranked: Ranked,
    n_drop: jax.Array,
    hint: jax.Array | None = None,
    now: jax.typing.ArrayLike = True,
) -> Cuts:
    """Where the lowest scores of every segment end.

    Args:
      ranked: what is ranked.
      n_drop: as for :func:`keep_masks`.
      hint: as for :func:`keep_masks`.
      now: False to read no score, and find nothing. Shape ``()``, bool.
    """
    hint = jnp.asarray(NO_KEY if hint is None else hint, jnp.int32)
    n_drop = jnp.asarray(n_drop, jnp.int32)
    return _find_cuts(*apart(ranked), n_drop, hint, jnp.bool_(now))


@tracing.once(1)
def _find_cuts(
    ranked: Ranked,
    tensors: tuple[Tensor, ...],
    n_drop: jax.Array,
    hint: jax.Array,
    now: jax.Array,
) -> Cuts:
    ranked = ranked._replace(tensors=tensors)
    size = jnp.asarray(sizes(tensors), jnp.int32)
    n_drop = n_drop.clip(0, size)
    row = (1, *n_drop.shape)
    n_drop, size = n_drop.reshape(row), size[None]
    nothing = n_drop <= 0
    lowest = jnp.full(row, NO_KEY, jnp.int32)
    key = _search(
        lambda tries: count(ranked, tries),
        _Search(lowest, -lowest, jnp.zeros_like(n_drop), size, nothing | ~now),
        _Each(n_drop),
        jnp.broadcast_to(hint, row),
    )
    # If no key was counted exactly, scores are tied at the first that has enough, and
    # only those at the end are dropped.
    last = _search(
        lambda tries: count_ties(ranked, key.low, key.high, size - tries),
        dataclasses.replace(key, low=jnp.zeros_like(size), high=size),
        _Each(n_drop),
        candidates=_TIES,
    )
    at = jnp.where(nothing, NO_KEY, key.high)
    first = jnp.where(key.exact, 0, size - last.high)
    return Cuts(jnp.minimum(key.low, at), at, first)


def common_threshold(
    scores: Sequence[jax.Array],
    tensors: Sequence[Tensor],
    n_drop: Wide,
    *,
    most: jax.Array,
    kept: Sequence[jax.Array] | None = None,
    hint: jax.Array | None = None,
    each: np.ndarray | int = 1,
    group: np.ndarray | None = None,
    now: jax.typing.ArrayLike = True,
) -> tuple[jax.Array, jax.Array]:
    """Splits one count over all segments by a threshold they share.

    Args:
      scores: one array per tensor.
      tensors: what they are.
      n_drop: how many to drop in total. Shape ``()``, or ``(groups,)``.
      most: the most that may be dropped in each segment. Shape ``(segments,)``, int32.
      kept: masks so far; what they drop ranks below everything.
      hint: key to search around first. Shape ``()``, or ``(segments,)`` and the same in
        all of a group, int32.
      each: what one score of each segment counts for in ``n_drop``.
      group: the number of the group that each segment belongs to, each of which has a
        count and a threshold of its own; None for one of all. Shape ``(segments,)``.
      now: as for :func:`find_cuts`.

    Returns:
      How many each segment drops, shape ``(segments,)``, and the key of the threshold,
      shape like that of ``hint``. Of scores equal to it, those of earlier segments are
      kept.
    """
    return _common_threshold(
        *apart(Ranked(scores, kept, tensors, ())),
        n_drop,
        jnp.asarray(most, jnp.int32),
        jnp.asarray(NO_KEY if hint is None else hint, jnp.int32),
        jnp.asarray(np.broadcast_to(np.asarray(each, np.int32), most.shape)),
        None if group is None else tuple(group.tolist()),
        jnp.bool_(now),
    )


@tracing.once(1, 6)
def _common_threshold(
    ranked: Ranked,
    tensors: tuple[Tensor, ...],
    n_drop: Wide,
    most: jax.Array,
    hint: jax.Array,
    each: jax.Array,
    of: tuple[int, ...] | None,
    now: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    row, weigh = (1, *most.shape), each[None]
    most = most.reshape(row) * weigh
    ranked = ranked._replace(
        tensors=tensors, starts=segment_starts(tensors, _zero(most[0]))
    )
    group = None if of is None else np.array(of)
    lowest, goal = jnp.full(row, NO_KEY, jnp.int32), _Together(n_drop, group)
    found = _search(
        lambda tries: jnp.minimum(count(ranked, tries) * weigh, most),
        _Search(lowest, -lowest, jnp.zeros_like(most), most, (most < 0) | ~now),
        goal,
        hint,
    )
    # Of an exact count everything is dropped, else of the ties at the threshold.
    count_low, ties = found.count_low[0], (found.count_high - found.count_low)[0]
    missing = Wide(*map(goal.of_each, wide.minus(n_drop, goal.totals(count_low))))
    quota = wide.clipped(wide.minus(missing, goal.sums_after(ties)), ties)
    at = found.high[0, 0] if group is None else found.high[0]
    return (count_low + quota) // weigh[0], at


# One search per segment, all in one loop: every field has shape `(1, segments)`.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    low: jax.Array  # at this value too few are counted
    high: jax.Array  # and at this one enough
    count_low: jax.Array  # how many that are
    count_high: jax.Array
    exact: jax.Array  # as many as are asked for, or none are


@dataclasses.dataclass(frozen=True)
class _Each:
    """A count for every segment."""

    n_drop: jax.Array  # shape (1, segments)

    def judge(self, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether counts are enough, and whether they are exact."""
        return counts >= self.n_drop, counts == self.n_drop

    def rest(self, counts: jax.Array) -> jax.Array:
        """How far it is from counts to what is asked for. float32."""
        return (self.n_drop - counts).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Together:
    """One count for all segments together, or for all of each group."""

    n_drop: Wide  # shape () or (groups,)
    group: np.ndarray | None = None  # of every segment

    def judge(self, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As that of :class:`_Each`."""
        total = self.totals(counts)
        enough = wide.at_least(total, self.n_drop)
        exact = enough & wide.at_least(self.n_drop, total)
        return self.of_each(enough), self.of_each(exact)

    def rest(self, counts: jax.Array) -> jax.Array:
        """As that of :class:`_Each`."""
        missing = wide.minus(self.n_drop, self.totals(counts))
        return self.of_each(wide.to_float(missing))

    def totals(self, counts: jax.Array) -> Wide:
        """Sums over the last axis, or over each group in it."""
        if self.group is None:
            return wide.total(counts, -1)
        own = jnp.arange(self.group.max() + 1)[:, None] == self.group
        return wide.total(jnp.where(own, counts[..., None, :], 0), -1)

    def of_each(self, values: jax.Array) -> jax.Array:
        """From values of the groups to those of their segments."""
        return values[..., None if self.group is None else self.group]

    def sums_after(self, counts: jax.Array) -> Wide:
        """For every segment, the sum of those of its group that follow it."""
        if self.group is None:
            return wide.sums_after(counts)
        order = np.argsort(self.group, kind="stable")
        sums = wide.sums_after(counts[order])
        last = np.searchsorted(self.group[order], self.group[order], "right") - 1
        sums = wide.minus(sums, Wide(*(x[last] for x in sums)))
        return Wide(*(x[np.argsort(order)] for x in sums))


def _search(
    counts_at: Callable[[jax.Array], jax.Array],
    start: _Search,
    goal: _Each | _Together,
    hint: jax.Array | None = None,
    candidates: int = CANDIDATES,
) -> _Search:
    """Narrows intervals until their ends are next to each other, or one is exact.

    Args:
      counts_at: counts that do not fall with the values they are counted at. Takes and
        returns shape ``(candidates, segments)``, int32.
      start: the intervals.
      goal: what is to be counted.
      hint: values to look around first, if they are not ``NO_KEY``. Shape ``()`` or
        ``(1, segments)``, int32.
      candidates: values to count at in every pass.
    """

    # Values are chosen at the end of a pass for the next one: chosen at its beginning,
    # XLA for CPU would choose them anew in the program of every tensor.
    def body(carry: tuple[_Search, jax.Array, jax.Array]) -> tuple[Any, ...]:
        now, tries, passes = carry
        now, passes = _narrow(now, tries, counts_at(tries), goal), passes + 1
        return now, _tries(now, goal, passes, candidates), passes

    def goes_on(carry: tuple[_Search, jax.Array, jax.Array]) -> jax.Array:
        now, *_ = carry
        return jnp.any(~now.exact & (distance(now.low, now.high) > 1))

    passes = jnp.int32(0)
    if hint is None:
        tries = _tries(start, goal, passes, candidates)
    else:
        tries = _first_tries(start, hint)
    return lax.while_loop(goes_on, body, (start, tries, passes))[0]


def _first_tries(start: _Search, hint: jax.Array) -> jax.Array:
    """Values around the hint, or where scores usually lie, to count at first."""
    tries = jnp.where(hint > NO_KEY, hint + _REACH[:, None], _USUAL[:, None])
    # Short of `high`: beyond +inf nothing would be counted, and the search not end.
    return jnp.clip(tries, start.low, start.high - 1)


def _tries(
    now: _Search, goal: _Each | _Together, passes: jax.Array, candidates: int
) -> jax.Array:
    """Values to count at. Shape ``(candidates, segments)``, int32.

    Where the value must lie if counts rise evenly within the interval, as far as that
    helps; then the interval is cut into equal parts.
    """
    low, high = now.low, now.high
    even, guess = _guess(now, goal, passes, candidates)
    guess = jnp.clip(low + guess, low + 1, high - 1)
    return jnp.where(even, guess, split(low, high, candidates))


def _guess(
    now: _Search, goal: _Each | _Together, passes: jax.Array, candidates: int
) -> tuple[jax.Array, jax.Array]:
    """Whether to guess, and how far from ``now.low``, int32; any guess will do."""
    width, missing = distance(now.low, now.high), goal.rest(now.count_low)
    between = missing - goal.rest(now.count_high)
    # Equal parts tell few values apart as well as a guess does.
    few = 2 * candidates + 2
    even = (passes < _GUESSES) & (width > few) & (width <= _EVEN) & (between > few)
    length = jnp.where(even, width, 2).astype(jnp.float32)
    between = jnp.maximum(between, 1)
    part = jnp.clip((missing - 0.5) / between, 0, 1)
    error = jnp.sqrt(part * (1 - part) / between) + 0.5 / between
    times = np.array(_TIMES[candidates], np.float32)[:, None]
    spread = np.array(_SPREAD[candidates], np.float32)[:, None]
    most = (1 + part) / 2  # half of the way to the upper end
    guess = jnp.minimum(times * part, most) * length
    guess += spread * jnp.maximum(error * length, 1)
    return even, guess.astype(jnp.int32)


def _narrow(
    now: _Search, tries: jax.Array, counts: jax.Array, goal: _Each | _Together
) -> _Search:
    enough, exact = goal.judge(counts)
    # One reduction of all: to XLA for CPU five programs else, each of which would make
    # its candidates anew.
    lowest, highest = np.int32(np.iinfo(np.int32).min), np.int32(np.iinfo(np.int32).max)
    found = lax.reduce(
        (
            jnp.where(enough, now.low, jnp.maximum(now.low, tries)),
            jnp.where(enough, jnp.minimum(now.high, tries), now.high),
            jnp.where(enough, now.count_low, counts),
            jnp.where(enough, counts, now.count_high),
            now.exact | exact,
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
    return _Search(*(x[None] for x in found))


def _zero(counts: jax.Array) -> jax.Array:
    return counts[0] >> 31  # they are not negative
