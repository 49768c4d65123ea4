"""What pruning did and what criteria disagree on, as records to print.

Reports run on the host, between steps. They read masks and scores where these are
sharded and fetch counts only, except for the quantiles of :func:`agreement`, which
fetch one tensor at a time.
"""

import dataclasses
import functools
import io
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import counting, schedules, wide
from movement_jax import state as _state
from movement_jax import structure as _structure
from movement_jax import tree as _tree
from movement_jax.allocation import ErdosRenyi, PerPath, Uniform, window_drop
from movement_jax.counting import Tensor
from movement_jax.prune import unpack
from movement_jax.state import MovementState
from movement_jax.structure import NM, Unstructured
from movement_jax.units import Units

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_WIDTH = 200  # of printed reports at most; tables take what they need


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """What pruning did to one tensor, or to all of them.

    Attributes:
      name: its ``/``-joined path, or ``"total"``.
      shape: its shape; ``()`` for the total.
      size: number of weights.
      kept: number of weights that are not pruned.
      asked: sparsity asked for; None where the allocation decides by the scores.
      sparsity: sparsity reached, ``1 - kept / size``.
      rows: rows of the kernel: all its axes but the last, flattened.
      columns: columns of the kernel: its last axis. 0, as ``rows``, below two axes.
      dead_rows: rows whose weights are all pruned.
      dead_columns: columns whose weights are all pruned.
      dense_bytes: bytes of all weights.
      packed_bytes: bytes of the kept weights and one bit a weight for the mask.
      nonfinite: scores that are NaN or infinite; None once finalized.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    kept: int
    asked: float | None
    sparsity: float
    rows: int
    columns: int
    dead_rows: int
    dead_columns: int
    dense_bytes: int
    packed_bytes: int
    nonfinite: int | None


@dataclasses.dataclass(frozen=True)
class UnitSummary:
    """What pruning did to a group of units that span several tensors.

    Attributes:
      name: of the group.
      size: number of units.
      kept: number of units of which any weight is left.
      weights: of one unit.
    """

    name: str
    size: int
    kept: int
    weights: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Sizes and sparsities; made by :func:`summary`, prints as a table.

    Attributes:
      tensors: one entry per prunable tensor, in the order of the params.
      total: over all prunable tensors.
      dense_size: number of weights in the other leaves, which stay dense.
      dense_bytes: their bytes.
      units: one entry per group, with the groups of a model as ``structure``.
    """

    tensors: tuple[TensorSummary, ...]
    total: TensorSummary
    dense_size: int
    dense_bytes: int
    units: tuple[UnitSummary, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain Python values, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return rendered(self)

    def __rich__(self) -> "RenderableType":
        from rich.console import Group

        if not self.units:
            return self._tensor_table()
        table = new_table("Group", "Units", "Kept", "Weights each", title="Units")
        for row in self.units:
            cells = (f"{row.size:,}", f"{row.kept:,}", f"{row.weights:,}")
            add_row(table, row.name, *cells)
        return Group(table, "", self._tensor_table())

    def _tensor_table(self) -> "Table":
        table = new_table(
            "Tensor",
            *("Weights", "Asked", "Reached", "Dead rows", "Dead columns"),
            *("Dense", "Packed", "Bad scores"),
            title="Sparsity",
            caption=f"{self.dense_size:,} weights ({_bytes(self.dense_bytes)}) in "
            "other leaves stay dense."
            if self.dense_size
            else None,
        )
        for row in (*self.tensors, self.total):
            add_row(
                table,
                row.name,
                f"{row.size:,}",
                fraction(row.asked),
                fraction(row.sparsity),
                f"{row.dead_rows:,} / {row.rows:,}" if row.rows else "-",
                f"{row.dead_columns:,} / {row.columns:,}" if row.columns else "-",
                _bytes(row.dense_bytes),
                _bytes(row.packed_bytes),
                "-" if row.nonfinite is None else f"{row.nonfinite:,}",
                style="bold" if row is self.total else None,
                end_section=row is self.tensors[-1] if self.tensors else False,
            )
        return table


def summary(state: Any) -> Summary:
    """How large, how sparse and how dead every tensor is.

    A row or column of a kernel is dead if all its weights are pruned: the unit it
    reads or writes can be cut. Kernels with more than two axes are seen as a matrix
    of all their axes but the last by the last; the layers of ``stacked`` kernels are
    counted one by one and summed.

    With ``PerPath``, what is asked of a tensor is what its rule asks in the end,
    also while a schedule rises; with ``Global`` it is asked of the total alone. With a
    structure, what is asked is rounded to whole groups, and to what N:M patterns reach.
    With the groups of a model as structure it is asked of their units, listed apart: a
    tensor whose rows and columns both lose half is to keep a quarter. With ``Global``
    as well, the total is asked of units.

    Args:
      state: a train state or a pair, as for :func:`movement_jax.prune`.

    Returns:
      A record to print, or to read by attribute or ``to_dict()``.

    Raises:
      ValueError: if there is no pruning state, or the state is traced.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = mj.movement_pruning(criterion=mj.Magnitude())
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [0.2, 0.1]])}
      >>> report = mj.summary(mj.prune((params, tx.init(params)), 0.5))
      >>> report.total.sparsity, report.total.dead_rows, report.total.packed_bytes
      (0.5, 1, 9)
    """
    opened = open_state(state, "summary")
    found, tensors = opened.found, opened.tensors
    scores: list[Any] = [None] * len(tensors)
    if not found.config.finalized:
        scores = jax.tree.leaves(_state.scores_of(found, opened.weights))
    rows = tuple(
        _summarize(*each)
        for each in zip(
            tensors,
            asked_of(found, tensors),
            jax.tree.leaves(found.masks),
            jax.tree.leaves(opened.weights),
            scores,
        )
    )
    everything = jax.tree.leaves(opened.params)
    total = _total(rows, scalar(found.sparsity), found)
    return Summary(
        tensors=rows,
        total=total,
        dense_size=sum(map(jnp.size, everything)) - total.size,
        dense_bytes=sum(map(_nbytes, everything)) - total.dense_bytes,
        units=_units(found, tensors),
    )


class Opened(NamedTuple):
    """A train state taken apart for a report.

    Attributes:
      params: all of them.
      weights: the prunable ones, with holes for the others.
      found: the pruning state.
      tensors: the prunable tensors, in flatten order.
    """

    params: Any
    weights: Any
    found: MovementState
    tensors: list[Tensor]


def open_state(state: Any, caller: str) -> Opened:
    """Takes a train state apart, refusing one that is traced."""
    params, opt_state, _ = unpack(state)
    _state.check_trained_params(opt_state)
    found = _state.find_state(opt_state)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, found))):
        raise ValueError(
            f"`{caller}` runs on the host: call `{caller}(state)` outside of `jit`, "
            "on the state that a step returned. Inside, `metrics(state)` gives scalars."
        )
    weights = _tree.punch(found.masks, params, "params")
    return Opened(params, weights, found, _state.tensors_of(found))


