"""Reports as pictures. Needs matplotlib: ``pip install "movement-jax[plot]"``.

Every function draws on the given axes, or on a figure of its own that is tied to no
global state, and returns the axes: ``plot_scores(state, 0.8).figure.savefig(...)``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from movement_jax.agreement import Agreement, TensorAgreement, compare
from movement_jax.counting import Tensor
from movement_jax.criteria import Magnitude
from movement_jax.health import health

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _PRUNED, _ONLY_A, _ONLY_B = "#4477aa", "#bbbbbb", "#ee6677", "#228833"
_ANNOTATED = 160  # cells of a heat-map, at most, that show their number
_LABELLED = 40  # tensors along an axis, at most, that show their name
_BINS = 80


def plot_agreement(
    reports: Agreement | Sequence[Agreement], *, ax: "Axes | None" = None
) -> "Axes":
    """Heat-map of which tensors two rankings agree on.

    One report shows, for every tensor, the weights pruned by both, only by A and only
    by B as fractions of those pruned by either, and by how much the Jaccard index lies
    above chance. Several, at different sparsities, show the Jaccard index of every
    tensor at every sparsity, with the chance level under it.

    Args:
      reports: one :class:`movement_jax.Agreement`, or a sequence of them for the same
        two rankings.
      ax: axes to draw on; default a figure of its own.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if there is no report, or they differ in what they compare.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(criterion=mj.Magnitude())
      >>> params = {"kernel": jnp.arange(8.0).reshape(2, 4)}
      >>> state = (params, tx.init(params))
      >>> report = mj.agreement(state, mj.Random(), 0.5)
      >>> ax = mj.plot.plot_agreement(report)  # doctest: +SKIP
      >>> ax.figure.savefig("agreement.png")  # doctest: +SKIP
    """
    several = not isinstance(reports, Agreement)
    series = list(reports) if not isinstance(reports, Agreement) else [reports]
    if not series:
        raise ValueError("`reports` must hold at least one agreement, got none.")
    first = series[0]
    names = [row.name for row in first.tensors]
    for report in series:
        same = (report.a, report.b) == (first.a, first.b)
        if not same or {row.name for row in report.tensors} != set(names):
            raise ValueError(
                "`reports` must compare the same two rankings of the same tensors: "
                f"got {first.a} and {first.b}, then {report.a} and {report.b}."
            )
    if several:
        series.sort(key=lambda report: report.sparsity)
        by_name = [{row.name: row for row in report.tensors} for report in series]
        values = [[rows[name].jaccard for rows in by_name] for name in names]
        columns = [f"{r.sparsity:g}\n({r.total.chance:.2f})" for r in series]
        title, below = "Jaccard index of the pruned weights", "Sparsity (chance level)"
    else:
        values = [_shares(row) for row in first.tensors]
        columns = ["both", "only A", "only B", "Jaccard\n- chance"]
        title, below = f"Pruned at sparsity {first.sparsity:g}", ""
    table = np.asarray(values, float).reshape(len(names), len(columns))
    ax = _axes(ax, 2.6 + 0.75 * len(columns), 1.6 + 0.3 * min(len(names), _LABELLED))
    image = ax.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    _label_tensors(ax, names)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_xlabel(below)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(f"{title}\nA = {first.a}, B = {first.b}", fontsize="medium")
    if table.size <= _ANNOTATED:
        for (row, column), value in np.ndenumerate(table):
            ink = "white" if value < 0.6 else "black"
            ax.text(
                *(column, row, f"{round(value, 2) + 0:.2f}"),
                ha="center",
                va="center",
                color=ink,
                fontsize="small",
            )
    else:
        ax.figure.colorbar(image, ax=ax)
    return ax


def plot_scores(
    state: Any,
    sparsity: float,
    *,
    tensor: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Histogram of the scores of one tensor, with the threshold of a pruning.

    A ``stacked`` tensor has a threshold for each of its layers, and shows none.

    If the state was made with ``track_noise=True`` and scores magnitudes, the range
    that noise alone would reach is shaded: a threshold inside it prunes by noise.

    Args:
      state: a train state or a pair, as for :func:`movement_jax.prune`.
      sparsity: fraction to drop, in [0, 1].
      tensor: path of the tensor; default the largest.
      ax: axes to draw on; default a figure of its own.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if there is no such tensor, or nothing has been scored yet.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(criterion=mj.Magnitude())
      >>> params = {"kernel": jnp.arange(8.0).reshape(2, 4)}
      >>> state = (params, tx.init(params))
      >>> ax = mj.plot.plot_scores(state, 0.5)  # doctest: +SKIP
    """
    found = compare(state, Magnitude(), sparsity, "plot_scores")
    which = _find_tensor(found.opened.tensors, tensor)
    scores = _flat(found.scores[which]).astype(np.float32)
    kept = _flat(found.a[which])
    finite = np.isfinite(scores)
    scores, kept = scores[finite], kept[finite]
    ax = _axes(ax, 5.6, 3.6)
    edges = np.histogram_bin_edges(scores, bins=_BINS).tolist()
    ax.hist(
        [scores[~kept], scores[kept]],
        bins=edges,
        stacked=True,
        color=[_PRUNED, _KEPT],
        label=[f"pruned ({(~kept).mean():.1%})", f"kept ({kept.mean():.1%})"],
    )
    whole = not found.opened.tensors[which].stacked  # else a threshold for each slice
    if whole and kept.any() and not kept.all():
        cut = scores[kept].min()
        ax.axvline(cut, color="black", lw=1.2, label=f"threshold {cut:.3g}")
    reach = health(state, sparsity=sparsity).tensors[which].noise_reach
    if reach:
        ax.axvspan(
            *(0, reach),
            color=_ONLY_A,
            alpha=0.2,
            lw=0,
            label=f"noise alone, to {reach:.2g}",
        )
    ax.set_xlabel(f"score ({found.name_a})")
    ax.set_ylabel("weights")
    ax.set_title(
        f"{found.opened.tensors[which].name} at sparsity {sparsity:g}",
        fontsize="medium",
    )
    ax.margins(x=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_quadrants(
    state: Any,
    other: Any,
    sparsity: float | None = None,
    *,
    tensor: str | None = None,
    max_points: int = 20_000,
    ax: "Axes | None" = None,
) -> "Axes":
    """Scores against magnitudes, coloured by which of two rankings prunes a weight.

    With ``Magnitude()`` as the other ranking and a tensor that is ranked as a whole,
    the four groups are the quadrants between the two thresholds.

    Args:
      state: a train state or a pair, as for :func:`movement_jax.prune`.
      other: the other ranking, as for :func:`movement_jax.agreement`.
      sparsity: fraction to drop, in [0, 1]; may be left out if ``other`` is masks.
      tensor: path of the tensor; default the largest.
      max_points: weights to draw at most, chosen at random; the legend counts all.
      ax: axes to draw on; default a figure of its own.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: as :func:`movement_jax.agreement`, or if there is no such tensor.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(criterion=mj.Random())
      >>> params = {"kernel": jnp.arange(8.0).reshape(2, 4)}
      >>> state = (params, tx.init(params))
      >>> ax = mj.plot.plot_quadrants(state, mj.Magnitude(), 0.5)  # doctest: +SKIP
    """
    if max_points < 1:
        raise ValueError(f"`max_points` must be at least 1, got {max_points}.")
    found = compare(state, other, sparsity, "plot_quadrants")
    which = _find_tensor(found.opened.tensors, tensor)
    weight = _flat(jax.tree.leaves(found.opened.weights)[which])
    x = np.abs(weight.astype(np.float32))
    y = _flat(found.scores[which]).astype(np.float32)
    a, b = _flat(found.a[which]), _flat(found.b[which])
    group = 2 * ~a + ~b  # 0: kept by both, 1: only B prunes, 2: only A, 3: both
    colors = np.array([_KEPT, _ONLY_B, _ONLY_A, _PRUNED])
    at = _chosen(x.size, max_points)
    ax = _axes(ax, 5.2, 4.4)
    # In random order, so that no group hides another.
    ax.scatter(x[at], y[at], s=5, c=colors[group[at]], lw=0, rasterized=True)
    for which_group, label in (
        (0, "kept by both"),
        (3, "pruned by both"),
        (2, f"pruned only by A ({found.name_a})"),
        (1, f"pruned only by B ({found.name_b})"),
    ):
        share = (group == which_group).mean()
        color = str(colors[which_group])
        ax.scatter([], [], s=5, color=color, lw=0, label=f"{label}: {share:.1%}")
    line: dict[str, Any] = {"color": "black", "lw": 0.8, "ls": "--"}
    whole = not found.opened.tensors[which].stacked
    in_a, in_b = y[a & np.isfinite(y)], x[b & np.isfinite(x)]
    if whole and in_a.size and not a.all():
        ax.axhline(in_a.min(), **line)
    if whole and isinstance(other, Magnitude) and in_b.size and not b.all():
        ax.axvline(in_b.min(), **line)
    ax.set_xlabel("magnitude |W|")
    ax.set_ylabel(f"score of A ({found.name_a})")
    name = found.opened.tensors[which].name
    ax.set_title(f"{name} at sparsity {found.sparsity:g}", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
        frameon=False,
        fontsize="small",
        markerscale=3,
        handletextpad=0.2,
    )
    return ax


def plot_sparsity(
    steps: Sequence[float],
    sparsities: Sequence[float],
    *,
    asked: Sequence[float] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Sparsity over the steps of a run.

    Args:
      steps: optimizer steps at which it was logged.
      sparsities: what was reached, such as ``metrics(state)["pruning/sparsity"]``.
      asked: what was asked for at the same steps, to draw beside it.
      ax: axes to draw on; default a figure of its own.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if the lengths differ.

    Examples:
      >>> import movement_jax as mj
      >>> schedule = mj.cubic(0.9, begin=0, end=100)
      >>> steps = range(0, 101, 10)
      >>> reached = [float(schedule(step)) for step in steps]
      >>> ax = mj.plot.plot_sparsity(steps, reached)  # doctest: +SKIP
    """
    x, reached = np.asarray(steps, float), np.asarray(sparsities, float)
    wanted = None if asked is None else np.asarray(asked, float)
    for name, values in (("sparsities", reached), ("asked", wanted)):
        if values is not None and values.shape != x.shape:
            raise ValueError(
                f"`{name}` must have one value a step: got {values.shape} for steps "
                f"of {x.shape}."
            )
    ax = _axes(ax, 5.6, 3.2)
    if wanted is not None:
        ax.plot(x, wanted, color="black", lw=1, ls="--", label="asked")
    ax.plot(x, reached, color=_KEPT, lw=1.8, drawstyle="steps-post", label="reached")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("sparsity")
    ax.set_ylim(0, 1)
    ax.margins(x=0.01)
    ax.grid(axis="y", lw=0.5, alpha=0.4)
    ax.spines[["top", "right"]].set_visible(False)
    if wanted is not None:
        ax.legend(frameon=False, loc="lower right")
    return ax


def _axes(ax: "Axes | None", width: float, height: float) -> "Axes":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib: `pip install "movement-jax[plot]"`.'
        ) from error
    if ax is not None:
        return ax
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure.add_subplot()


def _shares(row: TensorAgreement) -> list[float]:
    union = max(row.both + row.only_a + row.only_b, 1)
    shares = [n / union for n in (row.both, row.only_a, row.only_b)]
    return [*shares, row.jaccard - row.chance]


def _label_tensors(ax: "Axes", names: Sequence[str]) -> None:
    step = -(-len(names) // _LABELLED) or 1
    at = range(0, len(names), step)
    ax.set_yticks(at, [names[i] for i in at], fontsize="small")


def _find_tensor(tensors: Sequence[Tensor], name: str | None) -> int:
    names = [tensor.name for tensor in tensors]
    if name in names:
        return names.index(name)
    if name is None and names:
        counts = [tensor.segments * tensor.size for tensor in tensors]
        return counts.index(max(counts))
    if not names:
        raise ValueError("There is nothing to plot: `state` has no prunable tensor.")
    listing = "\n  ".join(names[:20])
    raise ValueError(f"`tensor` must be one of these paths, got {name!r}:\n  {listing}")


def _chosen(size: int, most: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(size)[:most]


def _flat(array: Any) -> np.ndarray:
    return np.asarray(jax.device_get(array)).reshape(-1)
