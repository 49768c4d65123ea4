"""What element-wise operations give where their operands are known numbers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

_EXACT = 2**53  # integers up to here are in 64 bits of a float

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
    primitive: str, params: dict[str, Any], operands: list[float], dtype: Any
) -> float | None:
    """What an operation gives for numbers, up to rounding; None if that is not known.

    Only whether the result is zero, one or not finite is relied on where operands are
    0; other numbers are followed as far as they are exact in 64 bits.

    Args:
      primitive: name of the operation.
      params: of the equation.
      operands: what they are.
      dtype: of the result.
    """
    kind = dtype.kind if isinstance(dtype, np.dtype) else "f"
    with np.errstate(all="ignore"):
        try:
            result = _float(primitive, params, list(map(float, operands)), kind)
        except (ValueError, OverflowError, ZeroDivisionError):
            result = math.nan
    if result is None or kind not in "iu":
        return result
    info = np.iinfo(dtype)
    fits = max(info.min, -_EXACT) <= result <= min(info.max, _EXACT)
    return float(math.trunc(result)) if fits else None  # others wrap around


def _float(
    primitive: str, params: dict[str, Any], operands: list[float], kind: str
) -> float | None:
    if primitive == "integer_pow":
        return float(np.power(operands[0], params["y"]))
    if primitive == "convert_element_type":
        return float(operands[0] != 0) if kind == "b" else operands[0]
    if primitive == "round":
        return _rounded(operands[0], params["rounding_method"])
    if primitive == "reduce_precision":
        return operands[0] if operands[0] == 0 else None
    if primitive == "or" and kind != "b":
        return float(int(operands[0]) | int(operands[1]))
    function = _FUNCTIONS.get(primitive)
    return None if function is None else float(function(*operands))


def _rounded(x: float, method: Any) -> float:
    if method == lax.RoundingMethod.TO_NEAREST_EVEN or not math.isfinite(x):
        return float(np.round(x))
    whole = math.trunc(x)
    return whole + math.copysign(abs(x - whole) >= 0.5, x)
