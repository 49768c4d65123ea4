"""What the language model experiment prints, draws and writes."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import _lm
import jax
import numpy as np
from _report import Grid, finish, new_axes, versions
from matplotlib.figure import Figure

import movement_jax as mj

_LOSS = "nats per byte"


def setting_of(
    name: str, preset: Any, seed: int, text: _lm.Text, params: Any, weights: Any
) -> dict[str, Any]:
    """What was run, on what."""

    def size(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    return {
        "preset": name,
        **dataclasses.asdict(preset),
        "seed": seed,
        "parameters": size(params),
        "prunable": size(weights),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": versions(),
        "train_files": text.files[0],
        "train_bytes": len(text.train),
        "validation_files": text.files[1],
        "validation_bytes": len(text.validation),
    }


def setting(results: Mapping[str, Any]) -> Grid:
    """Model, text and machine."""
    s, n = results["setting"], results["setting"]["steps"]
    seen = n * s["batch"] * s["length"]
    return Grid(
        "What is trained",
        ("", "value"),
        (
            ("parameters", f"{s['parameters']:,} ({s['prunable']:,} prunable)"),
            ("transformer", f"{s['layers']} layers of width {s['width']}"),
            ("run", f"{n:,} steps of {s['batch']} × {s['length']} bytes: {seen:,}"),
            ("training text", f"{s['train_bytes']:,} bytes, {s['train_files']} files"),
            (
                "validation text",
                f"{s['excerpts']} excerpts of {s['validation_files']} other files",
            ),
            ("devices", s["devices"]),
            ("versions", s["versions"]),
        ),
    )


def training(results: Mapping[str, Any]) -> Grid:
    """Loss over the run."""
    counting = results["counting"]
    rows = [
        (
            f"{step:,}",
            "-" if loss is None else f"{loss:.3f}",
            f"{validation:.3f}",
            f"{validation / np.log(2):.3f}",
        )
        for step, loss, validation in results["curve"]
    ]
    shards = (
        f" {results['sharded']:.1%} of the training state is spread over the devices."
        if results["sharded"]
        else ""
    )
    models = ", ".join(f"{name} {loss:.3f}" for name, loss in counting.items())
    return Grid(
        f"Loss, {_LOSS}",
        ("step", "training", "validation", "bits per byte"),
        rows,
        f"Models that only count: {models}.{shards}",
    )


def losses(results: Mapping[str, Any]) -> Grid:
    """Validation loss of every criterion at every sparsity."""
    levels = list(next(iter(results["loss"].values())))
    return Grid(
        f"Validation loss after one-shot pruning, {_LOSS}",
        ("criterion", *(f"{float(level):.0%}" for level in levels)),
        [
            (name, *(f"{row[level]['mean']:.3f}" for level in levels))
            for name, row in results["loss"].items()
        ],
        "Columns: sparsity. Half-lives are in per cent of the run. All rows prune the "
        "same weights of the same run.",
    )


def jaccards(results: Mapping[str, Any]) -> Grid:
    """How far every criterion prunes what magnitude prunes."""
    agreement = results["agreement"]
    levels = list(next(iter(agreement.values())))
    chance = next(iter(agreement.values()))
    rows = [
        (name, *(f"{row[level]['total']['jaccard']:.3f}" for level in levels))
        for name, row in agreement.items()
    ]
    rows.append(
        ("chance", *(f"{chance[level]['total']['chance']:.3f}" for level in levels))
    )
    return Grid(
        "Agreement with magnitude: Jaccard index of the pruned weights",
        ("criterion", *(f"{float(level):.0%}" for level in levels)),
        rows,
        "1: the same weights. Chance: what choosing at random would give.",
    )


def by_tensor(results: Mapping[str, Any], names: Sequence[str], at: float) -> Grid:
    """How far some criteria prune what magnitude prunes, tensor by tensor."""
    columns = []
    for name in names:
        tensors = results["agreement"][name][f"{at:g}"]["tensors"]
        columns.append({t["name"]: t["jaccard"] for t in tensors})
    return Grid(
        f"Agreement with magnitude at {at:.0%} sparsity, tensor by tensor",
        ("tensor", *names),
        [
            (tensor, *(f"{column[tensor]:.3f}" for column in columns))
            for tensor in sorted(columns[0])
        ],
    )


def contested(results: Mapping[str, Any], at: float) -> Grid:
    """Where every criterion disagrees most with magnitude, and on what weights."""
    rows = []
    for name, by_level in results["agreement"].items():
        report = by_level[f"{at:g}"]
        most, total = report["tensors"][0], report["total"]
        ranks = [
            f"{total[where]['magnitude'][1]:.2f}" if total[where] else "-"
            for where in ("where_a", "where_b")
        ]
        rows.append((name, most["name"], f"{most['jaccard']:.3f}", *ranks))
    return Grid(
        f"Where they disagree with magnitude at {at:.0%}",
        ("criterion", "most contested tensor", "Jaccard", "drops", "spares"),
        rows,
        "Drops, spares: median rank by |W| (0 smallest, 1 largest) of the weights that "
        "it drops and magnitude keeps, and the other way round.",
    )


def recovery(results: Mapping[str, Any]) -> Grid:
    """Loss of the pruned models before and after training on."""
    rows = [
        (name, *(f"{row[k]['mean']:.3f}" for k in ("before", "after")))
        for name, row in results["recovery"].items()
    ]
    rows += [
        (f"gradually: {name}", "-", f"{row['after']['mean']:.3f}")
        for name, row in results["gradual"].items()
    ]
    level = next(iter(results["gradual"].values()))["asked"]
    steps = results["setting"]["recovery"]
    return Grid(
        f"{level:.0%} pruned, {steps} more steps: validation loss",
        ("criterion", "before", "after"),
        rows,
        "Gradually: from the same dense weights, the sparsity rising over the same "
        "steps. Magnitude as it is now; movement as in the paper, from scores of 0, "
        "weights may return.",
    )


def rates(results: Mapping[str, Any]) -> Grid:
    """What health measured at other learning rates."""
    rows = []
    for name, health in results["health"].items():
        figures = {f["name"]: f["figure"] for f in health["findings"]}
        warnings = [f["name"] for f in health["findings"] if f["level"] == "warning"]
        snr = [t["snr"] for t in health["tensors"] if t["snr"] is not None]
        rows.append(
            (
                name,
                f"{figures.get('movement') or 0:.1%}",
                f"{np.median(snr):.1f}" if snr else "-",
                f"{max(t['in_noise'] or 0 for t in health['tensors']):.1%}",
                f"{health['jaccard']:.3f}",
                ", ".join(warnings) or "none",
            )
        )
    return Grid(
        "What mj.health says of the run",
        (
            "run",
            "weights moved",
            "signal/noise",
            "kept in noise",
            "EMA 0.9",
            "warnings",
        ),
        rows,
        "Signal/noise: median over tensors. Kept in noise: of the weights that the "
        "worst tensor keeps at "
        "50 % sparsity, those that score no more than noise would. EMA 0.9: Jaccard "
        "index with magnitude at 80 %.",
    )


def draw(
    out: pathlib.Path,
    results: Mapping[str, Any],
    agreements: Mapping[str, Sequence[mj.Agreement]],
    states: Mapping[str, Any],
    noisy: Any,
    at: float,
) -> dict[str, str]:
    """Draws the pictures.

    Args:
      out: folder.
      results: all numbers.
      agreements: name of a criterion -> its agreement with magnitude, by sparsity.
      states: name of a criterion -> the trained state, ranked by it.
      noisy: the state trained at ten times the learning rate.
      at: sparsity of the pictures of single weights.

    Returns:
      File name -> what it shows.
    """
    pictures = {}

    def save(figure: Figure, name: str, caption: str) -> None:
        figure.savefig(out / f"{name}.png")
        pictures[f"{name}.png"] = caption

    ax = new_axes()
    for name, row in results["loss"].items():
        x = [float(level) for level in row]
        y = [cell["mean"] for cell in row.values()]
        # Some curves lie on that of magnitude: a wide band shows below them.
        wide = {"lw": 7, "alpha": 0.25} if name.startswith("magnitude") else {}
        ax.plot(x, y, _style(name), ms=4, label=name, **wide)
    finish(ax, "sparsity", f"validation loss, {_LOSS}", "One-shot pruning")
    save(ax.figure, "loss", "Validation loss after one-shot pruning")

    ax = new_axes()
    for name, row in results["agreement"].items():
        x = [float(level) for level in row]
        ax.plot(
            x,
            [cell["total"]["jaccard"] for cell in row.values()],
            _style(name),
            ms=4,
            label=name,
        )
    chance = [cell["total"]["chance"] for cell in row.values()]
    ax.fill_between(x, 0, chance, color="0.85", lw=0, label="below chance")
    ax.set_ylim(0, 1.02)
    finish(ax, "sparsity", "Jaccard index", "Agreement with magnitude pruning")
    save(ax.figure, "agreement", "Agreement with magnitude, all criteria")

    ax = new_axes()
    steps, losses, validation = zip(*results["curve"])
    ax.plot(steps[1:], losses[1:], "o-", ms=4, label="training (mean of a tenth)")
    ax.plot(steps, validation, "o-", ms=4, label="validation")
    ax.axhline(results["counting"]["bigram"], color="0.5", ls=":", label="byte pairs")
    finish(ax, "step", f"loss, {_LOSS}", "Training")
    save(ax.figure, "training", "Training")

    for name, state in states.items():
        slug = "".join(c if c.isalnum() else "-" for c in name.lower())
        slug = "-".join(filter(None, slug.split("-")))
        ax = mj.plot.plot_agreement(agreements[name])
        save(ax.figure, f"tensors-{slug}", f"{name} and magnitude, tensor by tensor")
        ax = mj.plot.plot_quadrants(state, mj.Magnitude(), at)
        save(ax.figure, f"weights-{slug}", f"{name} and magnitude, weight by weight")
    worst = max(mj.health(noisy, sparsity=0.5).tensors, key=lambda row: row.in_noise)
    for state, name, run in (
        (next(iter(states.values())), "scores", "this run"),
        (noisy, "scores-noisy", "ten times the learning rate"),
    ):
        ax = mj.plot.plot_scores(state, 0.5, tensor=worst.name)
        save(ax.figure, name, f"Scores and noise, {run}")
    return pictures


def write(
    path: pathlib.Path,
    results: Mapping[str, Any],
    pictures: Mapping[str, str],
    details: Mapping[str, Any],
    at: float,
) -> None:
    """Writes the report.

    Args:
      path: of the Markdown file.
      results: all numbers.
      pictures: file name -> caption.
      details: heading -> a record of the library that prints as a table.
      at: sparsity of the tables by tensor.
    """
    parts = [
        "# Which weights would movement pruning drop, and is it right?",
        f"`examples/transformer_lm.py --preset {results['setting']['preset']} "
        f"--seed {results['setting']['seed']}`, "
        f"{results['seconds'] / 60:.1f} minutes.",
        "## What the numbers say",
        "\n".join(f"- {sentence}" for sentence in results["conclusions"]),
        "## Tables",
        *(
            grid.markdown()
            for grid in (
                *(setting(results), training(results), losses(results)),
                *(jaccards(results), by_tensor(results, results["pictured"], at)),
                *(contested(results, at), recovery(results), rates(results)),
            )
        ),
        "## Pictures",
        *(f"{caption}\n\n![{caption}]({name})" for name, caption in pictures.items()),
        "## Details",
    ]
    for heading, record in details.items():
        parts.append(f"### {heading}\n\n```text\n{record}\n```")
    path.write_text("\n\n".join(parts) + "\n")


def _style(name: str) -> str:
    if name.startswith("magnitude"):
        return "ko-"
    return "s--" if name.startswith(("movement", "Taylor")) else "o-"
