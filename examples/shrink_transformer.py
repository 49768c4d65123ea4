"""Prunes whole heads and hidden units of a language model, cuts them out, times it.

python examples/shrink_transformer.py                # some minutes on two cores
python examples/shrink_transformer.py --tiny         # a minute, to see it work
"""

import argparse
import time
from typing import Any

import _lm
import jax
import jax.numpy as jnp
import numpy as np
import optax

import movement_jax as mj
from movement_jax import shrink
from movement_jax.report import add_row, new_table, rendered

ROUNDS = 7  # of timing, in turn for all models


def main() -> None:
    """Trains, prunes, cuts, verifies and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    width, layers, heads, length = (32, 1, 4, 32) if tiny else (128, 4, 8, 128)
    steps, recovery, batch = (100, 20, 16) if tiny else (300, 60, 16)
    model = _lm.Transformer(width=width, layers=layers, heads=heads, length=length)
    text = _lm.read_standard_library()
    excerpts = jnp.asarray(_lm.windows(text.validation, 4 * batch, length, 0))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens)

    def make_loss(fn: Any) -> Any:
        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            logits, targets = fn(params, tokens[:, :-1]), tokens[:, 1:]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean()

        return loss

    loss = make_loss(apply)
    tx = optax.chain(
        optax.adamw(optax.cosine_decay_schedule(3e-3, steps + recovery)),
        mj.movement_pruning(prunable="."),  # biases too: a unit has one
    )

    @jax.jit
    def step(state: Any, tokens: jax.Array) -> Any:
        params, opt_state = state
        grads = jax.grad(loss)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def train(state: Any, n: int, seed: int) -> Any:
        data = _lm.windows(text.train, n * batch, length, seed)
        for tokens in data.reshape(n, batch, -1):
            state = step(state, tokens)
        return state

    tokens = jnp.zeros((1, length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    trained = train((params, tx.init(params)), steps, 1)
    groups = shrink.find_groups(apply, trained[0], tokens)
    chosen = {g.name: g for g in groups.prunable if _is_head_or_hidden(g)}
    print(f"{len(groups.prunable)} prunable groups, {len(chosen)} of heads and hidden")

    scores = groups.unit_scores(mj.find_state(trained[1]).scores)
    scores = {name: scores[name] for name in chosen}
    evaluate = jax.jit(loss)
    rows = [("dense", trained[0], apply, float(evaluate(trained[0], excerpts)), None)]
    for sparsity in (0.5, 0.75):
        keep = shrink.choose(groups, scores, sparsity)
        state = shrink.mask_units(trained, groups, keep)
        one_shot = float(evaluate(state[0], excerpts))
        state = train(state, recovery, 2)
        after = float(evaluate(state[0], excerpts))
        plan = groups.plan(keep)
        checked = shrink.verify(apply, state[0], plan, excerpts[:2, :-1])
        print(f"{sparsity:.0%}: shrunk is masked, up to {checked.worst:.1e}")
        fn, small = shrink.shrunk(apply, plan), plan.shrink(state[0])
        difference = abs(float(jax.jit(make_loss(fn))(small, excerpts)) - after)
        assert difference < 1e-4, difference
        rows.append((f"masked {sparsity:.0%}", state[0], apply, after, one_shot))
        rows.append((f"shrunk {sparsity:.0%}", small, fn, after, one_shot))
    times = _times([(jax.jit(fn), params) for _, params, fn, *_ in rows], excerpts)
    columns = ("Parameters", "Loss", "One-shot", "Time", "Speed-up")
    table = new_table("Model", *columns, title=None)
    for (name, params, _, after, one_shot), seconds in zip(rows, times):
        size = sum(x.size for x in jax.tree.leaves(params))
        speed = np.median(np.array(times[0]) / np.array(seconds))
        before = "-" if one_shot is None else f"{one_shot:.3f}"
        milliseconds = f"{1e3 * np.median(seconds):.1f} ms"
        cells = (f"{size:,}", f"{after:.3f}", before, milliseconds, f"{speed:.2f}x")
        add_row(table, name, *cells)
    print(rendered(table))


def _is_head_or_hidden(group: shrink.Group) -> bool:
    """Heads are the outer factor of all four kernels of an attention."""
    paths = {m.path.split("/")[-2] for m in group.members}
    return paths == {"query", "key", "value", "out"} or paths == {"up", "down"}


def _times(models: list[Any], excerpts: jax.Array) -> list[list[float]]:
    """Seconds of a forward pass; models take turns, so that noise hits all alike."""
    tokens, seconds = excerpts[:8, :-1], [[] for _ in models]
    for number in range(ROUNDS + 1):
        for own, (fn, params) in zip(seconds, models):
            jax.block_until_ready(fn(params, tokens))
            start = time.perf_counter()
            jax.block_until_ready(fn(params, tokens))
            if number:
                own.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
