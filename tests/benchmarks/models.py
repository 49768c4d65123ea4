"""The trees of params that are pruned here, and the ways to prune them."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import movement_jax as mj

STACKED = "blocks/"
# How the last axes of a param lie on ("data", "model"), by the end of its path.
_SPECS = {
    "embedding": ("model", "data"),
    "attention/query/kernel": ("data", "model", None),
    "attention/key/kernel": ("data", "model", None),
    "attention/value/kernel": ("data", "model", None),
    "attention/out/kernel": ("model", None, "data"),
    "query/kernel": ("data", "model"),
    "key/kernel": ("data", "model"),
    "value/kernel": ("data", None),
    "out/kernel": (None, "model"),
    "up/kernel": ("data", "model"),
    "down/kernel": ("model", "data"),
}
# Ways to prune, given what comes before them in a chain. Those that skip have changed
# their masks once, at their second step.
FORMS = {
    "masks only, skip": lambda **kw: mj.movement_pruning(0.8, mj.Magnitude(), **kw),
    "EMA scores, skip": lambda **kw: mj.movement_pruning(_once(), **kw),
    "EMA scores, cubic, skip": lambda **kw: mj.movement_pruning(
        mj.cubic(0.9, begin=2, end=10**6, every=10**5, initial=0.5), **kw
    ),
    "masks of bits, skip": lambda **kw: mj.movement_pruning(
        0.8, mj.Magnitude(), pack_masks=True, **kw
    ),
    "EMA scores in bfloat16, skip": lambda **kw: mj.movement_pruning(
        _once(), mj.EmaMagnitude(half_life=1000, scores_dtype="bfloat16"), **kw
    ),
    "EMA scores every 10, skip": lambda **kw: mj.movement_pruning(
        _once(), mj.EmaMagnitude(half_life=1000, score_every=10), **kw
    ),
    "masks only, prune": lambda **kw: mj.movement_pruning(
        _always(), mj.Magnitude(), **kw
    ),
    "EMA scores, prune": lambda **kw: mj.movement_pruning(_always(), **kw),
}


# Those whose cost is also measured while they look at bad steps.
CHECKED = ("masks only, skip", "EMA scores, skip", "EMA scores, cubic, skip")


def _once() -> mj.Stepwise:
    return mj.Stepwise(0.8, every=2)


def _always() -> mj.Polynomial:
    return mj.cubic(0.9, begin=2, end=400, initial=0.3)


def optimizer(form: str | None, **options: Any) -> optax.GradientTransformation:
    """AdamW, followed by a way to prune or by nothing."""
    adamw = optax.adamw(1e-4)
    return adamw if form is None else optax.chain(adamw, FORMS[form](**options))


def update(tx: optax.GradientTransformation) -> Any:
    """The optimizer's part of a train step."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def layers(width: int, depth: int, vocabulary: int = 512) -> dict[str, Any]:
    """Shapes of a transformer that is not stacked: 16 leaves a layer, and three."""
    block = {
        **{
            name: {"kernel": (width, width), "bias": (width,)}
            for name in ("query", "key", "value", "out")
        },
        "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "down": {"kernel": (4 * width, width), "bias": (width,)},
        "norm_0": {"scale": (width,), "bias": (width,)},
        "norm_1": {"scale": (width,), "bias": (width,)},
    }
    return {
        "embed": {"embedding": (vocabulary, width)},
        "norm": {"scale": (width,), "bias": (width,)},
        **{f"layer_{i}": block for i in range(depth)},
    }


def layers_of(size: int, depth: int = 10) -> dict[str, Any]:
    """The same of about so many params."""
    return layers(max(8, round(math.sqrt(size / 12 / depth) / 8) * 8), depth)


class Block(nn.Module):
    """One layer, as :func:`flax.linen.scan` takes it."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width, name="down")(hidden), None


class Transformer(nn.Module):
    """A language model whose layers are one scan over stacked kernels."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    vocabulary: int = 512

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )(self.width, self.heads, name="blocks")
        x, _ = blocks(embed(tokens), nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm()(x))


def train_step(model: nn.Module, tx: optax.GradientTransformation) -> Any:
    """A whole train step on a batch of tokens."""

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        return update(tx)(params, state, jax.grad(loss)(params))

    return step


def billion() -> Transformer:
    """A model of a billion params."""
    return Transformer(width=2048, depth=18, heads=16, vocabulary=50_304)


def shapes_of(model: Transformer) -> Any:
    """Its params, abstract."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def abstract(shapes: Any, dtype: Any = jnp.float32) -> Any:
    """Abstract arrays of the shapes in a tree."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def random(tree: Any, scale: float, seed: int = 0) -> Any:
    """Normal arrays like the abstract ones in a tree, made on the device."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    return structure.unflatten(
        [_normal(key, x.shape, x.dtype, scale) for key, x in zip(keys, leaves)]
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float) -> Any:
    return jnp.asarray(scale, dtype) * jax.random.normal(key, shape, dtype)


def place(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays like those of a tree, sharded as their paths say."""

    def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((_SPECS[end] for end in _SPECS if name.endswith(end)), ())
        spec = (None,) * (leaf.ndim - len(spec)) + spec if spec and leaf.ndim else ()
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def layout(tree: Any) -> Any:
    """The shardings of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def count(tree: Any) -> int:
    """Number of elements of all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def prunable(tree: Any) -> list[Any]:
    """The leaves that are pruned by default."""
    state = jax.eval_shape(mj.movement_pruning(0.5, mj.Magnitude()).init, tree)
    return jax.tree.leaves(state.masks)
