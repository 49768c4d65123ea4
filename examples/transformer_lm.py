r"""Which weights of a language model would movement pruning drop, and is it right?

Trains a byte-level Flax transformer on the source of Python's standard library while
many pruning criteria watch the *same* run. After convergence it prunes one-shot by
each of them, compares them with magnitude pruning, trains the pruned models on, and
shows what a bad learning rate does to the scores::

    python examples/transformer_lm.py                      # about 6 minutes, 2 cores
    python examples/transformer_lm.py --preset tiny        # seconds, to see it run
    python examples/transformer_lm.py --preset gpu         # 85M weights, all devices

It writes ``report.md``, pictures, ``results.json`` and a checkpoint to ``--out``.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import time
from typing import Any

import _lm
import _lm_report as report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _lm_train import PRESETS, LMState, Preset, Trainer, as_if, difference, sharded
from _lm_words import conclude
from orbax.checkpoint import v1 as ocp
from rich.console import Console

import movement_jax as mj
from movement_jax import tree

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
TABLE_AT = 0.8  # sparsity of the per-tensor tables and of the pictures
RECOVER_AT = 0.9  # sparsity at which the pruned models train on
SHORT = 0.15  # of the run: how long the bad learning rates are tried

MAGNITUDE = "magnitude"
CHAPTER = "EMA 0.9"
RANDOM = "random"
# The criteria whose pruned models train on.
RECOVERED = (
    *(MAGNITUDE, CHAPTER, "EMA half-life 100 %"),
    *("movement (Adam)", "Taylor", RANDOM),
)
# The criteria that are shown tensor by tensor.
PICTURED = (CHAPTER, "EMA half-life 100 %", "movement (Adam)")

# Where there is no terminal, tables are not squeezed into 80 columns.
console = Console(width=None if sys.stdout.isatty() else 130)


def watching(steps: int) -> dict[str, mj.Criterion]:
    """What watches the run beside the criterion in the optimizer."""
    return {
        MAGNITUDE: mj.Magnitude(),
        "EMA half-life 10 %": mj.EmaMagnitude(half_life=0.1 * steps),
        "EMA half-life 50 %": mj.EmaMagnitude(half_life=0.5 * steps),
        "EMA half-life 100 %": mj.EmaMagnitude(half_life=1.0 * steps),
        "peak half-life 50 %": mj.PeakMagnitude(half_life=0.5 * steps),
        "movement (Adam)": mj.Movement(),
        "movement (plain sum)": mj.Movement(optax.sgd(1.0)),
        "Taylor": mj.Taylor(momentum=0.9),
        RANDOM: mj.Random(),
    }


def schedule_of(preset: Preset, scale: float = 1.0) -> optax.Schedule:
    """Warm-up and cosine to zero; then a smaller cosine for the pruned models."""
    peak = scale * preset.learning_rate
    warmup = max(1, preset.steps // 20)
    training = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, preset.steps)
    return optax.join_schedules([training, recovery_of(preset)], [preset.steps])


def recovery_of(preset: Preset) -> optax.Schedule:
    """The learning rate of all that is trained after pruning, or while pruning."""
    return optax.cosine_decay_schedule(0.5 * preset.learning_rate, preset.recovery)


def adamw(
    preset: Preset, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """The optimizer, before pruning is chained to it.

    Weight decay forgets the initial weights over a quarter of the run, as the
    usual 0.1 does in runs that are long enough.
    """
    decay = 4 / (preset.learning_rate * preset.steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate, b2=0.99, weight_decay=decay, mask=is_kernel),
    )


def is_kernel(params: Any) -> Any:
    """True for kernels: embeddings, norms and biases are not decayed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: tree.path_name(path).endswith("kernel"), params
    )


def tracked(preset: Preset, scale: float = 1.0) -> optax.GradientTransformation:
    """AdamW with the chapter's scores, and with what ``mj.health`` looks at."""
    return optax.chain(
        adamw(preset, schedule_of(preset, scale)),
        mj.movement_pruning(track_start=True, track_noise=True),
    )


