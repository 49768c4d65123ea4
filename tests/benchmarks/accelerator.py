"""What only an accelerator shows: bandwidth, launches, peaks of memory.

Runs on whatever JAX finds; on a CPU the sizes are tiny, to see that it works.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import movement_jax as mj
from movement_jax import counting, selection

from . import machine, masks, models, steps, tables, timing

TITLE = "Accelerator"


def measure(quick: bool) -> dict[str, Any]:
    """Everything of it, at the sizes that this backend deserves."""
    large = jax.default_backend() != "cpu" and not quick
    seconds = 2.0 if large else 0.1
    sizes = (2**28, 2**30) if large else (2**16,)
    widths = (64, 256) if large else (8,)
    return {
        "backend": jax.default_backend(),
        "reads": [
            _reads(n, m, seconds)
            for n in sizes
            for m in ((3,) if quick else (3, 7, 15))
        ],
        "masks": [
            _against(n, way, seconds)
            for n in ((2**26, 10**9) if large else (10**5,))
            for way in list(masks.ways())[: 1 if quick else None]
        ],
        "steps": [
            _step(n, form, seconds)
            for n in ((10**8, 10**9) if large else (10**5,))
            for form in list(models.FORMS)[: 1 if quick else None]
        ],
        "conditions": [
            _condition(n, how, seconds)
            for n in ((10**8, 10**9) if large else (10**5,))
            for how in list(_THROUGH)[: 2 if quick else None]
        ],
        "warm": [
            _warm(n, moved, seconds)
            for n in ((2**26, 10**9) if large else (10**5,))
            for moved in (0.0, 0.001, 0.01)
        ],
        "small": [_small(n, 200 if large else 8, seconds) for n in widths],
        "compile": _compile(200 if large else 8),
    }


def _reads(size: int, m: int, seconds: float) -> dict[str, Any]:
    """One pass that counts for m thresholds, against a copy of the array."""
    x = models.random(jax.ShapeDtypeStruct((size // 1024, 1024), jnp.float32), 1.0)

    @jax.jit
    def count(x: jax.Array, at: jax.Array) -> Any:
        return counting.tally([x <= at[i] for i in range(m)])

    @jax.jit
    def copy(x: jax.Array) -> jax.Array:
        return x + 1

    at = jnp.linspace(-1, 1, m)
    jax.block_until_ready((count(x, at), copy(x)))
    found = timing.paired(lambda: count(x, at), lambda: copy(x), seconds=seconds)
    return {
        "bytes": 4 * size,
        "thresholds": m,
        "read_gb_s": 4 * size / found["ms"] / 1e6,
        "copy_gb_s": 8 * size / found["over_ms"] / 1e6,
        **found,
    }


def _against(size: int, way: str, seconds: float) -> dict[str, Any]:
    """A mask update against one other way, with the memory both reserve."""
    row: dict[str, Any] = {"size": size, "over": way}
    make = masks.ways()[way]
    if make is None or (way == "numpy.partition" and size > 10**8):
        return row | {"left_out": "not here"}
    shape = jax.ShapeDtypeStruct((size // 1000, 1000), jnp.float32)
    if 4 * 4 * size > machine.available():
        return row | {"left_out": "too large"}
    x, k = models.random(shape, 1.0), round(0.8 * size)
    ours = jax.jit(mj.keep_top)
    n_keep = jnp.int32(x.size - k)
    try:
        theirs = _on_device(way, x, k) or make(x, jax.device_get(x), k)
        jax.block_until_ready((ours(x, n_keep), theirs()))
        found = timing.paired(lambda: ours(x, n_keep), theirs, seconds=seconds)
    except Exception as error:  # out of memory, or what torch does not support
        return row | {"left_out": f"{type(error).__name__}: {error}"[:200]}
    its_temp = None
    if isinstance(theirs, functools.partial):  # compiled by JAX too
        its_temp = _temp(theirs.func, *theirs.args)
    return row | found | {"temp": _temp(ours, x, n_keep), "its_temp": its_temp}


def _temp(jitted: Any, *arguments: Any) -> int:
    """Bytes that a program reserves while it runs."""
    memory = jitted.lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


def _on_device(way: str, x: jax.Array, k: int) -> Any:
    """The way of PyTorch on its own device, if it has one."""
    if way != "torch.kthvalue" or jax.default_backend() == "cpu":
        return None
    import torch

    tensor = torch.utils.dlpack.from_dlpack(x)

    def run() -> None:
        torch.gt(tensor, torch.kthvalue(tensor.flatten(), k).values)
        torch.cuda.synchronize()

    return run


def _step(size: int, form: str, seconds: float) -> dict[str, Any]:
    """The optimizer step on a few large tensors."""
    params = models.abstract({f"{i}": {"kernel": (size // 4000, 1000)} for i in "0123"})
    row: dict[str, Any] = {"size": models.count(params), "form": form}
    if 42 * models.count(params) > machine.available():
        return row | {"left_out": "too large"}
    grads = models.random(params, 0.01, seed=1)
    tx = models.optimizer(form, check_finite=False)
    ours = steps.start(tx, params, grads)
    theirs = steps.start(models.optimizer(None), params, grads)
    prunes = "prune" in form
    return row | steps.compare(ours, theirs, prunes=prunes, seconds=seconds)


def _by_loop(due: jax.Array, change: Any, carry: Any) -> Any:
    """Zero or one trips, as the library does it."""
    return lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.bool_(False), change(carry[1])),
        (due, carry),
    )[1]


def _by_cond(due: jax.Array, change: Any, carry: Any) -> Any:
    return lax.cond(due, change, lambda carry: carry, carry)


# What goes through a conditional that is not taken, and through which kind.
_THROUGH = {
    "masks, loop": _by_loop,
    "masks, cond": _by_cond,
    "params and masks, loop": _by_loop,
    "params and masks, cond": _by_cond,
    "scores, loop": _by_loop,
    "scores, cond": _by_cond,
}


def _condition(size: int, how: str, seconds: float) -> dict[str, Any]:
    """A step that changes nothing, by a loop or by ``lax.cond``, over one without."""
    shape, through = (size // 1000, 1000), _THROUGH[how]
    x = models.random(jax.ShapeDtypeStruct(shape, jnp.float32), 1.0)
    row: dict[str, Any] = {"size": x.size, "how": how}
    if 36 * x.size > machine.available():
        return row | {"left_out": "too large"}

    def masked(mask: jax.Array, scores: jax.Array) -> jax.Array:
        return mask & mj.keep_top(scores, scores.size // 5)

    def step(x: Any, scores: Any, mask: Any, due: jax.Array) -> Any:
        if how.startswith("masks"):
            mask = through(due, lambda mask: masked(mask, scores), mask)
        if how.startswith("scores"):
            scores = through(due, lambda s: 0.9 * s + 0.1 * jnp.abs(x), scores)
        x = jnp.where(mask, 0.999 * x, 0)
        if how.startswith("params"):

            def both(carry: Any) -> Any:
                new = masked(carry[1], scores)
                return jnp.where(new, carry[0], 0), new

            x, mask = through(due, both, (x, mask))
        return x, scores, mask

    def without(x: Any, scores: Any, mask: Any, due: jax.Array) -> Any:
        return jnp.where(mask, 0.999 * x, 0), scores, mask

    def start(function: Any) -> Any:
        jitted = jax.jit(function, donate_argnums=(0, 1, 2))
        carry = [x + 0, jnp.abs(x), jnp.ones(shape, bool)]

        def run() -> Any:
            carry[:] = jitted(*carry, jnp.bool_(False))
            return carry

        jax.block_until_ready(run())
        return run

    return row | timing.paired(start(step), start(without), seconds=seconds)


def _warm(size: int, moved: float, seconds: float) -> dict[str, Any]:
    """A search from the last threshold, over one that starts anew."""
    shape = jax.ShapeDtypeStruct((size // 1000, 1000), jnp.float32)
    row: dict[str, Any] = {"size": size, "moved": f"{moved:.1%} of the scores"}
    if 3 * 4 * size > machine.available():
        return row | {"left_out": "too large"}
    x = models.random(shape, 1.0)
    tensors = [selection.Tensor("scores", x.shape)]

    @jax.jit
    def select(x: jax.Array, n_drop: jax.Array, hint: jax.Array) -> Any:
        return selection.keep_masks([x], tensors, n_drop, hint=hint)

    first, later = (jnp.array([round(s * x.size)]) for s in (0.8, 0.8 + moved))
    nothing = jnp.array([counting.NO_KEY])
    hint = select(x, first, nothing)[1]
    jax.block_until_ready(hint)
    return row | timing.paired(
        lambda: select(x, later, hint),
        lambda: select(x, later, nothing),
        seconds=seconds,
    )


def _small(width: int, count: int, seconds: float) -> dict[str, Any]:
    """Many small tensors: what launches cost."""
    params = models.abstract({f"{i}": {"kernel": (width, width)} for i in range(count)})
    leaves = jax.tree.leaves(models.random(params, 1.0))
    tensors = [selection.Tensor(str(i), x.shape) for i, x in enumerate(leaves)]
    drop = jnp.full(len(leaves), width * width // 2, jnp.int32)
    ours = jax.jit(lambda leaves, n: selection.keep_masks(leaves, tensors, n))
    copy = jax.jit(lambda leaves: [x + 1 for x in leaves])
    jax.block_until_ready((ours(leaves, drop), copy(leaves)))
    found = timing.paired(
        lambda: ours(leaves, drop), lambda: copy(leaves), seconds=seconds
    )
    return {"tensors": len(leaves), "width": width, **found}


def _compile(leaves: int) -> dict[str, float]:
    """Seconds to compile the optimizer step on this device."""
    params = models.abstract({f"{i}": {"kernel": (64, 64)} for i in range(leaves)})
    found: dict[str, float] = {"leaves": leaves}
    for name, tx in (
        ("ours", models.optimizer("EMA scores, cubic, skip")),
        ("adamw", models.optimizer(None)),
    ):
        jax.clear_caches()
        state = jax.eval_shape(tx.init, params)
        begin = time.perf_counter()
        jax.jit(models.update(tx)).lower(params, state, params).compile()
        found[name] = time.perf_counter() - begin
    return found


def report(found: dict[str, Any]) -> list[str]:
    """Tables of it."""
    number, size = tables.number, tables.size
    parts = [f"Backend: {found['backend']}."]

    def add(head: str, key: str, cells: Any) -> None:
        rows = [
            (*_what(row), f"not run: {row['left_out']}")
            if "left_out" in row
            else cells(row)
            for row in found[key]
        ]
        width = len(head.split(", "))
        rows = [(*row, *("-" * (width - len(row)))) for row in rows]
        parts.append(tables.table(head.split(", "), rows))

    add(
        "leaf, thresholds, read GB/s, copy GB/s",
        "reads",
        lambda r: (
            f"{r['bytes'] / 2**20:.0f} MiB",
            r["thresholds"],
            number(r["read_gb_s"]),
            number(r["copy_gb_s"]),
        ),
    )
    add(
        "scores, against, ms, its ms, ratio, temporary bytes, its",
        "masks",
        lambda r: (
            size(r["size"]),
            r["over"],
            number(r["ms"]),
            number(r["over_ms"]),
            tables.ratio(r),
            r["temp"],
            "-" if r["its_temp"] is None else r["its_temp"],
        ),
    )
    for key, name in (("steps", "form"), ("conditions", "how"), ("warm", "moved")):
        add(
            f"params, {'search that' if key == 'warm' else 'step'}, ms, over, ratio",
            key,
            lambda r, name=name: (
                size(r["size"]),
                r[name],
                number(r["ms"]),
                number(r["over_ms"]),
                tables.ratio(r),
            ),
        )
    add(
        "small tensors, width, mask update ms, copy ms",
        "small",
        lambda r: (r["tensors"], r["width"], number(r["ms"]), number(r["over_ms"])),
    )
    built = found["compile"]
    parts.append(
        f"Compiled for {built['leaves']} tensors in {number(built['ours'])} s, adamw "
        f"in {number(built['adamw'])} s."
    )
    return parts


def _what(row: dict[str, Any]) -> tuple[str, str]:
    name = next(row[key] for key in ("over", "form", "how", "moved") if key in row)
    return tables.size(row["size"]), name
