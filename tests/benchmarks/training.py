"""A whole train step of a transformer, over the same without pruning."""

from typing import Any

import jax
import jax.numpy as jnp

from . import models, steps, tables

TITLE = "Whole train step"
FORMS = ("EMA scores, cubic, skip", "EMA scores, prune")


def measure(quick: bool) -> list[dict[str, Any]]:
    """One row for each form: 85M params, scanned layers, float32."""
    model = models.Transformer(32, 2, 2) if quick else models.Transformer()
    params = models.shapes_of(model)
    shape = (2, 17) if quick else (4, 129)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, model.vocabulary)
    rows = []
    for form in FORMS[1:] if quick else FORMS:
        ours, theirs = (
            _start(model, tx, params, tokens)
            for tx in (
                models.optimizer(form, stacked=models.STACKED),
                models.optimizer(None),
            )
        )
        found = steps.compare(
            ours, theirs, prunes="prune" in form, seconds=0.1 if quick else 40
        )
        row = {"form": form, "size": models.count(params), "tokens": tokens.size}
        rows.append({**row, **found})
        del ours, theirs
    return rows


def _start(model: Any, tx: Any, params: Any, tokens: jax.Array) -> steps.Loop:
    values = models.random(params, 0.02)
    for name in ("blocks", "LayerNorm_0"):  # scales around one
        values[name] = jax.tree_util.tree_map_with_path(_one_if_scale, values[name])
    state = jax.jit(tx.init)(values)
    return steps.Loop(models.train_step(model, tx), values, state, tokens)


def _one_if_scale(path: Any, leaf: jax.Array) -> jax.Array:
    return jnp.ones_like(leaf) if path[-1].key == "scale" else leaf


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Tables of it."""
    lines = [
        (
            row["form"],
            tables.size(row["size"]),
            row["tokens"],
            tables.number(row["ms"]),
            tables.number(row["over_ms"]),
            tables.ratio(row),
        )
        for row in rows
    ]
    head = ("step", "params", "tokens", "ms", "without, ms", "ratio")
    return [tables.table(head, lines)]
