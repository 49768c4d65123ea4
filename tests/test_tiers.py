import fnmatch
import os
import pathlib

import jax
import pytest
import tiers

TESTS = pathlib.Path(__file__).parent
ROWS = [(path, name) for path, names in tiers.KEPT.items() for name in names]


@pytest.mark.parametrize("path, name", ROWS)
def test_what_is_kept_is_there(path, name, request):
    assert f"def {name}(" in (TESTS / path).read_text()
    if not any(file == path for file, _ in tiers.SEEN):
        pytest.skip(f"{path} is not among the tests that run")
    if any("::" in arg for arg in request.config.args):
        pytest.skip("rows are named one by one")
    rows = tiers.SEEN[path, name]
    assert rows
    for pattern in tiers.KEPT[path][name]:
        assert fnmatch.filter(rows, pattern), f"no row is called {pattern}: {rows}"


def test_only_what_is_not_kept_is_nightly():
    path = "faults/test_checkpoints.py"
    (name,) = tiers.KEPT[path]
    assert not tiers.is_nightly(path, name, "0")
    assert tiers.is_nightly(path, name, "1")
    assert not tiers.is_nightly(path, "another", "1")
    assert not tiers.is_nightly("another.py", name, "1")


@pytest.mark.parametrize(
    "optimized",
    [
        pytest.param(False, id="most tests"),
        pytest.param(True, id="marked", marks=pytest.mark.computes),
    ],
)
def test_machine_code_is_optimized_for_what_computes(optimized):
    optimized |= os.environ.get("MOVEMENT_JAX_OPTIMIZED") == "1"
    assert jax.config.values["jax_disable_most_optimizations"] != optimized
    assert os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == str(int(not optimized))