def main() -> None:
    """Runs the experiment and writes its report."""
    arguments = parse()
    preset, out = arguments.preset, pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    text = _lm.read_standard_library()
    trainer = Trainer(preset, text, arguments.seed)
    initial = trainer.init_params()
    results: dict[str, Any] = {
        "setting": report.setting_of(
            *(arguments.name, preset, arguments.seed, text),
            *(initial, tree.select(initial)),
        ),
        "counting": _lm.counting_losses(text),
    }
    console.print(report.setting(results))

    console.rule("1. Train, with every criterion watching")
    dense, results["curve"], early = train(trainer, initial)
    results["sharded"] = sharded(dense)
    console.print(report.training(results))

    console.rule("2. Prune one-shot, each time from the same weights")
    scores = scores_of(dense, preset)
    results["loss"], results["difference"] = one_shot(trainer, dense, scores)
    console.print(report.losses(results))

    console.rule("3. Which weights do the criteria disagree on?")
    agreements = {
        name: [named_agreement(dense, name, scores[name], s) for s in SPARSITIES]
        for name in scores
        if name != MAGNITUDE
    }
    results["pictured"] = PICTURED
    results["agreement"] = {
        name: {f"{found.sparsity:g}": found.to_dict() for found in series}
        for name, series in agreements.items()
    }
    details = {
        f"{name} against magnitude": agreements[name][SPARSITIES.index(TABLE_AT)]
        for name in PICTURED
    }
    console.print(
        report.jaccards(results),
        report.by_tensor(results, PICTURED, TABLE_AT),
        report.contested(results, TABLE_AT),
    )

    console.rule(f"4. Train on with {RECOVER_AT:.0%} pruned")
    results["recovery"], kept, reference = recover(trainer, dense, scores)
    results["gradual"] = prune_gradually(trainer, dense, reference)
    details[f"The model pruned by {CHAPTER} and trained on"] = mj.summary(kept)
    console.print(mj.summary(kept), report.recovery(results))

    console.rule("5. Learning rates that spoil the scores")
    fast, slow = (try_rate(trainer, initial, scale) for scale in (10.0, 0.01))
    examined = {
        "this run at its end": examine(dense),
        f"this run after {SHORT:.0%} of it": early,
        "learning rate × 10": examine(fast),
        "learning rate ÷ 100": examine(slow),
    }
    results["health"] = {
        name: {**health.to_dict(), "jaccard": agreed}
        for name, (health, agreed) in examined.items()
    }
    details |= {f"Health of {name}": pair[0] for name, pair in examined.items()}
    console.print(report.rates(results))

    console.rule("6. What the numbers say")
    results["checkpoint"] = checkpoint(kept, out / "checkpoint")
    pictures = report.draw(
        out, results, agreements, picture_states(dense, preset), fast, TABLE_AT
    )
    results["conclusions"] = conclude(
        results, MAGNITUDE, CHAPTER, RANDOM, TABLE_AT, RECOVER_AT
    )
    for sentence in results["conclusions"]:
        console.print(f"• {sentence}", highlight=False)
    results["seconds"] = time.perf_counter() - began
    (out / "results.json").write_text(json.dumps(results, indent=1))
    report.write(out / "report.md", results, pictures, details, TABLE_AT)
    console.print(
        f"\nReport, pictures and checkpoint are in [bold]{out}[/]. "
        f"Total time {results['seconds'] / 60:.1f} minutes."
    )


def train(trainer: Trainer, initial: Any) -> tuple[LMState, list[Any], Any]:
    """The run that all else starts from.

    Returns:
      The state at its end, the curve as ``[step, training loss, validation loss]``,
      and what :func:`examine` found after the fraction ``SHORT`` of it.
    """
    steps, early = trainer.preset.steps, []
    watched = watching(steps)
    state = trainer.start(tracked(trainer.preset), initial, watched)
    curve: list[Any] = [[0, None, float(trainer.evaluate(initial).mean())]]

    def look(state: LMState, loss: float) -> None:
        validation = float(trainer.evaluate(state.params).mean())
        curve.append([int(state.step), loss, validation])

    def look_early(state: LMState, loss: float) -> None:
        look(state, loss)
        early.append(examine(state))

    looks = {round(steps * i / 10): look for i in range(1, 11)}
    looks[round(SHORT * steps)] = look_early
    step = trainer.make_step(state, watched)
    state = trainer.fit(step, state, steps, "train", looks)
    return state, curve, early[0]


def examine(state: LMState) -> tuple[mj.Health, float]:
    """Health, and how far the chapter's scores agree with magnitude.

    Health at the mildest pruning tried, as its threshold is the nearest to noise.
    """
    agreed = mj.agreement(state, mj.Magnitude(), TABLE_AT).total.jaccard
    return mj.health(state, sparsity=min(SPARSITIES)), agreed


def scores_of(state: LMState, preset: Preset) -> dict[str, Any]:
    """One number per weight from every criterion, all from the same run."""
    weights = tree.select(state.params)
    scores = {CHAPTER: mj.find_state(state.opt_state).scores}
    for name, criterion in watching(preset.steps).items():
        scores[name] = criterion.scores(state.watched[name], weights)
    return {MAGNITUDE: scores.pop(MAGNITUDE), **scores}


