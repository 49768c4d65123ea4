"""Models to cut: each is a function, its params and inputs."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # old versions use what new JAX deprecates
    import equinox as eqx


def normal(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def tree(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape) / max(shape[0], 1) ** 0.5)
        for name, shape in shapes.items()
    }


def linen(module, *inputs, seed=0, **options):
    variables = jax.jit(module.init)(jax.random.key(seed), *inputs)
    return functools.partial(module.apply, **options), randomized(variables), inputs


def randomized(variables, seed=1):
    """No leaf is all zeros or ones, and all are of the widest float."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        noise = 0.3 * rng.normal(size=x.shape)
        return jnp.asarray(np.abs(x + noise) + 0.1 if x.ndim == 1 else x + noise)

    return jax.tree.map(draw, variables)


def tokens(batch, length, vocabulary=11, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, vocabulary, (batch, length)))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12)(x))
        x = nn.gelu(nn.Dense(8)(x))
        x = nn.sigmoid(nn.Dense(6)(x))
        return nn.Dense(3)(x)


def mlp():
    return linen(MLP(), *normal((2, 5)))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), name="stem")(x)))
        y = nn.relu(norm()(nn.Conv(8, (3, 3), name="a")(x)))
        x = x + nn.Conv(8, (3, 3), name="b")(y)
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4, name="grouped")(x))
        x = jnp.concatenate([x, nn.Conv(6, (1, 1), name="side")(x)], -1)
        x = nn.avg_pool(nn.Conv(10, (1, 1), name="mix")(x), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(x)


def cnn():
    return linen(CNN(), *normal((2, 8, 8, 3)))


class GroupNormNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3), name="conv")(x)
        x = nn.relu(nn.GroupNorm(num_groups=3)(x))
        return nn.Dense(2)(x.mean((1, 2)))


