"""One exact change of the masks, against the other ways to find a threshold."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import movement_jax as mj
from movement_jax import selection

from . import models, tables, timing

TITLE = "One exact mask update"
SPARSITY = 0.8
SIZES = (1_000_000, 10_000_000, 25_000_000, 50_000_000)
LONGEST = 60.0  # seconds; what would take longer is not run


def measure(quick: bool) -> dict[str, Any]:
    """Ratios over each way, of one tensor and of a tree."""
    rows: list[dict[str, Any]] = []
    took: dict[str, float] = {}  # seconds a score, at the size before
    for size in (20_000,) if quick else SIZES:
        rows += _one_tensor(size, took, 0.1 if quick else 4)
    return {"one_tensor": rows, "tree": _tree(quick)}


def _one_tensor(size: int, took: dict[str, float], seconds: float) -> list:
    shape = (size // 1000, 1000)
    x = models.random(jax.ShapeDtypeStruct(shape, jnp.float32), 1.0)
    host, k = np.asarray(x), round(SPARSITY * x.size)
    jitted, n_keep = jax.jit(mj.keep_top), jnp.int32(x.size - k)

    def ours() -> jax.Array:
        return jitted(x, n_keep)

    assert int(jnp.sum(ours())) == n_keep
    rows: list[dict[str, Any]] = []
    for name, make in ways().items():
        row: dict[str, Any] = {"size": x.size, "over": name}
        rows.append(row)
        if make is None:
            row["left_out"] = f"{name.partition('.')[0]} is not installed"
            continue
        if took.get(name, 0.0) * 1.2 * x.size > LONGEST:
            row["left_out"] = f"{name} takes more than {LONGEST:.0f} s at that size"
            continue
        theirs = make(x, host, k)
        row["kept"] = int(
            np.sum(np.asarray(theirs()))
        )  # more or less, if there are ties
        row |= timing.paired(ours, theirs, seconds=seconds, least=2)
        took[name] = row["over_ms"] / 1e3 / x.size
    return rows


def ways() -> dict[str, Callable[..., Callable[[], Any]] | None]:
    """What makes, of an array and a number to drop, a function that makes a mask."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
        def make(x: Any, host: Any, k: int) -> Callable[[], Any]:
            return functools.partial(jax.jit(functools.partial(function, k=k)), x)

        return make

    def by_partition(x: Any, host: Any, k: int) -> Callable[[], Any]:
        return lambda: host > np.partition(host, k - 1, axis=None)[k - 1]

    def by_torch(x: Any, host: Any, k: int) -> Callable[[], Any]:
        import torch

        tensor = torch.from_numpy(host.copy())
        return lambda: (tensor > torch.kthvalue(tensor.flatten(), k).values).numpy()

    return {
        "jnp.sort": compiled(lambda x, k: x > jnp.sort(x, axis=None)[k - 1]),
        "jnp.quantile": compiled(lambda x, k: x > jnp.quantile(x, k / x.size)),
        "lax.top_k": compiled(
            lambda x, k: x >= jax.lax.top_k(x.ravel(), x.size - k)[0][-1]
        ),
        "numpy.partition": by_partition,
        "torch.kthvalue": by_torch if importlib.util.find_spec("torch") else None,
    }


def _tree(quick: bool) -> dict[str, Any]:
    """All kernels of a transformer in one call, against a sort of each."""
    shapes = models.layers(16, 1) if quick else models.layers_of(10_000_000)
    kernels = models.prunable(models.abstract(shapes))
    leaves = models.random(models.abstract([x.shape for x in kernels]), 1.0)
    tensors = [selection.Tensor(str(i), x.shape) for i, x in enumerate(leaves)]
    drop = jnp.asarray([round(SPARSITY * x.size) for x in leaves], jnp.int32)
    ours = jax.jit(lambda leaves, n: selection.keep_masks(leaves, tensors, n))

    @jax.jit
    def theirs(leaves: Any) -> Any:
        return [
            x > jnp.sort(x, axis=None)[round(SPARSITY * x.size) - 1] for x in leaves
        ]

    jax.block_until_ready((ours(leaves, drop), theirs(leaves)))
    found = timing.paired(
        lambda: ours(leaves, drop),
        lambda: theirs(leaves),
        seconds=0.2 if quick else 6,
    )
    size = sum(x.size for x in leaves)
    return {"size": size, "leaves": len(leaves), "over": "jnp.sort", **found}


def report(found: dict[str, Any]) -> list[str]:
    """Tables of it."""
    rows = []
    for row in found["one_tensor"]:
        what = (tables.size(row["size"]), row["over"])
        if "left_out" in row:
            rows.append((*what, "-", "-", f"not run: {row['left_out']}"))
            continue
        times = tables.number(row["ms"]), tables.number(row["over_ms"])
        rows.append((*what, *times, tables.ratio(row)))
    tree = found["tree"]
    rows.append(
        (
            f"{tables.size(tree['size'])} in {tree['leaves']} tensors",
            tree["over"],
            tables.number(tree["ms"]),
            tables.number(tree["over_ms"]),
            tables.ratio(tree),
        )
    )
    return [tables.table(("scores", "against", "ms", "its ms", "ratio"), rows)]
