"""Runs the tests and prints the catalogue: fault, tests, verdict on ours and naive."""

import argparse
import re
import sys

import pytest
from rich.console import Console
from rich.table import Table

from . import catalogue
from .catalogue import FAULTS, NAIVE_SURVIVES, OUT_OF_SCOPE, TESTS, find_tests

_WRONG = "FAILS", "MISSING", "NOT AS"
_IDS = re.compile(r"^test_([A-Z]\d+_)+")


def on_ours(counts, left_out):
    if catalogue.survived(counts):
        return f"survives ({counts['passed']})"
    if counts["failed"]:
        return f"FAILS ({counts['failed']} of {counts.total()})"
    return "not run" if left_out or counts["skipped"] else "MISSING"


def on_naive(id, counts, left_out):
    if id in NAIVE_SURVIVES:
        good = not counts["failed"] and not counts["xfailed"]
        said = f"survives ({counts['passed']}): {NAIVE_SURVIVES[id]}"
        missing = not counts["passed"] and not left_out
        return said if good and not missing else f"NOT AS SAID: {said}"
    if catalogue.shown_to_fail(counts):
        return f"fails ({counts['xfailed']})"
    if counts["failed"] or counts["passed"]:
        return f"NOT AS EXPECTED ({counts['failed'] + counts['passed']})"
    return "not run" if left_out or counts["skipped"] else "MISSING"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave slow tests out")
    arguments = parser.parse_args()
    tests, outcomes = find_tests(), catalogue.Outcomes()
    found = [test for named in tests.values() for test in named]
    nodes = [f"{path}::{name}" for path, name in dict.fromkeys(found)]
    options = ["-n0", "-p", "no:cacheprovider", "-q", "--no-header", "-rfE"]
    options += ["--show-capture=no", "--rootdir", str(TESTS.parent)]
    options += ["-m", "not slow" if arguments.quick else ""]
    pytest.main([*nodes, *options], plugins=[outcomes])

    table, wrong, rows = Table("Id", "Fault", "Tests", "Ours", "Naive code"), [], []
    verdicts = catalogue.verdicts(outcomes)
    for id, fault in FAULTS.items():
        names = [name for _, name in tests.get(id, [])]
        if id in OUT_OF_SCOPE:
            row = "out of scope", OUT_OF_SCOPE[id]
        else:
            (ours, naive), left_out = verdicts[id], outcomes.left_out & {*names}
            row = on_ours(ours, left_out), on_naive(id, naive, left_out)
            rows.append(row)
            wrong += [id] if any(said.startswith(_WRONG) for said in row) else []
        shown = [_IDS.sub("", name).replace("_", " ") for name in names]
        table.add_row(id, fault, "\n".join(shown), *row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    survive = sum(ours.startswith("survives") for ours, _ in rows)
    fail = sum(naive.startswith("fails") for _, naive in rows)
    print(
        f"{len(rows)} of {len(FAULTS)} faults are in scope. Ours survives {survive}; "
        f"naive code fails {fail}, and is known to survive {len(NAIVE_SURVIVES)}."
    )
    if wrong:
        print(f"Not as they should be: {', '.join(wrong)}.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
