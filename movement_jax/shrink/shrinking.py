"""Running a function on params that were cut, and checking that it is exact."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import tree as _tree
from movement_jax.shrink import analysis, dims
from movement_jax.shrink.analysis import Analysis
from movement_jax.shrink.dims import Atom
from movement_jax.shrink.finding import find_groups
from movement_jax.shrink.flows import Exactness, Flow
from movement_jax.shrink.plan import Plan
from movement_jax.shrink.rewriting import Cutter
from movement_jax.shrink.rules import Axes


def shrunk(
    fn: Callable[..., Any], plan: Plan, *, allow_inexact: bool = False
) -> Callable[..., Any]:
    """The same function, for params that ``plan.shrink`` has cut.

    Each call traces ``fn`` with the original shapes, and runs its operations on the
    cut arrays. Numbers that it took from shapes stay those of the original model:
    ``1 / sqrt(head_dim)``, the size that a mean divides by, the frequencies of rotary
    embeddings. Once jitted, nothing of this remains. Results shrink too where they lie
    like cut params, as gradients do.

    Args:
      fn: pure function of params and further arguments. It need not be the one that
        the groups were found with: ``shrunk(jax.value_and_grad(loss), plan)``.
      plan: as made by ``groups.plan``.
      allow_inexact: run ``fn`` even if it would give something else with removed
        units at zero, and whatever plan it is.

    Returns:
      A function of the small params and the same further arguments, by position. Put it
      under ``jit``, ``grad``, ``vmap`` or ``jax.export`` as you would ``fn``.

    Raises:
      ValueError: when called: if params have other shapes than the plan says, or if
        ``fn`` does something to an axis that is cut which it does not allow.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from movement_jax import shrink
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.eye(3), "down": jnp.array([[1.0], [0.0], [2.0]])}
      >>> groups = shrink.find_groups(model, params, jnp.ones((1, 3)))
      >>> plan = groups.plan(groups.dead(params))
      >>> small = jax.jit(shrunk(model, plan))
      >>> small(plan.shrink(params), jnp.ones((5, 3)))[0]
      Array([3.], dtype=float32)
    """
    _check_plan("shrunk", plan)

    @functools.wraps(fn)
    def small(params: Any, *inputs: Any) -> Any:
        return _prepare(fn, plan, params, inputs, allow_inexact).run(params, inputs)

    return small


def cut(
    fn: Callable[..., Any],
    params: Any,
    plan: Plan | Mapping[str, Any],
    *inputs: Any,
    verified: bool = True,
    rtol: float | None = None,
) -> tuple[Any, Callable[..., Any]]:
    """Cuts params and function in one call, and checks that nothing else has changed.

    Args:
      fn: pure function of params and further arguments.
      params: the original params, masked or not.
      plan: a plan, or a keep of ``find_groups(fn, params, *inputs)``.
      *inputs: further arguments of ``fn``, better random than zeros or ones.
      verified: whether :func:`verify` runs first. An inexact plan never passes it.
      rtol: of :func:`verify`.

    Returns:
      ``plan.shrink(params)`` and ``shrunk(fn, plan)``.

    Raises:
      ValueError: as :func:`verify` does.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from movement_jax import shrink
      >>> def model(params, x):
      ...     return jax.nn.gelu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.eye(3, 4), "down": jnp.ones((4, 2))}
      >>> keep = {"up:1": jnp.array([True, False, True, False])}
      >>> small, fast = shrink.cut(model, params, keep, jnp.ones((5, 3)))
      >>> small["up"].shape, jax.jit(fast)(small, jnp.ones((7, 3))).shape
      ((3, 2), (7, 2))
    """
    plan = _planned("cut", fn, params, plan, inputs)
    if verified:
        verify(fn, params, plan, *inputs, rtol=rtol)
    return plan.shrink(params), shrunk(fn, plan, allow_inexact=plan.inexact)


def verify(
    fn: Callable[..., Any],
    params: Any,
    plan: Plan | Mapping[str, Any],
    *inputs: Any,
    rtol: float | None = None,
    rebuilt: Callable[..., Any] | None = None,
) -> "Verified":
    """Compares the masked dense model with the shrunk one.

    Both run under ``jit`` on the same inputs. Results that are smaller after the cut
    are compared where they remain.

    Args:
      fn: the original function.
      params: the original params, masked or not.
      plan: a plan, or a keep of ``find_groups(fn, params, *inputs)``.
      *inputs: further arguments of ``fn``, better random than zeros or ones.
      rtol: largest difference allowed, relative to the largest magnitude of the
        result. None for 1e-10 in float64, 1e-4 in float32, 0.05 in less.
      rebuilt: a function of the small params and ``inputs``, of a module that was made
        anew with smaller hyperparameters (see ``plan.small_shapes``). It is compared
        with the masked model too, since some give other results without an error: with
        a smaller ``head_dim``, or a narrower stream under a LayerNorm.

    Returns:
      The differences; with ``rebuilt``, those of it.

    Raises:
      ValueError: if a result differs by more, if no number in the results is finite,
        or if ``rebuilt`` returns another tree or other shapes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from movement_jax import shrink
      >>> def model(params, x):
      ...     return jax.nn.gelu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.eye(3, 4), "down": jnp.ones((4, 2))}
      >>> keep = {"up:1": jnp.array([True, False, True, False])}
      >>> shrink.verify(model, params, keep, jnp.ones((5, 3))).worst < 1e-6
      True
    """
    plan = _planned("verify", fn, params, plan, inputs)
    masked, small = plan.mask(params), plan.shrink(params)
    made = _prepare(fn, plan, small, inputs, plan.inexact)
    want = jax.tree.leaves(jax.jit(fn)(masked, *inputs))
    got = jax.jit(lambda p, *i: made.run(p, i))(small, *inputs)
    want = [made.cutter.take(x, axes) for x, axes in zip(want, made.results)]
    names, shapes = made.analysis.out_names, jax.tree.map(jnp.shape, got)
    found = _compared(
        names,
        want,
        jax.tree.leaves(got),
        rtol,
        "The shrunk model is not the masked one",
        "Inputs must make `fn` deterministic; an inexact plan always differs.",
    )
    if rebuilt is None:
        return found
    got = jax.jit(rebuilt)(small, *inputs)
    if jax.tree.map(jnp.shape, got) != shapes:
        raise ValueError(
            f"`rebuilt` returns arrays of shapes {jax.tree.map(jnp.shape, got)}, where "
            f"the shrunk model has {shapes}. Give it the sizes of "
            "`plan.small_shapes()`, and let it return what `fn` does."
        )
    return _compared(
        names,
        want,
        jax.tree.leaves(got),
        rtol,
        "`rebuilt` is another model than the masked one",
        "What it takes from its own sizes has changed: `1 / sqrt(head_dim)`, means "
        "under a LayerNorm, positions. Run `shrunk(fn, plan)`, which keeps the old.",
    )


def _planned(
    name: str, fn: Callable[..., Any], params: Any, plan: Any, inputs: Sequence[Any]
) -> Plan:
    if isinstance(plan, Mapping):
        return find_groups(fn, params, *inputs).plan(plan)
    return _check_plan(name, plan)


def _check_plan(name: str, plan: Any) -> Plan:
    if not isinstance(plan, Plan):
        raise ValueError(
            f"`plan` must be a `Plan`, got {type(plan).__name__}. Write "
            f"`{name}(fn, groups.plan(keep), ...)`."
        )
    return plan


def _compared(
    names: Sequence[str],
    want: list[Any],
    got: list[Any],
    rtol: float | None,
    what: str,
    hint: str,
) -> "Verified":
    rows = {}
    for name, a, b in zip(names, want, got):
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            rows[name] = (float(np.any(np.asarray(a != b))), 1.0, 0.5)
            continue
        wide = jnp.promote_types(a.dtype, jnp.float32)
        a, b = np.asarray(a.astype(wide)), np.asarray(b.astype(wide))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            off = np.where(same, 0, np.abs(a - b))
        largest = float(np.max(off, initial=0))
        finite = np.abs(a[np.isfinite(a)])
        scale = float(np.max(finite, initial=0))
        rows[name] = (largest, scale, _tolerance(want, rtol))
    found = Verified(
        {name: row[0] for name, row in rows.items()},
        {name: row[1] for name, row in rows.items()},
    )
    for name, (gap, scale, allowed) in rows.items():
        if not gap <= allowed * scale:
            raise ValueError(
                f"{what}: result {name!r} differs by {gap:.3g}, where the largest is "
                f"{scale:.3g}. {hint}"
            )
    inexact = [x for x in want if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
    if inexact and not any(bool(jnp.any(jnp.isfinite(x))) for x in inexact):
        raise ValueError(
            "`verify` has nothing to compare: with these params and inputs the masked "
            "model returns no finite number."
        )
    return found


@dataclasses.dataclass(frozen=True)
class Verified:
    """How far the shrunk model is from the masked one.

    Attributes:
      differences: path of a result -> largest absolute difference.
      scales: path of a result -> its largest magnitude.
    """

    differences: dict[str, float]
    scales: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest difference, relative to the largest magnitude of its result."""
        pairs = zip(self.differences.values(), self.scales.values())
        return max((d / s if s else d for d, s in pairs), default=0.0)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    analysis: Analysis
    cutter: Cutter
    results: list[Axes]

    def run(self, params: Any, inputs: Any) -> Any:
        args = jax.tree.leaves((params, list(inputs)))
        outs = self.cutter.run(self.analysis.frame, args)
        own = self.analysis.frame.results
        outs = [
            x if before is after else self.cutter.take(x, after)
            for x, before, after in zip(outs, own, self.results)
        ]
        return self.analysis.out_tree.unflatten(outs)


