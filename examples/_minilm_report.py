"""Tables, sentences and pictures of fine-pruning runs, from their stored results."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from _report import Grid, finish, new_axes, write_whole

Result = Mapping[str, Any]
_ORDER = ("dense", "magnitude", "ema", "movement", "soft")
_NEAR = 0.005  # the sparsity that was asked for
# What makes runs comparable: these are the same within one table.
_TABLE = ("task", "data", "steps", "batch")
# A row is held against magnitude where these are the same.
_RIVALS = ("sparsity", "layers", "distill")


def read(path: pathlib.Path) -> list[Result]:
    """Reads results: a list in one JSON file, or those of the runs in a folder."""
    if path.is_dir():
        return [json.loads(p.read_text()) for p in sorted(path.glob("*/result.json"))]
    return json.loads(path.read_text())


def grids(results: Sequence[Result]) -> list[Grid]:
    """One table for every task and budget."""
    return [_grid(group) for group in _groups(results, _TABLE)]


def sentences(results: Sequence[Result]) -> list[str]:
    """What the tables say of the criteria and magnitude at the same sparsity."""
    said = []
    for group in _groups(results, _TABLE):
        setting = group[0]["setting"]
        for row in _rows(group):
            found = _over_magnitude(row, group)
            if len(found) == 0:
                continue
            of, accuracy = row[0]["setting"], np.mean([r["dev"] for r in row])
            missed = max(abs(r["sparsity"] - of["sparsity"]) for r in row)
            if missed > _NEAR:
                said.append(
                    f"{setting['task']}, {setting['steps']:,} steps: "
                    f"{_label(row, group)} is not compared, it misses "
                    f"{of['sparsity']:.0%} by {100 * missed:.1f} points."
                )
                continue
            mean, spread = 100 * found.mean(), 100 * _half_range(found)
            # Seeds say how much a run is worth, and sentences how much a number is.
            error = 100 * np.sqrt(accuracy * (1 - accuracy) / row[0]["sentences"][1])
            verdict = "better than" if mean > 0 else "worse than"
            if abs(mean) <= max(spread, error):
                verdict = "as good as"
            seeds = (
                f"± {spread:.1f}, {len(found)} seeds" if len(found) > 1 else "1 seed"
            )
            said.append(
                f"{setting['task']}, {setting['steps']:,} steps, "
                f"{of['sparsity']:.0%} pruned: {_label(row, group)} is {verdict} "
                f"magnitude, by {mean:+.1f} points ({seeds})."
            )
    return said


def write(out: pathlib.Path, results: Sequence[Result]) -> None:
    """Writes ``results.json``, ``report.md`` and its pictures."""
    write_whole(out / "results.json", json.dumps(list(results), indent=1).encode())
    first = results[0]
    parts = [
        "# What is left of a pretrained encoder",
        f"{first['date']}, {first['device']}, {first['versions']}.",
        *(grid.markdown() for grid in grids(results)),
        "\n".join(f"- {sentence}" for sentence in sentences(results)),
    ]
    for name, caption in draw(out, results).items():
        parts.append(f"{caption}\n\n![{caption}]({name})")
    write_whole(out / "report.md", ("\n\n".join(filter(None, parts)) + "\n").encode())


def draw(out: pathlib.Path, results: Sequence[Result]) -> dict[str, str]:
    """Draws the pictures; file name -> caption."""
    pictures = {}
    for i, group in enumerate(_groups(results, _TABLE), 1):
        setting = group[0]["setting"]
        title = f"{setting['task']}, {setting['steps']:,} steps"
        ax = new_axes()
        _draw_accuracy(ax, group)
        finish(ax, "kernels pruned", "accuracy", title)
        caption = f"Accuracy by sparsity: {title}; a dot for every seed"
        ax.figure.savefig(out / f"accuracy-{i}.png")
        pictures[f"accuracy-{i}.png"] = caption

        pruned = [row for row in _rows(group) if "kept" in row[0]]
        if not pruned:
            continue
        highest = max(row[0]["setting"]["sparsity"] for row in pruned)
        ax = new_axes()
        for row in pruned:
            if row[0]["setting"]["sparsity"] == highest:
                kept = row[0]["kept"]
                names = [_short(name) for name in kept]
                ax.plot(
                    names, list(kept.values()), "o-", ms=4, label=_label(row, group)
                )
        ax.set_yscale("log")
        ax.tick_params(axis="x", rotation=90, labelsize="small")
        finish(ax, "", "weights kept", f"{title}, {highest:.0%} pruned")
        ax.figure.savefig(out / f"kept-{i}.png")
        pictures[f"kept-{i}.png"] = f"What is kept of every kernel: {title}"
    return pictures


def _grid(group: Sequence[Result]) -> Grid:
    setting = group[0]["setting"]
    rows = []
    for row in _rows(group):
        pruned = "sparsity" in row[0]
        over = _over_magnitude(row, group)
        rows.append(
            (
                _label(row, group),
                f"{np.mean([r['sparsity'] for r in row]):.2%}" if pruned else "-",
                *(_spread([r[part] for r in row], 3) for part in ("dev", "test")),
                _spread(100 * over, 1, sign=True) if len(over) else "-",
                _spread([r["jaccard"] for r in row], 3) if pruned else "-",
                _spread([_kept(r) for r in row], 3) if pruned else "-",
                f"{np.mean([r['seconds'] for r in row]):,.0f}",
                f"{len(row)}",
            )
        )
    levels = sorted({r["setting"]["sparsity"] for r in group if "sparsity" in r})
    chance = [f"{s / (2 - s):.3f} ({(1 - s) / (1 + s):.3f}) at {s:.0%}" for s in levels]
    by_chance = "; by chance " * bool(chance) + ", ".join(chance)
    sentences = "/".join(f"{n:,}" for n in group[0]["sentences"])
    return Grid(
        f"{setting['task']}, {setting['steps']:,} × {setting['batch']} sentences",
        (
            *("criterion", "pruned", "accuracy, dev", "accuracy, test"),
            *("points over magnitude", "Jaccard, pruned", "Jaccard, kept"),
            *("seconds", "seeds"),
        ),
        rows,
        f"Mean ± half the range over seeds; {sentences} sentences to train, try and "
        "test on. Points over magnitude: dev accuracy, seed by seed, over the best row "
        "of magnitude at that sparsity. Jaccard: of the pruned (or kept) weights with "
        f"those of magnitude, one-shot on the pretrained model{by_chance}. "
        "Seconds: of one core, where there is no accelerator.",
    )


def _draw_accuracy(ax: Any, group: Sequence[Result]) -> None:
    for row in _rows(group):
        label, accuracy = _label(row, group), [r["dev"] for r in row]
        if "sparsity" not in row[0]:
            ax.axhline(np.mean(accuracy), color="0.5", ls=":", label=label)
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for row in _rows(group):
        if "sparsity" in row[0]:
            at = row[0]["setting"]["sparsity"]
            place = lines.setdefault(_label(row, group), [])
            place.append((at, [r["dev"] for r in row]))
    for label, points in lines.items():
        x = [f"{at:.0%}" for at, _ in points]
        style = "ko-" if label == "magnitude" else "o-"
        (line,) = ax.plot(x, [np.mean(y) for _, y in points], style, ms=5, label=label)
        for at, (_, seeds) in zip(x, points):
            ax.plot([at] * len(seeds), seeds, ".", ms=3, color=line.get_color())


def _groups(results: Sequence[Result], keys: Iterable[str]) -> list[list[Result]]:
    """Results that are the same in some settings."""
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        key = tuple(result["setting"][key] for key in keys)
        found.setdefault(key, []).append(result)
    return [found[key] for key in sorted(found)]


def _rows(group: Sequence[Result]) -> list[list[Result]]:
    """Runs that differ in their seed only, ordered for the table."""

    def place(row: list[Result]) -> tuple[Any, ...]:
        setting = row[0]["setting"]
        name = setting["criterion"]
        order = _ORDER.index(name) if name in _ORDER else len(_ORDER)
        return setting["sparsity"], order, name, _label(row, group)

    keys = set(group[0]["setting"]) - {"seed"}
    return sorted(_groups(group, sorted(keys)), key=place)


def _label(row: Sequence[Result], group: Sequence[Result]) -> str:
    """The criterion, and what tells it from its other rows in the table."""
    own = row[0]["setting"]
    alike = [
        r["setting"]
        for r in group
        if r["setting"]["criterion"] == own["criterion"]
        and r["setting"]["sparsity"] == own["sparsity"]
    ]
    varied = [
        key
        for key in own
        if key != "seed" and len({str(other[key]) for other in alike}) > 1
    ]
    told = (f"{key.replace('_', ' ')} {own[key]}" for key in varied)
    return ", ".join([own["criterion"], *told])


def _over_magnitude(row: Sequence[Result], group: Sequence[Result]) -> np.ndarray:
    """Dev accuracy over the best of magnitude, for the seeds that both have."""
    own = row[0]["setting"]
    if own["criterion"] in ("dense", "magnitude"):
        return np.empty(0)
    rivals = [
        other
        for other in _rows(group)
        if other[0]["setting"]["criterion"] == "magnitude"
        and all(other[0]["setting"][key] == own[key] for key in _RIVALS)
    ]
    if not rivals:
        return np.empty(0)
    best = max(rivals, key=lambda other: np.mean([r["dev"] for r in other]))
    theirs = {r["setting"]["seed"]: r["dev"] for r in best}
    return np.array(
        [
            r["dev"] - theirs[r["setting"]["seed"]]
            for r in row
            if r["setting"]["seed"] in theirs
        ]
    )


def _kept(result: Result) -> float:
    """Jaccard index of the kept weights: both rankings prune equally many."""
    pruned, jaccard = result["sparsity"], result["jaccard"]
    both = 2 * pruned * jaccard / (1 + jaccard)
    return (1 - 2 * pruned + both) / (1 - both)


def _half_range(values: Any) -> float:
    return float(np.ptp(values)) / 2


def _spread(values: Any, digits: int, sign: bool = False) -> str:
    mean = f"{np.mean(values):{'+' if sign else ''}.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {_half_range(values):.{digits}f}"


def _short(name: str) -> str:
    return name.removeprefix("encoder/layer_").removesuffix("/kernel")
