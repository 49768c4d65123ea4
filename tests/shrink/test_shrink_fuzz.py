"""Random programs: whatever is found prunable is cut exactly, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import SCALE
from jax import lax

from movement_jax import shrink

BATCH, LENGTH = 2, 4
# Where many more examples are asked for than in a usual run.
QUICK, MORE = 75, 2000 if SCALE >= 100 else 300


@pytest.fixture(autouse=True)
def _float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


class Drawn:
    """A program that draws its operations; the same seed makes the same program.

    Values have shape ``(BATCH, LENGTH, d)``. Params are made when first asked for.
    """

    def __init__(self, seed):
        self.seed, self.shapes = seed, {}
        self.kinds = [getattr(self, n) for n in dir(self) if n.startswith("do_")]

    def __call__(self, params, x):
        self.rng, self.params, self.count = np.random.default_rng(self.seed), params, 0
        self.values = [jnp.tanh(x @ self.weight(x.shape[-1], self.pick(6, 8, 12)))]
        for _ in range(self.rng.integers(3, 12)):
            kind = self.kinds[self.rng.integers(len(self.kinds))]
            out = kind(self.one())
            if out is not None and out.shape[-1] <= 64:
                self.values.append(out)
        outs = [v @ self.weight(v.shape[-1], 3) for v in self.values[-3:]]
        return sum(outs[1:], outs[0])

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def one(self, size=None):
        fits = [v for v in self.values if size is None or v.shape[-1] == size]
        return fits[self.rng.integers(len(fits))]

    def weight(self, *shape):
        """A new parameter, or at times one of that shape again."""
        same = [n for n, s in self.shapes.items() if s == shape and n in self.used()]
        if same and self.rng.random() < 0.2:
            return jnp.asarray(self.params[same[self.rng.integers(len(same))]])
        name = f"w{self.count}"
        self.count += 1
        if name not in self.shapes:
            self.shapes[name] = shape
            scale = 1 / np.sqrt(max(shape[0], 1))
            values = np.random.default_rng(self.count + 99 * self.seed)
            self.params[name] = values.normal(size=shape) * scale
        return jnp.asarray(self.params[name])

    def used(self):
        return [f"w{i}" for i in range(self.count)]

    def do_dense(self, v):
        return v @ self.weight(v.shape[-1], self.pick(4, 6, 8, 12))

    def do_dense_bias(self, v):
        d = self.pick(4, 6, 8, 12)
        return v @ self.weight(v.shape[-1], d) + self.weight(d)

    def do_transposed(self, v):
        return v @ self.weight(self.pick(6, 8), v.shape[-1]).T

    def do_activate(self, v):
        return self.pick(
            jax.nn.relu, jax.nn.gelu, jax.nn.silu, jnp.tanh, jnp.sin, jax.nn.relu6
        )(v)

    def do_not_zero(self, v):
        return self.pick(jax.nn.sigmoid, jnp.cos, lambda v: v + 1.0)(v)

    def do_add(self, v):
        return v + self.one(v.shape[-1])

    def do_multiply(self, v):
        return v * self.one(v.shape[-1])

    def do_gate(self, v):
        return v * jax.nn.sigmoid(self.one(v.shape[-1]))

    def do_scale(self, v):
        return v * self.weight(v.shape[-1])

    def do_concatenate(self, v):
        return jnp.concatenate([v, self.one()], -1)

    def do_half(self, v):
        if v.shape[-1] % 2:
            return None
        return jnp.split(v, 2, -1)[self.pick(0, 1)]

    def do_halves(self, v):
        if v.shape[-1] % 2:
            return None
        a, b = jnp.split(v, 2, -1)
        return self.pick(a * jax.nn.silu(b), jnp.concatenate([a - b, a + b], -1))

    def do_slice(self, v):
        low = self.pick(0, 1, 2)
        return v[..., low : low + self.pick(2, 3)]

    def do_strided(self, v):
        return v[..., :: self.pick(2, 3)]

    def do_pad(self, v):
        return jnp.pad(
            v,
            ((0, 0), (0, 0), (self.pick(0, 1), self.pick(0, 2))),
            constant_values=self.pick(0.0, 1.0),
        )

    def do_mean(self, v):
        return v - v.mean(-1, keepdims=True)

    def do_rms(self, v):
        return v * lax.rsqrt((v * v).mean(-1, keepdims=True) + 1e-6)

    def do_norm_slow(self, v):
        return (v - v.mean(-1, keepdims=True)) / jnp.sqrt(v.var(-1) + 1e-6)[..., None]

    def do_norm_fast(self, v):
        mean = v.mean(-1, keepdims=True)
        var = (v * v).mean(-1, keepdims=True) - mean**2
        scale = self.weight(v.shape[-1])
        return (v - mean) * lax.rsqrt(jnp.abs(var) + 1e-3) * scale

    def do_softmax(self, v):
        return jax.nn.softmax(v, self.pick(-1, 1))

    def do_maximum(self, v):
        return v - v.max(-1, keepdims=True)

    def do_sum(self, v):
        return v * v.sum(-1, keepdims=True)

    def do_over_time(self, v):
        return self.pick(jnp.cumsum, jnp.sort, lambda v, i: v[:, ::-1])(v, 1)

    def do_over_units(self, v):
        return self.pick(jnp.cumsum, jnp.sort, lambda v, i: v[..., ::-1])(v, -1)

    def do_mix_time(self, v):
        return jnp.einsum("btd,ts->bsd", v, self.weight(LENGTH, LENGTH))

    def do_heads(self, v):
        if v.shape[-1] % 4:
            return None
        d = v.shape[-1]
        q, k, w = (v @ self.weight(d, d) for _ in range(3))
        q, k, w = (x.reshape(BATCH, LENGTH, 2, d // 2) for x in (q, k, w))
        p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", p, w).reshape(v.shape)

    def do_fused(self, v):
        d = 4
        x = (v @ self.weight(v.shape[-1], 3 * 2 * d)).reshape(BATCH, LENGTH, 3, 2, d)
        a, b, c = x[:, :, 0], x[:, :, 1], x[:, :, 2]
        return (a * jnp.tanh(b) + c).reshape(BATCH, LENGTH, -1)

    def do_regroup(self, v):
        if v.shape[-1] % 2:
            return None
        x = v.reshape(BATCH, LENGTH, 2, -1)
        return self.pick(x.swapaxes(2, 3).reshape(v.shape), x[:, :, 0], x.sum(2))

    def do_misfit(self, v):
        if v.shape[-1] % 6:
            return None
        x = v.reshape(BATCH, LENGTH, 2, -1).swapaxes(2, 3)
        return x.reshape(BATCH, LENGTH, 3, -1).sum(2)

    def do_repeat(self, v):
        return jnp.repeat(v, 2, -1)

    def do_tile(self, v):
        return jnp.tile(v, (1, 1, 2))

    def do_count(self, v):
        return v * jnp.arange(1.0, v.shape[-1] + 1)

    def do_constant(self, v):
        return v + jnp.linspace(-1, 1, v.shape[-1])

    def do_where(self, v):
        return jnp.where(v > self.pick(0.0, -0.5), v, self.pick(0.0, 1.0))

    def do_clip(self, v):
        return jnp.clip(v, self.pick(-1.0, 0.2), 2.0)

    def do_scan(self, v):
        w = self.weight(v.shape[-1], v.shape[-1])

        def step(h, x):
            h = jnp.tanh(h @ w + x)
            return h, h

        _, hs = lax.scan(step, jnp.zeros_like(v[:, 0]), v.swapaxes(0, 1))
        return hs.swapaxes(0, 1)

    def do_layers(self, v):
        stack = self.weight(3, v.shape[-1], 6), self.weight(3, 6, v.shape[-1])
        body = jax.checkpoint(lambda h, w: (h + jax.nn.relu(h @ w[0]) @ w[1], None))
        return lax.scan(body, v, stack)[0]

    def do_cond(self, v):
        other = self.weight(v.shape[-1])
        return lax.cond(v[0, 0].sum() > 0, jnp.tanh, lambda v: v * other, v)

    def do_while(self, v):
        return lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, v)
        )[1]

    def do_convolve(self, v):
        groups = self.pick(1, 2)
        d = v.shape[-1]
        if d % groups:
            return None
        kernel = self.weight(3, d // groups, 2 * groups)
        return lax.conv_general_dilated(
            v,
            kernel,
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=groups,
        )

    def do_depthwise(self, v):
        d = v.shape[-1]
        return lax.conv_general_dilated(
            v,
            self.weight(3, 1, d),
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=d,
        )

    def do_pool(self, v):
        return lax.reduce_window(v, -jnp.inf, lax.max, (1, 3, 1), (1, 1, 1), "SAME")

    def do_index(self, v):
        return v[:, jnp.array([1, 0, 3, 3])]

    def do_scatter(self, v):
        return v.at[:, jnp.array([0, 2])].add(self.pick(v[:, :2], 1.0))

    def do_one_hot(self, v):
        chosen = jnp.argmax(v @ self.weight(v.shape[-1], 4), -1)
        experts = self.weight(4, v.shape[-1], 5)
        return jnp.einsum("btd,edf,bte->btf", v, experts, jax.nn.one_hot(chosen, 4))

    def do_outer(self, v):
        return jnp.einsum("bti,btj->btij", v, v).sum(self.pick(2, 3))

    def do_matrix(self, v):
        w = self.weight(v.shape[-1], v.shape[-1])
        return v @ (w + w.T) if self.rng.random() < 0.5 else v @ w @ w


# Programs run once, so that compiling them well does not pay.
CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def run(fn, *args):
    return jax.jit(fn).lower(*args).compile(compiler_options=CHEAP)(*args)


def drawn(seed):
    program, params = Drawn(seed), {}
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, LENGTH, 5)))
    jax.eval_shape(lambda: program(params, x))  # makes the params
    return program, params, x


def check(seed):
    """Cuts half of all that can be cut; how many groups that were."""
    program, params, x = drawn(seed)
    groups = shrink.find_groups(program, params, x)
    if not groups.prunable:
        return 0
    rng = np.random.default_rng(seed + 1)
    keep = {
        g.name: rng.permutation(np.arange(g.size) < max(1, g.size // 2))
        for g in groups.prunable
    }
    plan = groups.plan(keep)
    want = run(lambda p, x: program(dict(p), x), plan.mask(params), x)
    got = run(shrink.shrunk(program, plan), plan.shrink(params), x)
    scale = max(float(jnp.abs(want).max()), 1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * scale)
    return len(keep)


@pytest.mark.parametrize("start", range(0, QUICK, 15))
def test_what_is_prunable_is_cut_exactly(start):
    found = [check(seed) for seed in range(start, start + 15)]
    assert np.mean(np.array(found) > 0) > 0.5  # in the rest there was nothing to cut


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(QUICK, MORE, 50))
def test_what_is_prunable_is_cut_exactly_in_more_programs(start):
    for seed in range(start, start + 50):
        check(seed)


def test_an_axis_without_elements_is_no_group():
    def model(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"] + x[:, :0] @ params["no"]

    shapes = {"up": (3, 4), "down": (4, 2), "no": (0, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    groups = shrink.find_groups(model, params, jnp.ones((1, 3)))
    assert [(g.name, g.size) for g in groups.prunable] == [("up:1", 4)]
    plan = groups.plan({"up:1": np.array([True, False, True, False])})
    shrink.verify(model, params, plan, jnp.ones((1, 3)))


def test_dead_units_change_nothing():
    """Kills some producers or consumers by hand; what is called dead can go."""
    removed = 0
    for seed in range(0, 40):
        program, params, x = drawn(seed)
        groups = shrink.find_groups(program, params, x)
        rng = np.random.default_rng(seed)
        for group in groups.prunable:
            for m in group.members:
                if rng.random() < 0.6:
                    dead = np.isin(m.index, rng.permutation(group.size)[:2])
                    own = np.moveaxis(np.array(params[m.path]), m.axis, 0)
                    own[dead] = 0
                    params[m.path] = np.moveaxis(own, 0, m.axis)
        keep = groups.dead(params)
        lost = sum(int((~mask).sum()) for mask in keep.values())
        if not lost:
            continue
        removed += lost
        plan = groups.plan(keep)
        want = run(lambda p, x, f=program: f(dict(p), x), params, x)
        got = run(shrink.shrunk(program, plan), plan.shrink(params), x)
        scale = max(float(jnp.abs(want).max()), 1e-3)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * scale)
    assert removed > 40
