"""How one target is spread over tensors: how many weights each of them drops."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import counting, schedules, selection, wide
from movement_jax.arguments import check_number, compiled, make_plain, plain
from movement_jax.counting import Tensor
from movement_jax.schedules import Target
from movement_jax.wide import Wide


class Allocation(Protocol):
    """What the transformation asks of an allocation."""

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raises ``ValueError`` if the allocation does not fit these tensors."""
        ...

    def n_drop(
        self,
        target: Target,
        tensors: Sequence[Tensor],
        scores: Sequence[jax.Array],
        kept: Sequence[jax.Array] | None,
        hint: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns how many weights to drop in every segment.

        Args:
          target: fraction to drop overall, and how far a schedule has come.
          tensors: what is to be pruned.
          scores: one array per tensor. Of a tensor that is ``absolute`` they are its
            weights, which count by their magnitude.
          kept: masks so far, if pruned weights are to stay pruned.
          hint: keys of the last thresholds. Shape ``(segments,)``, int32.

        Returns:
          Counts, shape ``(segments,)``, int32, and a key that hints at the threshold,
          or None.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same sparsity in every tensor.

    Attributes:
      min_keep: weights (with a structure: groups of them) kept in every tensor (every
        slice of a stacked one) whatever the sparsity: a count, or a fraction in (0, 1).
        Default 1.

    Examples:
      >>> import movement_jax as mj
      >>> tx = mj.movement_pruning(0.9, allocation=mj.Uniform(min_keep=0.005))
    """

    min_keep: float = 1

    def __post_init__(self) -> None:
        _check_min_keep(self)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """No tensor must have too many weights to be counted as one."""
        _check_countable(tensors)

    def n_drop(
        self,
        target: Target,
        tensors: Sequence[Tensor],
        scores: Sequence[jax.Array],
        kept: Sequence[jax.Array] | None,
        hint: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Rounds ``sparsity * size`` in every segment."""
        del scores, kept, hint
        sizes = counting.sizes(tensors)
        return jnp.minimum(drop_count(target, sizes), most_dropped(sizes, self)), None


@dataclasses.dataclass(frozen=True)
class Global:
    r"""One threshold for all tensors: the lowest scores go, wherever they are.

    Or one threshold for each layer, with ``per``: tensors in whose path the pattern
    finds the same text are ranked together, and lose together the fraction asked for.
    Those in whose path it is not found are another group. Where it is found in the path
    of a ``stacked`` kernel, layer ``i`` of all such kernels is a group.

    Tensors whose scores are small may lose nearly everything; ``min_keep`` bounds
    that, and :func:`movement_jax.health` names the tensors that collapsed. With a
    structure the lowest groups go. Where they differ in size a large one counts for
    more, and the total falls short of the target by less than a group, if those that
    the end of an axis cuts short are counted as whole.

    Attributes:
      min_keep: weights (with a structure: groups of them) kept in every tensor (every
        slice of a stacked one) whatever the sparsity: a count, or a fraction in (0, 1).
        Default 1.
      per: regular expression searched for in the ``/``-joined paths; None for one
        threshold.

    Raises:
      ValueError: at ``init``, if ``per`` is found in no prunable path.

    Examples:
      >>> import jax, jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(0.9, allocation=mj.Global(min_keep=0.01))
      >>> layers = mj.Global(per=r"layer_\d+")
      >>> tx = mj.movement_pruning(None, mj.Magnitude(), allocation=layers)
      >>> layer = {"up": jnp.array([[1.0, 2, 5]]), "down": jnp.array([[3.0, 4, 6]])}
      >>> layer = {name: {"kernel": kernel} for name, kernel in layer.items()}
      >>> params = {"layer_0": layer, "layer_1": jax.tree.map(lambda w: 10 * w, layer)}
      >>> params, _ = mj.prune((params, tx.init(params)), 0.5)
      >>> print(params["layer_1"]["up"]["kernel"], params["layer_1"]["down"]["kernel"])
      [[ 0.  0. 50.]] [[ 0. 40. 60.]]
    """

    min_keep: float = 1
    per: str | None = None

    def __post_init__(self) -> None:
        _check_min_keep(self)
        if self.per is not None:
            compiled("per", self.per)

    def __repr__(self) -> str:
        # What was saved without `per` is told by the same words.
        per = "" if self.per is None else f", per={self.per!r}"
        return f"Global(min_keep={self.min_keep!r}{per})"

    def check(self, tensors: Sequence[Tensor]) -> None:
        """The pattern must be found in some path. Any tensors are counted together."""
        per = self.per
        if per is not None and not any(re.search(per, t.name) for t in tensors):
            raise ValueError(
                f"`Global(per={self.per!r})` groups nothing: it is found in no "
                f"prunable path. Prunable paths:\n  {_listing(tensors)}"
            )

    def n_drop(
        self,
        target: Target,
        tensors: Sequence[Tensor],
        scores: Sequence[jax.Array],
        kept: Sequence[jax.Array] | None,
        hint: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Counts what lies below the threshold that all segments share."""
        sizes, each = counting.sizes(tensors), _weights_each(tensors)
        _check_weights(self, sizes * each)
        most, group = most_dropped(sizes, self), self._group(tensors)
        total = drop_total(target, _sums(sizes * each, group))
        total = wide.minimum(total, wide.from_int(_sums(most * each, group)))
        return selection.common_threshold(
            scores,
            tensors,
            total,
            most=jnp.asarray(most),
            kept=kept,
            hint=None if hint is None else _highest(hint, group),
            each=each,
            group=group,
            now=target.now,
        )

    def _group(self, tensors: Sequence[Tensor]) -> np.ndarray | None:
        """The number of the group of every segment; None if there is only one."""
        if self.per is None:
            return None
        keys = []
        for tensor in tensors:
            found = re.search(self.per, tensor.name)
            layers = math.prod(tensor.shape[: tensor.stacked]) if found else 1
            for layer in range(layers):
                key = found and (found[0], tensor.stacked, layer)
                keys += [key] * (tensor.segments // layers)
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return np.array([numbers[key] for key in keys]) if len(numbers) > 1 else None


@dataclasses.dataclass(frozen=True)
class ErdosRenyi:
    r"""Smaller tensors are kept denser, large ones pruned harder.

    The density of a tensor is proportional to :math:`\sum_i d_i / \prod_i d_i` over
    its axes :math:`d_i`, capped at 1, such that the whole reaches the sparsity asked
    for exactly; with groups of different sizes, to within the largest of them, if
    those that the end of an axis cuts short are counted as whole.

    Attributes:
      min_keep: weights (with a structure: groups of them) kept in every tensor (every
        slice of a stacked one) whatever the sparsity: a count, or a fraction in (0, 1).
        Default 1.

    Examples:
      >>> import movement_jax as mj
      >>> tx = mj.movement_pruning(0.9, allocation=mj.ErdosRenyi())

    References:
      Mocanu et al., 2018, `arXiv:1707.04780 <https://arxiv.org/abs/1707.04780>`_, in
      the form for kernels of Evci et al., 2019,
      `arXiv:1911.11134 <https://arxiv.org/abs/1911.11134>`_
    """

    min_keep: float = 1

    def __post_init__(self) -> None:
        _check_min_keep(self)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """No tensor must have too many weights to be counted as one."""
        _check_countable(tensors)

    def n_drop(
        self,
        target: Target,
        tensors: Sequence[Tensor],
        scores: Sequence[jax.Array],
        kept: Sequence[jax.Array] | None,
        hint: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Solves for the scale of the densities, then rounds to the exact total."""
        del scores, kept, hint
        if any(tensor.axes for tensor in tensors):
            raise ValueError(
                "`ErdosRenyi()` reads the shapes of whole tensors, which `axis_name` "
                "splits. Use another allocation, or `jit` with sharded params."
            )
        sizes, each = counting.sizes(tensors), _weights_each(tensors)
        _check_weights(self, sizes * each)
        total = int((sizes * each).sum())
        n_keep = wide.minus(wide.from_int(total), drop_total(target, total))
        raw = np.concatenate(
            [np.full(t.segments, _raw_density(t), np.float64) for t in tensors]
        )
        # Densest first, the j-th candidate scale supposes that j tensors are full.
        order = np.argsort(-raw, kind="stable")
        full = np.concatenate([[0], np.cumsum((sizes * each)[order])[:-1]])
        open_mass = np.cumsum((raw * sizes * each)[order][::-1])[::-1]
        rest = wide.to_float(wide.minus(n_keep, wide.from_int(full)))
        scale = rest / open_mass.astype(np.float32)
        fits = scale * raw[order].astype(np.float32) <= 1
        scale = jnp.where(jnp.any(fits), scale[jnp.argmax(fits)], jnp.inf)
        density = jnp.clip(scale * raw.astype(np.float32), 0, 1)
        density = jnp.where(jnp.isinf(scale), 1, density)
        wanted = jnp.round(density * sizes.astype(np.float32)).astype(jnp.int32)

        least = sizes - most_dropped(sizes, self)
        wanted = jnp.clip(wanted, least, sizes)
        each = each.astype(np.int32)
        missing = wide.minus(n_keep, wide.total(wanted * each))
        wanted += _poured(missing, sizes - wanted, each)
        excess = wide.minus(wide.total(wanted * each), n_keep)
        wanted -= _poured(excess, wanted - least, each)
        return jnp.asarray(sizes - wanted, jnp.int32), None


@dataclasses.dataclass(frozen=True)
class PerPath:
    """A sparsity of its own for every tensor whose path matches a pattern.

    The first pattern that is found in the path wins; tensors that match none take
    the overall sparsity. While :func:`movement_jax.cubic` and its like rise, each rule
    rises with them in proportion; under any other schedule rules hold in full. An
    overall sparsity of 0 prunes nothing: to leave the other tensors dense, end the
    rules with ``".": 0.0``.

    Attributes:
      rules: ``{regular expression: sparsity}``.
      min_keep: weights (with a structure: groups of them) kept in every tensor (every
        slice of a stacked one) whatever the sparsity: a count, or a fraction in (0, 1).
        Default 1.

    Raises:
      ValueError: at ``init``, if a pattern matches no prunable path.

    Examples:
      >>> import movement_jax as mj
      >>> rules = {"attention": 0.5, "mlp/.*kernel": 0.95}
      >>> tx = mj.movement_pruning(0.8, allocation=mj.PerPath(rules))
    """

    rules: Mapping[str, float] | tuple[tuple[str, float], ...]
    min_keep: float = 1

    def __post_init__(self) -> None:
        _check_min_keep(self)
        for pattern, value in self._pairs:
            schedules.check_sparsity(f"rules[{pattern!r}]", value)
            compiled("rules", pattern)
        object.__setattr__(self, "rules", self._pairs)  # a dict has no hash

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Every pattern must be found in some path, and be the first for one."""
        _check_countable(tensors)
        used = {self._rule(t.name) for t in tensors}
        unused = [p for i, (p, _) in enumerate(self._pairs) if i not in used]
        if unused:
            raise ValueError(
                f"`PerPath` has patterns that decide nothing: {unused}. They are found "
                "in no prunable path, or an earlier pattern wins in all of theirs. "
                f"Prunable paths:\n  {_listing(tensors)}"
            )

    def n_drop(
        self,
        target: Target,
        tensors: Sequence[Tensor],
        scores: Sequence[jax.Array],
        kept: Sequence[jax.Array] | None,
        hint: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Rounds ``sparsity * size`` in every segment, each with its own sparsity."""
        del scores, kept, hint
        progress = target.progress
        if isinstance(target.sparsity, int | float):
            progress = progress if target.sparsity else 0.0
        else:
            progress = jnp.where(target.sparsity > 0, progress, jnp.float32(0))
        counts = []
        for tensor in tensors:
            level, rule = target, self._rule(tensor.name)
            if rule is not None:
                final = self._pairs[rule][1]
                level = Target(final * progress, final, progress)
            counts.append(drop_count(level, counting.sizes([tensor])))
        sizes = counting.sizes(tensors)
        return jnp.minimum(jnp.concatenate(counts), most_dropped(sizes, self)), None

    def final(self, name: str, sparsity: Any) -> Any:
        """What the rule for a path ends at; without one, the overall sparsity."""
        rule = self._rule(name)
        return sparsity if rule is None else self._pairs[rule][1]

    @property
    def _pairs(self) -> tuple[tuple[str, float], ...]:
        rules = self.rules
        pairs = rules.items() if isinstance(rules, Mapping) else rules
        return tuple((pattern, plain(value)) for pattern, value in pairs)

    def _rule(self, name: str) -> int | None:
        for i, (pattern, _) in enumerate(self._pairs):
            if re.search(pattern, name):
                return i
        return None


def drop_total(target: Target, sizes: int | np.ndarray) -> Wide:
    """:func:`drop_count` of static sizes below 2**47, of any shape."""
    sparsity, final, progress = target.sparsity, target.final, target.progress
    sizes = np.asarray(sizes, np.int64)
    if isinstance(sparsity, int | float):
        counts = [round(sparsity * size) for size in sizes.ravel().tolist()]
        return wide.from_int(np.array(counts, np.int64).reshape(sizes.shape))
    count = _traced_total(sparsity, sizes)
    if final is None:
        return count
    end = drop_total(Target(final), sizes)
    total: Wide = jax.tree.map(lambda a, b: jnp.where(progress >= 1, a, b), end, count)
    return total


def drop_count(target: Target, sizes: np.ndarray) -> jax.Array:
    """``round_half_even(sparsity * size)``, exact for every size.

    A float32 product is off by one above 2**24 weights. A Python sparsity is rounded
    on the host in float64; a traced one is multiplied in integers, exactly.

    Args:
      target: a fraction in [0, 1].
      sizes: static sizes below 2**31. Shape ``(n,)``.

    Returns:
      Counts, shape ``(n,)``, int32.
    """
    sparsity, final, progress = target.sparsity, target.final, target.progress
    if isinstance(sparsity, int | float):
        return jnp.asarray([round(sparsity * int(n)) for n in sizes], jnp.int32)
    count = _traced_drop_count(sparsity, sizes)
    if final is None:
        return count
    return jnp.where(progress >= 1, drop_count(Target(final), sizes), count)


def _traced_drop_count(sparsity: jax.Array, sizes: np.ndarray) -> jax.Array:
    if sparsity.dtype == jnp.float64:
        return jnp.round(sparsity * sizes).astype(jnp.int32)
    low, middle, _ = _rounded_product(sparsity, sizes)
    return (low + (middle << 16)).astype(jnp.int32)


def _traced_total(sparsity: jax.Array, sizes: np.ndarray) -> Wide:
    if sparsity.dtype == jnp.float64:
        count = jnp.round(sparsity * sizes).astype(jnp.int64)
        parts = count >> wide.BITS, count & ((1 << wide.BITS) - 1)
        return Wide(*(part.astype(jnp.int32) for part in parts))
    digits = _rounded_product(sparsity, sizes)
    low, middle, high = (digit.astype(jnp.int32) for digit in digits)
    return Wide(middle + (high << 16), low)


def _rounded_product(
    sparsity: jax.Array, sizes: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``round_half_even(sparsity * sizes)`` as 16-bit digits, lowest first."""
    # The fraction as three 16-bit digits, times a size of as many: below 2**-24 a
    # float32 has more, which no size below 2**31 can tell from nothing.
    rest = sparsity.astype(jnp.float32) * 65536
    digits = []
    for _ in range(3):
        digit = jnp.floor(rest)
        digits.append(digit.astype(jnp.uint32))
        rest = (rest - digit) * 65536
    parts = [(sizes >> shift & 0xFFFF).astype(np.uint32) for shift in (0, 16, 32)]
    # Columns of the schoolbook product, from 2**-48 up.
    columns = [jnp.zeros(sizes.shape, jnp.uint32)] * 7
    for place, digit in enumerate(reversed(digits)):
        for shift, part in enumerate(parts):
            product = digit * part
            columns[place + shift] += product & 0xFFFF
            columns[place + shift + 1] += product >> 16
    columns = _carry(columns)
    half = columns[2] == 0x8000
    beyond = (columns[0] | columns[1]) != 0
    up = (columns[2] > 0x8000) | (half & (beyond | (columns[3] & 1 == 1)))
    low, middle, high, _ = _carry([columns[3] + up, *columns[4:]])
    return low, middle, high


def _carry(columns: list[jax.Array]) -> list[jax.Array]:
    carried, carry = [], jnp.zeros_like(columns[0])
    for column in columns:
        column = column + carry
        carried.append(column & 0xFFFF)
        carry = column >> 16
    return carried


def _check_countable(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.leading > tensor.stacked:
            raise ValueError(
                f"{tensor.name!r} ranks more than {counting.MAX_COUNT} weights "
                "together. Rank its leading axis by slices with `stacked=`, or use "
                "`allocation=Global()`, which counts further."
            )


def window_drop(
    allocation: Allocation, target: Target, name: str, window: int
) -> jax.Array:
    """How many of every ``window`` weights of a tensor are to go. Shape ``()``, int32.

    By the rule that ``PerPath`` has for it, else ``round(sparsity * window)``.
    """
    chosen = allocation if isinstance(allocation, PerPath) else Uniform()
    chosen = dataclasses.replace(chosen, min_keep=0)
    return chosen.n_drop(target, [Tensor(name, (window,))], [], None)[0][0]


def rule_of(allocation: Allocation, name: str, sparsity: Any) -> Any:
    """The sparsity that a rule of ``PerPath`` ends at, else the overall one."""
    if isinstance(allocation, PerPath):
        return allocation.final(name, sparsity)
    return sparsity


def _weights_each(tensors: Sequence[Tensor]) -> np.ndarray:
    """What one of every segment counts for, in the largest unit common to all.

    1, unless groups of different size are ranked. Shape ``(segments,)``.
    """
    members = [math.prod(t.block) for t in tensors]
    return np.repeat(members, [t.segments for t in tensors]) // math.gcd(*members)


def _raw_density(tensor: Tensor) -> float:
    dims = np.multiply(tensor.shape, tensor.block or 1)[tensor.stacked :]
    return float(sum(dims) / max(math.prod(dims.tolist()), 1))


def _poured(amount: Wide, room: Any, each: np.ndarray) -> jax.Array:
    """How many fit into every segment if they are filled in order, by ``amount``.

    Every unit of it counts for ``each``; what is left over of one is not poured.
    """
    room = room.astype(jnp.int32) * each
    return wide.clipped(wide.minus(amount, wide.sums_before(room)), room) // each


def _check_weights(allocation: Any, weights: np.ndarray) -> None:
    if weights.max() > counting.MAX_COUNT:
        raise ValueError(
            f"`{type(allocation).__name__}()` with groups of different sizes counts at "
            f"most {counting.MAX_COUNT} weights of a tensor together. Give all tensors "
            "one structure, or rank their leading axis by slices with `stacked=`."
        )


def most_dropped(sizes: np.ndarray, allocation: Any) -> np.ndarray:
    """The most that ``min_keep`` lets go of every segment. Like ``sizes``, int32."""
    least: int | float = getattr(allocation, "min_keep", 0)
    floor = np.ceil(sizes * least) if isinstance(least, float) else least
    return np.maximum(sizes - floor, 0).astype(np.int32)


def _sums(counts: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """Of all, shape ``()``, or of every group. int64."""
    if group is None:
        return np.asarray(counts.sum(dtype=np.int64))
    return np.bincount(group, counts).astype(np.int64)  # float64 holds them


def _highest(hint: jax.Array, group: np.ndarray | None) -> jax.Array:
    """Of all, or for every segment the highest of its group."""
    if group is None:
        return jnp.max(hint)
    own = jnp.arange(group.max() + 1)[:, None] == group
    return jnp.max(jnp.where(own, hint, counting.NO_KEY), -1)[group]


def _listing(tensors: Sequence[Tensor]) -> str:
    return "\n  ".join(tensor.name for tensor in tensors[:20])


def _check_min_keep(allocation: Any) -> None:
    make_plain(allocation, "min_keep")
    value = allocation.min_keep
    check_number("min_keep", value)
    if isinstance(value, float) and not 0 < value < 1 or value < 0:
        raise ValueError(
            "`min_keep` must be a count of at least 0 or a fraction in (0, 1), got "
            f"{value}."
        )
