"""What an error says is asserted: every message, by its own words, in some test."""

import ast
import pathlib
import re

import movement_jax as mj

TESTS = pathlib.Path(__file__).parent
SHARED = 10  # characters in a row that a message and a test have in common
# Faults of our own, and what is caught and told in other words.
INTERNAL = {"AssertionError", "NotImplementedError"}


def strings(node):
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def messages():
    """Where an error is raised -> the literal parts of what it says."""
    package = pathlib.Path(mj.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            parts = list(strings(node.exc))
            if parts and getattr(node.exc.func, "id", None) not in INTERNAL:
                yield f"{path.relative_to(package)}:{node.lineno}", parts


def test_every_message_is_asserted_by_its_words(record_property):
    asserted = "\n".join(
        re.sub(r"\\(.)", r"\1", text)
        for path in TESTS.rglob("test_*.py")
        for text in strings(ast.parse(path.read_text()))
    )

    def known(parts):
        n = min(SHARED, max(map(len, parts)))
        runs = (part[i : i + n] for part in parts for i in range(len(part) - n + 1))
        return any(run in asserted for run in runs)

    found = dict(messages())
    missing = [at for at, parts in found.items() if not known(parts)]
    record_property("R18", (len(missing), len(found)))
    assert len(found) > 150
    assert missing == []
