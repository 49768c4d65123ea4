"""Settings every test shares; they must be made before JAX is imported."""

import collections
import importlib.util
import os

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES}"

# Compilation makes first examples slow, and a seed makes failures repeatable.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.load_profile("fixed")


# Programs are compiled for a TPU by libtpu, which only the extra `tpu-aot` installs.
_HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
collect_ignore = [] if _HAS_LIBTPU else ["test_aot.py"]


def pytest_report_header():
    """Says what is left out, and how to have it run."""
    if not _HAS_LIBTPU:
        return 'test_aot.py is left out: it needs `pip install -e ".[test,tpu-aot]"`'
    return None


def pytest_terminal_summary(terminalreporter):
    """Prints the contract: how many checks every transformation kept."""
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
