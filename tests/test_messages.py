"""What an error says is asserted: every message, by words that no other one has."""

import ast
import collections
import pathlib
import re
from typing import NamedTuple

import movement_jax as mj

PACKAGE, TESTS = pathlib.Path(mj.__file__).parent, pathlib.Path(__file__).parent
LEAST = 12  # characters in a row that a message and a test have in common
# Faults of our own, and what is caught and told in other words.
INTERNAL = {"AssertionError", "NotImplementedError"}


class Site(NamedTuple):
    """A place that raises an error."""

    at: str
    words: tuple[str, ...]


def parsed(paths):
    return {path: ast.parse(path.read_text()) for path in sorted(paths)}


def called(node):
    return getattr(getattr(node, "func", None), "id", None)


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def literal(node, constants):
    """The literal parts of a string, which the values of a module are parts of."""
    text = ""
    for part in node.values if isinstance(node, ast.JoinedStr) else [node]:
        name = getattr(getattr(part, "value", None), "id", None)
        text += part.value if is_text(part) else constants.get(name, "\0")
    return text.split("\0")


def texts(node, constants):
    """The strings of some code, one by one, without those that are within others."""
    if isinstance(node, ast.JoinedStr) or is_text(node):
        yield from literal(node, constants)
    elif not (isinstance(node, ast.Expr) and is_text(node.value)):  # a docstring
        for child in ast.iter_child_nodes(node):
            yield from texts(child, constants)


def sites():
    """Every place of the package that tells a user of an error."""
    for path, tree in parsed(PACKAGE.rglob("*.py")).items():
        name = str(path.relative_to(PACKAGE))
        functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
        constants = {
            assigned.targets[0].id: assigned.value.value
            for assigned in tree.body
            if isinstance(assigned, ast.Assign) and is_text(assigned.value)
        }
        for node in ast.walk(tree):
            error = node.exc if isinstance(node, ast.Raise) else None
            if not isinstance(error, ast.Call) or called(error) in INTERNAL:
                continue  # a `raise` without a call is of what was raised elsewhere
            words = tuple(texts(error, constants))
            for call in [error, *error.args]:
                if called(call) in functions:  # words that several places share
                    body = ast.Module(functions[called(call)].body, [])
                    words = tuple(texts(body, constants))
            yield Site(f"{name}:{node.lineno}", words)


def named_values(tree):
    """Name -> what it may stand for: assigned, looped over, or given as an argument."""
    values = collections.defaultdict(list)

    def bind(target, value):
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                values[name.id].append(value)

    arguments = {
        function.name: [a.arg for a in function.args.args + function.args.kwonlyargs]
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                bind(target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            bind(node.target, node.iter)
        elif isinstance(node, ast.Call):
            if getattr(node.func, "attr", None) == "parametrize":
                for name in re.findall(r"\w+", "".join(texts(node.args[0], {}))):
                    values[name].append(node.args[1])
            for name, value in zip(arguments.get(called(node), []), node.args):
                values[name].append(value)
            for keyword in node.keywords:
                values[keyword.arg].append(keyword.value)
    return values


def asserted():
    """What tests match errors with, and what they assert to be in a text."""
    for tree in parsed(TESTS.rglob("test_*.py")).values():
        values, seen = named_values(tree), set()
        todo = [
            keyword.value
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            and getattr(call.func, "attr", None) == "raises"
            for keyword in call.keywords
            if keyword.arg == "match"
        ]
        todo += [
            compared.left
            for node in ast.walk(tree)
            if isinstance(node, ast.Assert)
            for compared in ast.walk(node)
            if isinstance(compared, ast.Compare) and isinstance(compared.ops[0], ast.In)
        ]
        while todo:
            node = todo.pop()
            yield from (re.sub(r"\\(.)", r"\1", text) for text in texts(node, {}))
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and part.id not in seen:
                    seen.add(part.id)
                    todo += values[part.id]


def own_words(site, tested, others):
    """Whether tests have a run of words of a message that no other message has."""
    for part in site.words:
        for start in range(len(part) - LEAST + 1):
            end = start + LEAST
            if part[start:end] not in tested:
                continue
            while end < len(part) and part[start : end + 1] in tested:
                end += 1
            if part[start:end] not in others:
                return True
    return False


def test_every_message_is_asserted_by_words_of_its_own(record_property):
    found, tested = list(sites()), "\0".join(asserted())
    said = {site.words: "\0".join(site.words) for site in found}
    missing = []
    for site in found:
        others = "\0".join(text for words, text in said.items() if words != site.words)
        if not own_words(site, tested, others):
            missing.append(site.at)
    record_property("R18", (len(missing), len(found)))
    assert len(found) > 150
    assert missing == []
