"""Prints what trust in this library rests on: the goals, and how far each is reached.

`python -m tests.goals` runs the tests behind them; `--kills 100 --mutants 100` also
those that take long, so many times, and `--coverage` and `--ci` all tests and all that
must hold.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import pytest
from rich.console import Console
from rich.table import Table

from tests.faults import catalogue

ROOT = pathlib.Path(__file__).parents[1]
FUZZ, CHECKPOINTS = "tests/faults/test_fuzz.py", "tests/faults/test_checkpoints.py"
POSITION, PROCESSES = "tests/faults/test_position.py", "tests/test_multiprocess.py"
COMPILED_ONCE = (
    "tests/test_transform.py::"
    "test_a_thousand_steps_compile_once_and_keep_pruned_weights_at_zero"
)
PROPERTIES = [f"tests/test_{n}.py" for n in ("wide", "allocation", "selection")]
PROPERTIES += ["tests/test_structure.py", "tests/faults/test_random_trees.py"]
EXAMPLES = "6"  # times as many, which makes more than 20,000


class Figure(NamedTuple):
    """How often something failed, of how many times it was tried."""

    failed: int = 0
    tried: int = 0


SURVIVED = len(catalogue.NAIVE_SURVIVES)
FAILED = len(catalogue.FAULTS) - len(catalogue.OUT_OF_SCOPE) - SURVIVED
GOALS = {  # what; how often it is to be tried; tests that count as one try each
    "R1": ("faults in scope whose tests pass", 80, None),
    "R1b": (f"of these, failed by naive code, which survives {SURVIVED}", FAILED, None),
    "R2": ("trainings with NaN and Inf that end at the exact sparsity", 1000, None),
    "R3": ("examples of properties against NumPy", 20_000, None),
    "R4": ("counts kept, exact, every NaN kept", 1000, None),
    "R5": ("masks that are the same however scores are sharded", 500, None),
    "R6": ("masks after each step that are the same on all processes", 35, None),
    "R7": ("kills after which training ends in the same bits", 100, None),
    "R8": ("kills around a save, a third inside, that lose nothing", 100, None),
    "R9": ("flipped bits of a checkpoint, told or harmless", 400, None),
    "R10": ("saves on a full disk that keep the last good step", 20, None),
    "R11": ("damaged and forged files that are refused or do no harm", 400, None),
    "R12": ("wrong and right orders of a chain, told and not told", 30, "_orders_"),
    "R13": ("lines and branches that tests run", 4000, None),
    "R14": ("changes of the core rooms that tests notice", 100, None),
    "R15": ("modules that pyrefly and mypy --strict find nothing in", 1, None),
    "R16": ("schedules of 1,000 steps in one compilation", 1, COMPILED_ONCE),
    "R17": ("checks of the contract of a transformation", 1, "tests/test_contract.py"),
    "R18": ("messages of errors that a test asserts by their words", 150, None),
    "R19": ("whether all that must hold does, in 20 minutes of two cores", 1, None),
    "R20": ("old checkpoints that load bit for bit", 4, "tests/golden/"),
}
# How much may fail: what is known to make the same program is not tried.
ALLOWED = {"R14": 0.05}


class Record:
    """What tests noted: a figure for a goal, or that they passed."""

    def __init__(self):
        self.figures = collections.defaultdict(Figure)
        self.outcomes = {}
        self.seen = set()

    def pytest_runtest_logreport(self, report):
        expected = hasattr(report, "wasxfail")
        if report.when == "call" and not expected:
            self.outcomes[report.nodeid] = report.outcome
        if report.when == "teardown" and report.nodeid not in self.seen:
            self.seen.add(report.nodeid)
            for name, value in report.user_properties:
                if name == "examples":
                    self.add("R3", (0, value))
                elif name in GOALS:
                    self.add(name, value)

    def add(self, goal, figure):
        failed, tried = figure
        so_far = self.figures[goal]
        self.figures[goal] = Figure(so_far.failed + failed, so_far.tried + tried)

    def count(self, goal, part):
        for nodeid, outcome in self.outcomes.items():
            if part in nodeid and outcome != "skipped":
                self.add(goal, (outcome != "passed", 1))


def run_tests(record):
    files = [FUZZ, CHECKPOINTS, POSITION, PROCESSES, *PROPERTIES]
    files += ["tests/test_contract.py", "tests/test_messages.py", "tests/golden"]
    faults = [test for found in catalogue.find_tests().values() for test in found]
    nodes = [f"{path}::{name}" for path, name in dict.fromkeys(faults)]
    nodes = [node for node in nodes if _file(node) not in files]
    options = ["-q", "--no-header", "-rfE", "-p", "no:cacheprovider", "-m", ""]
    options += ["--show-capture=no", "--rootdir", str(ROOT)]
    outcomes = catalogue.Outcomes()
    pytest.main([*files, COMPILED_ONCE, *nodes, *options], plugins=[record, outcomes])
    for goal, (_, _, part) in GOALS.items():
        if part:
            record.count(goal, part)
    for id, (ours, naive) in catalogue.verdicts(outcomes).items():
        if ours["passed"] or ours["failed"]:
            record.add("R1", (not catalogue.survived(ours), 1))
        if catalogue.survived(ours) and catalogue.shown_to_fail(naive):
            record.add("R1b", (0, 1))
        elif naive["failed"] or (
            naive["passed"] and id not in catalogue.NAIVE_SURVIVES
        ):
            record.add("R1b", (1, 1))


def _file(node):
    return pathlib.Path(node.partition("::")[0]).relative_to(ROOT).as_posix()


def run_kills(record, kills):
    command = [sys.executable, "-m", "tests.faults.killing", "--saves", str(kills)]
    command += ["--trainings", str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    saves = re.search(r"(\d+) processes .* (\d+) of them .*: (\d+) lost", done.stdout)
    trained = re.search(r"trainings with (\d+) kills: (\d+) ended", done.stdout)
    tried, inside, lost = map(int, saves.groups()) if saves else (1, 1, 1)
    # Kills before or after a save show little: of those within, three times as many.
    record.add("R8", (lost, min(tried, 3 * inside)))
    record.add("R7", (int(trained[2]), int(trained[1])) if trained else (1, 1))


def run_mutants(record, sample):
    command = [sys.executable, "-m", "tests.mutants", str(sample)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    found = re.search(r"(\d+) tried: \d+ noticed, (\d+) survive", done.stdout)
    record.add("R14", (int(found[2]), int(found[1])) if found else (1, 1))


def run_coverage(record):
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.json")
        environment = os.environ | {"COVERAGE_FILE": str(report.with_name("data"))}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "", "--cov", f"--cov-report=json:{report}"]
        subprocess.run(command, cwd=ROOT, env=environment)
        found = json.loads(report.read_text())
    for name, file in found["files"].items():
        if missed := file["missing_lines"] + file["missing_branches"]:
            print(f"{name}: {missed}")
    totals = found["totals"]
    missed = totals["missing_lines"] + totals["missing_branches"]
    record.add("R13", (missed, totals["num_statements"] + totals["num_branches"]))


def run_ci(record):
    start = time.monotonic()
    done = subprocess.run(["bash", ".ci/run"], cwd=ROOT)
    minutes = (time.monotonic() - start) / 60
    print(f"CI took {minutes:.0f} minutes.")
    record.add("R19", (done.returncode != 0 or minutes > 20, 1))


def run_types(record):
    errors, modules = 0, len([*(ROOT / "movement_jax").rglob("*.py")])
    for command in (
        ["pyrefly", "check", "--python-interpreter-path", sys.executable],
        ["mypy", "--strict", "--python-executable", sys.executable],
    ):
        command[0] = shutil.which(command[0], path=_scripts()) or command[0]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return
        found = re.search(r"(\d+) errors?", done.stdout + done.stderr)
        errors += int(found[1]) if found else done.returncode != 0
    record.add("R15", (errors, modules))


def _scripts():
    own = str(pathlib.Path(sys.executable).parent)
    return os.pathsep.join([own, os.environ.get("PATH", "")])


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.goals", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="processes to kill")
    parser.add_argument("--mutants", type=int, default=0, help="changes to try")
    parser.add_argument("--coverage", action="store_true", help="of all tests")
    parser.add_argument("--ci", action="store_true", help="all of .ci/run")
    arguments = parser.parse_args()
    os.environ.setdefault("MOVEMENT_JAX_EXAMPLES", EXAMPLES)
    record = Record()
    run_tests(record)
    run_types(record)
    if arguments.kills:
        run_kills(record, arguments.kills)
    if arguments.mutants:
        run_mutants(record, arguments.mutants)
    if arguments.coverage:
        run_coverage(record)
    if arguments.ci:
        run_ci(record)
    table = Table("Goal", "What", "To be tried", "Tried", "Failed", "Verdict")
    all_good = True
    for goal, (what, bar, _) in GOALS.items():
        failed, tried = record.figures[goal]
        good = failed <= tried * ALLOWED.get(goal, 0)
        all_good &= good
        verdict = "reached" if good and tried >= bar else "short" if good else "FAILED"
        shown = (f"{bar:,}", f"{tried:,}", f"{failed:,}") if tried else (f"{bar:,}",)
        table.add_row(
            goal, what, *shown, *([verdict] if tried else ["", "", "not run"])
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return not all_good


if __name__ == "__main__":
    sys.exit(main())
