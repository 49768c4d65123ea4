"""Runs a program again on arrays that were cut, equation by equation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from movement_jax.shrink import dims, jaxprs, rules
from movement_jax.shrink.dims import Atom, Layout
from movement_jax.shrink.frames import Frame, layouts_in
from movement_jax.shrink.jaxprs import Call
from movement_jax.shrink.rules import Axes, Site

Values = list[Any]  # arrays, of a program that runs
Frames = tuple[Frame, ...]
Own = tuple[Frame, list[int]] | None  # as in `Frame.derivatives`
Emit = Callable[["Cutter", Site, Values, list[Axes], list[Axes]], Values]


class Cutter:
    """Knows which units stay, and runs frames with the others gone.

    Args:
      keep: units that stay, of the leaves that lose some. Shapes ``(units,)``, bool.
    """

    def __init__(self, keep: dict[Atom, np.ndarray]) -> None:
        self._keep = keep

    def positions(self, layout: Layout) -> np.ndarray | None:
        """Positions of an axis that stay; None if it is not cut."""
        return dims.kept(layout, self._keep)

    def size(self, layout: Layout) -> int:
        """How many positions of an axis stay."""
        stays = self.positions(layout)
        return dims.size(layout) if stays is None else int(stays.sum())

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """Shape of an array that has been cut."""
        return tuple(map(self.size, axes))

    def is_cut(self, axes: Axes) -> bool:
        """Whether any axis is."""
        return any(self.positions(layout) is not None for layout in axes)

    def take(self, x: Any, axes: Sequence[Layout | None]) -> Any:
        """Cuts an array of the original size along axes that are given."""
        for axis, layout in enumerate(axes):
            stays = None if layout is None else self.positions(layout)
            if stays is not None:
                x = jnp.take(x, np.flatnonzero(stays), axis=axis)
        return x

    def run(self, frame: Frame, args: Sequence[Any]) -> Values:
        """Results of a frame, for arguments that have been cut."""
        program, values = frame.program, {}
        for var, value in zip(program.constvars, program.consts):
            values[var] = self.take(value, frame.of(var))
        values |= dict(zip(program.invars, args))

        def read(var: jaxprs.Var) -> Any:
            if jaxprs.is_literal(var):
                return self.take(var.val, frame.of(var))
            return values[var]

        for number, equation in enumerate(program.equations):
            operands = [read(v) for v in equation.invars]
            outs = self._equation(frame, number, equation, operands)
            values |= dict(zip(equation.outvars, outs))
        return [read(v) for v in program.outvars]

    def _equation(
        self, frame: Frame, number: int, equation: Any, operands: Values
    ) -> Values:
        before = [frame.of(v) for v in equation.invars]
        after = [frame.of(v) for v in equation.outvars]
        inner = frame.inner.get(number)
        touched = any(map(self.is_cut, (*before, *after)))
        if not touched and not (inner and any(map(self._is_touched, inner))):
            return jaxprs.bind(equation, operands)
        site = Site(equation)
        with jaxprs.in_context(equation), equation.ctx.manager:
            if inner:
                call = jaxprs.call_of(equation)
                assert call is not None
                own = frame.derivatives.get(number)
                method = getattr(self, f"_{call.kind}")
                return list(method(site, call, inner, own, operands))
            emit = EMITS.get(equation.primitive.name, _as_it_was)
            return emit(self, site, operands, before, after)

    def _is_touched(self, frame: Frame) -> bool:
        return any(self.positions(x) is not None for x in layouts_in(frame))

    def _call(
        self, site: Site, call: Call, frames: Frames, own: Own, operands: Values
    ) -> Values:
        return self.run(frames[0], operands)

    def _remat(
        self, site: Site, call: Call, frames: Frames, own: Own, operands: Values
    ) -> Values:
        if site.params.get("differentiated"):  # it is being computed again right now
            return self.run(frames[0], lax.optimization_barrier(operands))
        options = {k: site.params[k] for k in ("prevent_cse", "policy")}
        run = jax.checkpoint(lambda *args: self.run(frames[0], args), **options)
        outs: Values = run(*operands)
        return outs

    def _jvp(
        self, site: Site, call: Call, frames: Frames, own: Own, operands: Values
    ) -> Values:
        consts, rest = operands[: call.consts], operands[call.consts :]

        @jax.custom_jvp
        def function(*args: Any) -> Values:
            return self.run(frames[0], [*consts, *args])

        @function.defjvp
        def rule(
            primals: Sequence[Any], tangents: Sequence[Any]
        ) -> tuple[Values, Values]:
            if own is None:
                raise _no_derivative(site)
            frame, chosen = own
            dots = [tangents[i - call.consts] for i in chosen]
            outs = self.run(frame, [*consts, *primals, *dots])
            results, dots = outs[: len(site.shapes)], outs[len(site.shapes) :]
            rest = iter(dots)
            return results, [
                next(rest) if jaxprs.is_inexact(x) else jaxprs.no_tangent(x)
                for x in results
            ]

        return function(*rest)

    def _vjp(
        self, site: Site, call: Call, frames: Frames, own: Own, operands: Values
    ) -> Values:
        consts, rest = operands[: call.consts], operands[call.consts :]

        @jax.custom_vjp
        def function(*args: Any) -> Values:
            return self.run(frames[0], [*consts, *args])

        def forward(*args: Any) -> tuple[Values, tuple[Any, ...]]:
            return self.run(frames[0], [*consts, *args]), args

        def backward(args: tuple[Any, ...], cotangents: Values) -> tuple[Any, ...]:
            if own is None:
                raise _no_derivative(site)
            frame, chosen = own
            given = [
                ct
                for ct, var in zip(cotangents, site.equation.outvars)
                if jaxprs.is_inexact(var.aval)
            ]
            outs = self.run(frame, [*consts, *args, *given])
            found = dict(zip(chosen, outs))
            return tuple(found.get(i + call.consts) for i in range(len(args)))

        function.defvjp(forward, backward)
        return function(*rest)

    def _scan(
        self, site: Site, call: Call, frames: Frames, own: Own, operands: Values
    ) -> Values:
        start = call.consts + call.carry
        consts, carry = operands[: call.consts], operands[call.consts : start]

        def body(carry: Values, xs: Values) -> tuple[Values, Values]:
            outs = self.run(frames[0], [*consts, *carry, *xs])
            return outs[: call.carry], outs[call.carry :]

        carry, ys = lax.scan(
            body,
            carry,
            operands[start:],
            length=site.params["length"],
            reverse=site.params["reverse"],
            unroll=site.params["unroll"],
        )
        return [*carry, *ys]

    def _while(
        self, site: Site, call: Call, frames: Frames, own: Own, operands: Values
    ) -> Values:
        start = call.consts + call.body_consts
        tests, consts = operands[: call.consts], operands[call.consts : start]
        return lax.while_loop(
            lambda carry: self.run(frames[0], [*tests, *carry])[0],
            lambda carry: self.run(frames[1], [*consts, *carry]),
            operands[start:],
        )

    def _cond(
        self, site: Site, call: Call, frames: Frames, own: Own, operands: Values
    ) -> Values:
        index, *rest = operands
        branches = [lambda *args, f=f: self.run(f, args) for f in frames]
        outs: Values = lax.switch(index, branches, *rest)
        return outs


def _no_derivative(site: Site) -> ValueError:
    return ValueError(
        "`shrunk(fn)` cannot be differentiated here, since "
        f"{site.told('a function with a derivative of its own has only its first')}. "
        "Shrink the derivative instead, as in `shrunk(jax.grad(loss), plan)`."
    )


def _as_it_was(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    return jaxprs.bind(site.equation, vals)


def _broadcast_in_dim(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    return jaxprs.bind(site.equation, vals, shape=cutter.shape(after[0]))


def _reshape(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    return jaxprs.bind(site.equation, vals, new_sizes=cutter.shape(after[0]))


def _iota(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    """Counts the original positions, of which some stay."""
    counted, shape = site.params["dimension"], list(cutter.shape(after[0]))
    shape[counted] = site.shapes[0][counted]
    (full,) = jaxprs.bind(site.equation, vals, shape=tuple(shape))
    only = [a if i == counted else None for i, a in enumerate(after[0])]
    return [cutter.take(full, only)]


def _random_bits(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    """Those of the original shape, of which some stay."""
    (full,) = jaxprs.bind(site.equation, vals)
    rank = len(before[0])
    return [cutter.take(full, [None] * rank + list(after[0][rank:]))]


def _slice(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    starts, limits, steps = [], [], site.params["strides"]
    given = zip(site.params["start_indices"], site.params["limit_indices"])
    for i, (layout, (start, limit)) in enumerate(zip(before[0], given)):
        stays = cutter.positions(layout)
        if stays is None:
            starts.append(start)
            limits.append(limit)
        elif steps is not None and steps[i] > 1:  # inner positions all stay
            starts.append(start)
            limits.append(int(stays.sum()) - (len(stays) - limit))
        else:
            starts.append(int(stays[:start].sum()))
            limits.append(int(stays[:limit].sum()))
    return jaxprs.bind(
        site.equation, vals, start_indices=tuple(starts), limit_indices=tuple(limits)
    )


def _split(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    axis = site.params["axis"]
    sizes = tuple(cutter.size(axes[axis]) for axes in after)
    return jaxprs.bind(site.equation, vals, sizes=sizes)


def _pad(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    config = []
    for (low, high, inner), layout in zip(site.params["padding_config"], after[0]):
        stays = cutter.positions(layout)
        if stays is not None and not inner:
            low, high = int(stays[:low].sum()), int(stays[len(stays) - high :].sum())
        config.append((low, high, inner))
    return jaxprs.bind(site.equation, vals, padding_config=tuple(config))


def _dynamic_slice(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    return jaxprs.bind(site.equation, vals, slice_sizes=cutter.shape(after[0]))


def _gather(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    sizes = tuple(
        cutter.size(layout) if n == dims.size(layout) and n > 1 else n
        for layout, n in zip(before[0], site.params["slice_sizes"])
    )
    return jaxprs.bind(site.equation, vals, slice_sizes=sizes)


def _conv(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    parts, changed = rules.conv_parts(site, before), {}
    assert parts is not None
    for name in ("feature_group_count", "batch_group_count"):
        if site.params[name] > 1:
            changed[name] = cutter.size(parts["groups"])
    return jaxprs.bind(site.equation, vals, **changed)


def _tile(
    cutter: Cutter, site: Site, vals: Values, before: list[Axes], after: list[Axes]
) -> Values:
    reps = tuple(cutter.size(b) // cutter.size(a) for a, b in zip(before[0], after[0]))
    return jaxprs.bind(site.equation, vals, reps=reps)


EMITS: dict[str, Emit] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "conv_general_dilated": _conv,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "random_bits": _random_bits,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "tile": _tile,
}
