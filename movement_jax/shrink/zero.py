"""Where values are zero if removed units are, and whether cutting these is exact.

A second walk over the frames carries, for each value, at which units of which leaf it
is zero along which axis, given that the parameters of removed units are. Where an axis
disappears (a contraction, a sum), its removed positions must contribute nothing; else
removing these units would change the result.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax.shrink import jaxprs, zero_rules
from movement_jax.shrink.flows import Exactness, Flow, meet, moved, same
from movement_jax.shrink.frames import Frame
from movement_jax.shrink.rules import Site

_MOST_READ = 1 << 20  # elements of a constant that are compared


def follow(
    frame: Frame, ins: Sequence[Flow], exact: Exactness, caller: Site | None = None
) -> list[Flow]:
    """Runs the rules over a frame; what is known of its results."""
    known: dict[Any, Flow] = {}
    program = frame.program
    known |= {v: _constant(c) for v, c in zip(program.constvars, program.consts)}
    known |= dict(zip(program.invars, ins))

    def read(var: jaxprs.Var) -> Flow:
        return _constant(var.val) if jaxprs.is_literal(var) else known[var]

    for number, equation in enumerate(program.equations):
        flows = [read(v) for v in equation.invars]
        site = Site(equation, caller)
        before = [frame.of(v) for v in equation.invars]
        after = [frame.of(v) for v in equation.outvars]
        call = jaxprs.call_of(equation)
        if call is not None:
            outs = _CALLS[call.kind](frame.inner[number], call, flows, exact, site)
            if number in frame.derivatives:
                _derivative(frame.derivatives[number], call.kind, flows, exact, site)
        else:
            name = equation.primitive.name
            outs = zero_rules.RULES.get(name, zero_rules.unknown)(
                exact, site, flows, before, after
            )
        known |= dict(zip(equation.outvars, outs))
    return [read(v) for v in program.outvars]


def _constant(value: Any) -> Flow:
    if isinstance(value, jax.core.Tracer) or not hasattr(value, "dtype"):
        plain = isinstance(value, int | float) and math.isfinite(value)
        return Flow(float(value)) if plain else Flow()
    shape = np.shape(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return Flow()
    unread = value.dtype.kind == "c" or value.dtype == jax.dtypes.float0
    if unread or not 0 < math.prod(shape) <= _MOST_READ:
        return Flow()
    array = np.asarray(value)
    first = array.reshape(-1)[0]
    return Flow(float(first)) if (array == first).all() else Flow()


def _call(
    frames: Any, call: Any, flows: list[Flow], exact: Exactness, site: Site
) -> list[Flow]:
    return follow(frames[0], flows, exact, site)


def _scan(
    frames: Any, call: Any, flows: list[Flow], exact: Exactness, site: Site
) -> list[Flow]:
    (body,), start = frames, call.consts + call.carry
    consts, carry = flows[: call.consts], flows[call.consts : start]
    xs = [moved(x, {i: i - 1 for i, _ in x.zero}) for x in flows[start:]]
    carry, outs = _settle(
        lambda carry: follow(body, [*consts, *carry, *xs], exact, site), carry
    )
    ys = [moved(y, {i: i + 1 for i, _ in y.zero}) for y in outs[call.carry :]]
    return [*carry, *ys]


def _while(
    frames: Any, call: Any, flows: list[Flow], exact: Exactness, site: Site
) -> list[Flow]:
    start = call.consts + call.body_consts
    tests, consts, carry = (
        flows[: call.consts],
        flows[call.consts : start],
        flows[start:],
    )
    carry, _ = _settle(lambda c: follow(frames[1], [*consts, *c], exact, site), carry)
    follow(frames[0], [*tests, *carry], exact, site)
    return carry


def _cond(
    frames: Any, call: Any, flows: list[Flow], exact: Exactness, site: Site
) -> list[Flow]:
    branches = [follow(frame, flows[1:], exact, site) for frame in frames]
    out = branches[0]
    for other in branches[1:]:
        out = [meet(a, b) for a, b in zip(out, other)]
    return out


_CALLS = {
    **dict.fromkeys(("call", "remat", "jvp", "vjp"), _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _derivative(
    own: Any, kind: str, flows: list[Flow], exact: Exactness, site: Site
) -> None:
    """Tangents are zero where values are; nothing is known of cotangents."""
    frame, chosen = own
    rest = len(frame.program.invars) - len(flows)
    more = [Flow(zero=flows[i].zero) for i in chosen]
    given = more if kind == "jvp" else [Flow()] * rest
    follow(frame, [*flows, *given], exact, site)


def _settle(
    body: Callable[[list[Flow]], list[Flow]], carry: list[Flow]
) -> tuple[list[Flow], list[Flow]]:
    """What stays known of a carry, however often the body runs."""
    while True:
        outs = body(carry)
        met = [meet(a, b) for a, b in zip(carry, outs)]
        if all(same(a, b) for a, b in zip(met, carry)):
            return carry, outs
        carry = met
