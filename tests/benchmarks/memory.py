"""Bytes a param: of state to keep, and of memory reserved while a program runs."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import movement_jax as mj

from . import models, programs, tables
from .targets import Target

TITLE = "Memory"
TARGETS = (Target("cpu"), Target("v5e"), Target("h200"))
FORMS = ("masks only, skip", "EMA scores, cubic, skip")


def measure(quick: bool) -> list[dict[str, Any]]:
    """One row for each target, tree and program."""
    if quick:
        trees = {"many tensors": (models.abstract(models.layers(16, 1)), None)}
    else:
        trees = {
            "many tensors": (models.abstract(models.layers(896, 10)), None),
            "stacked": (models.shapes_of(models.billion()), models.STACKED),
        }
    rows = []
    for target in TARGETS[:1] if quick else TARGETS:
        if reason := target.missing():
            rows.append({"target": str(target), "left_out": reason})
            continue
        for name, (params, stacked) in trees.items():
            try:
                rows += _rows(target, name, params, stacked, quick)
            except TooLarge as error:
                rows.append({"target": str(target), "left_out": f"{name}: {error}"})
    return rows


class TooLarge(ValueError):
    """What a program needs is more than the device has."""


def build(target: Target, function: Any, *trees: Any, **kw: Any) -> programs.Program:
    """Compiles a function that updates its first two arguments in place."""
    mesh = target.mesh(**kw)
    placed = [models.place(tree, mesh) for tree in trees]
    out = models.layout(tuple(placed[:2]))
    jitted = jax.jit(function, donate_argnums=(0, 1), out_shardings=out)
    with jax.sharding.set_mesh(mesh):
        lowered = jitted.lower(*placed)
    try:
        return programs.Program(lowered, **target.options())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(f"does not fit into the memory of {target}") from error


def _rows(
    target: Target, name: str, params: Any, stacked: str | None, quick: bool
) -> list[dict[str, Any]]:
    size = models.count(params)
    adamw = models.optimizer(None)
    state = jax.eval_shape(adamw.init, params)
    plain, before = build(target, models.update(adamw), params, state, params), state
    rows = []

    def add(what: str, program: programs.Program, state: Any) -> None:
        rows.append(
            {
                "target": str(target),
                "tree": name,
                "program": what,
                "size": size,
                "leaves": len(jax.tree.leaves(params)),
                "state_bytes": (models.nbytes(state) - models.nbytes(before)) / size,
                "temp_bytes": program.temp / size,
                "temp_bytes_of_adamw": plain.temp / size,
            }
        )

    for form in FORMS[1:] if quick else FORMS:
        for check in (False,) if quick else (False, True):
            tx = models.optimizer(form, stacked=stacked, check_finite=check)
            state = jax.eval_shape(tx.init, params)
            found = build(target, models.update(tx), params, state, params)
            add(f"step: {form}{', check_finite' if check else ''}", found, state)
    level = jax.ShapeDtypeStruct((), jnp.float32)
    found = build(target, lambda p, s, x: mj.prune((p, s), x), params, state, level)
    add("prune", found, state)
    return rows


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Tables of it."""
    head = "program, tree, on, state added, temporary, of adamw alone"
    lines = []
    for row in rows:
        if "left_out" in row:
            lines.append((row["left_out"], "-", row["target"], "-", "-", "-"))
            continue
        figures = (row[key] for key in ("state_bytes", "temp_bytes"))
        tree = f"{tables.size(row['size'])} in {row['leaves']}"
        lines.append(
            (
                row["program"],
                tree,
                row["target"],
                *map(tables.number, figures),
                tables.number(row["temp_bytes_of_adamw"]),
            )
        )
    assert not any(math.isnan(row.get("temp_bytes", 0)) for row in rows)
    note = (
        "Bytes a param. What is reserved on a TPU includes its on-chip memory, at most "
        "128 MiB.\n\n"
    )
    return [note + tables.table(head.split(", "), lines)]
