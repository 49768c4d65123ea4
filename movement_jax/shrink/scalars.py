"""What element-wise operations give where their operands are known numbers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

# Of two operands, or of one and the equation's params: see `evaluate`.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "acos": np.arccos,
    "acosh": np.arccosh,
    "add": np.add,
    "add_any": np.add,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "bessel_i1e": lambda x: x if x == 0 else math.nan,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "clamp": lambda low, x, high: min(max(x, low), high),
    "conj": lambda x: x,
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "cos": np.cos,
    "cosh": np.cosh,
    "digamma": lambda x: math.nan,
    "div": np.divide,
    "eq": np.equal,
    "erf": math.erf,
    "erf_inv": lambda x: x if x == 0 else math.nan,
    "erfc": math.erfc,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "imag": lambda x: 0.0,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "lgamma": lambda x: math.nan,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "name": lambda x: x,
    "ne": np.not_equal,
    "neg": np.negative,
    "or": lambda x, y: float(x != 0 or y != 0),
    "pow": np.power,
    "real": lambda x: x,
    "rem": np.fmod,
    "rsqrt": lambda x: np.divide(1.0, np.sqrt(x)),
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda x: x,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
}


def evaluate(
    primitive: str, params: dict[str, Any], operands: list[float]
) -> float | None:
    """What an operation gives for numbers, up to rounding; None if that is not known.

    Only whether the result is zero, one or not finite is relied on where operands are
    0; other numbers are followed as far as they are exact in 64 bits.
    """
    with np.errstate(all="ignore"):
        if primitive == "integer_pow":
            return float(np.power(float(operands[0]), params["y"]))
        if primitive == "convert_element_type":
            kind = np.dtype(params["new_dtype"]).kind if _plain(params) else "f"
            x = operands[0]
            if kind == "b":
                return float(x != 0)
            return float(math.trunc(x)) if kind in "iu" and math.isfinite(x) else x
        if primitive == "round":
            return float(np.round(operands[0]))
        if primitive == "reduce_precision":
            return operands[0] if operands[0] == 0 else None
        function = _FUNCTIONS.get(primitive)
        if function is None:
            return None
        try:
            return float(function(*map(float, operands)))
        except (ValueError, OverflowError, ZeroDivisionError):
            return math.nan


def _plain(params: dict[str, Any]) -> bool:
    try:
        np.dtype(params["new_dtype"])
    except TypeError:
        return False
    return True
