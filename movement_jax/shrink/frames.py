"""Walks a program once and gives every axis of every value its layout."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from movement_jax.shrink import dims, jaxprs, rules
from movement_jax.shrink.dims import Layout
from movement_jax.shrink.jaxprs import Call, Program, Var
from movement_jax.shrink.rules import Axes, Site


@dataclasses.dataclass(eq=False)
class Frame:
    """One call of a program. A program called twice has two.

    Attributes:
      program: what is called.
      layouts: of every variable in it, and of literals by their `id`.
      inner: the frames of what its equations call, by the number of the equation.
      derivatives: the frame of the derivative of a function that has its own, and
        which arguments it is taken of, by the number of the equation.
    """

    program: Program
    layouts: dict[Any, Axes] = dataclasses.field(default_factory=dict)
    inner: dict[int, tuple["Frame", ...]] = dataclasses.field(default_factory=dict)
    derivatives: dict[int, tuple["Frame", list[int]]] = dataclasses.field(
        default_factory=dict
    )

    def of(self, var: Var) -> Axes:
        """Layouts of the axes of a variable or literal."""
        if not jaxprs.is_literal(var):
            return self.layouts[var]
        if id(var) not in self.layouts:
            self.layouts[id(var)] = tuple(dims.new(d) for d in jaxprs.shape_of(var))
        return self.layouts[id(var)]

    @property
    def results(self) -> list[Axes]:
        """Layouts of what the program returns."""
        return [self.of(v) for v in self.program.outvars]

    def below(self) -> list["Frame"]:
        """All frames of calls in it, derivatives too."""
        own = [frame for frames in self.inner.values() for frame in frames]
        return own + [frame for frame, _ in self.derivatives.values()]


Walked = tuple[list[Axes], tuple[Frame, ...]]


class Walk:
    """Builds frames; remembers the derivatives of shared functions."""

    def __init__(self) -> None:
        self._derivatives: dict[int, tuple[Program, list[int]] | None] = {}
        self._alive: list[object] = []  # so that no `id` is used twice
        self._within = False  # a derivative, whose own are not followed

    def frame(
        self, program: Program, ins: Sequence[Axes], caller: Site | None = None
    ) -> Frame:
        """Walks a program whose arguments have the given layouts."""
        frame = Frame(program)
        for var in program.constvars:
            frame.layouts[var] = tuple(dims.new(d) for d in jaxprs.shape_of(var))
        frame.layouts |= dict(zip(program.invars, ins))
        for number, equation in enumerate(program.equations):
            operands = [frame.of(v) for v in equation.invars]
            outs = self._equation(frame, number, Site(equation, caller), operands)
            frame.layouts |= dict(zip(equation.outvars, outs))
        return frame

    def _equation(
        self, frame: Frame, number: int, site: Site, ins: list[Axes]
    ) -> list[Axes]:
        call = jaxprs.call_of(site.equation)
        if call is None:
            shapes = [*site.shapes, *([dims.size(a) for a in x] for x in ins)]
            name = site.equation.primitive.name
            empty = name not in rules.SAFE_EMPTY and any(0 in shape for shape in shapes)
            rule = rules.RULES.get(name, rules.unknown)
            return (rules.unknown if empty else rule)(site, ins)
        walked: Walked = getattr(self, f"_{call.kind}")(site, call, ins)
        outs, frame.inner[number] = walked
        if call.kind in ("jvp", "vjp") and not self._within:
            own = self._derivative(site, call.kind, ins, outs)
            if own is not None:
                frame.derivatives[number] = own
        return outs

    def _call(self, site: Site, call: Call, ins: list[Axes]) -> Walked:
        inner = self.frame(call.programs[0], ins, site)
        return inner.results, (inner,)

    _remat = _jvp = _vjp = _call

    def _scan(self, site: Site, call: Call, ins: list[Axes]) -> Walked:
        start = call.consts + call.carry
        carry, xs = ins[call.consts : start], ins[start:]
        length = site.params["length"]
        lengths = [site.pin(x[0], "the length of a scan") for x in xs]
        steps = lengths[0] if lengths else site.pinned(length, "the length of a scan")
        for other in lengths[1:]:
            site.unify(steps, other)
        args = [*ins[:start], *(x[1:] for x in xs)]
        body = self.frame(call.programs[0], args, site)
        results = body.results
        self._equate(site, carry, results[: call.carry])
        return [*carry, *((steps, *y) for y in results[call.carry :])], (body,)

    def _while(self, site: Site, call: Call, ins: list[Axes]) -> Walked:
        start = call.consts + call.body_consts
        carry = ins[start:]
        test = self.frame(call.programs[0], [*ins[: call.consts], *carry], site)
        args = [*ins[call.consts : start], *carry]
        body = self.frame(call.programs[1], args, site)
        self._equate(site, carry, body.results)
        return carry, (test, body)

    def _cond(self, site: Site, call: Call, ins: list[Axes]) -> Walked:
        branches = tuple(self.frame(each, ins[1:], site) for each in call.programs)
        for other in branches[1:]:
            self._equate(site, branches[0].results, other.results)
        return branches[0].results, branches

    def _equate(self, site: Site, ours: Sequence[Axes], theirs: Sequence[Axes]) -> None:
        for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs)):
            site.unify(a, b)

    def _derivative(
        self, site: Site, kind: str, ins: list[Axes], outs: list[Axes]
    ) -> tuple[Frame, list[int]] | None:
        equation = site.equation
        if id(equation) not in self._derivatives:
            self._alive.append(equation)
            found = jaxprs.derivative_of(equation, kind)
            self._derivatives[id(equation)] = found
        found = self._derivatives[id(equation)]
        if found is None:
            return None
        program, own = found
        inexact = [a for a, v in zip(outs, equation.outvars) if _has_tangent(v)]
        chosen = [ins[i] for i in own]
        given = chosen if kind == "jvp" else inexact
        self._within = True
        frame = self.frame(program, [*ins, *given], site)
        self._within = False
        expected = [*outs, *inexact] if kind == "jvp" else chosen
        self._equate(site, expected, frame.results)
        return frame, own


def _has_tangent(var: Var) -> bool:
    return jaxprs.is_inexact(var.aval)


def layouts_in(frame: Frame) -> list[Layout]:
    """Every layout of a frame and of all frames below."""
    found = list(itertools.chain(*frame.layouts.values()))
    for inner in frame.below():
        found += layouts_in(inner)
    return found