def asked_of(found: MovementState, tensors: list[Tensor]) -> list[float | None]:
    """Sparsity asked of every tensor, as far as it does not hang on the scores."""
    level, allocation = scalar(found.sparsity), found.config.allocation
    target = schedules.Target(level)
    asked: list[float | None] = [None] * len(tensors)
    if isinstance(found.config.structure, Units):
        left = _densities(found, found.config.structure)
        return [None if left is None else 1 - left.get(t.name, 1.0) for t in tensors]
    groups = {}
    for i, tensor in enumerate(tensors):
        own = _structure.structure_of(found.config.structure, tensor.name)
        if level == 0:
            asked[i] = level
        elif isinstance(own, NM):
            drop = window_drop(allocation, target, tensor.name, own.m)
            asked[i] = own.dropped(tensor, int(drop))
        elif isinstance(allocation, Uniform) and isinstance(own, Unstructured):
            asked[i] = level
        else:
            groups[i] = _structure.groups_of(own, tensor)
    if groups and isinstance(allocation, Uniform | ErdosRenyi | PerPath):
        n_drop, _ = allocation.n_drop(target, list(groups.values()), [], None)
        ends = np.cumsum([group.segments for group in groups.values()])
        counts = np.split(np.asarray(n_drop, np.int64), ends[:-1])
        for (i, group), drops in zip(groups.items(), counts):
            asked[i] = float(drops.sum()) / math.prod(group.shape)
    return asked


def _densities(found: MovementState, units: Units) -> dict[str, float] | None:
    """What is left of every tensor with as many units of each group as asked for."""
    allocation, target = (
        found.config.allocation,
        schedules.Target(scalar(found.sparsity)),
    )
    if not isinstance(allocation, Uniform | PerPath):
        return None
    n_drop, _ = allocation.n_drop(target, units.tensors, [], None)
    drops = np.asarray(n_drop, float)
    return units.densities([1 - n / g.size for n, g in zip(drops, units.groups)])


@functools.partial(jax.jit, static_argnames="lead")
def count(predicate: jax.Array, lead: int = 0) -> wide.Wide:
    """Counts exactly beyond int32; :func:`whole` puts the parts together.

    Args:
      predicate: bools.
      lead: leading axes whose slices have less than 2**31 elements each.

    Returns:
      The count in two parts.
    """
    axes = tuple(range(lead, predicate.ndim))
    counts, _ = counting.tally((predicate, ~predicate), axes)
    return wide.total(counts)


