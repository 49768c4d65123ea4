"""All that touches jaxprs: tracing, reading, sub-programs, binding, source lines.

The rest of the sub-package sees :class:`Program` and the equations in it. Their
``primitive``, ``params``, ``invars`` and ``outvars`` are JAX's; what changes between
versions of JAX is read here and nowhere else.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

Equation = Any  # jax.extend.core.JaxprEqn
Var = Any  # jax.extend.core.Var or Literal

_CALLS = {"jit", "pjit", "closed_call", "core_call", "call", "eval_jaxpr"}
_REMATS = {"checkpoint", "remat", "remat2"}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function.

    Attributes:
      equations: in the order in which they run.
      constvars: variables bound to ``consts``.
      consts: arrays that the function closes over.
      invars: arguments.
      outvars: results; variables or literals.
    """

    equations: tuple[Equation, ...]
    constvars: tuple[Var, ...]
    consts: tuple[Any, ...]
    invars: tuple[Var, ...]
    outvars: tuple[Var, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """An equation that runs other programs.

    Attributes:
      kind: ``"call"``, ``"remat"``, ``"jvp"``, ``"vjp"``, ``"scan"``, ``"while"`` or
        ``"cond"``.
      programs: the body; condition and body of a while loop; branches of a cond.
      consts: how many leading arguments are constants of a scan, of a function with
        derivatives of its own, or of the condition of a while loop.
      body_consts: the constants of the body of a while loop.
      carry: how many arguments after them are carried by a scan.
    """

    kind: str
    programs: tuple[Program, ...]
    consts: int = 0
    body_consts: int = 0
    carry: int = 0


def trace(function: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """Traces a function; the program, and the tree of what it returns."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    return _program(closed), out


def call_of(equation: Equation) -> Call | None:
    """What an equation calls, if it does."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS or name in _REMATS:
        body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        return Call("call" if name in _CALLS else "remat", (_program(body),))
    if name in ("custom_jvp_call", "custom_vjp_call"):
        kind = "jvp" if name == "custom_jvp_call" else "vjp"
        body = _program(params["call_jaxpr"])
        return Call(kind, (body,), consts=params["num_consts"])
    if name == "scan":
        consts, carry = _scan_counts(params)
        return Call("scan", (_program(params["jaxpr"]),), consts=consts, carry=carry)
    if name == "while":
        programs = (_program(params["cond_jaxpr"]), _program(params["body_jaxpr"]))
        consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
        return Call("while", programs, consts=consts, body_consts=body_consts)
    if name == "cond":
        return Call("cond", tuple(_program(branch) for branch in params["branches"]))
    return None


def derivative_of(equation: Equation, kind: str) -> tuple[Program, list[int]] | None:
    """What a function with a derivative of its own computes when differentiated.

    Args:
      equation: a call of such a function.
      kind: ``"jvp"`` for the program ``primals, tangents -> outputs, tangents``,
        ``"vjp"`` for ``primals, cotangents -> cotangents``. Tangents and cotangents
        are those of inexact arrays only.

    Returns:
      The program, and which arguments have tangents; None if it cannot be
      differentiated.
    """
    call = call_of(equation)
    assert call is not None
    primals = [_struct(v) for v in equation.invars]
    results = [_struct(v) for v in equation.outvars]
    own = [i for i, x in enumerate(primals) if i >= call.consts and is_inexact(x)]
    if not own:
        return None

    def part(args: Sequence[Any]) -> Callable[..., list[Any]]:
        def function(*chosen: Any) -> list[Any]:
            full = list(args)
            for i, x in zip(own, chosen):
                full[i] = x
            return bind(equation, full)

        return function

    def jvp(*args: Any) -> list[Any]:
        args, tangents = args[: len(primals)], args[len(primals) :]
        chosen = [args[i] for i in own]
        outs, dots = jax.jvp(part(args), chosen, list(tangents))
        return [*outs, *(t for t, out in zip(dots, results) if is_inexact(out))]

    def vjp(*args: Any) -> Any:
        args, given = args[: len(primals)], iter(args[len(primals) :])
        _, pull = jax.vjp(part(args), *[args[i] for i in own])
        return pull([next(given) if is_inexact(x) else no_tangent(x) for x in results])

    tangents = (
        [primals[i] for i in own]
        if kind == "jvp"
        else [x for x in results if is_inexact(x)]
    )
    try:
        program, _ = trace(jvp if kind == "jvp" else vjp, *primals, *tangents)
    except Exception:  # the rule is the user's: any error may come
        return None
    return program, own


def bind(equation: Equation, args: Sequence[Any], **changed: Any) -> list[Any]:
    """Runs an equation on other arguments, with some of its params changed."""
    params = {**equation.params, **changed}
    functions: Sequence[Any] = ()
    bound = equation.primitive.get_bind_params(params)
    if isinstance(bound, tuple):  # before JAX 0.8 functions came apart from the params
        functions, bound = bound
    with in_context(equation), equation.ctx.manager:
        out = equation.primitive.bind(*functions, *args, **bound)
    return list(out) if equation.primitive.multiple_results else [out]


def in_context(equation: Equation) -> Any:
    """Context in which new equations say that they come from an equation's line."""
    info = equation.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    return source_info_util.user_context(info.traceback, name_stack=names)


def source_line(equation: Equation) -> str | None:
    """Where in the user's program an equation comes from, if known: ``file.py:12``."""
    told = source_info_util.summarize(equation.source_info)
    place = told.split(" (")[0].split(":")
    if len(place) < 2:
        return None
    return f"{'/'.join(pathlib.PurePath(place[0]).parts[-2:])}:{place[1]}"


def shape_of(var: Var) -> tuple[int, ...]:
    """Shape of a variable or literal; of what is no array, ``()``."""
    shape = getattr(var.aval, "shape", ())
    if not all(isinstance(d, int) for d in shape):
        raise ValueError(
            f"Shapes must be numbers, got {shape}: symbolic dimensions cannot be "
            "shrunk. Call with the shapes you export for, or export each batch size."
        )
    return tuple(shape)


def is_literal(var: Var) -> bool:
    """Whether a value is written into the program."""
    return isinstance(var, core.Literal)


def is_inexact(x: Any) -> bool:
    """Whether an array has a derivative."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def no_tangent(x: Any) -> np.ndarray:
    """The tangent of an array of integers."""
    return np.zeros(x.shape, jax.dtypes.float0)


def _struct(var: Var) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        shape_of(var), var.aval.dtype, weak_type=getattr(var.aval, "weak_type", False)
    )


def _program(jaxpr: Any) -> Program:
    """Of an open or closed jaxpr, which are one class from JAX 0.12 on."""
    consts = tuple(getattr(jaxpr, "consts", ()))
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    constvars, invars = tuple(inner.constvars), tuple(inner.invars)
    if len(consts) != len(constvars):
        raise NotImplementedError("A jaxpr with constants that have no value.")
    return Program(tuple(inner.eqns), constvars, consts, invars, tuple(inner.outvars))


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    if "ft_in" in params:  # from JAX 0.11 on
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]