def one_shot(
    trainer: Trainer, dense: LMState, scores: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prunes the same weights by every criterion to every sparsity.

    Returns:
      Validation losses by criterion and sparsity, 0 among them; and, except for
      magnitude, how far they lie above those of magnitude.
    """
    whole = trainer.evaluate(dense.params)
    found = {
        name: {"0": whole}
        | {
            f"{sparsity:g}": trainer.evaluate(
                trainer.prune_by(dense, ranked, sparsity).params
            )
            for sparsity in SPARSITIES
        }
        for name, ranked in scores.items()
    }
    losses = {
        name: {level: {"mean": float(x.mean())} for level, x in row.items()}
        for name, row in found.items()
    }
    differences = {
        name: {
            level: difference(row[level], found[MAGNITUDE][level])
            for level in row
            if level != "0"
        }
        for name, row in found.items()
        if name != MAGNITUDE
    }
    return losses, differences


def named_agreement(
    dense: LMState, name: str, scores: Any, sparsity: float
) -> mj.Agreement:
    """Agreement of one criterion's scores with magnitude, under its name here."""
    found = mj.agreement(as_if(dense, scores), mj.Magnitude(), sparsity)
    return dataclasses.replace(found, a=name, b=MAGNITUDE)


def recover(
    trainer: Trainer, dense: LMState, scores: dict[str, Any]
) -> tuple[dict[str, Any], LMState, np.ndarray]:
    """Prunes one-shot and trains on under the masks.

    Returns:
      Losses before and after by criterion, the state that the chapter's criterion led
      to, and the losses after magnitude pruning, excerpt by excerpt.
    """
    found, kept, step, reference = {}, None, None, None
    bare = dense.replace(watched={})
    # What the same steps give without any pruning: the honest ceiling.
    for name in (*RECOVERED, "nothing pruned"):
        pruned = bare
        if name in scores:
            pruned = trainer.prune_by(bare, scores[name], RECOVER_AT)
        before = trainer.evaluate(pruned.params)
        step = step or trainer.make_step(pruned)
        # A copy, as the step donates what it is given and `dense` is needed again.
        pruned = jax.tree.map(jnp.copy, pruned)
        state = trainer.fit(step, pruned, trainer.preset.recovery, name)
        after = trainer.evaluate(state.params)
        reference = after if reference is None else reference  # magnitude comes first
        found[name] = {
            "before": {"mean": float(before.mean())},
            "after": {"mean": float(after.mean())},
            "after_difference": difference(after, reference),
            "sparsity": float(mj.sparsity_of(state)),
        }
        kept = state if name == CHAPTER else kept
    return found, kept, reference


def prune_gradually(
    trainer: Trainer, dense: LMState, one_shot_magnitude: np.ndarray
) -> dict[str, Any]:
    """Prunes while training on: how the paper means movement pruning to be used."""
    n = trainer.preset.recovery
    schedule = mj.cubic(RECOVER_AT, begin=0, end=round(0.7 * n), every=max(1, n // 30))
    optimizer = adamw(trainer.preset, recovery_of(trainer.preset))
    ways = {
        MAGNITUDE: optax.chain(
            optimizer, mj.movement_pruning(schedule, mj.Magnitude())
        ),
        "movement (Adam)": mj.movement_pruning(
            schedule, mj.Movement(), inner=optimizer, regrow=True
        ),
    }
    found, reference = {}, None
    for name, tx in ways.items():
        state = trainer.start(tx, dense.params)
        state = trainer.fit(trainer.make_step(state), state, n, f"gradual {name}")
        state = mj.finalize(state)
        after = trainer.evaluate(state.params)
        reference = after if reference is None else reference  # magnitude comes first
        found[name] = {
            "asked": RECOVER_AT,
            "after": {"mean": float(after.mean())},
            "after_difference": difference(after, reference),
            "against_one_shot_magnitude": difference(after, one_shot_magnitude),
            "sparsity": float(mj.sparsity_of(state)),
        }
    return found


def try_rate(trainer: Trainer, initial: Any, scale: float) -> LMState:
    """The first part of the same run at another learning rate."""
    state = trainer.start(tracked(trainer.preset, scale), initial)
    n = round(SHORT * trainer.preset.steps)
    step = trainer.make_step(state)
    return trainer.fit(step, state, n, f"learning rate × {scale:g}")


def checkpoint(state: LMState, path: pathlib.Path) -> dict[str, Any]:
    """Saves the pruned train state and reads it back, bit for bit."""
    shutil.rmtree(path, ignore_errors=True)
    ocp.save(path.absolute(), state)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = ocp.load(path.absolute(), like)
    same = jax.tree.map(np.array_equal, state, restored)
    if not all(jax.tree.leaves(same)):
        raise RuntimeError("The checkpoint does not hold what was saved.")
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return {"bytes": size, "sparsity": float(mj.sparsity_of(restored))}


def picture_states(dense: LMState, preset: Preset) -> dict[str, LMState]:
    """The dense state, ranked by some of the criteria."""
    criteria = watching(preset.steps)
    watchers = [name for name in PICTURED if name != CHAPTER]
    return {CHAPTER: dense} | {
        name: as_if(dense, dense.watched[name], criteria[name]) for name in watchers
    }


def parse() -> argparse.Namespace:
    """Reads the command line; ``preset`` becomes a :class:`Preset`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", default="runs/transformer_lm")
    parser.add_argument("--seed", type=int, default=0)
    sizes = ("steps", "recovery", "width", "layers", "length", "batch", "excerpts")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--learning-rate", type=float, help="its peak")
    arguments = parser.parse_args()
    arguments.name = arguments.preset
    given = {
        field.name: getattr(arguments, field.name, None)
        for field in dataclasses.fields(Preset)
    }
    arguments.preset = dataclasses.replace(
        PRESETS[arguments.name],
        **{name: value for name, value in given.items() if value is not None},
    )
    return arguments


if __name__ == "__main__":
    main()