def whole(parts: wide.Wide) -> int:
    """The number that :func:`count` counted."""
    return (int(parts.high) << wide.BITS) + int(parts.low)


def scalar(value: jax.Array) -> float:
    """A float32 as the number it was written as: 0.8, not 0.800000011920929."""
    return float(str(np.float32(value)))


def checked_sparsity(value: Any) -> float:
    """A sparsity given as a Python number or a concrete scalar."""
    if hasattr(value, "dtype") and jnp.shape(value) == ():
        value = scalar(value) if value.dtype != np.float64 else float(value)
    schedules.check_sparsity("sparsity", value)
    sparsity: float = value
    return sparsity


def _nbytes(leaf: Any) -> int:
    """Bytes of an array, or of a Python number once JAX computes with it."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.size(leaf) * dtype.itemsize


def _summarize(
    tensor: Tensor, asked: float | None, mask: Any, weight: Any, score: Any
) -> TensorSummary:
    lead, ndim = tensor.stacked, len(tensor.shape)
    size, itemsize = math.prod(tensor.shape), weight.dtype.itemsize
    kept, nonfinite = whole(count(mask, tensor.leading)), None
    if score is not None:
        nonfinite = whole(count(~jnp.isfinite(score), tensor.leading))
    rows = columns = dead_rows = dead_columns = 0
    if ndim - lead >= 2:
        rows = size // tensor.shape[-1]
        columns = math.prod(tensor.shape[:lead]) * tensor.shape[-1]
        inputs = tuple(range(lead, ndim - 1))
        dead_rows = whole(count(~jnp.any(mask, axis=-1), lead))
        dead_columns = whole(count(~jnp.any(mask, axis=inputs), lead))
    return TensorSummary(
        name=tensor.name,
        shape=tensor.shape,
        size=size,
        kept=kept,
        asked=asked,
        sparsity=1 - kept / size,
        rows=rows,
        columns=columns,
        dead_rows=dead_rows,
        dead_columns=dead_columns,
        dense_bytes=size * itemsize,
        packed_bytes=kept * itemsize + math.ceil(size / 8),
        nonfinite=nonfinite,
    )


def _units(found: MovementState, tensors: list[Tensor]) -> tuple[UnitSummary, ...]:
    units = found.config.structure
    if not isinstance(units, Units):
        return ()
    names = [tensor.name for tensor in tensors]
    alive = units.alive(dict(zip(names, jax.tree.leaves(found.masks))))
    return tuple(
        UnitSummary(group.name, group.size, int(np.asarray(own).sum()), group.weights)
        for group, own in zip(units.groups, alive)
    )


def _total(
    rows: tuple[TensorSummary, ...], asked: float, found: MovementState
) -> TensorSummary:
    def add(field: str) -> int:
        return sum(getattr(row, field) or 0 for row in rows)

    size, kept = add("size"), add("kept")
    structured = found.config.structure != Unstructured()
    if structured or isinstance(found.config.allocation, PerPath):
        # What hangs on the scores is asked together, at the overall sparsity.
        each = [asked if row.asked is None else row.asked for row in rows]
        asked = sum(a * row.size for a, row in zip(each, rows)) / max(size, 1)
    return TensorSummary(
        name="total",
        shape=(),
        size=size,
        kept=kept,
        asked=asked,
        sparsity=1 - kept / max(size, 1),
        rows=add("rows"),
        columns=add("columns"),
        dead_rows=add("dead_rows"),
        dead_columns=add("dead_columns"),
        dense_bytes=add("dense_bytes"),
        packed_bytes=add("packed_bytes"),
        nonfinite=None if found.config.finalized else add("nonfinite"),
    )


def rendered(renderable: "RenderableType") -> str:
    """What a rich terminal would show, without colours and the same everywhere."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, color_system=None, legacy_windows=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))


def new_table(
    first: str, *others: str, title: str | None, caption: str | None = None
) -> "Table":
    """A table with names in its first column and numbers in the others."""
    from rich.box import Box
    from rich.table import Table

    blank, rule = "    ", " -- "  # ASCII, so that every stream can print it
    table = Table(
        box=Box("\n".join([blank, blank, rule, *[blank] * 5, ""]), ascii=True),
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def add_row(table: "Table", *cells: str, **options: Any) -> None:
    """Adds cells as they are: a path with brackets is no markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells), **options)


def fraction(value: float | None) -> str:
    """A fraction as tables show it."""
    return "-" if value is None else f"{value:.3f}"


def _bytes(n: float) -> str:
    power = min(int(math.log10(max(n, 1)) // 3), 4)
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{n / 1000**power:.{min(power, 1)}f} {unit}"
