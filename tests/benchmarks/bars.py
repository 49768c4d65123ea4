"""What was promised of speed, and whether it is kept."""

from collections.abc import Iterator
from typing import Any

from . import tables

TITLE = "Bars"
# Milliseconds of JaxPruner's exact mask update on the machine the bars come from, at
# so many params; the bar is a fiftieth.
_JAXPRUNER_MS = {1_000_000: 270, 10_000_000: 3251, 25_000_000: 8614}


def bars(parts: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Name, bar, figure and verdict, for all parts that were measured."""
    yield from _masks(parts.get("masks"))
    yield from _memory(parts.get("memory", []))
    yield from _steps(parts.get("steps", []))
    yield from _traffic(parts.get("traffic", []))
    for row in parts.get("compiling", []):
        if row["leaves"] < 50:
            continue
        name = f"compile, {row['leaves']} leaves, {_form(row)}"
        middle = row["ratio"][1]
        yield name, "2x adamw", f"{tables.ratio(row)}x", middle <= 2


def _masks(found: Any) -> Iterator[tuple[str, str, str, bool]]:
    rows = found["one_tensor"] if found else []
    for size, theirs in _JAXPRUNER_MS.items():
        ours = [row["ms"] for row in rows if row["size"] == size and "ms" in row]
        if ours:
            name = f"mask update, {tables.size(size)}"
            bar, best = theirs / 50, min(ours)
            yield name, f"{bar:.1f} ms", f"{best:.1f} ms", best <= bar
    for row in rows:
        if row["over"] == "jnp.sort" and "ratio" in row and row["size"] >= 10**6:
            name = f"mask update over jnp.sort, {tables.size(row['size'])}"
            middle = row["ratio"][1]
            yield name, "1/50", f"1/{1 / middle:.0f}", middle <= 1 / 50


def _memory(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, bool]]:
    rows = [row for row in rows if row.get("size", 0) >= 10**6]
    for target in dict.fromkeys(row["target"] for row in rows if "tree" in row):
        here = [row for row in rows if row["target"] == target]
        for program in ("prune", "step: EMA scores, cubic, skip"):
            found = [row for row in here if row["program"] == program]
            worst = max(row["temp_bytes"] - row["temp_bytes_of_adamw"] for row in found)
            name = f"temporary bytes a param over adamw, {program}, {target}"
            yield name, "0.1", tables.number(worst), worst < 0.1


def _steps(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, bool]]:
    for row in rows:
        if row["dtype"] != "float32" or row["size"] < 10**6:
            continue
        bar = 3 if "prune" in row["form"] else 1.06 if "masks" in row["form"] else 1.3
        name = f"step, {tables.size(row['size'])}, {_form(row)}"
        yield name, f"{bar}x adamw", f"{tables.ratio(row)}x", row["ratio"][1] <= bar


def _traffic(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, bool]]:
    for row in rows:
        if "searches" not in row:
            continue
        name = f"bytes a tensor, {row['program']}, {row['target']}, {row['mode']}"
        for how, sent in {**row["typical"], "worst": row["bytes_per_tensor"]}.items():
            yield f"{name}, {how}", "1,024", f"{sent:,.0f}", sent < 1024
    explicit = [row for row in rows if row.get("mode") == "Explicit"]
    if explicit:
        yield "explicit meshes", "work", f"{len(explicit)} programs", True


def _form(row: dict[str, Any]) -> str:
    return row["form"] + (", check_finite" if row["check_finite"] else "")


def report(parts: dict[str, Any]) -> str:
    """The table of them."""
    rows = [
        (name, bar, figure, "kept" if kept else "MISSED")
        for name, bar, figure, kept in bars(parts)
    ]
    return tables.table(("what", "bar", "reached", "verdict"), rows)
