"""Settings every test shares; they must be made before JAX is imported."""

import collections
import importlib.metadata
import importlib.util
import os
import pathlib
import re

import pytest
import tiers
from budget import SCALE
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {"xla_force_host_platform_device_count": 8}
if not importlib.metadata.version("jaxlib").startswith(("0.7.", "0.8.", "0.9.")):
    # Where more devices than cores share a busy machine, one may wait for another for
    # longer than the 40 s after which XLA ends the process.
    _FLAGS["xla_cpu_collective_call_terminate_timeout_seconds"] = 600
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        _known = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{_known} --{_name}={_value}"

import jax  # noqa: E402

from movement_jax import counting, grouping, selection  # noqa: E402

jax.config.update("jax_traceback_in_locations_limit", 0)  # a twentieth of the time

# Compilation makes first examples slow, and a seed makes failures repeatable. Where
# there is time for many examples they are others each time, and what fails is printed
# as a `@reproduce_failure` to put above the test.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("drawn", deadline=None, print_blob=True, database=None)
_PROFILE = os.environ.get("MOVEMENT_JAX_PROFILE", "drawn" if SCALE >= 50 else "fixed")
settings.load_profile(_PROFILE)


@pytest.fixture
def traced_anew(monkeypatch):
    """For tests that change what programs are traced with, such as largest counts.

    Theirs are forgotten before `monkeypatch`, which comes first, ends.
    """
    once = [
        function
        for room in (counting, grouping, selection)
        for function in vars(room).values()
        if hasattr(function, "clear_cache") and function.__module__ == room.__name__
    ]
    for function in once:
        function.clear_cache()
    yield
    for function in once:
        function.clear_cache()


# Compilers for a TPU and for a GPU, which only these extras install.
_COMPILERS = {
    "tpu-aot": ["libtpu"],
    "gpu-aot": ["jax_cuda12_plugin", "jax_cuda13_plugin"],
}
_MISSING = [
    extra
    for extra, modules in _COMPILERS.items()
    if not any(map(importlib.util.find_spec, modules))
]
collect_ignore = ["test_aot.py"] if len(_MISSING) == len(_COMPILERS) else []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is nightly is slow, so that `-m "not slow"` leaves it out as well."""
    for item in items:
        path, name = _in_tests(item), getattr(item, "originalname", item.name)
        row = item.callspec.id if hasattr(item, "callspec") else ""
        tiers.SEEN[path, name].add(row)
        if tiers.is_nightly(path, name, row):
            item.add_marker("nightly")
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Most tests take longer to compile than to run: only some need fast code.

    With MOVEMENT_JAX_OPTIMIZED=1 all have it, as users do.
    """
    quickly = item.get_closest_marker("computes") is None
    quickly &= os.environ.get("MOVEMENT_JAX_OPTIMIZED") != "1"
    if quickly != jax.config.values["jax_disable_most_optimizations"]:
        jax.clear_caches()  # of programs made in the other way
        jax.config.update("jax_disable_most_optimizations", quickly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))  # of processes
    yield


def pytest_report_header():
    """Says how examples are made, what is left out, and how to have it run."""
    said = [f"examples of properties: {_PROFILE}, {SCALE} times as many"]
    if collect_ignore:
        extras = " or ".join(_MISSING)
        said += [f'test_aot.py is left out: it needs `pip install -e ".[{extras}]"`']
    return said


def _in_tests(item):
    folder = pathlib.Path(__file__).parent
    path = pathlib.Path(item.path)
    return path.relative_to(folder).as_posix() if folder in path.parents else path.name


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Notes how many examples a property test tried."""
    report = (yield).get_result()
    passing = re.findall(r"(\d+) passing", getattr(item, "hypothesis_statistics", ""))
    if report.when == "teardown" and passing:
        report.user_properties.append(("examples", sum(map(int, passing))))


def pytest_terminal_summary(terminalreporter):
    """Prints how many examples were tried, and the contract that was kept."""
    tried = [
        number
        for report in terminalreporter.getreports("")
        for name, number in report.user_properties
        if name == "examples"
    ]
    if tried:
        terminalreporter.line(f"{sum(tried)} examples of {len(tried)} properties")
    kept, broken = collections.Counter(), collections.Counter()
    for outcome, rows in (("passed", kept), ("failed", broken)):
        for report in terminalreporter.stats.get(outcome, []):
            if "test_contract.py" in report.nodeid and " | " in report.nodeid:
                rows[report.nodeid.partition("[")[2].rstrip("]")] += 1
    if kept or broken:
        terminalreporter.section("contract: criterion | form | wrapper")
    for row in sorted(kept | broken, key=lambda row: row.split(" | ")[::-1]):
        verdict = f"{broken[row]} BROKEN" if broken[row] else "ok"
        terminalreporter.line(f"{row:<60} {kept[row]:>3} kept  {verdict}")
