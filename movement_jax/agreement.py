"""Where two rankings of the same weights disagree, next to what chance would give."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import masking, schedules
from movement_jax import state as _state
from movement_jax import tree as _tree
from movement_jax.counting import Tensor
from movement_jax.criteria import Criterion
from movement_jax.prune import unpack
from movement_jax.report import (
    Opened,
    add_row,
    checked_sparsity,
    count,
    fraction,
    new_table,
    open_state,
    rendered,
    whole,
)
from movement_jax.state import MovementState, Tracked

if TYPE_CHECKING:
    from rich.table import Table

_SAMPLE = 100_000  # weights of a tensor that percentile ranks are estimated from
_QUARTILES = (0.25, 0.5, 0.75)

Quartiles = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Disputed:
    """Where the weights lie that one side alone prunes.

    Percentile ranks are within a weight's own tensor, in [0, 1], estimated from at
    most 100 000 of its weights.

    Attributes:
      magnitude: quartiles of their rank by magnitude as it is now.
      score: quartiles of their rank by the scores of A.
    """

    magnitude: Quartiles
    score: Quartiles


@dataclasses.dataclass(frozen=True)
class TensorAgreement:
    """How two rankings agree on one tensor, or on all of them.

    Attributes:
      name: its ``/``-joined path, or ``"total"``.
      size: number of weights.
      both: weights that A and B both prune.
      only_a: weights that A prunes and B keeps.
      only_b: weights that B prunes and A keeps.
      jaccard: pruned by both over pruned by either; 1 if neither prunes any.
      chance: the Jaccard index to expect if B pruned as many weights of every tensor
        at random, ``s / (2 - s)`` where both prune the fraction ``s``.
      where_a: where the weights lie that only A prunes; None if there are none.
      where_b: where the weights lie that only B prunes; None if there are none.
    """

    name: str
    size: int
    both: int
    only_a: int
    only_b: int
    jaccard: float
    chance: float
    where_a: Disputed | None
    where_b: Disputed | None


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What two rankings agree on; made by :func:`agreement`, prints as a table.

    Attributes:
      a: what A ranks by.
      b: what B ranks by.
      sparsity: fraction that A drops, and B unless it was given as masks.
      tensors: one entry per prunable tensor, the most contested first.
      total: over all prunable tensors.
    """

    a: str
    b: str
    sparsity: float
    tensors: tuple[TensorAgreement, ...]
    total: TensorAgreement

    def to_dict(self) -> dict[str, Any]:
        """The same as plain Python values, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return rendered(self)

    def __rich__(self) -> "Table":
        table = new_table(
            "Tensor",
            *("Weights", "Both", "Only A", "Only B", "Jaccard", "Chance"),
            *("Only A: by |W|", "by A", "Only B: by |W|", "by A"),
            title=f"Pruned at sparsity {self.sparsity:g} by A = {self.a} and "
            f"B = {self.b}",
            caption="by |W|, by A: median percentile rank, within its tensor, of the "
            "weights that one side alone prunes.",
        )
        for row in (*self.tensors, self.total):
            add_row(
                table,
                row.name,
                *(f"{n:,}" for n in (row.size, row.both, row.only_a, row.only_b)),
                fraction(row.jaccard),
                fraction(row.chance),
                *_medians(row.where_a),
                *_medians(row.where_b),
                style="bold" if row is self.total else None,
                end_section=row is self.tensors[-1] if self.tensors else False,
            )
        return table


def agreement(state: Any, other: Any, sparsity: float | None = None) -> Agreement:
    """Which weights two rankings would both prune, and on which they disagree.

    A is the criterion of ``state`` with the scores it has now. It ranks all weights
    freely, also those that are pruned already, so ask before pruning: a pruned weight
    scores as it scores now. Both sides spread the sparsity over tensors by the
    allocation of ``state``.

    Two random choices agree to some degree: compare ``jaccard`` with ``chance``.

    Args:
      state: a train state or a pair, as for :func:`movement_jax.prune`.
      other: B, one of
        a criterion whose scores need no training, such as ``Magnitude()``;
        another state of the same model, which brings its own scores;
        a tree of bools like params or like ``MovementState.masks``, True where kept.
      sparsity: fraction to drop, in [0, 1]. May be left out for masks: then A drops
        the fraction that they drop.

    Returns:
      A record to print, or to read by attribute or ``to_dict()``.

    Raises:
      ValueError: if ``other`` is a criterion that accumulates its scores in training
        or does not fit ``state``, if nothing has been scored yet, or if ``sparsity``
        is missing or out of range.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(criterion=mj.Magnitude())
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [0.2, 0.1]])}
      >>> masks = {"kernel": jnp.array([[True, False], [True, False]])}
      >>> report = mj.agreement((params, tx.init(params)), masks)
      >>> report.total.both, report.total.only_a, report.total.only_b
      (1, 1, 1)
    """
    found = compare(state, other, sparsity, "agreement")
    weights = jax.tree.leaves(found.opened.weights)
    rows, only_a, only_b = [], [], []
    for each in zip(found.opened.tensors, found.a, found.b, found.scores, weights):
        row, where_a, where_b = _agree(*each)
        rows.append(row)
        only_a.append(where_a)
        only_b.append(where_b)
    jaccard, chance = _jaccards([(r.size, r.both, r.only_a, r.only_b) for r in rows])
    total = TensorAgreement(
        name="total",
        size=sum(row.size for row in rows),
        both=sum(row.both for row in rows),
        only_a=sum(row.only_a for row in rows),
        only_b=sum(row.only_b for row in rows),
        jaccard=jaccard,
        chance=chance,
        where_a=_pool(only_a),
        where_b=_pool(only_b),
    )
    rows.sort(key=lambda row: row.jaccard)
    return Agreement(found.name_a, found.name_b, found.sparsity, tuple(rows), total)


class Comparison(NamedTuple):
    """Two rankings of the same tensors, in flatten order.

    Attributes:
      opened: the state that A belongs to.
      name_a: what A ranks by.
      name_b: what B ranks by.
      sparsity: fraction that is dropped.
      a: masks of A, True where kept.
      b: masks of B, True where kept.
      scores: of A.
    """

    opened: Opened
    name_a: str
    name_b: str
    sparsity: float
    a: list[jax.Array]
    b: list[jax.Array]
    scores: list[jax.Array]


def compare(state: Any, other: Any, sparsity: float | None, caller: str) -> Comparison:
    """Ranks all weights twice. Arguments as for :func:`agreement`.

    Args:
      state: A.
      other: B.
      sparsity: fraction to drop.
      caller: the function to name in errors.
    """
    opened = open_state(state, caller)
    found, weights = opened.found, opened.weights
    check_scored(found, caller)
    if sparsity is not None:
        sparsity = checked_sparsity(sparsity)
    name_a = type(found.config.criterion).__name__
    ranked = _rank_other(opened, other, caller)
    if ranked is not None:
        name_b, scores_b = ranked
        if sparsity is None:
            raise ValueError(
                "`sparsity` is needed to turn two rankings into masks: for example "
                f"`{caller}(state, other, sparsity=0.8)`."
            )
        masks_b = masks_at(found, scores_b, sparsity)
    else:
        name_b, masks_b = "masks", _given_masks(found, other, caller)
        if sparsity is None:
            sparsity = _dropped_by(masks_b, opened.tensors)
    scores = _state.scores_of(found, weights)
    masks = [masks_at(found, scores, sparsity), masks_b]
    a, b, leaves = (jax.tree.leaves(tree) for tree in (*masks, scores))
    return Comparison(opened, name_a, name_b, sparsity, a, b, leaves)


def check_scored(found: MovementState, caller: str) -> None:
    """Refuses a state whose scores are gone or have not begun."""
    if found.config.finalized:
        raise ValueError(
            f"This state was finalized and its scores are gone: call `{caller}` "
            "before `finalize`."
        )
    if getattr(found.config.criterion, "accumulates", True) and not found.step > 0:
        raise ValueError(
            f"Nothing has been scored yet: `{caller}` ranks weights by scores that "
            "training steps accumulate. Train first."
        )


def masks_at(
    found: MovementState, scores: Any, sparsity: float, kept: Any = None
) -> Any:
    """Masks of the highest scores at a sparsity, spread as ``found`` spreads it.

    Args:
      found: gives allocation and tensors.
      scores: tree like ``found.masks``.
      sparsity: fraction to drop.
      kept: masks that may only shrink, or None to rank all weights freely.
    """
    light = found._replace(scores=(), tracked=Tracked(), inner_state=())
    return _masks_at(scores, light, kept, sparsity=float(sparsity))


@functools.partial(jax.jit, static_argnames="sparsity")
def _masks_at(scores: Any, found: MovementState, kept: Any, *, sparsity: float) -> Any:
    target = schedules.Target(sparsity)  # a Python number, for exact counts
    return masking.masks_from(scores, found, target, kept)[0]


def _rank_other(opened: Opened, other: Any, caller: str) -> tuple[str, Any] | None:
    """Name and scores of B, or None if it is given as masks."""
    if isinstance(other, type) and hasattr(other, "scores"):
        raise TypeError(
            f"`other` must be an object such as `{other.__name__}()`, got the class."
        )
    if isinstance(other, Criterion):
        return type(other).__name__, _criterion_scores(opened, other, caller)
    theirs, weights = _open_other(other, caller)
    if theirs is None:
        return None
    if _state.tensors_of(theirs) != opened.tensors:
        ours = {(t.name, t.shape, t.stacked) for t in opened.tensors}
        different = [
            t.name
            for t in _state.tensors_of(theirs)
            if (t.name, t.shape, t.stacked) not in ours
        ]
        raise ValueError(
            "`other` is a state of another model, or prunes other tensors: "
            f"{different[:5] or 'it lacks some'} differ from those of `state`."
        )
    check_scored(theirs, caller)
    scores = jax.tree.leaves(_state.scores_of(theirs, weights))
    structure = jax.tree.structure(opened.found.masks)
    name = f"{type(theirs.config.criterion).__name__} of the other state"
    return name, jax.tree.unflatten(structure, scores)


def _criterion_scores(opened: Opened, other: Criterion, caller: str) -> Any:
    if getattr(other, "accumulates", True):
        name = type(other).__name__
        needs_gradients = getattr(other, "needs_gradients", False)
        more = "inner=optax.adamw(...)" if needs_gradients else "..."
        raise ValueError(
            f"`{name}` ranks by scores that it accumulates in training, and this state "
            "holds none of its. Train a second state with "
            f"`movement_pruning(criterion={name}(...), {more})` and give that one: "
            f"`{caller}(state, other_state, sparsity=0.8)`. A criterion that needs no "
            f"training is given as it is: `{caller}(state, Magnitude(), sparsity=0.8)`."
        )
    return other.scores(other.init(opened.weights), opened.weights)


def _open_other(other: Any, caller: str) -> tuple[MovementState | None, Any]:
    """The pruning state in ``other`` and its weights, as far as there are any."""
    is_state = functools.partial(_is_a, MovementState)
    if not any(map(is_state, jax.tree.leaves(other, is_leaf=is_state))):
        return None, None
    try:
        params, opt_state, _ = unpack(other)
    except ValueError:
        params, opt_state = (), other
    # The state of a chain of two is a pair as well, of states, which are tuples.
    if isinstance(params, tuple) and not _fits(opt_state, params):
        params, opt_state = None, other
    theirs = _state.find_state(opt_state)
    if params is not None:
        return theirs, _tree.punch(theirs.masks, params, "params")
    if not getattr(theirs.config.criterion, "accumulates", True):
        name = type(theirs.config.criterion).__name__
        raise ValueError(
            f"`{name}` ranks by the weights as they are: give `other` with its params, "
            f"as in `{caller}(state, (other_params, other_opt_state), sparsity=0.8)`."
        )
    return theirs, None


def _fits(opt_state: Any, params: Any) -> bool:
    try:
        _tree.punch(_state.find_state(opt_state).masks, params, "params")
    except ValueError:
        return False
    return True


def _is_a(kind: type, node: Any) -> bool:
    return isinstance(node, kind)


def _given_masks(found: MovementState, other: Any, caller: str) -> Any:
    leaves = jax.tree.leaves(other)
    if not leaves or not all(hasattr(x, "dtype") for x in leaves):
        raise TypeError(
            "`other` must be a criterion such as `Magnitude()`, another train state, "
            f"or a tree of masks like params; got {type(other).__name__}."
        )
    masks = _tree.punch(found.masks, other, "other")
    for name, mask in _tree.named_leaves(masks):
        if mask.dtype != jnp.bool_:
            raise ValueError(
                "`other` is taken for masks, which are bools, True where a weight is "
                f"kept; got {mask.dtype} at {name!r}. To compare with another run, "
                f"give its state: `{caller}(state, other_state, sparsity=0.8)`."
            )
    return jax.tree.map(jnp.asarray, masks)


def _dropped_by(masks: Any, tensors: list[Tensor]) -> float:
    leaves: list[jax.Array] = jax.tree.leaves(masks)
    dropped = sum(whole(count(~m, t.leading)) for m, t in zip(leaves, tensors))
    return dropped / max(sum(mask.size for mask in leaves), 1)


class _Sample(NamedTuple):
    """Ranks of some of the disputed weights of one tensor, by |W| and by score."""

    n: int
    magnitude: np.ndarray
    score: np.ndarray


def _agree(
    tensor: Tensor, a: Any, b: Any, score: Any, weight: Any
) -> tuple[TensorAgreement, _Sample, _Sample]:
    both, only_a, only_b = (
        whole(count(p, tensor.leading)) for p in (~a & ~b, ~a & b, a & ~b)
    )
    size = tensor.segments * tensor.size
    where_a = where_b = _Sample(0, np.zeros(0), np.zeros(0))
    if only_a or only_b:
        kept_a, kept_b, score, weight = (
            np.asarray(jax.device_get(x)).reshape(-1) for x in (a, b, score, weight)
        )
        magnitude, score = np.abs(weight.astype(np.float32)), score.astype(np.float32)
        where_a = _sample(~kept_a & kept_b, only_a, magnitude, score)
        where_b = _sample(kept_a & ~kept_b, only_b, magnitude, score)
    jaccard, chance = _jaccards([(size, both, only_a, only_b)])
    row = TensorAgreement(
        name=tensor.name,
        size=size,
        both=both,
        only_a=only_a,
        only_b=only_b,
        jaccard=jaccard,
        chance=chance,
        where_a=_pool([where_a]),
        where_b=_pool([where_b]),
    )
    return row, where_a, where_b


def _sample(
    disputed: np.ndarray, n: int, magnitude: np.ndarray, score: np.ndarray
) -> _Sample:
    where = _some(np.flatnonzero(disputed))
    return _Sample(n, _ranks(magnitude, where), _ranks(score, where))


def _ranks(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Percentile ranks of some values among all; ties share the middle of theirs."""
    ordered = np.sort(_some(values))
    below = np.searchsorted(ordered, values[where], side="left")
    up_to = np.searchsorted(ordered, values[where], side="right")
    ranks: np.ndarray = (below + up_to) / (2 * len(ordered))
    return ranks


