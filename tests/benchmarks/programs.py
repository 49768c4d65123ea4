"""Compiled programs: what they do, move, copy and reserve, read from their text."""

import collections
import dataclasses
import math
import re
from typing import Any

import jax

LARGE = 1024  # bytes: no tensor is smaller, no count or flag of a few leaves larger
MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
COLLECTIVES = (*MOVES, "all-reduce")
SHOWN = ("sort", "while", "fusion", "copy", *COLLECTIVES)
NBYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}

_INSTRUCTION = re.compile(r" *(?:ROOT )?%\S+ = (.*?) ([a-z][a-z\d-]*)\(")
_FUSION = r" fusion\(.*calls=%([\w.-]+)"
_PLAIN = {"parameter", "copy", "tuple", "get-tuple-element", "bitcast"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of a compiled program.

    Attributes:
      name: such as ``"all-reduce"``; the start of an asynchronous pair counts as it.
      result: the type it returns.
      nbytes: of all arrays it returns; of an asynchronous one without its operands.
      where: the computation it is in.
      looped: whether that is run by a while loop, perhaps never and perhaps often.
    """

    name: str
    result: str
    nbytes: int
    where: str
    looped: bool


class Program:
    """A compiled program: its operations with the types they return, its memory."""

    def __init__(self, lowered: jax.stages.Lowered, **options: Any):
        self.executable = lowered.compile(options or None)
        self.text = self.executable.as_text()
        memory = self.executable.memory_analysis()
        self.temp = memory.temp_size_in_bytes
        self.alias = memory.alias_size_in_bytes
        self.arguments = memory.argument_size_in_bytes
        # What it needs beside them at once, with fast memory on a TPU; `temp` is that
        # as XLA packs it, with gaps.
        self.live = memory.peak_memory_in_bytes - self.arguments
        self.returned = memory.output_size_in_bytes
        self.operations = _operations(self.text)
        self.ops = collections.Counter(op.name for op in self.operations)

    def __str__(self) -> str:
        telling = {n: self.ops[n] for n in SHOWN if self.ops[n]}
        return (
            f"{telling}, {self.temp} bytes temporary, {self.live} at once, "
            f"{self.alias} of {self.returned} returned bytes in place"
        )

    def sorts(self) -> bool:
        """Whether anything is sorted."""
        return self.ops["sort"] > 0 or bool(
            re.search(r'custom_call_target="[^"]*([Tt]op_?[Kk]|[Ss]ort)', self.text)
        )

    def aliases_all_it_returns(self) -> bool:
        """Whether all arrays are updated in place; a table of them is left."""
        return self.returned - self.alias <= LARGE

    def collectives(self, looped: bool | None = None) -> list[Operation]:
        """All that devices send each other: in while loops, outside, or both."""
        found = [op for op in self.operations if op.name in COLLECTIVES]
        return [op for op in found if looped is None or op.looped == looped]

    def moved(self) -> list[Operation]:
        """What devices send each other, save for counts."""
        return [op for op in self.collectives() if op.nbytes >= LARGE]

    def copies_on_every_step(self) -> list[Operation]:
        """Copies from main memory to main memory outside of loops.

        Not those to and from a TPU's on-chip memory, ``S(1)`` in a type. What it takes
        in so is read by an operation soon after, which then reads main memory no more,
        AdamW alone has such. What goes through a loop in there is also written back,
        on every step: of 163 leaves with 97 MB of masks one mask, 3.2 MB.
        """
        return [
            op
            for op in self.operations
            if op.name == "copy"
            and not op.looped
            and "S(" not in op.result
            and op.nbytes >= LARGE
        ]

    def flops(self) -> dict[str, float]:
        """What XLA counts: bodies of while loops once."""
        cost = self.executable.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        return {k: cost.get(k, math.nan) for k in ("flops", "bytes accessed")}


def nbytes_of(result: str) -> int:
    """Bytes of all arrays in the type of an instruction."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    return sum(
        NBYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in arrays
    )


def _operations(text: str) -> list[Operation]:
    computations = _computations(text)
    looped = _reached(computations, r"(?:body|condition)=%([\w.-]+)")
    fused = _reached(computations, _FUSION)
    nested = _reached({name: computations[name] for name in fused}, _FUSION)
    found = []
    for where, lines in computations.items():
        matches = [_INSTRUCTION.match(line) for line in lines]
        here = [(match[1], match[2]) for match in matches if match]
        only_copies = {name for _, name in here} <= _PLAIN
        in_registers = where in nested or (where in fused and not only_copies)
        for result, name in here:
            if name.endswith("-done") or (name == "copy" and in_registers):
                continue
            nbytes = nbytes_of(result)
            if name.endswith("-start"):
                name = name.removesuffix("-start")
                nbytes = _received(name, result)
            found.append(Operation(name, result, nbytes, where, where in looped))
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation, by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line.rstrip())
        if header:
            lines = found.setdefault(header[1], [])
        elif line.startswith(" "):
            lines.append(line.partition(", metadata=")[0])
    return found


def _reached(computations: dict[str, list[str]], called_by: str) -> set[str]:
    """Computations called in that way, and all that they call."""
    lines = [line for lines in computations.values() for line in lines]
    todo, seen = re.findall(called_by, "\n".join(lines)), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations.get(name, ()):
            called = re.search(r"\), .*", line)
            words = re.findall(r"%([\w.-]+)", called[0]) if called else []
            todo += [word for word in words if word in computations]
    return seen


def _received(name: str, result: str) -> int:
    """Bytes an asynchronous collective returns: its type lists the operands first."""
    parts = re.findall(r"\b[a-z]+\d*\[[\d,]*\]", result)
    sizes = [nbytes_of(part) for part in parts]
    if name == "all-reduce" or len(sizes) < 2:
        return sum(sizes)
    return max(sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :]))
