"""A small language model and its text: the source of Python's standard library."""

import dataclasses
import pathlib
import sysconfig
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = 256  # bytes
# Tests would be half of the text; the others are tables, not code that people write.
_SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings"}
_SKIPPED |= {"pydoc_data", "turtledemo", "__pycache__", "ensurepip", "__phello__"}


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes of source files, split by file.

    Attributes:
      train: shape ``(bytes,)``, uint8.
      validation: shape ``(bytes,)``, uint8, of files that are not in ``train``.
      files: number of files in both.
    """

    train: np.ndarray
    validation: np.ndarray
    files: tuple[int, int]


def read_standard_library(most_bytes: int = 16_000_000) -> Text:
    """Reads the ``.py`` files of this Python, about every twelfth for validation."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED & set(relative.parts) or size > most_bytes:
            continue
        source = path.read_bytes() + b"\n\x00"  # a zero byte ends a file
        # By name, so that adding a file to the library moves no other.
        held_out = zlib.crc32(relative.as_posix().encode()) % 12 == 0
        parts[held_out].append(source)
        size += len(source)
    train, validation = (np.frombuffer(b"".join(p), np.uint8) for p in parts)
    return Text(train, validation, (len(parts[0]), len(parts[1])))


def windows(text: np.ndarray, n: int, length: int, seed: int) -> np.ndarray:
    """Random excerpts of ``length + 1`` bytes. Shape ``(n, length + 1)``, int32."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length - 1, n)
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def counting_losses(text: Text) -> dict[str, float]:
    """Validation loss, nats per byte, of models that only count: what to beat."""
    train, held_out = text.train.astype(np.int64), text.validation.astype(np.int64)
    pairs = np.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2)
    pairs = pairs.reshape(VOCABULARY, VOCABULARY) + 0.1
    single = pairs.sum(0) / pairs.sum()
    bigram = pairs / pairs.sum(1, keepdims=True)
    return {
        "uniform": float(np.log(VOCABULARY)),
        "unigram": float(-np.log(single[held_out[1:]]).mean()),
        "bigram": float(-np.log(bigram[held_out[:-1], held_out[1:]]).mean()),
    }


class Attention(nn.Module):
    """Causal self-attention."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps shape ``(batch, length, width)`` to the same."""
        *_, length, width = x.shape

        def project(name: str) -> jax.Array:
            y = nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

        query, key, value = project("query"), project("key"), project("value")
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        logits = logits.astype(jnp.float32) / np.sqrt(width // self.heads)
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, logits, -1e30)).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return nn.Dense(width, use_bias=False, dtype=self.dtype, name="out")(mixed)


class MLP(nn.Module):
    """Two dense layers, four times as wide inside."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps shape ``(batch, length, width)`` to the same."""
        width = x.shape[-1]
        hidden = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="up")(x))
        return nn.Dense(width, dtype=self.dtype, name="down")(hidden)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps shape ``(batch, length, width)`` to the same."""
        normed = nn.LayerNorm(dtype=self.dtype, name="norm_attention")(x)
        x = x + Attention(self.heads, self.dtype, name="attention")(normed)
        normed = nn.LayerNorm(dtype=self.dtype, name="norm_mlp")(x)
        return x + MLP(self.dtype, name="mlp")(normed)


class Transformer(nn.Module):
    """Decoder-only language model over bytes; the embedding is also the output layer.

    Attributes:
      width: of the stream between blocks.
      layers: number of blocks.
      heads: attention heads of a block.
      length: longest context.
      dtype: of activations; params are float32.
      remat: compute activations again in the backward pass instead of keeping them.
    """

    width: int
    layers: int
    heads: int
    length: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``(batch, length)`` to logits ``(batch, length, 256)``."""
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(VOCABULARY, self.width, embedding_init=init, name="embed")
        place = nn.Embed(self.length, self.width, embedding_init=init, name="place")
        x = embed(tokens) + place(jnp.arange(tokens.shape[-1]))
        x = x.astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        for i in range(self.layers):
            x = block(self.heads, self.dtype, name=f"block_{i}")(x)
        x = nn.LayerNorm(name="norm_final")(x.astype(jnp.float32))
        return embed.attend(x)