def _some(values: np.ndarray) -> np.ndarray:
    """At most ``_SAMPLE`` of them, the same every time."""
    if len(values) <= _SAMPLE:
        return values
    return np.random.default_rng(0).choice(values, _SAMPLE)


def _pool(samples: list[_Sample]) -> Disputed | None:
    samples = [sample for sample in samples if sample.n]
    if not samples:
        return None
    share = [np.full(len(s.score), s.n / len(s.score)) for s in samples]
    return Disputed(
        magnitude=_quartiles([s.magnitude for s in samples], share),
        score=_quartiles([s.score for s in samples], share),
    )


def _quartiles(values: list[np.ndarray], share: list[np.ndarray]) -> Quartiles:
    value, weight = np.concatenate(values), np.concatenate(share)
    order = np.argsort(value, kind="stable")
    upto = np.cumsum(weight[order]) / weight.sum()
    at = np.minimum(np.searchsorted(upto, _QUARTILES), len(value) - 1)
    low, median, high = (float(x) for x in value[order][at])
    return low, median, high


def _jaccards(counts: list[tuple[int, int, int, int]]) -> tuple[float, float]:
    """The Jaccard index and its chance level over some tensors."""
    overlap = union = expected = drops = 0.0
    for size, both, only_a, only_b in counts:
        overlap += both
        union += both + only_a + only_b
        expected += (both + only_a) * (both + only_b) / max(size, 1)
        drops += 2 * both + only_a + only_b
    chance = expected / (drops - expected) if drops > expected else float(drops > 0)
    return overlap / union if union else 1.0, chance


def _medians(where: Disputed | None) -> tuple[str, str]:
    if where is None:
        return "-", "-"
    return fraction(where.magnitude[1]), fraction(where.score[1])
