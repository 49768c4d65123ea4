"""Time to compile the optimizer step, over that of AdamW alone."""

import statistics
from typing import Any

import jax

from . import models, tables, timing

TITLE = "Time to compile the optimizer step"
DEPTHS = {51: 3, 147: 9}  # leaves: layers
TINY = {19: 1}
FORMS = ("masks only, skip", "EMA scores, cubic, skip")


def measure(quick: bool) -> list[dict[str, Any]]:
    """One row for each tree and form; every turn traces and compiles anew."""
    rows = []
    for leaves, depth in (TINY if quick else DEPTHS).items():
        params = models.abstract(models.layers(128, depth))
        for form in FORMS[1:] if quick else FORMS:
            for check in (True,) if quick else (False, True):
                tx = models.optimizer(form, check_finite=check)
                row = {"leaves": leaves, "form": form, "check_finite": check}
                rows.append(row | _against_adamw(tx, params, 1 if quick else 5))
    return rows


def _against_adamw(tx: Any, params: Any, turns: int) -> dict[str, Any]:
    found = timing.paired(
        lambda: _build(tx, params),
        lambda: _build(models.optimizer(None), params),
        least=turns,
        most=turns,
    )
    return found | _parts(tx, params)


def _build(tx: Any, params: Any) -> None:
    jax.clear_caches()
    _lower(tx, params).compile()


def _lower(tx: Any, params: Any) -> jax.stages.Lowered:
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(models.update(tx), donate_argnums=(0, 1))
    return step.lower(params, state, params)


def _parts(tx: Any, params: Any) -> dict[str, Any]:
    """How much of it is Python's, and how long the program is."""
    times = []
    for _ in range(2):
        jax.clear_caches()
        times.append(timing.once(lambda: _lower(tx, params) and None)[0])
    text = _lower(tx, params).as_text()
    return {"lower_ms": 1e3 * statistics.median(times), "lines": text.count("\n")}


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Tables of it."""
    lines = [
        (
            row["form"],
            "yes" if row["check_finite"] else "no",
            row["leaves"],
            tables.number(row["ms"] / 1e3),
            tables.number(row["lower_ms"] / 1e3),
            tables.number(row["over_ms"] / 1e3),
            tables.ratio(row),
            tables.ratio(row, "ratio_of_core_time"),
        )
        for row in rows
    ]
    head = "step, check_finite, leaves, s, of it tracing, adamw s, ratio"
    return [tables.table([*head.split(", "), "ratio of core time"], lines)]
