"""Bytes that devices exchange when masks change, and on the steps between."""

import collections
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

import movement_jax as mj
from movement_jax import selection

from . import models, tables
from .memory import build
from .programs import LARGE, Program
from .targets import Target

TITLE = "Bytes between devices"
DEVICES = 8
TARGETS = (
    Target("cpu", (2, 2)),
    Target("cpu", (4, 2)),
    Target("v5e", (2, 2)),
    Target("h200", (2, 2)),
)
ALLOCATIONS = {"Uniform": mj.Uniform(), "Global": mj.Global()}


def passes() -> int:
    """Most passes of a search through 32 bits, with two guesses that do not help."""
    return math.ceil(32 / math.log2(selection.CANDIDATES + 1)) + 2


def trips(allocation: Any, params: Any) -> tuple[list[int], list[int]]:
    """How often each search of a mask update looks at the scores: all, then ties.

    Counted while normal weights go from 0 to 80 % by their magnitude, without a
    threshold to start from, and then to 81 %, with one.
    """
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    searches = collections.Counter[str]()

    def counted(name: str) -> Any:
        original = getattr(selection, name)

        def count(*args: Any) -> Any:
            searches[name] += 1
            key = name, searches[name]
            jax.debug.callback(lambda: counts.update([key]))
            return original(*args)

        return mock.patch.object(selection, name, count)

    def change(params: Any, state: Any, level: jax.Array) -> Any:
        return mj.prune((params, state), level)

    def took() -> list[int]:
        jax.effects_barrier()
        found = [n for _, n in sorted(counts.items())]
        ties = sum(n for (name, _), n in counts.items() if name == "count_ties")
        counts.clear()
        return [*sorted(found[: len(found) - (ties > 0)], reverse=True), ties]

    with counted("count"), counted("count_ties"):
        jitted = jax.jit(change)
        tx = models.optimizer("masks only, skip", allocation=allocation)
        carry = models.random(params, 0.02), None
        carry = carry[0], jax.jit(tx.init)(carry[0])
        carry = jitted(*carry, jnp.float32(0.8))
        cold = took()
        jitted(*carry, jnp.float32(0.81))
        return cold, took()


def measure(quick: bool) -> list[dict[str, Any]]:
    """One row for each target and allocation, and one for a sort."""
    params = models.abstract(models.layers(64, 1) if quick else models.layers(512, 3))
    rows = []
    for target in TARGETS[:1] if quick else TARGETS:
        if reason := target.missing():
            rows.append({"target": str(target), "left_out": reason})
            continue
        modes = ("Auto", "Explicit") if target.kind == "cpu" else ("Auto",)
        modes = modes[1:] if quick else modes
        for mode in modes:
            for name, allocation in list(ALLOCATIONS.items())[: 1 if quick else None]:
                row = {"target": str(target), "mode": mode, "program": name}
                rows.append(row | _row(target, mode, allocation, params))
        rows.append(_sorted(target, params))
    return rows


def _row(target: Target, mode: str, allocation: Any, params: Any) -> dict[str, Any]:
    kw = {"axis_type": AxisType[mode]}
    tx = models.optimizer("EMA scores, cubic, skip", allocation=allocation)
    state = jax.eval_shape(tx.init, params)
    level = jax.ShapeDtypeStruct((), jnp.float32)

    def change(params: Any, state: Any, level: jax.Array) -> Any:
        return mj.prune((params, state), level)

    pruned = build(target, change, params, state, level, **kw)
    step = build(target, models.update(tx), params, state, params, **kw)
    plain = models.optimizer(None)
    state = jax.eval_shape(plain.init, params)
    plain_step = build(target, models.update(plain), params, state, params, **kw)
    tensors = models.prunable(params)
    searches = 2 if isinstance(allocation, mj.Global) else 1
    once, each = _sent(pruned, looped=False), _sent(pruned, looped=True)
    cold, warm = trips(allocation, params)
    loops: collections.Counter[str] = collections.Counter()
    for op in pruned.collectives(looped=True):
        loops[op.where] += op.nbytes
    sent = sorted(loops.values(), reverse=True)  # candidates are fewest for ties
    return {
        "trips": {"cold": cold, "warm": warm},
        "typical": {
            name: (once + sum(map(math.prod, zip(sent, took)))) / len(tensors)
            for name, took in (("cold", cold), ("warm", warm))
        },
        "tensors": len(tensors),
        "kernel_bytes": 4 * models.count(tensors),
        "once": once,
        "each_pass": each,
        # Searches have loops of their own: a pass of each is counted in `each_pass`.
        "passes": passes(),
        "searches": searches,
        "bytes_per_tensor": (once + passes() * each) / len(tensors),
        "largest": max((op.nbytes for op in pruned.collectives()), default=0),
        "tensors_moved": len([op for op in pruned.moved() if op.nbytes > 16 * LARGE]),
        "skip_step": _sent(step, looped=False) - _sent(plain_step, looped=False),
    }


def typical(row: dict[str, Any]) -> list[str]:
    """Bytes a tensor of a first mask update, and of a later one."""
    found = row.get("typical", {})
    return [f"{found[n]:,.0f}" if n in found else "-" for n in ("cold", "warm")]


def _sorted(target: Target, params: Any) -> dict[str, Any]:
    """The same by a sort of each tensor."""
    row = {"target": str(target), "mode": "Auto", "program": "jnp.sort of each"}
    if target.kind == "v5e":
        return row | {"left_out": "a sort takes minutes to compile for a TPU"}
    tensors = models.prunable(params)
    shapes = {f"{i}": {"up": {"kernel": x.shape}} for i, x in enumerate(tensors)}
    leaves = models.place(models.abstract(shapes), target.mesh())

    def change(leaves: Any) -> Any:
        return jax.tree.map(lambda x: x > jnp.sort(x, axis=None)[x.size // 2], leaves)

    jitted = jax.jit(change, out_shardings=models.layout(leaves))
    found = Program(jitted.lower(leaves), **target.options())
    sent = _sent(found)
    return row | {
        "tensors": len(tensors),
        "kernel_bytes": 4 * models.count(tensors),
        "once": sent,
        "each_pass": 0,
        "bytes_per_tensor": sent / len(tensors),
    }


def _sent(program: Program, looped: bool | None = None) -> int:
    return sum(op.nbytes for op in program.collectives(looped))


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Tables of it."""
    lines = []
    for row in rows:
        where = row["target"], row.get("mode", "-"), row.get("program", "-")
        if "left_out" in row:
            lines.append((*where, f"not run: {row['left_out']}", *"------"))
            continue
        lines.append(
            (
                *where,
                f"{row['tensors']}, {row['kernel_bytes'] / 2**20:.0f} MiB",
                f"{row['once']:,}",
                f"{row['each_pass']:,}",
                *typical(row),
                f"{row['bytes_per_tensor']:,.0f}",
                f"{row['skip_step']:,}" if "skip_step" in row else "-",
            )
        )
    head = (
        "mesh, axes, masks by, tensors, once, each pass, first, later, most, skip step"
    )
    note = (
        "Bytes that a device receives; first, later, most: for each tensor in a whole "
        "update, at first and with a threshold to start from (normal weights; all "
        f"tensors take as many passes as the slowest), and if all {passes()} passes of "
        "all searches were needed. Skip step: all tensors together.\n\n"
    )
    return [note + tables.table(head.split(", "), lines)]
