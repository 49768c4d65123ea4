"""The README's section on what pruning costs, written from what was measured."""

from collections.abc import Callable, Iterable
from typing import Any

from . import tables, traffic

_NO_SORT = """\
**Changing masks** finds the exact threshold by counting: no sort, no copy of the
scores, no gather."""
_STEPS = """\
**A step of the optimizer**, over `optax.adamw` alone. On steps that do not prune,
masks are one more array to read, EMA scores one to read and write;
`check_finite=False` saves the trip through memory that looking for bad steps takes,
which a CPU feels most: there all updates are stored before the first one is applied."""
_WHOLE = """\
**A whole train step** of a transformer takes so much longer:"""
_MEMORY = """\
**Memory**, in bytes a param over AdamW's: what is kept in the state, and what is
reserved while a program runs (on a TPU with its on-chip memory, at most 128 MiB)."""
_TRAFFIC = """\
**Between devices** go counts. Bytes for each tensor and mask update of normal weights,
at first and later, with a threshold to start from (all tensors take as many passes as
the slowest); and at most, if all passes of all searches are needed, also for ties. On
the steps between, all tensors together:"""
_COMPILE = """\
**Compiling** the optimizer's step, over AdamW's:"""
_GROWTH = """\
**Growth** is linear in the params, and on more devices each does its share."""


def section(results: dict[str, Any]) -> str:
    """Markdown, from the JSON that ``python -m tests.benchmarks`` writes."""
    parts = results["parts"]
    where = results["machine"]
    versions = results["versions"]
    lines = [
        "## What it costs",
        f"Measured by `{results['command']}` on {results['date'][:10]}: "
        f"{where['cores']} cores, {where['processor']}, jax {versions['jax']}. "
        "Ratios are medians of runs in turns, with quartiles; milliseconds are this "
        "machine's. Programs for a TPU or an H200 were compiled, not run.",
    ]
    writers: Iterable[tuple[str, Callable[[Any], str]]] = (
        ("masks", _masks),
        ("steps", _steps),
        ("training", _training),
        ("memory", _memory),
        ("traffic", _traffic),
        ("compiling", _compiling),
        ("growth", _growth),
    )
    lines += [write(parts[name]) for name, write in writers if name in parts]
    return "\n\n".join(lines)


def _masks(found: dict[str, Any]) -> str:
    measured = [row for row in found["one_tensor"] if "ratio" in row]
    names = list(dict.fromkeys(row["over"] for row in measured))
    rows = []
    for size in dict.fromkeys(row["size"] for row in measured):
        here = {row["over"]: row for row in measured if row["size"] == size}
        best = min(row["ms"] for row in here.values())
        others = [
            f"{tables.number(1 / here[name]['ratio'][1])}x" if name in here else "-"
            for name in names
        ]
        rows.append((tables.size(size), f"{tables.number(best)} ms", *others))
    head = ("scores", "`keep_top`", *(f"`{name}` takes" for name in names))
    text = f"{_NO_SORT}\n\n{tables.table(head, rows)}"
    return text + _left_out(found["one_tensor"])


def _steps(rows: list[dict[str, Any]]) -> str:
    cases = list(dict.fromkeys((row["dtype"], row["size"]) for row in rows))
    forms = list(dict.fromkeys((row["form"], row["check_finite"]) for row in rows))
    found = {
        (row["form"], row["check_finite"], row["dtype"], row["size"]): row
        for row in rows
    }
    lines = []
    for form, check in forms:
        here = [found.get((form, check, *case)) for case in cases]
        cells = [tables.ratio(row) if row else "-" for row in here]
        lines.append((form, "yes" if check else "no", *cells))
    head = [f"{dtype}, {tables.size(size)}" for dtype, size in cases]
    return f"{_STEPS}\n\n{tables.table(('step', '`check_finite`', *head), lines)}"


def _training(rows: list[dict[str, Any]]) -> str:
    said = [
        f"{tables.ratio(row)} times as long ({row['form']}; "
        f"{tables.size(row['size'])} params, {row['tokens']} tokens)"
        for row in rows
    ]
    return f"{_WHOLE} {'; '.join(said)}."


def _memory(rows: list[dict[str, Any]]) -> str:
    lines = [
        (
            row["program"],
            f"{tables.size(row['size'])} in {row['leaves']}",
            row["target"],
            tables.number(row["state_bytes"]),
            tables.number(row["temp_bytes"] - row["temp_bytes_of_adamw"]),
        )
        for row in rows
        if "left_out" not in row
    ]
    head = ("program", "params", "compiled for", "state", "temporary")
    return f"{_MEMORY}\n\n{tables.table(head, lines)}{_left_out(rows)}"


def _traffic(rows: list[dict[str, Any]]) -> str:
    lines = [
        (
            row["target"],
            row["mode"],
            row["program"],
            *traffic.typical(row),
            f"{row['bytes_per_tensor']:,.0f}",
            f"{row['kernel_bytes'] / row['tensors']:,.0f}",
            f"{row['skip_step']:,}" if "skip_step" in row else "-",
        )
        for row in rows
        if "left_out" not in row
    ]
    head = "mesh, axes, masks by, first, later, most, bytes it has, skip step".split(
        ", "
    )
    return f"{_TRAFFIC}\n\n{tables.table(head, lines)}"


def _compiling(rows: list[dict[str, Any]]) -> str:
    said = [
        f"{tables.ratio(row)} ({row['leaves']} leaves, {row['form']}, "
        f"{'with' if row['check_finite'] else 'without'} `check_finite`)"
        for row in rows
    ]
    return f"{_COMPILE} {'; '.join(said)}."


def _growth(found: dict[str, Any]) -> str:
    lines = [
        (
            tables.size(row["size"]),
            tables.number(row["ms"]) if "ms" in row else "not run",
            tables.ratio(step) if "ratio" in step else "not run",
        )
        for row, step in zip(found["masks"], found["steps"])
    ]
    head = ("params", "mask update, ms", "step that skips, over adamw")
    text = f"{_GROWTH}\n\n{tables.table(head, lines)}"
    built = [row for row in found["devices"] if "left_out" not in row]
    text += _left_out(found["masks"] + found["steps"])
    if not built:
        return text + _left_out(found["devices"])
    lines = [
        (
            row["target"],
            f"{row['arguments'] / 2**30:.2f} GiB",
            f"{row['step_temp'] / 2**20:.1f} MiB",
            f"{row['prune_temp'] / 2**20:.1f} MiB",
            f"{row['prune_sent'] / 2**10:.0f} KiB",
        )
        for row in built
    ]
    size = tables.size(built[0]["size"])
    head = "devices, held by each, temporary (step), temporary (prune), received"
    return (
        f"{text}\n\n{size} params, compiled for TPUs; each device then holds, reserves "
        f"and, in a mask update, receives:\n\n{tables.table(head.split(', '), lines)}"
        f"{_left_out(found['devices'])}"
    )


def _left_out(rows: list[dict[str, Any]]) -> str:
    """What could not be measured, and why."""
    said = [
        f"{row.get('target') or tables.size(row['size'])}: {row['left_out']}"
        for row in rows
        if "left_out" in row
    ]
    return f"\n\nNot run: {'; '.join(dict.fromkeys(said))}." if said else ""
