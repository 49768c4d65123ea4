"""What few programs hold: operands that do not fit, indices, calls, sums of axes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from movement_jax import shrink
from movement_jax.shrink import analysis, dims, jaxprs, rules
from movement_jax.shrink.scalars import evaluate

X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6)), jnp.float32)
I = jnp.array([0, 2, 1, 3])  # noqa: E741


def weights(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in zip("abcdefg", shapes)
    }


def statuses(groups, path, axis):
    return {
        g.status
        for g in groups.groups
        if any(m.path == path and m.axis == axis for m in g.members)
    }


@jax.custom_jvp
def kept_positive(n):
    return jnp.maximum(n, 0)


@kept_positive.defjvp
def _(primals, tangents):
    return kept_positive(*primals), tangents[0]


@jax.custom_vjp
def not_differentiable(h):
    return jnp.tanh(h)


def _refuse(_, cotangent):
    raise RuntimeError("no derivative")


not_differentiable.defvjp(lambda h: (jnp.tanh(h), None), _refuse)


@jax.custom_vjp
def scaled(h, n):
    return h * n, n + 1


def _scaled_back(n, cotangents):
    return cotangents[0] * n, np.zeros(n.shape, jax.dtypes.float0)


scaled.defvjp(lambda h, n: (scaled(h, n), n), _scaled_back)

ONES, ZEROS = np.ones((4, 8), np.float32), np.zeros((4, 8), np.float32)
MESH = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
# What is done to the units between two kernels -> what may be done with them.
MIDDLES = {
    "rounded to few bits": (lambda h, _: lax.reduce_precision(h, 5, 10), "prunable"),
    "picked by a constant": (
        lambda h, _: lax.select_n(np.ones((4, 8), bool), ONES, h),
        "prunable",
    ),
    "left out by a constant": (
        lambda h, _: lax.select_n(np.zeros((4, 8), bool), ONES, h) + h,
        "prunable",
    ),
    "of two equal constants": (
        lambda h, _: lax.select(h > 0, jnp.asarray(ZEROS), jnp.asarray(ZEROS)) + h,
        "prunable",
    ),
    "to a power that is computed": (
        lambda h, _: jnp.power(jnp.abs(h) + 1, jnp.abs(h)) - 1,
        "prunable",
    ),
    "zeros end to end": (
        lambda h, _: h + jnp.concatenate([ZEROS[:1] * h[:1], ZEROS[1:] * h[1:]]),
        "prunable",
    ),
    "zeros padded with zeros": (
        lambda h, _: h + lax.pad(jnp.asarray(ZEROS[1:]), 0.0, [(0, 1, 0), (0, 0, 0)]),
        "prunable",
    ),
    "a branch of zeros or of others": (
        lambda h, i: h + lax.cond(i[0] > 0, lambda: ZEROS[0], lambda: ZEROS[1]),
        "prunable",
    ),
    "rows from where an index says": (
        lambda h, i: jnp.concatenate([lax.dynamic_slice(h, (i[1], 0), (2, 8))] * 2),
        "prunable",
    ),
    "a few units from where an index says": (
        lambda h, i: jnp.tile(
            jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (4,)))(h, i), 2
        ),
        "pinned",
    ),
    "a few units written where an index says": (
        lambda h, i: jax.vmap(
            lambda row, at: lax.dynamic_update_slice(row, jnp.ones(2), (at,))
        )(h, i),
        "pinned",
    ),
    "a function of integers with a derivative": (
        lambda h, i: h * kept_positive(i)[:, None],
        "prunable",
    ),
    "a function whose derivative fails": (
        lambda h, _: not_differentiable(h),
        "prunable",
    ),
    "a function of floats and integers": (
        lambda h, i: scaled(h, i[:, None])[0],
        "prunable",
    ),
    "sharded over an axis": (
        lambda h, _: lax.with_sharding_constraint(
            h, NamedSharding(MESH, PartitionSpec(None, "x"))
        ),
        "pinned",
    ),
    "put on a device": (
        lambda h, _: lax.with_sharding_constraint(
            h, SingleDeviceSharding(jax.devices()[0])
        ),
        "pinned",
    ),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_units_between_two_kernels(name):
    middle, want = MIDDLES[name]

    def fn(p, x, i):
        return middle(x @ p["a"], i) @ p["b"]

    params = weights((6, 8), (8, 3))
    groups = shrink.find_groups(fn, params, X, I)
    assert statuses(groups, "a", 1) == {want}, groups
    keep = {g.name: np.arange(g.size) % 3 > 0 for g in groups.prunable}
    assert shrink.verify(fn, params, groups.plan(keep), X, I).worst < 1e-5


def test_gradients_of_a_function_with_its_own_are_cut():
    def loss(p, x, i):
        return jnp.sin(scaled(x @ p["a"], i[:, None])[0] @ p["b"]).sum()

    params = weights((6, 8), (8, 3))
    plan = shrink.find_groups(loss, params, X, I).plan({"a:1": np.arange(8) < 3})
    assert shrink.verify(jax.grad(loss), params, plan, X, I).worst < 1e-5
    small = jax.grad(shrink.shrunk(loss, plan))(plan.shrink(params), X, I)
    want = plan.shrink(jax.grad(loss)(plan.mask(params), X, I))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), small, want)


def test_a_derivative_that_fails_is_told_when_it_is_asked_for():
    def fn(p, x):
        return (not_differentiable(x @ p["a"]) @ p["b"]).sum()

    params = weights((6, 8), (8, 3))
    plan = shrink.find_groups(fn, params, X).plan({"a:1": np.arange(8) < 3})
    small = shrink.shrunk(fn, plan)
    assert np.isfinite(small(plan.shrink(params), X))
    with pytest.raises(ValueError, match=r"shrunk\(jax.grad\(loss\), plan\)"):
        jax.grad(small)(plan.shrink(params), X)


def test_groups_of_a_convolution_that_cut_through_its_parts_are_pinned():
    def fn(p, x):
        h = jnp.concatenate([x @ p["a"], x @ p["b"]], -1)  # 3 and 5 of 2 groups of 4
        h = lax.conv_general_dilated(
            h[:, None],
            p["c"],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )
        return h[:, 0] @ p["d"]

    params = weights((6, 3), (6, 5), (1, 4, 6), (6, 2))
    groups = shrink.find_groups(fn, params, X)
    assert statuses(groups, "a", 1) == statuses(groups, "b", 1) == {"pinned"}
    assert shrink.verify(fn, params, groups.plan({}), X).worst == 0


@pytest.mark.parametrize("shape", [(8,), (4, 2)])
def test_a_rule_for_operands_that_do_not_fit_pins_them(shape):
    name = f"fitted_{len(shape)}"
    fitted = Primitive(name)

    def run(h, other):
        return h + jnp.resize(other, h.shape)

    fitted.def_impl(run)
    fitted.def_abstract_eval(lambda h, other: h)
    mlir.register_lowering(fitted, mlir.lower_fun(run, False))
    shrink.register_rule(name, dims=rules.elementwise)
    params = weights((6, 8), (8, 3), shape)
    groups = shrink.find_groups(
        lambda p, x: fitted.bind(x @ p["a"], p["c"]) @ p["b"], params, X
    )
    assert statuses(groups, "a", 1) == statuses(groups, "c", 0) == {"pinned"}


def test_numbers_and_values_of_an_outer_trace_are_no_units():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) * p["scale"] @ p["b"]

    params = {**weights((6, 8), (8, 3)), "scale": 2.0}
    found = []

    @jax.jit
    def outer(c):
        groups = shrink.find_groups(lambda p, x: fn(p, x) * c, params, X)
        found.append(groups)
        return c

    outer(jnp.float32(3.0))
    for groups in (shrink.find_groups(fn, params, X), found[0]):
        assert [(g.name, g.size) for g in groups.prunable] == [("a:1", 8)]


def test_results_that_are_integers_are_compared_as_such():
    def fn(p, x):
        y = jax.nn.relu(x @ p["a"]) @ p["b"]
        return {"y": y, "top": jnp.argmax(y, -1)}

    params = weights((6, 8), (8, 3))
    plan = shrink.find_groups(fn, params, X).plan({"a:1": np.arange(8) < 3})
    assert shrink.verify(fn, params, plan, X).worst < 1e-5


def test_a_function_that_is_called_twice_is_cut_each_time():
    inner = jax.jit(scaled)

    @jax.custom_jvp
    def twice(h):
        return jax.jit(jnp.tanh)(h) + jax.jit(jnp.tanh)(-2 * h)

    twice.defjvp(lambda h, t: (twice(*h), t[0] * jnp.cos(h[0])))
    outer = jax.jit(lambda h, n: twice(inner(h, n)[0]))

    def loss(p, x, i):
        h = outer(x @ p["a"], i[:, None])
        h = outer(h @ p["b"], i[:, None])
        return jnp.sin(h @ p["c"]).sum()

    params = weights((6, 8), (8, 8), (8, 3))
    groups = shrink.find_groups(loss, params, X, I)
    assert {g.name for g in groups.prunable} >= {"a:1", "b:1"}
    plan = groups.plan({"a:1": np.arange(8) < 3, "b:1": np.arange(8) % 2 == 0})
    small = shrink.shrunk(loss, plan)
    for fn, want in ((small, loss), (jax.grad(small), jax.grad(loss))):
        got = fn(plan.shrink(params), X, I)
        full = want(plan.mask(params), X, I)
        full = plan.shrink(full) if isinstance(full, dict) else full
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), got, full
        )
    assert shrink.verify(jax.grad(loss), params, plan, X, I).worst < 1e-5


def test_masks_may_lack_whole_groups():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"] + jax.nn.relu(x @ p["c"]) @ p["d"]

    groups = shrink.find_groups(fn, weights((6, 8), (8, 3), (6, 5), (5, 3)), X)
    masks = {"a": np.tile(np.arange(8) < 3, (6, 1)), "b": np.zeros((8, 3), bool)}
    kept = groups.kept(masks)
    assert {name: int(k.sum()) for name, k in kept.items()} == {"a:1": 3, "c:1": 5}
    for reduce in ("sum", "max", "mean", "l2"):
        worth = groups.unit_scores({"a": masks["a"].astype(float)}, reduce)
        assert worth["a:1"].tolist()[2:4] != [0, 0]
        assert worth["c:1"].tolist() == [0] * 5


@pytest.mark.parametrize(
    ("primitive", "operands", "dtype", "want"),
    [
        ("erf", [np.nan], "float32", np.nan),
        ("or", [2.0, 1.0], "int32", 3.0),
        ("or", [2.0, 1.0], "bool", 1.0),
        ("or", [np.inf, 1.0], "int32", None),
        ("integer_pow", [0.0], "float32", np.inf),
        ("nothing_of_the_kind", [0.0], "float32", None),
        ("add", [2.0**40, 1.0], "int32", None),  # wraps around
        ("floor", [np.inf], "float32", np.inf),
    ],
)
def test_what_an_operation_gives_for_numbers(primitive, operands, dtype, want):
    got = evaluate(primitive, {"y": -1}, operands, np.dtype(dtype))
    assert got == want or (np.isnan(got) and np.isnan(want))


def test_a_program_with_constants_that_have_no_value_is_refused():
    program = types.SimpleNamespace(constvars=(1,), invars=(), eqns=(), outvars=())
    with pytest.raises(NotImplementedError, match="constants that have no value"):
        jaxprs._program(program)


def test_what_has_no_shape_is_refused():
    with pytest.raises(TypeError, match="'x' is no array, no number and nothing"):
        analysis.shape_dtype("x")


def test_axes_that_cannot_be_split_or_equated():
    assert dims.split(dims.new(4), 8) is None
    with pytest.raises(AssertionError, match="axes of 3 and 4 positions"):
        dims.unify(dims.new(3), dims.new(4), "")
    assert dims.split(dims.concatenate([dims.new(3), dims.new(5)]), 2) is None


def test_sums_of_axes_that_end_within_a_product_are_pinned():
    product = dims.new(6)
    assert dims.split(product, 3) is not None  # positions 0 to 5 are 2 times 3
    a = dims.concatenate([product, dims.new(2)])
    b = dims.concatenate([dims.new(5), dims.new(3)])
    dims.unify(a, b, "do not fit")
    assert {leaf.pin for leaf in dims.leaves(a)} == {"do not fit"}
    assert {leaf.pin for leaf in dims.leaves(b)} == {"do not fit"}


def test_a_sum_of_products_that_do_not_split_is_no_product():
    product = dims.new(6)
    assert dims.split(product, 3) is not None
    assert dims.split(dims.concatenate([product, dims.new(4)]), 2) is None