def group_norm():
    return linen(GroupNormNet(), *normal((2, 4, 4, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(y)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(16, name="down")(nn.gelu(nn.Dense(24, name="up")(y)))


class Transformer(nn.Module):
    layers: int = 2

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 16, name="embed")(ids)
        for i in range(self.layers):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(11, name="head")(nn.LayerNorm()(x))


def linen_transformer():
    return linen(Transformer(), tokens(2, 5))


class Wide(nn.Module):
    """As large as asked for; only its shapes are used."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(256, self.width)(ids)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(num_heads=10)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(256)(nn.LayerNorm()(x))


class ScannedTransformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 16, name="embed")(ids)
        scan = nn.scan(
            nn.remat(lambda block, x, _: (block(x), None)),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scan(Block(name="blocks"), x, None)
        return nn.Dense(11, name="head")(nn.LayerNorm()(x))


def linen_scan_remat():
    return linen(ScannedTransformer(), tokens(2, 5))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.silu(self.up(self.norm(x))))


def nnx_transformer():
    graph, state = nnx.split(NnxBlock(nnx.Rngs(0)), nnx.Param, ...)[0:2]

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    return apply, randomized(state), normal((2, 5, 16))


def nnx_cnn():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.out = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return (
        lambda state, x: nnx.merge(graph, state)(x),
        randomized(state),
        normal((2, 5, 5, 3)),
    )


def equinox_mlp():
    model = eqx.nn.MLP(4, 3, 10, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return apply, randomized(params), normal((5, 4))


def equinox_attention():
    class Net(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.RMSNorm

        def __call__(self, x):
            y = jax.vmap(self.norm)(x)
            return x + self.attention(y, y, y)

    net = Net(
        eqx.nn.MultiheadAttention(4, 16, key=jax.random.key(0)), eqx.nn.RMSNorm(16)
    )
    params, static = eqx.partition(net, eqx.is_array)
    return (
        lambda params, x: eqx.combine(params, static)(x),
        randomized(params),
        normal((5, 16)),
    )


def rope(x, angles):
    """Rotates index i with i + half."""
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def decoder_layer(p, x, groups=2, repeat=2):
    batch, length, _ = x.shape
    half = p["wk"].shape[-1] // groups // 2
    frequencies = 10.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(length)[:, None] * frequencies
    h = rms(x, p["norm"])
    q = (h @ p["wq"]).reshape(batch, length, groups, repeat, 2 * half)
    k = (h @ p["wk"]).reshape(batch, length, groups, 2 * half)
    v = (h @ p["wv"]).reshape(batch, length, groups, -1)
    q = rope(q, angles[:, None, None])
    k = rope(k, angles[:, None])
    logits = jnp.einsum("bqgrd,bkgd->bgrqk", q, k) / (2 * half) ** 0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -1e30))
    mixed = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v)
    x = x + mixed.reshape(batch, length, -1) @ p["wo"]
    gate, up = jnp.split(rms(x, p["norm2"]) @ p["gate_up"], 2, -1)
    return x + (jax.nn.silu(gate) * up) @ p["down"]


def decoder_params(seed=0, layers=None):
    shapes = {
        "norm": (16,),
        "norm2": (16,),
        "wq": (16, 2 * 2 * 8),
        "wk": (16, 2 * 8),
        "wv": (16, 2 * 6),
        "wo": (2 * 2 * 6, 16),
        "gate_up": (16, 2 * 20),
        "down": (20, 16),
    }
    if layers:
        shapes = {name: (layers, *shape) for name, shape in shapes.items()}
    return tree(seed, **shapes)


def gqa_decoder():
    params = {"layer": decoder_params(), "embed": tree(1, table=(11, 16))}

    def apply(params, ids):
        x = decoder_layer(params["layer"], params["embed"]["table"][ids])
        return x @ params["embed"]["table"].T

    return apply, params, [tokens(2, 5)]


def gqa_decoder_scan():
    params = {"layers": decoder_params(layers=3), "embed": tree(1, table=(11, 16))}

    def apply(params, ids):
        @jax.checkpoint
        def body(x, layer):
            return decoder_layer(layer, x), None

        x, _ = jax.lax.scan(body, params["embed"]["table"][ids], params["layers"])
        return x @ params["embed"]["table"].T

    return apply, params, [tokens(2, 5)]


def library_attention():
    params = tree(0, wq=(8, 4 * 6), wk=(8, 2 * 6), wv=(8, 2 * 6), wo=(4 * 6, 3))

    def apply(p, x):
        b, t, _ = x.shape
        q, k, v = ((x @ p[n]).reshape(b, t, -1, 6) for n in ("wq", "wk", "wv"))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return y.reshape(b, t, -1) @ p["wo"]

    return apply, params, normal((2, 5, 8))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.LSTMCell(10), name="lstm")(x)
        x = nn.RNN(nn.GRUCell(8), name="gru")(x)
        return nn.Dense(3)(x)


def linen_rnn():
    x = normal((2, 4, 5))[0].astype(jnp.float32)  # its carry is float32 always
    fn, params, inputs = linen(Recurrent(), x)
    return fn, jax.tree.map(lambda w: w.astype(jnp.float32), params), inputs


def fused_lstm():
    params = tree(0, w=(5 + 8, 4 * 8), b=(4 * 8,), out=(8, 3))

    def apply(p, xs):
        def step(carry, x):
            h, c = carry
            gates = jnp.concatenate([x, h], -1) @ p["w"] + p["b"]
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((xs.shape[1], 8), xs.dtype)
        _, hs = jax.lax.scan(step, (zeros, zeros), xs)
        return hs @ p["out"]

    return apply, params, normal((4, 2, 5))


def vit_fused_qkv():
    params = tree(
        0,
        patch=(2, 2, 3, 16),
        cls=(1, 16),
        place=(5, 16),
        scale=(16,),
        qkv=(16, 3 * 4 * 4),
        out=(16, 16),
        up=(16, 20),
        up_bias=(20,),
        down=(20, 16),
        head=(16, 3),
    )

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale

    def apply(p, images):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            images, p["patch"], (2, 2), "VALID", dimension_numbers=numbers
        )
        x = x.reshape(x.shape[0], -1, 16)
        cls = jnp.broadcast_to(p["cls"], (x.shape[0], 1, 16))
        x = jnp.concatenate([cls, x], 1) + p["place"]
        qkv = (norm(x, p["scale"]) @ p["qkv"]).reshape(*x.shape[:2], 3, 4, 4)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        w = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        y = jnp.einsum("bhqk,bkhd->bqhd", w, v).reshape(*x.shape)
        x = x + y @ p["out"]
        x = x + jax.nn.gelu(x @ p["up"] + p["up_bias"]) @ p["down"]
        return x[:, 0] @ p["head"]

    return apply, params, normal((2, 4, 4, 3))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(6, (3, 3), name="down1")(x))
        b = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2), name="down2")(a))
        c = nn.relu(nn.Conv(10, (3, 3), name="middle")(b))
        up = nn.relu(nn.ConvTranspose(6, (2, 2), strides=(2, 2), name="up")(c))
        return nn.Conv(2, (1, 1), name="out")(jnp.concatenate([up, a], -1))


def unet():
    return linen(UNet(), *normal((2, 8, 8, 3)))


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(12, (1, 1), use_bias=False, name="expand")(x))
        x = nn.Conv(12, (3, 3), feature_group_count=12, name="depthwise")(x)
        s = nn.relu(nn.Dense(5, name="squeeze")(x.mean((1, 2), keepdims=True)))
        x = x * nn.hard_sigmoid(nn.Dense(12, name="excite")(s))
        return nn.Dense(2)(nn.Conv(4, (1, 1), name="project")(x).mean((1, 2)))


def squeeze_excite():
    return linen(SqueezeExcite(), *normal((2, 4, 4, 3)))


def mixer():
    params = tree(
        0, embed=(3, 8), t1=(6, 10), b1=(10,), t2=(10, 6), b2=(6,), head=(8, 2)
    )

    def apply(p, x):
        x = x @ p["embed"]
        y = jax.nn.gelu(x.swapaxes(1, 2) @ p["t1"] + p["b1"]) @ p["t2"] + p["b2"]
        x = x + y.swapaxes(1, 2)  # the bias makes removed channels other than zero
        return (x - x.mean(-1, keepdims=True)).mean(1) @ p["head"]

    return apply, params, normal((2, 6, 3))


def pixel_shuffle():
    params = tree(0, a=(3, 4 * 6), head=(6, 2))

    def apply(p, x):
        b, h, w, _ = x.shape
        y = jax.nn.relu(x @ p["a"]).reshape(b, h, w, 2, 2, 6)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 6)
        return y @ p["head"]

    return apply, params, normal((2, 3, 3, 3))


def mamba():
    params = tree(0, into=(6, 2 * 10), a=(10, 4), bc=(10, 8), d=(10,), out=(10, 6))

    def apply(p, x):
        x, z = jnp.split(x @ p["into"], 2, -1)
        b, c = jnp.split(x @ p["bc"], 2, -1)
        decay = jnp.exp(-jnp.exp(p["a"])) * jnp.ones((*x.shape, 1), x.dtype)
        inner = x[..., None] * b[:, :, None, :]

        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, states = jax.lax.associative_scan(combine, (decay, inner), axis=1)
        y = jnp.einsum("btin,btn->bti", states, c) + p["d"] * x
        return (y * jax.nn.silu(z)) @ p["out"]

    return apply, params, normal((2, 4, 6))


def mixture_of_experts():
    params = tree(0, router=(8, 4), up=(4, 8, 10), down=(4, 10, 8), head=(8, 2))

    def apply(p, x):
        gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        weights = (jax.nn.one_hot(chosen, 4, dtype=x.dtype) * gates[..., None]).sum(-2)
        h = jax.nn.relu(jnp.einsum("btd,edf->btef", x, p["up"]))
        y = jnp.einsum("btef,efd,bte->btd", h, p["down"], weights)
        return (x + y) @ p["head"]

    return apply, params, normal((2, 5, 8))


def seq2seq():
    params = tree(
        0,
        table=(11, 8),
        enc=(8, 12),
        enc_out=(12, 8),
        q=(8, 6),
        k=(8, 6),
        v=(8, 10),
        o=(10, 8),
    )

    def apply(p, source, target):
        s, t = p["table"][source], p["table"][target]
        s = s + jax.nn.relu(s @ p["enc"]) @ p["enc_out"]
        w = jax.nn.softmax((t @ p["q"]) @ (s @ p["k"]).swapaxes(1, 2))
        return (t + w @ (s @ p["v"]) @ p["o"]) @ p["table"].T

    return apply, params, [tokens(2, 4), tokens(2, 3, seed=1)]


def densely_connected():
    params = tree(0, a=(3, 4), b=(7, 5), c=(12, 6), head=(18, 2))

    def apply(p, x):
        for name in ("a", "b", "c"):
            x = jnp.concatenate([x, jnp.tanh(x @ p[name])], -1)
        return x @ p["head"]

    return apply, params, normal((2, 3))


def branches():
    """A choice at run time, and a loop of unknown length."""
    params = tree(0, w=(4, 8), a=(8, 8), b=(8, 8), head=(8, 2))

    def apply(p, x):
        h = jnp.tanh(x @ p["w"])
        h = jax.lax.cond(
            h.sum() > 0, lambda h: jnp.tanh(h @ p["a"]), lambda h: h @ p["b"], h
        )

        def body(carry):
            i, h = carry
            return i + 1, jax.nn.relu(h)

        _, h = jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, h))
        return h @ p["head"]

    return apply, params, normal((2, 4))


def own_derivatives():
    """``custom_vjp`` (straight through) and ``custom_jvp``."""

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))

    @jax.custom_jvp
    def clipped(x):
        return jnp.maximum(x, 0)

    clipped.defjvp(lambda p, t: (clipped(p[0]), t[0] * (p[0] >= 0)))
    params = tree(0, a=(4, 8), b=(8, 6), head=(6, 2))

    def apply(p, x):
        return clipped(rounded(3 * x @ p["a"]) @ p["b"]) @ p["head"]

    return apply, params, normal((2, 4))


def low_rank():
    params = tree(0, w=(8, 8), down=(8, 3), up=(3, 8), head=(8, 2))

    def apply(p, x):
        return jax.nn.relu(x @ (p["w"] + p["down"] @ p["up"])) @ p["head"]

    return apply, params, normal((2, 8))


MODELS = {
    f.__name__: f
    for f in (
        mlp,
        cnn,
        group_norm,
        linen_transformer,
        linen_scan_remat,
        nnx_transformer,
        nnx_cnn,
        equinox_mlp,
        equinox_attention,
        gqa_decoder,
        gqa_decoder_scan,
        library_attention,
        linen_rnn,
        fused_lstm,
        vit_fused_qkv,
        unet,
        squeeze_excite,
        mixer,
        pixel_shuffle,
        mamba,
        mixture_of_experts,
        seq2seq,
        densely_connected,
        branches,
        own_derivatives,
        low_rank,
    )
}
