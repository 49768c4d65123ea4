"""The benchmarks run, and say all that they are asked to; figures are not looked at."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.computes
PARTS = [
    "masks",
    "steps",
    "training",
    "memory",
    "compiling",
    "traffic",
    "growth",
    "accelerator",
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The JSON of a run at tiny sizes, where it is, and what was printed."""
    folder = tmp_path_factory.mktemp("benchmarks")
    printed = command("--quick", "--out", str(folder))
    path = folder / "benchmarks-quick.json"
    return json.loads(path.read_text()), path, printed


def command(*arguments):
    words = [sys.executable, "-m", "tests.benchmarks", *arguments]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.nightly
def test_every_part_is_measured_and_says_where_and_when(quick):
    results, _, _ = quick
    assert list(results["parts"]) == PARTS
    assert set(results["seconds"]) == set(PARTS)
    assert results["failed"] == []
    assert results["date"] and results["command"].endswith("--quick")
    assert {"python", "jax", "optax"} <= set(results["versions"])
    assert {"cores", "device", "load"} <= set(results["machine"])


@pytest.mark.nightly
def test_every_time_is_a_ratio_with_its_spread(quick):
    parts = quick[0]["parts"]
    rows = [*parts["masks"]["one_tensor"], parts["masks"]["tree"], *parts["steps"]]
    rows += [*parts["training"], *parts["compiling"], *parts["growth"]["steps"]]
    for row in rows:
        if "left_out" not in row:
            low, middle, high = row["ratio"]
            assert 0 < low <= middle <= high
            assert row["ms"] > 0 and row["over_ms"] > 0 and row["turns"] >= 1


@pytest.mark.nightly
def test_tables_and_bars_and_the_section_of_the_readme_are_printed(quick):
    _, path, printed = quick
    assert printed.count("\n## ") == len(PARTS) + 1
    assert "| what | bar | reached | verdict |" in printed
    assert command("--tables", str(path)) == printed
    section = command("--readme", str(path))
    assert section.startswith("## What it costs")
    assert section.count("**") >= 2 * 7
