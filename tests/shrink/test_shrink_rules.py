"""One rule at a time: what can be cut, what cannot, and what would go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from movement_jax import shrink

X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6)), jnp.float32)


def weights(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in zip("abcdefg", shapes)
    }


def status(fn, params, *inputs, **options):
    groups = shrink.find_groups(fn, params, *inputs, **options)
    return {
        f"{m.path}:{m.axis}": {
            (g.status, g.size) for g in groups.groups for n in g.members if n == m
        }
        for group in groups.groups
        for m in group.members
    }


def statuses(fn, params, axis, *inputs):
    return {s for s, _ in status(fn, params, *inputs)[axis]}


def layer(middle, width=8, out=8):
    """``middle`` between two kernels, of which ``a:1`` may be cut."""
    return lambda p, x: middle(x @ p["a"]) @ p["b"], weights((6, width), (out, 3))


def half(n):
    """0 if integers divided as floats do."""
    n = lax.full((), n, jnp.int32)
    return lax.div(n, jnp.int32(2)) * 2 - n


def either(a, b):
    return (lax.full((), a, jnp.int32) | b) - 1


def below(n):
    """0 if unsigned integers did not wrap around."""
    return jnp.maximum(lax.full((), n, jnp.uint8) - jnp.uint8(1), jnp.uint8(0))


# What is done to the units between the kernels -> what may be done with them.
ELEMENTWISE = {
    "relu": (jax.nn.relu, "prunable"),
    "gelu": (jax.nn.gelu, "prunable"),
    "silu": (jax.nn.silu, "prunable"),
    "tanh": (jnp.tanh, "prunable"),
    "sigmoid": (jax.nn.sigmoid, "prunable"),  # since the next kernel's rows go too
    "exp": (jnp.exp, "prunable"),
    "relu6": (jax.nn.relu6, "prunable"),
    "clip": (lambda h: jnp.clip(h, -1.0, 1.0), "prunable"),
    "where": (lambda h: jnp.where(h > 0.5, h, 0.0), "prunable"),
    "reciprocal": (lambda h: 1 / h, "inexact"),  # 1 / 0 at removed units
    "log": (lambda h: jnp.log(h * h), "inexact"),
    "rsqrt": (lambda h: lax.rsqrt(h * h), "inexact"),
    "softmax": (jax.nn.softmax, "inexact"),
    "cumsum": (lambda h: jnp.cumsum(h, -1), "pinned"),
    "sort": (lambda h: jnp.sort(h, -1), "pinned"),
    "rev": (lambda h: h[:, ::-1], "pinned"),
    "fft": (lambda h: jnp.fft.fft(h).real, "pinned"),
    "roll": (lambda h: jnp.roll(h, 3, -1), "prunable"),  # 5 and 3 units, which see
    "l2": (lambda h: h / jnp.sqrt((h * h).sum(-1, keepdims=True) + 1e-6), "prunable"),
    "mean": (lambda h: h - h.mean(-1, keepdims=True), "prunable"),  # sum(h) / 8
    "max": (lambda h: h - h.max(-1, keepdims=True), "inexact"),
    "min": (lambda h: h - h.min(-1, keepdims=True), "inexact"),
    "prod": (lambda h: h + h.prod(-1, keepdims=True), "inexact"),
    "argmax": (lambda h: h * jnp.argmax(h, -1, keepdims=True), "pinned"),
    "variance": (lambda h: h / jnp.var(h, -1, keepdims=True), "inexact"),
    "sum of exp": (lambda h: h / jnp.exp(h).sum(-1, keepdims=True), "inexact"),
    "sum of sigmoid": (lambda h: h + jax.nn.sigmoid(h).sum(-1)[:, None], "inexact"),
    "sum of one": (lambda h: h + (h + 1.0).sum(-1, keepdims=True), "inexact"),
    "sum of 3 // 2": (lambda h: h + (h + half(3)).sum(-1)[:, None], "inexact"),
    "sum of 4 | 1": (lambda h: h + (h + either(4, 1)).sum(-1)[:, None], "inexact"),
    "sum of 0 - 1": (lambda h: h + (h + below(0)).sum(-1)[:, None], "inexact"),
    "sum of round(0.5)": (
        lambda h: h + (h + lax.round(lax.full((), 0.5))).sum(-1)[:, None],
        "inexact",
    ),
    "a derivative of integers": (
        lambda h: jax.jvp(lambda v: (v, jnp.int32(v)), (h,), (h,))[1][0],
        "prunable",
    ),
    "any": (lambda h: h * jnp.any(h > 0, -1, keepdims=True), "prunable"),
    "all": (lambda h: h * jnp.all(h > 0, -1, keepdims=True), "inexact"),
    "count >= 0": (lambda h: h * jnp.sum(h >= 0, -1, keepdims=True), "inexact"),
    "count > 0": (lambda h: h * jnp.sum(h > 0, -1, keepdims=True), "prunable"),
    "norm of one row": (lambda h: h * h[0], "prunable"),
    "index": (lambda h: h[:, jnp.array([3, 1, 2, 0, 4, 5, 6, 7])], "pinned"),
    "dynamic slice": (
        lambda h: jnp.tile(lax.dynamic_slice(h, (0, h.shape[0]), (4, 2)), 4),
        "pinned",
    ),
    "window": (
        lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 3), (1, 1), "SAME"),
        "pinned",
    ),
    "window elsewhere": (
        lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (3, 1), (1, 1), "SAME"),
        "prunable",
    ),
    "pad and cut": (lambda h: jnp.pad(h, ((0, 0), (2, 1)))[:, 2:10], "prunable"),
    "split and swap": (
        lambda h: jnp.concatenate(jnp.split(h, 2, -1)[::-1], -1),
        "prunable",
    ),
    "reshape": (
        lambda h: h.reshape(-1, 4, 2).swapaxes(1, 2).reshape(-1, 8),
        "prunable",
    ),
    "top_k": (lambda h: h * lax.top_k(h, 1)[0], "pinned"),
    "iota": (lambda h: h * jnp.arange(8.0), "prunable"),
    "constant": (lambda h: h + jnp.linspace(0, 1, 8), "prunable"),
    "scan": (
        lambda h: lax.scan(lambda c, _: (jnp.tanh(c), c), h, None, 3)[1].sum(0),
        "prunable",
    ),
    "scan adds one": (
        lambda h: h + lax.scan(lambda c, _: (c + 1.0, None), h, None, 3)[0].sum(),
        "inexact",
    ),
    "cond": (
        lambda h: h + lax.cond(h.sum() > 1e6, lambda h: h, lambda h: h + 1, h).sum(),
        "inexact",
    ),
    "cond, other branch": (
        lambda h: h + lax.cond(h.sum() < 1e6, lambda h: h + 1, lambda h: h, h).sum(),
        "inexact",
    ),
    "outer": (
        lambda h: jnp.einsum("bi,bj->bij", h, h).reshape(-1, 64)[:, ::9][:, :8],
        "pinned",
    ),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_units_between_two_kernels(name):
    middle, want = ELEMENTWISE[name]
    fn, params = layer(middle)
    groups = shrink.find_groups(fn, params, X)
    own = [g for g in groups.groups if any(m.path == "a" and m.axis for m in g.members)]
    assert {g.status for g in own} == {want}, [g.reason for g in own]
    if want == "prunable":
        keep = {g.name: np.arange(g.size) % 2 == 1 for g in own}
        assert shrink.verify(fn, params, groups.plan(keep), X).worst < 1e-5
    elif want == "inexact":
        assert "test_shrink_rules.py" in own[0].reason
        if name in ("max", "min", "all"):  # seen only where removed zeros win
            return
        plan = groups.plan({own[0].name: np.arange(8) % 2 == 1}, allow_inexact=True)
        with pytest.raises(ValueError, match="not the masked one"):
            shrink.verify(fn, params, plan, X)


@pytest.mark.parametrize("name", ["max", "min", "all"])
def test_comparing_with_removed_units_is_inexact_although_they_are_zero(name):
    fn, params = layer(ELEMENTWISE[name][0])
    x, sign = jnp.abs(X), -1 if name == "max" else 1
    params["a"] = sign * jnp.abs(params["a"])  # so that a removed 0 decides
    plan = shrink.find_groups(fn, params, x).plan(
        {"a:1": np.arange(8) < 4}, allow_inexact=True
    )
    with pytest.raises(ValueError, match="not the masked one"):
        shrink.verify(fn, params, plan, x)


def test_every_second_position_is_one_of_a_pair():
    def pairs(h):
        a, b = (lax.slice(h, (0, i), h.shape, (1, 2)) for i in (0, 1))
        turned = jnp.stack([a - b, a + b], -1)
        return turned.reshape(h.shape)

    fn, params = layer(pairs)  # as rotary embeddings that interleave do it
    groups = shrink.find_groups(fn, params, X)
    assert [(g.name, g.size) for g in groups.prunable] == [("a:1[0]", 4)]
    plan = groups.plan({"a:1[0]": np.array([True, False, False, True])})
    assert plan.cuts["a"] == {1: (0, 1, 6, 7)}
    assert shrink.verify(fn, params, plan, X).worst < 1e-5
    grad = jax.grad(lambda p, x: jnp.sin(fn(p, x)).sum())
    assert shrink.verify(grad, params, plan, X).worst < 1e-5


def test_a_gradient_that_is_zero_everywhere_is_cut_like_its_parameter():
    def loss(p, x):
        codes = lax.stop_gradient(p["c"])  # as of a codebook that nothing trains
        return jnp.sin(jax.nn.relu(x @ p["a"] + codes) @ p["b"]).sum()

    params = weights((6, 8), (8, 3), (8,))
    plan = shrink.find_groups(loss, params, X).plan({"a:1": np.arange(8) < 3})
    grad = jax.jit(shrink.shrunk(jax.value_and_grad(loss), plan))
    small = plan.shrink(params)
    assert jax.tree.map(jnp.shape, grad(small, X)[1]) == jax.tree.map(jnp.shape, small)
    assert shrink.verify(jax.grad(loss), params, plan, X).worst < 1e-5


def test_unknown_primitives_pin_and_can_be_taught():
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    twice = Primitive("twice_of_a_test")
    twice.def_impl(lambda x: 2 * x)
    twice.def_abstract_eval(lambda x: x)
    mlir.register_lowering(twice, mlir.lower_fun(lambda x: 2 * x, False))
    fn, params = layer(twice.bind)
    group = shrink.find_groups(fn, params, X)["a:1"]
    assert group.status == "pinned"
    assert "twice_of_a_test" in group.reason
    assert "test_shrink_rules.py" in group.reason

    from movement_jax.shrink import rules

    shrink.register_rule("twice_of_a_test", dims=rules.elementwise)
    groups = shrink.find_groups(fn, params, X)
    assert groups["a:1"].status == "prunable"
    plan = groups.plan({"a:1": np.arange(8) < 3})
    assert shrink.verify(fn, params, plan, X).worst < 1e-5
    with pytest.raises(ValueError, match="has a rule already"):
        shrink.register_rule("twice_of_a_test", dims=rules.elementwise)


def test_a_rule_may_tell_of_zeros_and_run_the_primitive_on_what_is_left():
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    from movement_jax.shrink import rules

    # It adds an index below `size` to every entry that is not zero.
    nudge = Primitive("nudge_of_a_test")

    def run(x, *, size):
        assert x.shape[-1] == size
        return jnp.where(x == 0, 0, x + 1)

    nudge.def_impl(run)
    nudge.def_abstract_eval(lambda x, *, size: x)
    mlir.register_lowering(nudge, mlir.lower_fun(run, False))
    seen = []

    def zeros(exactness, site, flows, before, after):
        return flows

    def rewrite(cutter, site, values, before, after):
        seen.append(values[0].shape[-1])
        return [nudge.bind(values[0], size=values[0].shape[-1])]

    shrink.register_rule(
        "nudge_of_a_test", dims=rules.elementwise, zero_flow=zeros, rewrite=rewrite
    )
    fn, params = layer(lambda x: nudge.bind(x, size=8))
    groups = shrink.find_groups(fn, params, X)
    assert groups["a:1"].status == "prunable"
    plan = groups.plan({"a:1": np.arange(8) < 3})
    assert shrink.verify(fn, params, plan, X).worst < 1e-5
    assert set(seen) == {3}


def test_equal_sizes_alone_couple_nothing():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"] + jnp.tanh(x @ p["c"]) @ p["d"]

    params = weights((6, 8), (8, 3), (6, 8), (8, 3))
    found = {
        g.name: {(m.path, m.axis) for m in g.members}
        for g in shrink.find_groups(fn, params, X).prunable
    }
    assert found == {"a:1": {("a", 1), ("b", 0)}, "c:1": {("c", 1), ("d", 0)}}


def test_positions_beyond_the_input_are_pinned():
    def fn(p, x):
        return (x @ p["a"] + p["b"][: len(x)]) @ p["c"]

    params = weights((6, 8), (16, 8), (8, 3))
    found = status(fn, params, X)
    assert {s for s, _ in found["b:0"]} == {"pinned"}
    assert found["b:1"] == {("prunable", 8)}


def test_unused_parameters_and_results_are_pinned():
    def fn(p, x):
        _ = x @ p["c"]
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    found = status(fn, weights((6, 8), (8, 3), (6, 5), (7, 7)), X)
    assert found["c:1"] == {("pinned", 5)}
    assert {s for s, _ in found["d:0"]} == {"pinned"}
    assert found["a:1"] == {("prunable", 8)}


def test_tied_weights_go_together():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.tanh(h @ p["b"]) @ p["b"] @ p["a"].T

    params = weights((6, 8), (8, 8))
    groups = shrink.find_groups(fn, params, X)
    assert [(g.name, g.size) for g in groups.prunable] == [("a:1", 8)]
    plan = groups.plan({"a:1": np.arange(8) % 3 > 0})
    assert plan.small_shapes() == {"a": (6, 5), "b": (5, 5)}
    assert shrink.verify(fn, params, plan, X).worst < 1e-5


def test_a_parameter_against_its_transpose():
    def fn(p, x):
        return x @ (p["a"] + p["a"].T)

    assert statuses(fn, weights((6, 6)), "a:0", X) == {"pinned"}


def test_a_shape_that_does_not_factor_is_pinned():
    def fn(p, x):
        h = (x @ p["a"]).reshape(4, 2, 6).reshape(4, 3, 4).sum(1)
        return h @ p["b"]

    assert statuses(fn, weights((6, 12), (4, 2)), "a:1", X) == {"pinned"}


def test_scalars_from_shapes_stay_those_of_the_original():
    def fn(p, x):
        h = x @ p["a"]
        return (h / h.shape[-1] ** 0.5) @ p["b"]

    params = weights((6, 8), (8, 3))
    plan = shrink.find_groups(fn, params, X).plan({"a:1": np.arange(8) < 2})
    got = shrink.shrunk(fn, plan)(plan.shrink(params), X)
    want = X @ params["a"][:, :2] @ params["b"][:2] / 8**0.5
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_random_bits_are_those_of_the_original_shape():
    def fn(p, x, key):
        h = x @ p["a"]
        return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0) @ p["b"]

    params, key = weights((6, 8), (8, 3)), jax.random.key(3)
    groups = shrink.find_groups(fn, params, X, key)
    assert "random bits" in groups["a:1"].reason
    plan = groups.plan({"a:1": np.arange(8) % 2 == 0})
    assert shrink.verify(fn, params, plan, X, key).worst < 1e-5


def test_outputs_may_shrink_when_asked():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        return {"y": h @ p["b"], "h": h}

    params = weights((6, 8), (8, 3))
    assert statuses(fn, params, "a:1", X) == {"pinned"}
    groups = shrink.find_groups(fn, params, X, pin_outputs=lambda path: path != "h")
    plan = groups.plan({"a:1": np.arange(8) < 3})
    assert shrink.verify(fn, params, plan, X).worst < 1e-5
    assert shrink.shrunk(fn, plan)(plan.shrink(params), X)["h"].shape == (4, 3)


def test_scatter_and_gather_of_rows():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])[jnp.array([0, 2, 2])]
        return jnp.zeros((5, 8)).at[jnp.array([1, 4, 1])].add(h) @ p["b"]

    params = weights((6, 8), (8, 3))
    plan = shrink.find_groups(fn, params, X).plan({"a:1": np.arange(8) < 3})
    assert shrink.verify(fn, params, plan, X).worst < 1e-5


def test_scatter_writes_other_than_zero():
    def fn(p, x):
        h = (x @ p["a"]).at[jnp.array([0])].add(1.0)
        return h.sum(-1, keepdims=True) * (h @ p["b"])

    assert statuses(fn, weights((6, 8), (8, 3)), "a:1", X) == {"inexact"}


def test_padding_with_other_than_zero_is_seen():
    def fn(p, x):
        h = jnp.pad(x @ p["a"], ((1, 0), (0, 0)), constant_values=1.0)
        return h.sum(-1, keepdims=True) * (h @ p["b"])

    assert statuses(fn, weights((6, 8), (8, 3)), "a:1", X) == {"inexact"}


def test_concatenated_with_other_than_zero_is_seen():
    def fn(p, x):
        h = jnp.concatenate([x @ p["a"], jnp.ones((1, 8))], 0)
        return h.sum(-1, keepdims=True) * (h @ p["b"])

    assert statuses(fn, weights((6, 8), (8, 3)), "a:1", X) == {"inexact"}


def test_zero_times_zero_in_a_division_is_inexact():
    def fn(p, x):
        h = x @ p["a"]
        return (h / (h * h).sum(0)) @ p["b"]

    assert statuses(fn, weights((6, 8), (8, 3)), "a:1", X) == {"inexact"}


def test_second_derivatives_through_a_function_with_its_own_are_refused():
    fn, params = layer(jax.nn.relu)
    plan = shrink.find_groups(fn, params, X).plan({"a:1": np.arange(8) < 3})
    small, part = plan.shrink(params), shrink.shrunk(fn, plan)

    def slope(p):
        return jax.grad(lambda q: part(q, X).sum())(p)["a"].sum()

    assert np.isfinite(slope(small))
    with pytest.raises(ValueError, match=r"shrunk\(jax.grad\(loss\), plan\)"):
        jax.grad(slope)(small)
