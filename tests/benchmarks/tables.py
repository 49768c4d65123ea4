"""Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with its figures aligned to the right."""
    lines = [[str(cell) for cell in row] for row in rows]
    marks = ["---:" if column else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, marks, *lines])


def ratio(found: dict[str, Any], key: str = "ratio") -> str:
    """Median with quartiles: ``1.05 (1.03-1.08)``."""
    low, middle, high = found[key]
    return f"{number(middle)} ({number(low)}-{number(high)})"


def number(value: float) -> str:
    """Three digits, and no power of ten."""
    if value != value:
        return "-"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    if 0 < abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:,.{digits}f}"


def size(count: float) -> str:
    """``12M``, ``1.5B``."""
    for letter, unit in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * unit:  # which three digits round to 1
            return f"{count / unit:.3g}{letter}"
    return str(int(count))
