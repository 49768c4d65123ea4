"""Every rule is broken in turn, and the programs kept for it must tell.

A rule without a program fails its test, so that a new rule comes with a killer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from movement_jax import shrink
from movement_jax.shrink import dims, flows, rules, zero_rules

X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6)), jnp.float32)
ROWS = jnp.array([2, 0])
KEY = jax.random.key(3)


def window(h, start, combine, size):
    return lax.reduce_window(h, start, combine, size, (1, 1), "SAME")


def pooled(h):
    def pool(h):
        return lax.reduce_window(h, -jnp.inf, lax.max, (2, 1), (2, 1), "VALID")

    return jax.vjp(pool, lax.stop_gradient(h))[1](h[:2])[0]


def xor(h, axis):
    return lax.reduce(jnp.int32(8 * h), np.int32(0), lax.bitwise_xor, (axis,))


def conv(h):
    kernel = jnp.ones((1, 1, 8, 5))
    return lax.conv_general_dilated(
        h[:, None, None],
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def smoothed(h):
    return lax.conv(h[:, None], jnp.ones((1, 1, 3)), (1,), "SAME")


def at_traced(h):
    return jnp.int32(h[0, 0] * 0 + 1)


def placed(h):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return lax.with_sharding_constraint(h, spec)


# Primitive -> what it does to units `h`, of shape (4, 8), before all is summed up; then
# what may be done with the units of the kernel that made `h`, if the removed ones are 0
# there, and if they are exp(0).
YES, NO, PIN = "prunable", "inexact", "pinned"
BETWEEN = {
    "tanh": [(jnp.tanh, YES, NO), (jnp.cos, NO, NO)],
    "div": [(lambda h: 1 / h, NO, NO), (lambda h: h / 2, YES, NO)],
    "reduce_sum": [(lambda h: h.sum(-1), YES, NO), (lambda h: h.sum(0), YES, NO)],
    "reduce_or": [
        (lambda h: (h > 0).any(-1), YES, NO),
        (lambda h: (h > 0).any(0), YES, NO),
    ],
    "reduce_xor": [(lambda h: xor(h, 1), YES, NO), (lambda h: xor(h, 0), YES, NO)],
    "reduce_max": [(lambda h: h.max(-1), NO, NO), (lambda h: h.max(0), YES, NO)],
    "reduce_min": [(lambda h: h.min(-1), NO, NO), (lambda h: h.min(0), YES, NO)],
    "reduce_prod": [(lambda h: h.prod(-1), NO, NO), (lambda h: h.prod(0), YES, NO)],
    "reduce_and": [
        (lambda h: (h > 0).all(-1), NO, NO),
        (lambda h: (h > 0).all(0), YES, NO),
    ],
    "argmax": [(lambda h: h.argmax(-1), PIN, PIN), (lambda h: h.argmax(0), NO, NO)],
    "argmin": [(lambda h: h.argmin(-1), PIN, PIN), (lambda h: h.argmin(0), NO, NO)],
    **{
        name: [
            (functools.partial(getattr(lax, name), axis=1), PIN, PIN),
            (functools.partial(getattr(lax, name), axis=0), zero, NO),
        ]
        for name, zero in (
            ("cumsum", YES),
            ("cumprod", YES),
            ("cummax", YES),
            ("cummin", YES),
            ("cumlogsumexp", NO),
        )
    },
    **{
        f"reduce_window_{kind}": [
            (functools.partial(window, start=a, combine=f, size=(1, 3)), PIN, PIN),
            (functools.partial(window, start=a, combine=f, size=(3, 1)), YES, NO),
        ]
        for kind, a, f in (
            ("sum", 0.0, lax.add),
            ("max", -jnp.inf, lax.max),
            ("min", jnp.inf, lax.min),
        )
    },
    "select_and_scatter_add": [(pooled, YES, NO)],
    "bitcast_convert_type": [
        (lambda h: lax.bitcast_convert_type(h, jnp.int32) * 1.0, NO, NO)
    ],
    "broadcast_in_dim": [
        (lambda h: jnp.broadcast_to(h[:, None], (4, 2, 8)), YES, NO),
        (lambda h: h + jnp.ones(8), NO, NO),
    ],
    "concatenate": [
        (lambda h: jnp.concatenate([h, 2 * h], 0), YES, NO),
        (lambda h: jnp.concatenate([h, 2 * h], 1), YES, NO),
        (lambda h: jnp.concatenate([h, jnp.ones((1, 8))], 0), NO, NO),
    ],
    "conv_general_dilated": [
        (conv, YES, NO),
        (lambda h: smoothed(h) + h.sum(), PIN, PIN),
    ],
    "device_put": [(jax.device_put, YES, NO)],
    "dot_general": [(lambda h: h @ jnp.ones((8, 3)), YES, NO)],
    "dynamic_slice": [
        (lambda h: lax.dynamic_slice(h, (at_traced(h), 0), (2, 8)), YES, NO),
        (lambda h: lax.dynamic_slice(h, (0, at_traced(h)), (4, 2)), PIN, PIN),
    ],
    "dynamic_update_slice": [
        (lambda h: lax.dynamic_update_slice(h, h[:2], (at_traced(X), 0)), YES, NO),
        (lambda h: lax.dynamic_update_slice(h, X[:, :2], (0, at_traced(X))), PIN, PIN),
    ],
    "gather": [
        (lambda h: h[ROWS], YES, NO),
        (lambda h: h[:, ROWS].sum() + h, PIN, PIN),
        (lambda h: h.at[ROWS + 9].get(mode="fill", fill_value=0), YES, NO),
        (lambda h: h.at[ROWS + 9].get(mode="fill", fill_value=1), NO, NO),
    ],
    "iota": [
        (lambda h: h + lax.broadcasted_iota(h.dtype, h.shape, 1), NO, NO),
        (lambda h: h * lax.broadcasted_iota(h.dtype, h.shape, 1), YES, NO),
    ],
    "optimization_barrier": [(lax.optimization_barrier, YES, NO)],
    "pad": [
        (lambda h: jnp.pad(h, ((1, 0), (0, 0))), YES, NO),
        (lambda h: jnp.pad(h, ((0, 0), (1, 2))), YES, NO),
        (lambda h: jnp.pad(h, ((1, 0), (0, 0)), constant_values=1.0), NO, NO),
        (lambda h: lax.pad(h, 1.0, ((0, 0, 1), (0, 0, 0))), NO, NO),
        (lambda h: lax.pad(h, 0.0, ((0, 0, 0), (1, 1, 2))), YES, NO),
        (lambda h: lax.pad(h, 1.0, ((0, 0, 0), (1, 1, 2))), NO, NO),
        (lambda h: lax.pad(h, 0.0, ((0, 0, 0), (1, 1, 1))), PIN, PIN),
    ],
    "random_bits": [
        (lambda h: h + jax.random.bits(KEY, h.shape) / 2.0, NO, NO),
        (lambda h: h * (jax.random.bits(KEY, h.shape) / 2.0), YES, NO),
    ],
    "reshape": [
        (lambda h: h.reshape(4, 4, 2), YES, NO),
        (lambda h: h.reshape(2, 16), YES, NO),
    ],
    "rev": [(lambda h: lax.rev(h, (0,)), YES, NO), (lambda h: h[:, ::-1], PIN, PIN)],
    "scatter": [
        (lambda h: jnp.zeros((4, 8)).at[ROWS].set(h[:2]), YES, NO),
        (lambda h: jnp.zeros((4, 9)).at[:, ROWS].set(h[:, :2]), PIN, PIN),
    ],
    "scatter-add": [
        (lambda h: h.at[ROWS].add(h[:2]), YES, NO),
        (lambda h: h.at[ROWS].add(1.0), NO, NO),
        (lambda h: h.at[:, ROWS].add(1.0), PIN, PIN),
    ],
    "sharding_constraint": [(placed, YES, NO)],
    "slice": [
        (lambda h: h[1:3], YES, NO),
        (lambda h: h[:, 1:3], "pinned/prunable", "inexact/pinned"),
    ],
    "sort": [
        (lambda h: lax.sort(h, dimension=0), YES, NO),
        (lambda h: lax.sort(h, dimension=1), PIN, PIN),
    ],
    "split": [
        (lambda h: lax.split(h, (1, 3))[1], YES, NO),
        (lambda h: jnp.add(*lax.split(h, (4, 4), 1)), YES, NO),
    ],
    "squeeze": [(lambda h: lax.squeeze(h[:, None], (1,)), YES, NO)],
    "stack": [(lambda h: jnp.stack([h, 2 * h]), YES, NO)],
    "tile": [(lambda h: jnp.tile(h, (2, 1)), YES, NO)],
    "top_k": [
        (lambda h: lax.top_k(h.T, 2)[0], YES, NO),
        (lambda h: lax.top_k(h, 2)[0], PIN, PIN),
    ],
    "transpose": [(lambda h: h.T, YES, NO)],
    "unstack": [(lambda h: jnp.unstack(h)[1], YES, NO)],
}
# Two kernels whose units go together by this operation alone.
TOGETHER = {
    "div": lambda a, b: a / (1 + b * b),
    "concatenate": lambda a, b: jnp.concatenate([a, b], 0),
    "dot_general": lambda a, b: a @ b.T,
    "dynamic_update_slice": lambda a, b: lax.dynamic_update_slice(a, b[:2], (1, 0)),
    "scatter-add": lambda a, b: a.at[ROWS].add(b[:2]),
    "scatter": lambda a, b: a.at[ROWS].set(b[:2]),
    "stack": lambda a, b: jnp.stack([a, b]),
    "conv_general_dilated": lambda a, b: lax.conv(
        a[:, :, None], b[:, :, None], (1,), "SAME"
    ),
}
SAME_RULE = {"scatter_add": "scatter-add", **dict.fromkeys(rules.ELEMENTWISE, "tanh")}
# Other versions of JAX have them, or write them otherwise.
SOMETIMES = {"scatter-add", "scatter_add", "stack", "tile", "unstack"}
NAMES = [*BETWEEN, *sorted({*rules.RULES} - {*BETWEEN} - {*SAME_RULE})]


def programs(name):
    """Functions, their params, and what is right to say of them."""
    for middle, zero, one in BETWEEN[name]:
        for before, want in ((lambda h: h, zero), (jnp.exp, one)):

            def fn(p, x, middle=middle, before=before):
                return (middle(before(x @ p["a"])) * 1.0).sum()

            yield fn, {"a": jnp.ones((6, 8))}, ("a", want)

        # What comes out along an axis is the row of another kernel.
        shape = jax.eval_shape(middle, jnp.ones((4, 8))).shape
        axis = len(shape) - 1 if zero == PIN else 0

        def then(p, x, middle=middle, axis=axis):
            h = middle(x @ p["a"]) * 1.0
            return jnp.tensordot(h, p["c"], ((axis,), (0,))).sum()

        if shape:
            params = {"a": jnp.ones((6, 8)), "c": jnp.ones((shape[axis], 3))}
            yield then, params, ("c", PIN) if zero == PIN else None
    both = TOGETHER.get(name)
    if both is not None:

        def fn(p, x):
            return (both(x @ p["a"], x @ p["b"]) * 1.0).sum()

        yield fn, {"a": jnp.ones((6, 8)), "b": jnp.ones((6, 8))}, ("a", "together")


def outcome(fn, params):
    """All that is said of all params."""
    try:
        groups = shrink.find_groups(fn, params, X).groups
    except Exception as error:
        return f"{type(error).__name__}"
    return {
        (g.status, g.size, g.reason * (g.status == YES), *sorted(map(str, g.members)))
        for g in groups
    }


def verdict(fn, params, name):
    own = [
        g
        for g in shrink.find_groups(fn, params, X).groups
        if any((m.path, m.axis) == (name, int(name == "a")) for m in g.members)
    ]
    if "b" in params:
        tied = all("b" in {m.path for m in g.members} for g in own)
        return "together" if tied else "apart"
    return "/".join(sorted({g.status for g in own}))


class Blunted:
    """A site or an account of exactness of which one method does nothing, or worse."""

    def __init__(self, inner, **methods):
        self.__dict__.update(methods)
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)


def broken_dims(rule, how, touched):
    def fresh(site, ins):
        touched.append(True)
        rule(site, ins)
        return [tuple(map(dims.new, shape)) for shape in site.shapes]

    def no_pins(site, ins):
        def pin(layout, why):
            touched.append(any(leaf.pin is None for leaf in dims.leaves(layout)))
            return layout

        def pinned(size, why):
            return pin(dims.new(size), why)

        blunt = Blunted(site, pin=pin, pinned=pinned)
        return rule(blunt, ins)

    def no_unify(site, ins):
        def unify(a, b):
            touched.append(dims.expand(a) != dims.expand(b))
            return a

        return rule(Blunted(site, unify=unify), ins)

    return {"uncoupled": fresh, "unpinned": no_pins, "not equated": no_unify}[how]


def broken_zero(rule, how, touched):
    hopeful = how == "hopeful"

    def broken(exact, site, ins, before, after):
        def eliminate(site, leaf, zero, why):
            touched.append(not leaf.pin and not (zero == hopeful).all())
            exact.eliminate(site, leaf, np.full(leaf.size, hopeful), why)

        def divide(site, leaf, units):
            touched.append(bool(units.any()) and not leaf.pin)

        blunt = Blunted(exact, eliminate=eliminate, divide=divide)
        right = rule(blunt, site, ins, before, after)
        out = []
        for flow, axes in zip(right, after):
            own = {
                (axis, leaf): np.full(leaf.size, hopeful)
                for axis, layout in enumerate(axes)
                for leaf in dims.leaves(layout)
                if not leaf.pin
            }
            touched.extend(not (flow.at(*key) == hopeful).all() for key in own)
            out.append(flows.Flow(None, own))
        return out

    return broken


def killed(name, table, broken, monkeypatch):
    """Which of the programs notice; None if the rule is not even met."""
    found, changed = [], []
    for fn, params, _ in programs(name):
        right, touched = outcome(fn, params), []
        with monkeypatch.context() as patch:
            patch.setitem(table, name, broken(table[name], touched=touched))
            wrong = outcome(fn, params)
        found.append(right != wrong)
        changed.append(any(touched))
    return any(found) if any(changed) else None


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_says_what_is_right(name):
    _skip_where_unknown(name)
    for number, (fn, params, want) in enumerate(programs(name)):
        if want is not None:
            got = verdict(fn, params, want[0])
            assert got == want[1], f"program {number} of {name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_broken_rule_is_noticed(name, monkeypatch):
    _skip_where_unknown(name)
    results = {
        how: killed(
            name, rules.RULES, functools.partial(broken_dims, how=how), monkeypatch
        )
        for how in ("uncoupled", "unpinned", "not equated")
    }
    results |= {
        how: killed(
            name, zero_rules.RULES, functools.partial(broken_zero, how=how), monkeypatch
        )
        for how in ("hopeful", "hopeless")
    }
    assert True in results.values()
    assert False not in results.values(), results


def _skip_where_unknown(name):
    assert name in BETWEEN, f"{name} has a rule, and no program that needs it"
    texts = [str(jax.make_jaxpr(fn)(params, X)) for fn, params, _ in programs(name)]
    if name in SOMETIMES and not any(f" {name}" in text for text in texts):
        pytest.skip(f"this JAX does without {name}")
    assert any(f" {name}" in text for text in texts)
