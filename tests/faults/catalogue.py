"""All faults that are known, by id, and the tests that are named after them."""

import ast
import collections
import pathlib
import re

TESTS = pathlib.Path(__file__).parents[1]
FAULTS = {
    # Numbers
    "A1": "one weight is NaN",
    "A2": "one gradient is NaN",
    "A3": "a gradient is Inf, and then -Inf",
    "A4": "more than half of the scores are NaN, which is kept and not ranked lowest",
    "A5": "all scores are zero, as every step was skipped",
    "A6": "apply_if_finite gives up",
    "A7": "steps are skipped, or gathered by MultiSteps",
    "A8": "a slow average of bfloat16 weights",
    "A9": "products of float16 underflow or overflow",
    "A10": "bfloat16 scores tie",
    "A11": "subnormals, and zeros of both signs",
    "A12": "masking by multiplication leaves -0.0 and NaN",
    "A13": "a pruned weight becomes NaN, which no update undoes",
    "A14": "counts to keep are rounded in float32",
    "A15": "weights are counted in float32",
    "A16": "more than 2**31 weights",
    "A17": "the step counter wraps",
    "A18": "64-bit mode",
    # Arguments
    "B1": "a percentage for a fraction",
    "B2": "a negative sparsity",
    "B3": "a sparsity of NaN",
    "B4": "a sparsity that is no number",
    "B5": "a traced sparsity out of range",
    "B6": "sparsity 0 prunes",
    "B7": "sparsity 1 empties a tensor",
    "B8": "all scores are equal",
    "B9": "half of the scores are zero",
    "B10": "a compilation for every sparsity",
    # Trees and dtypes
    "C1": "a leaf without elements",
    "C2": "a leaf that is a scalar",
    "C3": "a leaf of integers",
    "C4": "a leaf of bools",
    "C5": "a complex leaf",
    "C6": "a leaf of random keys",
    "C7": "None for a leaf",
    "C8": "gradients of type float0",
    "C9": "a tree that grew, shrank, was renamed or frozen",
    "C10": "a shape that changed, and broadcasts",
    "C11": "two leaves of one shape that trade places",
    "C12": "an update without params",
    "C13": "tied weights as two leaves",
    "C14": "a donated state that is used again",
    "C15": "scores that share the buffer of the weights, both donated",
    "C16": "a layer that collapses under a common threshold",
    # Position in the optimizer
    "D1": "the mask before an optimizer",
    "D2": "the mask before whatever else changes updates",
    "D3": "false alarms in right orders",
    "D4": "a first-order score that sees updates for gradients",
    "D5": "the momentum of pruned weights",
    "D6": "a weight and its negative in several dtypes",
    # Transforms, devices, hosts
    "E1": "jit, vmap, scan, grad, remat",
    "E2": "parts of a tensor in shard_map",
    "E3": "sharded tensors under jit",
    "E4": "sums of floats depend on the sharding",
    "E5": "several processes",
    "E6": "one process decides otherwise than another",
    "E7": "other devices after a restart",
    "E8": "the debugging modes of JAX",
    # Checkpoints
    "F1": "killed while saving",
    "F2": "killed while saving asynchronously",
    "F3": "a checkpoint overwritten",
    "F4": "disk full",
    "F5": "disk full while saving asynchronously",
    "F6": "disk full while overwriting",
    "F7": "a bit flips in the data",
    "F8": "a bit flips in the metadata",
    "F9": "a file is cut short",
    "F10": "a page of a file is zeroed",
    "F11": "a file is missing",
    "F12": "a key, shape or name that differs",
    "F13": "a dtype that differs",
    "F14": "restored without a target",
    "F15": "masks of another run",
    "F16": "a name with a dot in it",
    "F17": "leaves that are no arrays",
    "F18": "another mesh",
    "F19": "unusual dtypes",
    "F20": "params alone are restored",
    "F21": "the step alone is lost",
    "F22": "scores are lost, or saved in bfloat16",
    "F23": "two writers in one directory",
    # Hostile input
    "G1": "a checkpoint with a symlink",
    "G2": "a param named like a file elsewhere",
    "G3": "files that run code",
    "G4": "hostile headers of safetensors",
    "G5": "safetensors of random bytes",
    "G6": "bools whose byte is neither 0 nor 1",
    "G7": "bombs of msgpack",
    "G8": "bombs of npz",
    "G9": "patterns that take for ever",
}
_NOT_READ = "the package reads none of these, as the lint of G3 shows"
OUT_OF_SCOPE = {
    "C13": "in Flax and Optax tied weights are one leaf; two leaves of equal values "
    "are two parameters to the optimizer, apart after one step of unequal gradients",
    **dict.fromkeys(("G4", "G5", "G7", "G8"), _NOT_READ),
}
# What other code does right as well: tests show it, and naive code passes them.
NAIVE_SURVIVES = {
    "A18": "dtypes in an Optax state stay what they are, of a float64 score as well",
    "C14": "JAX itself refuses a buffer that was donated",
    "D3": "a mask that comes last leaves exact zeros, and raises no alarm at all",
    "D6": "a weight minus itself is zero in every dtype",
    "F9": "Orbax finds that there is less to read than there should be",
}
_NAME = re.compile(r"test_((?:[A-Z]\d+_)+)\w+")


class Outcomes:
    """A plugin of pytest that collects what tests of ours and of naive code ended with.

    Attributes:
      ours: by function, how many "passed", "failed" or were "skipped".
      naive: the same of cases whose id, or whose function, is that of naive code, of
        which some "xfailed", as they should.
      left_out: functions of which some cases were not run.
    """

    def __init__(self):
        self.ours = collections.defaultdict(collections.Counter)
        self.naive = collections.defaultdict(collections.Counter)
        self.left_out = set()

    def pytest_deselected(self, items):
        self.left_out |= {item.originalname for item in items}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        function, _, case = report.nodeid.rpartition("::")[2].partition("[")
        is_naive = "_naive_" in function
        is_naive |= any(part.startswith("naive") for part in re.split(r"[-\]]", case))
        expected = hasattr(report, "wasxfail") and report.skipped
        subject = self.naive if is_naive else self.ours
        subject[function]["xfailed" if expected else report.outcome] += 1


def verdicts(outcomes):
    """``{id: (ours, naive)}`` of all faults in scope, each a `Counter` of outcomes."""
    tests = find_tests()

    def total(counts, id):
        names = {name for _, name in tests.get(id, [])}
        return sum((counts[name] for name in names), collections.Counter())

    ids = [id for id in FAULTS if id not in OUT_OF_SCOPE]
    return {id: (total(outcomes.ours, id), total(outcomes.naive, id)) for id in ids}


def survived(ours):
    """Whether tests passed and none failed."""
    return bool(ours["passed"]) and not ours["failed"]


def shown_to_fail(naive):
    """Whether naive code failed in all of what it was put to, as was expected."""
    return bool(naive["xfailed"]) and not naive["failed"] and not naive["passed"]


def find_tests():
    """``{id: [(file, function)]}`` of all tests named after one fault or several."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, ast.FunctionDef) and _NAME.fullmatch(node.name)
            for id in named[1].strip("_").split("_") if named else ():
                if id in FAULTS:
                    found.setdefault(id, []).append((path, node.name))
    return found
