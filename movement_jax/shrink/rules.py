"""Which axes an operation equates: one rule for each primitive.

A rule maps the layouts of the operands to those of the results. It may equate, refine
and pin; what it cannot describe it pins. A primitive without a rule pins all its axes.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from movement_jax.shrink import dims, jaxprs
from movement_jax.shrink.dims import Layout

Axes = tuple[Layout, ...]
DimsRule = Callable[["Site", list[Axes]], list[Axes]]
RANDOM, COUNTED = "random bits", "counted by iota"


class Site:
    """One equation, as rules see it.

    Attributes:
      equation: of the jaxpr.
      params: its static arguments.
      shapes: of its results.
    """

    def __init__(self, equation: jaxprs.Equation, caller: "Site | None" = None) -> None:
        self.equation = equation
        self._caller = caller
        self.params: dict[str, Any] = equation.params
        self.shapes: list[tuple[int, ...]] = [
            jaxprs.shape_of(v) for v in equation.outvars
        ]

    def told(self, why: str) -> str:
        """A reason with the operation and its source line."""
        return f"{why} (`{self.equation.primitive.name}`, {self._line()})"

    def _line(self) -> str:
        """Of functions inside of JAX only the line that calls them is known."""
        line = jaxprs.source_line(self.equation)
        if line is None:
            return "unknown line" if self._caller is None else self._caller._line()
        return line

    def pin(self, layout: Layout, why: str) -> Layout:
        """Pins an axis, for a reason."""
        if any(leaf.pin is None for leaf in dims.leaves(layout)):
            dims.pin(layout, self.told(why))
        return layout

    def unify(self, a: Layout, b: Layout) -> Layout:
        """Equates two axes."""
        if a != b:
            dims.unify(a, b, self.told("reshaped across its factors"))
        return a

    def pinned(self, size: int, why: str) -> Layout:
        """A new axis that cannot be cut."""
        return self.pin(dims.new(size), why)


def unknown(site: Site, ins: list[Axes]) -> list[Axes]:
    """Pins everything."""
    why = "no rule for this operation"
    for layout in itertools.chain(*ins):
        site.pin(layout, why)
    return [tuple(site.pinned(d, why) for d in shape) for shape in site.shapes]


def elementwise(site: Site, ins: list[Axes]) -> list[Axes]:
    """Operands have the axes of the result; those of size 1 and scalars spread."""
    arrays = [axes for axes in ins if axes]
    if not arrays:
        return [() for _ in site.shapes]
    if len({len(axes) for axes in arrays}) > 1:
        return unknown(site, ins)
    out = []
    for layouts in zip(*arrays):
        whole = [layout for layout in layouts if dims.size(layout) != 1] or [()]
        if len({dims.size(layout) for layout in whole}) > 1:
            return unknown(site, ins)
        for other in whole[1:]:
            site.unify(whole[0], other)
        out.append(whole[0])
    return [tuple(out) for _ in site.shapes]


def passed(site: Site, ins: list[Axes]) -> list[Axes]:
    """Every result is the operand of the same place."""
    return list(ins)


def _sharded(site: Site, ins: list[Axes]) -> list[Axes]:
    spec = getattr(site.params.get("sharding"), "spec", None)
    if spec is None:
        return unknown(site, ins)
    for layout, names in itertools.zip_longest(ins[0], spec):
        if names is not None and layout is not None:
            site.pin(layout, "sharded by a constraint")
    return ins


def _dot_general(site: Site, ins: list[Axes]) -> list[Axes]:
    lhs, rhs = ins
    contract, batch = site.params["dimension_numbers"]
    for i, j in (*zip(*contract), *zip(*batch)):
        site.unify(lhs[i], rhs[j])
    used = [{*contract[side], *batch[side]} for side in (0, 1)]
    free = [[a[i] for i in range(len(a)) if i not in u] for a, u in zip(ins, used)]
    return [(*(lhs[i] for i in batch[0]), *free[0], *free[1])]


def conv_parts(site: Site, ins: list[Axes]) -> dict[str, Layout] | None:
    """The roles in a convolution: batch, groups, input and output features."""
    spec, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
    batches = site.params["batch_group_count"]
    n, c = (ins[0][i] for i in spec.lhs_spec[:2])
    o, i = (ins[1][i] for i in spec.rhs_spec[:2])
    parts: dict[str, Layout] = {"n": n, "c": c, "o": o, "i": i, "groups": ()}
    many = max(groups, batches)
    if many > 1:
        shared = n if batches > 1 else c
        left = dims.split(shared, dims.size(shared) // many)
        right = dims.split(o, dims.size(o) // many)
        if left is None or right is None or min(groups, batches) > 1:
            return None
        parts |= {"groups": left[0], "out_groups": right[0], "inner": left[1]}
    return parts


def _conv(site: Site, ins: list[Axes]) -> list[Axes]:
    spec, why = site.params["dimension_numbers"], "under a convolution's window"
    parts = conv_parts(site, ins)
    if parts is None:
        return unknown(site, ins)
    if parts["groups"]:
        site.unify(parts["groups"], parts["out_groups"])
    by_batch = site.params["batch_group_count"] > 1
    site.unify(parts["c"] if by_batch else parts.get("inner", parts["c"]), parts["i"])
    for axes, inner in zip(ins, (spec.lhs_spec[2:], spec.rhs_spec[2:])):
        for i in inner:
            site.pin(axes[i], why)
    out = [site.pinned(d, why) for d in site.shapes[0]]
    out[spec.out_spec[0]] = parts["inner"] if by_batch else parts["n"]
    out[spec.out_spec[1]] = parts["o"]
    return [tuple(out)]


def _reduce(site: Site, ins: list[Axes]) -> list[Axes]:
    gone = site.params["axes"]
    return [tuple(a for i, a in enumerate(ins[0]) if i not in gone)]


def _arg_reduce(site: Site, ins: list[Axes]) -> list[Axes]:
    for i in site.params["axes"]:
        site.pin(ins[0][i], "its positions are returned")
    return _reduce(site, ins)


def _broadcast_in_dim(site: Site, ins: list[Axes]) -> list[Axes]:
    out = [dims.new(d) for d in site.shapes[0]]
    for layout, i in zip(ins[0], site.params["broadcast_dimensions"]):
        if dims.size(layout) == site.shapes[0][i]:
            out[i] = layout
    return [tuple(out)] + [()] * (len(site.shapes) - 1)


def _reshape(site: Site, ins: list[Axes]) -> list[Axes]:
    order, operand = site.params["dimensions"], ins[0]
    if order is not None:
        operand = tuple(operand[i] for i in order)
    out = tuple(dims.new(d) for d in site.shapes[0])
    site.unify(tuple(itertools.chain(*operand)), tuple(itertools.chain(*out)))
    return [out]


def _transpose(site: Site, ins: list[Axes]) -> list[Axes]:
    return [tuple(ins[0][i] for i in site.params["permutation"])]


def _squeeze(site: Site, ins: list[Axes]) -> list[Axes]:
    gone = site.params["dimensions"]
    return [tuple(a for i, a in enumerate(ins[0]) if i not in gone)]


def _concatenate(site: Site, ins: list[Axes]) -> list[Axes]:
    axis, out = site.params["dimension"], list(ins[0])
    for other in ins[1:]:
        for i, (a, b) in enumerate(zip(out, other)):
            if i != axis:
                site.unify(a, b)
    out[axis] = dims.concatenate([axes[axis] for axes in ins])
    return [tuple(out)]


def _cut(site: Site, layout: Layout, points: Sequence[int]) -> list[Layout]:
    """Segments of an axis; pinned ones if they do not fit its factors."""
    parts = dims.cut(layout, points)
    if parts is None:
        why = "cut inside of its factors"
        site.pin(layout, why)
        parts = [site.pinned(b - a, why) for a, b in zip(points, points[1:])]
    return parts


def _split(site: Site, ins: list[Axes]) -> list[Axes]:
    axis, sizes = site.params["axis"], site.params["sizes"]
    points = [0, *itertools.accumulate(n for n in sizes if n)]
    found = iter(_cut(site, ins[0][axis], points))
    parts = [next(found) if n else dims.new(0) for n in sizes]
    return [(*ins[0][:axis], part, *ins[0][axis + 1 :]) for part in parts]


def _slice(site: Site, ins: list[Axes]) -> list[Axes]:
    starts, limits = site.params["start_indices"], site.params["limit_indices"]
    strides, out = site.params["strides"] or (1,) * len(starts), []
    for layout, start, limit, step in zip(ins[0], starts, limits, strides):
        n = dims.size(layout)
        if start == limit:
            out.append(dims.new(0))
            continue
        if step == 1:
            points = sorted({0, start, limit, n})
            out.append(_cut(site, layout, points)[points.index(start)])
            continue
        count = -(-(limit - start) // step)
        parts = dims.split(layout, step) if count * step == n else None
        if parts is None:
            site.pin(layout, "sliced with a stride")
            out.append(site.pinned(count, "sliced with a stride"))
        else:
            site.pin(parts[1], "every so many-th position is taken")
            out.append(parts[0])
    return [tuple(out)]


def _pad(site: Site, ins: list[Axes]) -> list[Axes]:
    out = []
    for layout, config in zip(ins[0], site.params["padding_config"]):
        low, high, inner = map(int, config)
        if inner and min(low, high) >= 0 and low + high == inner:
            # The transpose of a slice with a stride: one of so many is not new.
            out.append(layout + site.pinned(inner + 1, "spread out"))
        elif low < 0 or high < 0 or inner:
            site.pin(layout, "padded inside or cut by padding")
            n = dims.size(layout)
            total = low + high + n + max(n - 1, 0) * inner
            out.append(site.pinned(total, "padded inside or cut by padding"))
        else:
            parts = [dims.new(low)] * (low > 0) + [layout]
            out.append(dims.concatenate(parts + [dims.new(high)] * (high > 0)))
    return [tuple(out)]


def _dynamic_slice(site: Site, ins: list[Axes]) -> list[Axes]:
    out, why = [], "sliced at a place that is computed"
    for layout, d in zip(ins[0], site.shapes[0]):
        whole = dims.size(layout) == d
        out.append(layout if whole else site.pinned(d, why))
        if not whole:
            site.pin(layout, why)
    return [tuple(out)]


def _dynamic_update_slice(site: Site, ins: list[Axes]) -> list[Axes]:
    why = "written at a place that is computed"
    for a, b in zip(ins[0], ins[1]):
        if dims.size(a) == dims.size(b):
            site.unify(a, b)
        else:
            site.pin(a, why)
            site.pin(b, why)
    return [ins[0]]


def _gather(site: Site, ins: list[Axes]) -> list[Axes]:
    operand, indices = ins
    numbers, why = site.params["dimension_numbers"], "indexed"
    shape, out = site.shapes[0], {}
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(operand)) if i not in gone]
    for i, at in zip(kept, numbers.offset_dims):
        whole = site.params["slice_sizes"][i] == dims.size(operand[i])
        if whole and i not in numbers.start_index_map:
            out[at] = operand[i]
        else:
            site.pin(operand[i], why)
            out[at] = site.pinned(shape[at], why)
    for i in numbers.collapsed_slice_dims:
        site.pin(operand[i], why)
    site.pin(indices[-1], "coordinates of an index")
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims)
    for i, j in pairs:
        site.unify(operand[i], indices[j])
    rest = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    out |= dict(zip(rest, indices[:-1]))
    return [tuple(out[i] for i in range(len(shape)))]


def _scatter(site: Site, ins: list[Axes]) -> list[Axes]:
    operand, indices, updates = ins
    numbers, why = site.params["dimension_numbers"], "indexed"
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [i for i in range(len(operand)) if i not in gone]
    for i, at in zip(window, numbers.update_window_dims):
        whole = dims.size(operand[i]) == dims.size(updates[at])
        if whole and i not in numbers.scatter_dims_to_operand_dims:
            site.unify(operand[i], updates[at])
        else:
            site.pin(operand[i], why)
            site.pin(updates[at], why)
    for i in numbers.inserted_window_dims:
        site.pin(operand[i], why)
    site.pin(indices[-1], "coordinates of an index")
    pairs = zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims)
    for i, j in pairs:
        site.unify(operand[i], indices[j])
    rest = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    for i, layout in zip(rest, indices[:-1]):
        site.unify(updates[i], layout)
    return [operand]


def _iota(site: Site, ins: list[Axes]) -> list[Axes]:
    counted = site.params["dimension"]
    return [
        tuple(
            dims.new(d, COUNTED if i == counted else None)
            for i, d in enumerate(site.shapes[0])
        )
    ]


def _random_bits(site: Site, ins: list[Axes]) -> list[Axes]:
    own = [dims.new(d, RANDOM) for d in site.shapes[0][len(ins[0]) :]]
    return [(*ins[0], *own)]


def _along(name: str, why: str) -> DimsRule:
    """Pins one axis and passes the others on."""

    def rule(site: Site, ins: list[Axes]) -> list[Axes]:
        out = elementwise(site, ins)
        axes = site.params[name]
        for axis in axes if isinstance(axes, tuple) else (axes,):
            site.pin(ins[0][axis], why)
        return out

    return rule


def _top_k(site: Site, ins: list[Axes]) -> list[Axes]:
    axis, why = site.params.get("axis", len(ins[0]) - 1) % len(ins[0]), "ranked"
    site.pin(ins[0][axis], why)
    out = list(ins[0])
    out[axis] = site.pinned(site.shapes[0][axis], why)
    return [tuple(out), tuple(out)]


def windowless(site: Site, rank: int) -> list[bool]:
    """Along which axes the windows of a reduction are single positions."""
    ones, get = (1,) * rank, site.params.get
    rows = (
        get("window_dimensions") or ones,
        get("window_strides") or ones,
        get("base_dilation") or ones,
        get("window_dilation") or ones,
    )
    padding = get("padding") or ((0, 0),) * rank
    return [
        all(row[i] == 1 for row in rows) and tuple(padding[i]) == (0, 0)
        for i in range(rank)
    ]


def _window(site: Site, ins: list[Axes]) -> list[Axes]:
    """One operand, or (source, operand) of the transpose of a maximum over windows."""
    why, out = "under a window", []
    *sources, operand = ins
    for i, single in enumerate(windowless(site, len(operand))):
        if single:
            for other in sources:
                site.unify(operand[i], other[i])
            out.append(operand[i])
        else:
            for other in (operand, *sources):
                site.pin(other[i], why)
            out.append(site.pinned(site.shapes[0][i], why))
    return [tuple(out)]


def _tile(site: Site, ins: list[Axes]) -> list[Axes]:
    return [
        tuple(
            dims.new(n) + a if n > 1 else a for n, a in zip(site.params["reps"], ins[0])
        )
    ]


def _stack(site: Site, ins: list[Axes]) -> list[Axes]:
    (common,) = set(elementwise(site, ins)) if ins[0] else {()}
    axis = site.params["axis"]
    own = dims.concatenate([()] * len(ins)) if len(ins) > 1 else ()
    return [(*common[:axis], own, *common[axis:])]


def _bitcast(site: Site, ins: list[Axes]) -> list[Axes]:
    same = tuple(map(dims.size, ins[0])) == site.shapes[0]
    return ins if same else unknown(site, ins)


def _unstack(site: Site, ins: list[Axes]) -> list[Axes]:
    axis = site.params["axis"]
    site.pin(ins[0][axis], "taken apart")
    return [ins[0][:axis] + ins[0][axis + 1 :]] * len(site.shapes)


ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq
eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi name ne neg
nextafter not one_minus_square or polygamma population_count pow real reduce_precision
rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin
sinh sqrt square stop_gradient sub tan tanh xor
""".split()
REDUCTIONS = "sum max min prod and or xor".split()

# These take arrays without elements like others.
SAFE_EMPTY = {*ELEMENTWISE, "broadcast_in_dim", "concatenate", "pad", "slice", "split"}

RULES: dict[str, DimsRule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **{f"reduce_{kind}": _reduce for kind in REDUCTIONS},
    **{
        name: _along("axis", "accumulated along")
        for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
    },
    **{f"reduce_window_{kind}": _window for kind in ("sum", "max", "min")},
    "select_and_scatter_add": _window,
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "device_put": passed,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": passed,
    "pad": _pad,
    "random_bits": _random_bits,
    "reshape": _reshape,
    "rev": _along("dimensions", "reversed"),
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter_add": _scatter,
    "sharding_constraint": _sharded,
    "slice": _slice,
    "sort": _along("dimension", "sorted along"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
