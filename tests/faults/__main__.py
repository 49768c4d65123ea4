"""Runs the tests and prints the catalogue: fault, tests, verdict on ours and naive."""

import argparse
import collections
import re
import sys

import pytest
from rich.console import Console
from rich.table import Table

from .catalogue import FAULTS, OUT_OF_SCOPE, TESTS, find_tests

_IDS = re.compile(r"^test_([A-Z]\d+_)+")


class Outcomes:
    """Collects what every test function ended with, ours and naive apart."""

    def __init__(self):
        self.ours = collections.defaultdict(collections.Counter)
        self.naive = collections.defaultdict(collections.Counter)

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        _, _, name = report.nodeid.rpartition("::")
        function, _, case = name.partition("[")
        expected = hasattr(report, "wasxfail") and report.skipped
        broken = "XPASS(strict)" in str(report.longrepr)
        subject = self.naive if expected or broken else self.ours
        subject[function][report.outcome] += 1


def verdict(counts, good, words):
    """What several tests of one fault say together."""
    if not counts:
        return "–"
    bad = sum(counts.values()) - counts[good]
    if not bad:
        return f"{words[0]} ({counts[good]})"
    return f"{words[1]} ({bad} of {sum(counts.values())})"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave slow tests out")
    arguments = parser.parse_args()
    tests, outcomes = find_tests(), Outcomes()
    found = [test for named in tests.values() for test in named]
    nodes = [f"{path}::{name}" for path, name in dict.fromkeys(found)]
    options = ["-n0", "-p", "no:cacheprovider", "-q", "--no-header", "-rfE"]
    options += ["--rootdir", str(TESTS.parent)]
    options += ["-m", "not slow"] if arguments.quick else []
    pytest.main([*nodes, *options], plugins=[outcomes])

    table, failed = Table("Id", "Fault", "Tests", "Ours", "Naive code"), False
    for id, fault in FAULTS.items():
        names = [name for _, name in tests.get(id, [])]
        ours = sum((outcomes.ours[name] for name in names), collections.Counter())
        naive = sum((outcomes.naive[name] for name in names), collections.Counter())
        if names:
            said = verdict(ours, "passed", ("survives", "FAILS"))
            row = said, verdict(naive, "skipped", ("fails", "SURVIVES"))
        else:
            reason = OUT_OF_SCOPE.get(id)
            row = ("out of scope", reason) if reason else ("MISSING", "")
        failed |= any(word.isupper() for word in " ".join(row[:1]).split())
        failed |= row[1].startswith("SURVIVES")
        shown = [_IDS.sub("", name).replace("_", " ") for name in names]
        table.add_row(id, fault, "\n".join(shown), *row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    survived = sum(bool(tests.get(id)) for id in FAULTS)
    print(f"{survived} of {len(FAULTS)} faults have a test that bears their name.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
