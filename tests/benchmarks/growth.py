"""How cost grows with the number of params and of devices."""

import gc
import math
from typing import Any

import jax
import jax.numpy as jnp

import movement_jax as mj

from . import machine, models, programs, steps, tables, timing
from .memory import TooLarge, build
from .targets import Target
from .traffic import passes

TITLE = "Growth"
SIZES = (10**6, 10**7, 10**8, 3 * 10**8, 10**9)
MESHES = ((1, 1), (2, 2), (4, 4), (8, 8))
FORM = "EMA scores, cubic, skip"


def measure(quick: bool) -> dict[str, Any]:
    """Times by size, programs by size, and programs by devices."""
    sizes = (10**5,) if quick else SIZES
    return {
        "masks": [_masks(size, quick) for size in sizes],
        "steps": [_steps(size, quick) for size in sizes],
        "programs": [_program(size) for size in (*sizes, *([] if quick else [10**10]))],
        "devices": [] if quick else [_devices(shape) for shape in MESHES],
    }


def tree(size: int) -> dict[str, Any]:
    """Four stacked kernels of about so many params in all."""
    width = max(8, round(math.sqrt(size / 16) / 8) * 8)
    return {"blocks": {f"w{i}": {"kernel": (4, width, width)} for i in range(4)}}


def _masks(size: int, quick: bool) -> dict[str, Any]:
    x = jax.ShapeDtypeStruct((max(1, size // 1000), 1000), jnp.float32)
    row: dict[str, Any] = {"size": models.count([x])}
    needed = 7 * models.count([x])  # the scores, the mask, and some room
    if reason := _too_large(needed):
        return row | {"left_out": reason}
    scores, ours = models.random(x, 1.0), jax.jit(mj.keep_top)
    keep = jnp.int32(scores.size // 5)
    jax.block_until_ready(ours(scores, keep))
    return row | {
        "ms": timing.alone(lambda: ours(scores, keep), seconds=0.1 if quick else 4)
    }


def _steps(size: int, quick: bool) -> dict[str, Any]:
    params = models.abstract(tree(size))
    row: dict[str, Any] = {"size": models.count(params)}
    # Both: params, gradients, two moments; ours: scores, masks; what init makes.
    if reason := _too_large(42 * models.count(params)):
        return row | {"left_out": reason}
    grads = models.random(params, 0.01, seed=1)
    ours, theirs = (
        steps.start(tx, params, grads)
        for tx in (
            models.optimizer(FORM, stacked=models.STACKED, check_finite=False),
            models.optimizer(None),
        )
    )
    found = steps.compare(ours, theirs, prunes=False, seconds=0.1 if quick else 4)
    del ours, theirs, grads
    gc.collect()
    return row | found


def _too_large(needed: int) -> str | None:
    if needed < machine.available():
        return None
    return f"it takes {needed / 2**30:.0f} GiB"


def _program(size: int) -> dict[str, Any]:
    """The step compiled for this machine, on arrays that are not made."""
    params = models.abstract(tree(size))
    found = {}
    for name, tx in (
        ("ours", models.optimizer(FORM, stacked=models.STACKED, check_finite=False)),
        ("adamw", models.optimizer(None)),
    ):
        state = jax.eval_shape(tx.init, params)
        step = jax.jit(models.update(tx), donate_argnums=(0, 1))
        program = programs.Program(step.lower(params, state, params))
        found[name] = program.flops() | {"temp": program.temp}
    return {"size": models.count(params), **found}


def _devices(shape: tuple[int, int]) -> dict[str, Any]:
    """A billion params on ever more TPUs."""
    target = Target("v5e", shape)
    if reason := target.missing():
        return {"target": str(target), "left_out": reason}
    params = models.shapes_of(models.billion())
    tx = models.optimizer(FORM, stacked=models.STACKED, check_finite=False)
    state = jax.eval_shape(tx.init, params)
    level = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        step = build(target, models.update(tx), params, state, params)
        pruned = build(
            target, lambda p, s, x: mj.prune((p, s), x), params, state, level
        )
    except TooLarge as error:
        return {"target": str(target), "left_out": str(error)}
    return {
        "target": str(target),
        "devices": math.prod(shape),
        "size": models.count(params),
        "arguments": step.arguments,
        "step_temp": step.temp,
        "prune_temp": pruned.temp,
        "step_sent": sum(op.nbytes for op in step.collectives(False)),
        "prune_sent": sum(op.nbytes for op in pruned.collectives(False))
        + passes() * sum(op.nbytes for op in pruned.collectives(True)),
    }


def report(found: dict[str, Any]) -> list[str]:
    """Tables of it."""
    rows = []
    for masks, step in zip(found["masks"], found["steps"]):
        row = [tables.size(masks["size"])]
        if "left_out" in masks:
            row += [f"not run: {masks['left_out']}", "-"]
        else:
            nanoseconds = 1e6 * masks["ms"] / masks["size"]
            row += [tables.number(masks["ms"]), tables.number(nanoseconds)]
        if "left_out" in step:
            row += [f"not run: {step['left_out']}", "-"]
        else:
            row += [tables.number(step["ms"]), tables.ratio(step)]
        rows.append(row)
    head = "params, mask update ms, ns a param, step that skips ms, over adamw"
    parts = [tables.table(head.split(", "), rows)]
    rows = [
        [
            tables.size(row["size"]),
            *(
                tables.number(row[name][key] / row["size"])
                for key in ("flops", "bytes accessed", "temp")
                for name in ("ours", "adamw")
            ),
        ]
        for row in found["programs"]
    ]
    head = "params, flops, of adamw, bytes, of adamw, temporary, of adamw"
    note = "The same step compiled, a param; bodies of loops count once.\n\n"
    parts.append(note + tables.table(head.split(", "), rows))
    rows = [
        (row["target"], f"not run: {row['left_out']}", *"-----")
        if "left_out" in row
        else (
            row["target"],
            tables.size(row["size"]),
            f"{row['arguments'] / 2**30:.2f} GiB",
            f"{row['step_temp'] / 2**20:.1f} MiB",
            f"{row['prune_temp'] / 2**20:.1f} MiB",
            f"{row['step_sent']:,}",
            f"{row['prune_sent']:,}",
        )
        for row in found["devices"]
    ]
    head = (
        "devices, params, state and gradients on each, temporary (step), "
        "temporary (prune), bytes sent (skip step), bytes sent (mask update)"
    )
    if rows:
        parts.append("Compiled for TPUs.\n\n" + tables.table(head.split(", "), rows))
    return parts
