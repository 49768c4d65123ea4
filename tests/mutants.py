"""Changes the core rooms by one operator or number, and looks whether a test notices.

``python -m tests.mutants 20`` tries that many of all such changes, drawn by a seed, on
a copy of this project, and prints the score and the changes that no test noticed.
"""

import argparse
import ast
import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 90  # seconds: a test that takes longer hangs
_RANKING = (
    "tests/faults/test_fuzz.py",
    "tests/test_wide.py",
    "tests/test_selection.py",
    "tests/test_allocation.py",
    "tests/test_manual_axes.py",
)
ROOMS = {  # what is changed, and the tests that should notice, quick ones first
    "selection.py": _RANKING,
    "counting.py": _RANKING,
    "wide.py": ("tests/test_wide.py", "tests/test_allocation.py"),
    "allocation.py": ("tests/test_allocation.py", *_RANKING),
    "masking.py": (
        "tests/test_prune.py",
        "tests/test_transform.py",
        "tests/test_state.py",
        "tests/test_health.py",
        "tests/test_manual_axes.py",
        "tests/shrink/test_shrink_units.py",
        "tests/test_soft.py",
        "tests/test_structure.py",
    ),
    "packing.py": ("tests/test_packing.py",),
    "scoring.py": (
        "tests/test_state.py",
        "tests/test_scoring.py",
        "tests/test_health.py",
    ),
}
# How a search guesses: whatever these are, it ends at the same mask, only later.
SPEED = {"CANDIDATES", "_TIES", "_REACH", "_USUAL", "_TIMES", "_SPREAD", "_EVEN"}
SPEED |= {"_GUESSES", "_guess", "_highest", "hint", "key_of"}
# Changed statements, or their beginnings, that leave every mask as it is.
SAME = {
    tuple(line.split(": ", 1))
    for line in (ROOT / "tests" / "mutants.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: a field of a node of the syntax tree of a room."""

    room: str
    tree: ast.Module
    statement: ast.stmt
    node: Any
    field: str
    value: Any

    def source(self) -> str:
        """The room with the change in it."""
        return self._changed(self.tree)

    def line(self) -> str:
        """The statement with the change in it, or how it begins."""
        return self._changed(self.statement).partition("\n")[0]

    def __str__(self) -> str:
        change = f"{ast.unparse(self.node)}  ->  {self._changed(self.node)}"
        return f"{self.room}:{self.node.lineno}: {change}\n{'':10}in {self.line()}"

    def _changed(self, shown: ast.AST) -> str:
        before = getattr(self.node, self.field)
        setattr(self.node, self.field, self.value)
        text = ast.unparse(shown)
        setattr(self.node, self.field, before)
        return text


def mutants(room):
    """All changes to one room."""
    tree = ast.parse((ROOT / "movement_jax" / room).read_text())
    for statement, node in _code(tree):
        for field, value in _changes(node):
            mutant = Mutant(room, tree, statement, node, field, value)
            if (room, mutant.line()) not in SAME:
                yield mutant


def _code(node, statement=None):
    """Every node below with its statement, but for annotations and what is speed."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            named = {getattr(t, "id", None) for t in getattr(child, "targets", [])}
            named |= {getattr(child, "name", None), getattr(child, "arg", None)}
            if isinstance(child, ast.AST) and not named & SPEED:
                own = child if isinstance(child, ast.stmt) else statement
                yield own, child
                yield from _code(child, own)


def _changes(node):
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield "op", SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in SWAPS:
                yield "ops", [*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]]
    elif isinstance(node, ast.UnaryOp):  # twice is as good as not at all
        yield "operand", ast.UnaryOp(node.op, node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "value", node.value + 1


def notices(copy, room):
    """Whether the tests of a room fail in a copy of the project; None if they hang."""
    tests = [sys.executable, "-m", "pytest", *ROOMS[room]]
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider"]
    options += ["-m", "not slow", "-k", "not naive"]
    options += ["-o", f"faulthandler_timeout={PATIENCE}"]
    options += ["-o", "faulthandler_exit_on_timeout=true"]
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(copy / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # What a change does to a program, it does however fast that is.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        [*tests, *options], cwd=copy, env=environment, capture_output=True, check=False
    )
    if b"Timeout (" in done.stderr:
        return None
    return done.returncode != 0


def main():
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__)
    parser.add_argument("sample", type=int, help="how many changes to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", default=[*ROOMS], choices=[*ROOMS])
    arguments = parser.parse_args()
    everything = [mutant for room in arguments.rooms for mutant in mutants(room)]
    count = min(arguments.sample, len(everything))
    sample = random.Random(arguments.seed).sample(everything, count)
    sample.sort(key=lambda mutant: arguments.rooms.index(mutant.room))
    killed, survivors, hanging, passing = 0, [], [], set()
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("movement_jax", "tests"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutant in sample:
            path = copy / "movement_jax" / mutant.room
            original = (ROOT / "movement_jax" / mutant.room).read_text()
            if ROOMS[mutant.room] not in passing:
                if notices(copy, mutant.room) is not False:
                    sys.exit(f"The tests of {mutant.room} do not pass as it is.")
                passing.add(ROOMS[mutant.room])
            path.write_text(mutant.source())
            noticed = notices(copy, mutant.room)
            path.write_text(original)
            killed += noticed is True
            survivors += [mutant] if noticed is False else []
            hanging += [mutant] if noticed is None else []
            said = {True: "noticed", False: "SURVIVES", None: "hangs"}[noticed]
            print(f"{said:9} {mutant}", flush=True)
    print(f"\n{len(everything)} changes, {count} tried: {killed} noticed, ", end="")
    print(f"{len(survivors)} survive, {len(hanging)} hang, which is noticed too.")
    print(f"Score {1 - len(survivors) / count:.0%}")
    for mutant in survivors:
        print(f"  {mutant}")


if __name__ == "__main__":
    main()
