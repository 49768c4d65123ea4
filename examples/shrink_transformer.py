"""Prunes whole heads and hidden units of a language model, cuts them out, times it.

python examples/shrink_transformer.py                # some minutes on two cores
python examples/shrink_transformer.py --tiny         # a minute, to see it work

It trains the model of ``transformer_lm.py``, prunes 50, 75 and 90 % of the heads of
every attention and of the hidden units of every MLP, trains a little after each, and
cuts them out. The table and ``shrink.png`` compare what is left with the dense model
and with the masked one, which has the same zeros and the old shapes: size, loss, time
of a forward pass (one core, all models in turn, in one process) and checkpoints.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import _lm
import jax
import jax.numpy as jnp
import numpy as np
import optax

import movement_jax as mj
from movement_jax import shrink
from movement_jax.report import add_row, new_table, rendered

ROUNDS = 15  # of timing, in turn for all models
# All heads of an attention, and all hidden units of an MLP; not what is in a head.
HEADS_AND_HIDDEN = r"attention/key/kernel:1\[0\]|mlp/up/kernel:1"


class Row(NamedTuple):
    """One model, as the table has it."""

    name: str
    fn: Any
    params: Any
    loss: float
    before: float | None = None  # the loss right after pruning
    dense: float | None = None  # that of the dense model after as many steps


def main() -> None:
    """Trains, prunes, cuts, verifies, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--width", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path, default="runs/shrink")
    args = parser.parse_args()
    tiny = args.tiny
    width, layers, heads, length = (32, 1, 4, 32) if tiny else (128, 4, 8, 128)
    steps, recovery, rounds = (60, 15, 3) if tiny else (600, 200, ROUNDS)
    width, steps, batch = args.width or width, args.steps or steps, args.batch
    model = _lm.Transformer(width=width, layers=layers, heads=heads, length=length)
    text = _lm.read_standard_library()
    excerpts = jnp.asarray(_lm.windows(text.validation, 64, length, 0))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens)

    def make_loss(fn: Any) -> Any:
        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            logits, targets = fn(params, tokens[:, :-1]), tokens[:, 1:]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean()

        return loss

    tokens = jnp.zeros((1, length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    start = time.perf_counter()
    groups = shrink.find_groups(apply, params, tokens)
    seconds = time.perf_counter() - start
    chosen = groups.only(HEADS_AND_HIDDEN)
    print(
        f"{len(groups.prunable)} prunable groups found in {seconds:.2f} s, of which "
        f"{len(chosen.prunable)} are pruned:\n\n{chosen}\n"
    )

    learning_rate = optax.warmup_cosine_decay_schedule(
        0, 3e-3, steps // 10, steps + 3 * recovery, 3e-4
    )
    tx = optax.chain(optax.adamw(learning_rate), mj.movement_pruning(structure=chosen))
    loss = make_loss(apply)

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

    def measured(fn: Any, params: Any) -> float:
        return float(jax.jit(make_loss(fn))(params, excerpts))

    state = unpruned = train((params, tx.init(params)), steps, 1)
    rows = [Row("dense", apply, state[0], measured(apply, state[0]))]
    prune = jax.jit(mj.prune)  # whole units, at any sparsity
    for seed, sparsity in enumerate((0.5, 0.75, 0.9), 2):
        state = prune(state, sparsity)
        before = measured(apply, state[0])
        state = train(state, recovery, seed)
        after = measured(apply, state[0])
        unpruned = train(unpruned, recovery, seed)
        dense = measured(apply, unpruned[0])
        plan = groups.plan(groups.kept(mj.find_state(state[1]).masks))
        checked = shrink.verify(apply, state[0], plan, excerpts[:2, :-1])
        print(f"{sparsity:.0%}: shrunk equals masked, up to {checked.worst:.1e}")
        fn, small = shrink.shrunk(apply, plan), plan.shrink(state[0])
        shrunk_loss = measured(fn, small)
        assert abs(shrunk_loss - after) < 1e-4, (shrunk_loss, after)
        for name, *own in (
            ("masked", apply, state[0], after),
            ("shrunk", fn, small, shrunk_loss),
        ):
            rows.append(Row(f"{name} {sparsity:.0%}", *own, before, dense))

    print(plan)
    models = [(jax.jit(row.fn), row.params) for row in rows]
    times = np.array(_times(models, excerpts[:4, :-1], rounds))
    sizes = [_checkpoint_bytes(row.params) for row in rows]
    columns = (
        "Parameters",
        "MFLOP",
        "Loss",
        "Before",
        "Dense",
        "Time",
        "Speed-up",
        "Disk",
    )
    table = new_table("Model", *columns, title=None)
    for row, (fn, params), own, size in zip(rows, models, times, sizes):
        flops = fn.lower(params, excerpts[:4, :-1]).compile().cost_analysis()["flops"]
        add_row(
            table,
            row.name,
            f"{sum(x.size for x in jax.tree.leaves(row.params)):,}",
            f"{flops / 1e6:,.0f}",
            f"{row.loss:.3f}",
            "-" if row.before is None else f"{row.before:.3f}",
            "-" if row.dense is None else f"{row.dense:.3f}",
            f"{1e3 * np.median(own):.1f} ms",
            _ratios(times[0] / own),
            f"{size / 1e6:.2f} MB",
        )
    print(f"\n{rendered(table)}")
    print(
        "\nLoss: nats per byte; before: right after pruning; dense: of the model that"
    )
    print(f"was trained as long and never pruned. Time: of 4 x {length} tokens on one")
    print(f"core; median and quartiles of {rounds} paired runs.")
    args.out.mkdir(parents=True, exist_ok=True)
    _draw(rows, times, sizes, args.out / "shrink.png")


def _ratios(ratios: np.ndarray) -> str:
    low, median, high = np.percentile(ratios, (25, 50, 75))
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def _times(models: list[Any], tokens: jax.Array, rounds: int) -> list[list[float]]:
    """Seconds of a forward pass; models take turns, so that noise hits all alike."""
    seconds: list[list[float]] = [[] for _ in models]
    for fn, params in models:
        jax.block_until_ready(fn(params, tokens))
    for _ in range(rounds):
        for own, (fn, params) in zip(seconds, models):
            for _ in _on_one_core():
                jax.block_until_ready(fn(params, tokens))
                start = time.perf_counter()
                jax.block_until_ready(fn(params, tokens))
                own.append(time.perf_counter() - start)
    return seconds


def _on_one_core() -> Iterator[None]:
    """Keeps all threads of this process on one core meanwhile, where Linux runs."""
    tasks = pathlib.Path("/proc/self/task")
    if not tasks.exists():
        yield
        return
    everywhere = os.sched_getaffinity(0)
    for cores in ({min(everywhere)}, everywhere):
        for task in tasks.iterdir():
            os.sched_setaffinity(int(task.name), cores)
        if cores is not everywhere:
            yield


def _checkpoint_bytes(params: Any) -> int:
    """Bytes on disk of params saved with Orbax, which compresses."""
    with tempfile.TemporaryDirectory() as directory:
        mj.checkpoint.save(directory, 1, params)
        files = pathlib.Path(directory).rglob("*")
        return sum(path.stat().st_size for path in files if path.is_file())


def _draw(
    rows: list[Row], times: np.ndarray, sizes: list[int], path: pathlib.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speed = np.median(times[0] / times, axis=1)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    shares = [row.name.split()[-1] for row in rows[1::2]]
    places = np.arange(len(shares) + 1)
    for first, name, color in ((1, "masked", "tab:gray"), (2, "shrunk", "tab:blue")):
        own = [0, *range(first, len(rows), 2)]
        at = places + (0.2 if name == "shrunk" else -0.2)
        axes[0].bar(at, speed[own], 0.38, color=color, label=name)
        axes[1].bar(at, np.array(sizes)[own] / 1e6, 0.38, color=color)
        for bar, value in zip(at, speed[own]):
            axes[0].text(bar, value, f"{value:.1f}", ha="center", va="bottom", size=8)
    losses = [rows[0].loss, *(row.loss for row in rows[2::2])]
    before = [rows[0].loss, *(row.before or 0.0 for row in rows[2::2])]
    axes[2].plot(places, before, "o:", color="tab:gray", label="right after pruning")
    axes[2].plot(places, losses, "o-", color="tab:blue", label="trained on")
    dense = [rows[0].loss, *(row.dense or 0.0 for row in rows[2::2])]
    axes[2].plot(places, dense, "s-", color="black", ms=4, label="never pruned")
    titles = ("Speed-up of a forward pass", "Checkpoint, MB", "Loss, nats per byte")
    for ax, title in zip(axes, titles):
        ax.set_title(title, size=10)
        ax.set_xticks(places, ["dense", *shares])
        ax.set_xlabel("heads and hidden units removed")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"\nThe picture is in {path}.")


if __name__ == "__main__":
    main()