def _prepare(
    fn: Callable[..., Any], plan: Plan, params: Any, inputs: Any, allow_inexact: bool
) -> _Prepared:
    plan.check_small(params)
    found = analysis.analyse(fn, _dense(plan, params), inputs)
    keep = _projected(plan, found)
    exact, results = found.follow()
    if not allow_inexact:
        _check_exact(found, exact, keep)
    cutter = Cutter(keep)
    return _Prepared(found, cutter, _results(plan, found, cutter, results))


def _dense(plan: Plan, params: Any) -> Any:
    def grow(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        small = analysis.shape_dtype(x)
        return jax.ShapeDtypeStruct(plan.shapes[_tree.path_name(path)], small.dtype)

    return jax.tree_util.tree_map_with_path(grow, params)


def _projected(plan: Plan, found: Analysis) -> dict[Atom, np.ndarray]:
    """The units of every leaf that the plan keeps."""
    keep: dict[Atom, np.ndarray] = {}
    wanted = []
    for name, axes in zip(found.names, found.axes):
        for axis, layout in enumerate(axes):
            at = plan.cuts.get(name, {}).get(axis)
            stays = np.ones(dims.size(layout), bool)
            if at is not None:
                stays[:] = False
                stays[list(at)] = True
            wanted.append((name, axis, layout, stays))
            for leaf, index in dims.units(layout):
                own = keep.setdefault(leaf, np.zeros(leaf.size, bool))
                own[index[stays & (index >= 0)]] = True
    keep = {leaf: own for leaf, own in keep.items() if not own.all()}
    for name, axis, layout, stays in wanted:
        got = dims.kept(layout, keep)
        if not np.array_equal(stays, np.ones_like(stays) if got is None else got):
            raise ValueError(
                f"`plan` does not fit `fn`, which ties axis {axis} of {name!r} to "
                "others that keep other positions. Find the groups of this `fn`."
            )
    for name, axis, layout, _ in wanted:
        for leaf in dims.leaves(layout):
            if leaf in keep and leaf.pin is not None:
                raise ValueError(
                    f"`plan` cuts axis {axis} of {name!r}, which `fn` does not allow: "
                    f"{leaf.pin}."
                )
    return keep


def _check_exact(
    found: Analysis, exact: Exactness, keep: dict[Atom, np.ndarray]
) -> None:
    for leaf, stays in keep.items():
        if not (exact.units(leaf) | stays).all():
            named = zip(found.names, found.axes)
            name = next(n for n, axes in named for x in axes if leaf in dims.leaves(x))
            raise ValueError(
                f"`plan` cuts units of {name!r} that still change what `fn` returns "
                f"when their weights are zero: {exact.why[leaf]}. Pass "
                "`allow_inexact=True` to run it all the same."
            )


def _results(
    plan: Plan, found: Analysis, cutter: Cutter, known: Sequence[Flow]
) -> list[Axes]:
    """Layouts of the results; of a gradient that is 0 everywhere, its parameter's.

    Nothing that is computed ties such a gradient to the parameter.
    """
    params, out = dict(zip(found.names, found.axes)), []
    owners = plan.owners(found.out_names)
    for name, axes, flow in zip(found.out_names, found.frame.results, known):
        own = owners.get(name)
        alike = own is not None and tuple(map(dims.size, axes)) == plan.shapes[own]
        if own is not None and alike and flow.value is not None:
            axes = axes if cutter.is_cut(axes) else params[own]
        out.append(axes)
    return out


def _tolerance(results: list[Any], rtol: float | None) -> float:
    if rtol is not None:
        return rtol
    dtypes = [x.dtype for x in results if jnp.issubdtype(x.dtype, jnp.inexact)]
    least = min((jnp.finfo(dtype).bits for dtype in dtypes), default=64)
    return {64: 1e-10, 32: 1e-4}.get(least, 0.05)
