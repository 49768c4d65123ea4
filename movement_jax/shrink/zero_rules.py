"""What each operation does to zeros: one rule for each primitive."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from movement_jax.shrink import dims, rules
from movement_jax.shrink.dims import Atom, Layout
from movement_jax.shrink.flows import (
    Exactness,
    Flow,
    Zero,
    ZeroRule,
    meet,
    moved,
    restricted,
)
from movement_jax.shrink.rules import Axes, Site
from movement_jax.shrink.scalars import evaluate


def unknown(
    exact: Exactness,
    site: Site,
    flows: list[Flow],
    before: list[Axes],
    after: list[Axes],
) -> list[Flow]:
    """Nothing is known of the results; leaves that disappear are lost inexactly."""
    stay = {leaf for axes in after for layout in axes for leaf in dims.leaves(layout)}
    for axes in before:
        for layout in axes:
            for leaf in dims.leaves(layout):
                if leaf not in stay:
                    none = np.zeros(leaf.size, bool)
                    exact.eliminate(site, leaf, none, "nothing is known of zeros in it")
    return [Flow() for _ in after]


def _nothing(exact: Any, site: Any, flows: Any, before: Any, after: Any) -> list[Flow]:
    return [Flow() for _ in after]


def _elementwise(
    exact: Exactness, site: Site, flows: list[Flow], before: Any, after: Any
) -> list[Flow]:
    name = site.equation.primitive.name
    values = [flow.value for flow in flows]
    numbers = [v for v in values if v is not None]
    if len(numbers) == len(values):
        return [Flow(evaluate(name, site.params, numbers, _dtype(site)))]
    if name == "mul" and 0 in numbers:
        return [Flow(0.0)]
    if name == "select_n" and values[1] is not None and len(set(values[1:])) == 1:
        return [Flow(values[1])]
    keys: Iterable[tuple[int, Atom]] = {key for flow in flows for key in flow.zero}
    zero: Zero = {}
    for key in keys:
        units = _zero_units(exact, site, name, flows, key)
        if units is not None and units.any():
            zero[key] = units
    return [Flow(None, zero)]


def _zero_units(
    exact: Exactness, site: Site, name: str, flows: list[Flow], key: tuple[int, Atom]
) -> np.ndarray | None:
    at = [flow.at(*key) for flow in flows]
    if name in ("mul", "and"):
        either: np.ndarray = np.logical_or(*at)
        return either
    if name == "select_n":
        picked: np.ndarray = at[0] & at[1]
        if flows[0].value is not None:
            picked = at[1 + int(flows[0].value)]
        picked = picked | np.logical_and.reduce(at[1:])
        return picked
    if name in ("div", "rem"):
        exact.divide(site, key[1], at[1])
        quotient: np.ndarray = at[0] & ~at[1]
        return quotient
    if name == "pow" and flows[1].value is None:
        return None
    known = np.ones(key[1].size, bool)
    for flow, units in zip(flows, at):
        if flow.value is None:
            known &= units
    zeros = [0.0 if flow.value is None else flow.value for flow in flows]
    result = evaluate(name, site.params, zeros, _dtype(site))
    if result is not None and not math.isfinite(result):
        exact.divide(site, key[1], known)
    return known if result == 0 else None


def _dtype(site: Site) -> Any:
    return site.equation.outvars[0].aval.dtype


def _dot_general(
    exact: Exactness, site: Site, flows: list[Flow], before: list[Axes], after: Any
) -> list[Flow]:
    (lhs, rhs), (contract, batch) = flows, site.params["dimension_numbers"]
    for i, j in zip(*contract):
        for leaf in dims.leaves(before[0][i]):
            gone = lhs.at(i, leaf) | rhs.at(j, leaf)
            exact.eliminate(site, leaf, gone, "summed over where it is not zero")
    if 0 in (lhs.value, rhs.value):
        return [Flow(0.0)]
    zero: Zero = {}
    at = len(batch[0])
    for side, flow in enumerate(flows):
        used = (*contract[side], *batch[side])
        for i in range(len(before[side])):
            if i not in used:
                zero |= {(at, a): z for (k, a), z in flow.zero.items() if k == i}
                at += 1
    for k, (i, j) in enumerate(zip(*batch)):
        for leaf in dims.leaves(before[0][i]):
            zero[k, leaf] = lhs.at(i, leaf) | rhs.at(j, leaf)
    return [Flow(None, zero)]


def _conv(
    exact: Exactness, site: Site, flows: list[Flow], before: list[Axes], after: Any
) -> list[Flow]:
    parts = rules.conv_parts(site, before)
    if parts is None:
        return unknown(exact, site, flows, before, after)
    (lhs, rhs), spec = flows, site.params["dimension_numbers"]
    n, c = spec.lhs_spec[:2]
    o, i = spec.rhs_spec[:2]
    for leaf in dims.leaves(parts["i"]):
        gone = lhs.at(c, leaf) | rhs.at(i, leaf)
        exact.eliminate(site, leaf, gone, "summed over where it is not zero")
    out_n, out_c = spec.out_spec[:2]
    zero: Zero = {(out_n, a): z for (k, a), z in lhs.zero.items() if k == n}
    shared = n if site.params["batch_group_count"] > 1 else c
    groups = set(dims.leaves(parts["groups"]))
    for leaf in set(dims.leaves(parts["o"])):
        zero[out_c, leaf] = rhs.at(o, leaf)
        if leaf in groups and list(dims.leaves(parts["o"])).count(leaf) == 1:
            zero[out_c, leaf] = zero[out_c, leaf] | lhs.at(shared, leaf)
    return [Flow(None, zero)]


def _reduce(preserves: bool, exact_at_zero: bool) -> ZeroRule:
    def rule(
        exact: Exactness, site: Site, flows: list[Flow], before: Any, after: Any
    ) -> list[Flow]:
        gone = site.params["axes"]
        why = "summed over where it is not zero" if exact_at_zero else "compared with"
        for axis in gone:
            for leaf in dims.leaves(before[0][axis]):
                zero = flows[0].at(axis, leaf) & exact_at_zero
                exact.eliminate(site, leaf, zero, why)
        if not preserves:
            return [Flow()]
        rest = [i for i in range(len(before[0])) if i not in gone]
        left = moved(flows[0], {i: k for k, i in enumerate(rest)})
        return [Flow(0.0 if flows[0].value == 0 else None, left.zero)]

    return rule


def _broadcast_in_dim(
    exact: Any, site: Site, flows: list[Flow], before: Any, after: Any
) -> list[Flow]:
    where = dict(enumerate(site.params["broadcast_dimensions"]))
    return [moved(flows[0], where)] + [Flow()] * (len(after) - 1)


def _relaid(
    exact: Any, site: Any, flows: list[Flow], before: list[Axes], after: list[Axes]
) -> list[Flow]:
    """A reshape: a leaf is zero where it was on all the axes that it was on."""
    flow, zero = flows[0], {}
    at: dict[Atom, list[int]] = {}
    for axis, layout in enumerate(before[0]):
        for leaf in dims.leaves(layout):
            at.setdefault(leaf, []).append(axis)
    for axis, layout in enumerate(after[0]):
        for leaf in dims.leaves(layout):
            if leaf in at:
                known = [flow.at(i, leaf) for i in at[leaf]]
                zero[axis, leaf] = np.logical_and.reduce(known)
    return [Flow(flow.value, zero)]


def _same_axes(*operands: int) -> ZeroRule:
    """Every result is zero where all of these operands are, along the same axis."""

    def rule(
        exact: Any, site: Any, flows: list[Flow], before: Any, after: list[Axes]
    ) -> list[Flow]:
        met = flows[operands[0]]
        for i in operands[1:]:
            met = meet(met, flows[i])
        return [restricted(met, axes) for axes in after]

    return rule


def _transpose(
    exact: Any, site: Site, flows: list[Flow], before: Any, after: Any
) -> list[Flow]:
    order = site.params["permutation"]
    return [moved(flows[0], {i: k for k, i in enumerate(order)})]


def _squeeze(
    exact: Any, site: Site, flows: list[Flow], before: list[Axes], after: Any
) -> list[Flow]:
    rest = [i for i in range(len(before[0])) if i not in site.params["dimensions"]]
    return [moved(flows[0], {i: k for k, i in enumerate(rest)})]


def _joined(axis: int, flows: list[Flow], layouts: list[Layout], rank: int) -> Flow:
    """Several end to end: zero along ``axis`` where all parts with the leaf are."""
    first = flows[0].value
    if first is not None and all(flow.value == first for flow in flows):
        return Flow(first)
    zero: Zero = {}
    keys = {key for flow in flows for key in flow.zero if key[0] != axis}
    for key in keys:
        zero[key] = np.logical_and.reduce([flow.at(*key) for flow in flows])
    for flow, layout in zip(flows, layouts):
        for leaf in dims.leaves(layout):
            old = zero.get((axis, leaf), True)
            zero[axis, leaf] = flow.at(axis, leaf) & old
    return Flow(None, zero)


def _concatenate(
    exact: Any, site: Site, flows: list[Flow], before: list[Axes], after: Any
) -> list[Flow]:
    axis = site.params["dimension"]
    layouts = [axes[axis] for axes in before]
    return [_joined(axis, flows, layouts, len(before[0]))]


def _pad(
    exact: Any, site: Site, flows: list[Flow], before: list[Axes], after: list[Axes]
) -> list[Flow]:
    flow, filled = flows
    if flow.value is not None and flow.value == filled.value:
        return [flow]
    zero: Zero = {}
    for axis, layout in enumerate(after[0]):
        own = set(dims.leaves(before[0][axis]))
        for leaf in set(dims.leaves(layout)):
            at = flow.at(axis, leaf) if leaf in own else np.ones(leaf.size, bool)
            others = list(dims.leaves(layout)).count(leaf) > list(
                dims.leaves(before[0][axis])
            ).count(leaf)
            zero[axis, leaf] = at & (filled.value == 0) if others else at
    # Padding along another axis or inside of this one fills units as well.
    config = list(enumerate(site.params["padding_config"]))
    if filled.value != 0:
        for key in list(zero):
            if any(inner or i != key[0] and (a or b) for i, (a, b, inner) in config):
                del zero[key]
    return [Flow(None, zero)]


def _gather(
    exact: Any, site: Site, flows: list[Flow], before: list[Axes], after: list[Axes]
) -> list[Flow]:
    numbers = site.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(before[0])) if i not in gone]
    found = moved(flows[0], dict(zip(kept, numbers.offset_dims)))
    # Filled in for indices out of bounds, at all units. NaN stays NaN either way.
    if (filled := site.params["fill_value"]) is not None and abs(filled) > 0:
        return [Flow()]
    return [restricted(Flow(None, found.zero), after[0])]


def _scatter(
    exact: Any, site: Site, flows: list[Flow], before: list[Axes], after: list[Axes]
) -> list[Flow]:
    numbers = site.params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [i for i in range(len(before[0])) if i not in gone]
    at = dict(zip(numbers.update_window_dims, window))
    met = meet(flows[0], moved(flows[2], at))
    return [restricted(Flow(None, met.zero), after[0])]


def _each(
    exact: Any, site: Any, flows: list[Flow], before: Any, after: list[Axes]
) -> list[Flow]:
    return [Flow(f.value, restricted(f, axes).zero) for f, axes in zip(flows, after)]


def _top_k(
    exact: Any, site: Any, flows: list[Flow], before: Any, after: list[Axes]
) -> list[Flow]:
    return [restricted(flows[0], after[0]), Flow()]


def _without_value(rule: ZeroRule) -> ZeroRule:
    def without(*args: Any) -> list[Flow]:
        return [Flow(0.0 if f.value == 0 else None, f.zero) for f in rule(*args)]

    return without


def _unstack(
    exact: Any, site: Site, flows: list[Flow], before: list[Axes], after: Any
) -> list[Flow]:
    rest = [i for i in range(len(before[0])) if i != site.params["axis"]]
    return [moved(flows[0], {i: k for k, i in enumerate(rest)}) for _ in after]


def _stack(
    exact: Any, site: Site, flows: list[Flow], before: list[Axes], after: Any
) -> list[Flow]:
    met = flows[0]
    for other in flows[1:]:
        met = meet(met, other)
    axis = site.params["axis"]
    return [moved(met, {i: i + (i >= axis) for i in range(len(before[0]))})]


RULES: dict[str, ZeroRule] = {
    **dict.fromkeys(rules.ELEMENTWISE, _elementwise),
    "reduce_sum": _reduce(preserves=True, exact_at_zero=True),
    "reduce_or": _reduce(preserves=True, exact_at_zero=True),
    "reduce_xor": _reduce(preserves=True, exact_at_zero=True),
    "reduce_max": _reduce(preserves=True, exact_at_zero=False),
    "reduce_min": _reduce(preserves=True, exact_at_zero=False),
    "reduce_prod": _reduce(preserves=True, exact_at_zero=False),
    "reduce_and": _reduce(preserves=True, exact_at_zero=False),
    "argmax": _reduce(preserves=False, exact_at_zero=False),
    "argmin": _reduce(preserves=False, exact_at_zero=False),
    **{
        name: _without_value(_same_axes(0))
        for name in ("cumsum", "cumprod", "cummax", "cummin")
    },
    **{
        f"reduce_window_{kind}": _without_value(_same_axes(0))
        for kind in ("sum", "max", "min")
    },
    "cumlogsumexp": _nothing,
    "select_and_scatter_add": _without_value(_same_axes(0)),
    "bitcast_convert_type": _nothing,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "device_put": _each,
    "dot_general": _dot_general,
    "dynamic_slice": _same_axes(0),
    "dynamic_update_slice": _same_axes(0, 1),
    "gather": _gather,
    "iota": _nothing,
    "optimization_barrier": _each,
    "pad": _pad,
    "random_bits": _nothing,
    "reshape": _relaid,
    "rev": _same_axes(0),
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter_add": _scatter,
    "sharding_constraint": _each,
    "slice": _same_axes(0),
    "sort": _each,
    "split": _same_axes(0),
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _same_axes(0),
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
