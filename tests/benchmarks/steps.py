"""The optimizer's part of a train step, over the same with AdamW alone."""

import gc
from typing import Any

import jax
import jax.numpy as jnp

import movement_jax as mj

from . import models, tables, timing

TITLE = "Optimizer step over optax.adamw"
SIZES = (10_000_000, 100_000_000)
WARM = 3  # steps, in which the forms that skip have pruned for the last time


def measure(quick: bool) -> list[dict[str, Any]]:
    """One row for each size, dtype, form and for looking at bad steps or not."""
    rows = []
    sizes = (20_000,) if quick else SIZES
    for size in sizes:
        shapes = models.layers_of(size, depth=1 if quick else 10)
        for dtype in (jnp.float32,) if quick else (jnp.float32, jnp.bfloat16):
            params = models.abstract(shapes, dtype)
            cases = [(form, False) for form in models.FORMS]
            cases += [(form, True) for form in models.CHECKED]
            for form, check in cases if not quick else cases[2:4]:
                rows.append(
                    {
                        "size": models.count(params),
                        "leaves": len(jax.tree.leaves(params)),
                        "dtype": jnp.dtype(dtype).name,
                        "form": form,
                        "check_finite": check,
                        **_compare(params, form, check, 0.1 if quick else 4),
                    }
                )
                gc.collect()
    return rows


class Loop:
    """A step on state of its own, which it is given for good."""

    def __init__(self, step: Any, params: Any, state: Any, last: Any):
        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.params, self.state, self.last = params, state, last

    def __call__(self) -> Any:
        self.params, self.state = self.step(self.params, self.state, self.last)
        return self.params, self.state

    def changes(self) -> int:
        """How often masks changed so far."""
        return int(mj.find_state(self.state).events.changes)


def start(tx: Any, params: Any, grads: Any) -> Loop:
    """A loop of optimizer steps from random params."""
    values = models.random(params, 0.05)
    return Loop(models.update(tx), values, jax.jit(tx.init)(values), grads)


def _compare(params: Any, form: str, check: bool, seconds: float) -> dict[str, Any]:
    grads = models.random(params, 0.01, seed=1)
    ours = start(models.optimizer(form, check_finite=check), params, grads)
    theirs = start(models.optimizer(None), params, grads)
    return compare(ours, theirs, prunes="prune" in form, seconds=seconds)


def compare(ours: Loop, theirs: Loop, *, prunes: bool, seconds: float) -> dict:
    """Times both, and makes sure that masks changed in each step or in none."""
    for _ in range(WARM):
        jax.block_until_ready((ours(), theirs()))
    before = ours.changes()
    found = timing.paired(ours, theirs, seconds=seconds)
    changed = ours.changes() - before
    assert changed == (found["turns"] if prunes else 0), changed
    return found


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Tables of it."""
    lines = [
        (
            row["form"],
            "yes" if row["check_finite"] else "no",
            f"{tables.size(row['size'])} in {row['leaves']}",
            row["dtype"],
            tables.number(row["ms"]),
            tables.number(row["over_ms"]),
            tables.ratio(row),
            tables.ratio(row, "ratio_of_core_time"),
        )
        for row in rows
    ]
    head = "step, check_finite, params, dtype, ms, adamw ms, ratio, ratio of core time"
    return [tables.table(head.split(", "), lines)]
