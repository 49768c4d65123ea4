"""Masks in one bit per weight, where a tensor has an axis that 32 divides."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BITS = 32  # of a word


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask of which 32 entries along an axis are the bits of one word.

    Attributes:
      words: shaped as the mask, but for the axis. uint32.
      axis: which axis, counted from the last. Static.
    """

    words: jax.Array
    axis: int = dataclasses.field(metadata={"static": True})


def pack(masks: Any) -> Any:
    """A tree of masks with those packed that can be; the others stay as they are."""
    return jax.tree.map(_pack, masks)


def unpack(masks: Any) -> Any:
    """The tree of bools that :func:`pack` was given."""
    return jax.tree.map(_unpack, masks, is_leaf=is_packed)


def like(old: Any, masks: Any) -> Any:
    """A tree of bools, packed where ``old`` is."""
    return jax.tree.map(
        lambda a, b: _pack(b) if is_packed(a) else b, old, masks, is_leaf=is_packed
    )


def is_packed(node: Any) -> bool:
    """True for a mask that is packed."""
    return isinstance(node, PackedMask)


def has_packed(masks: Any) -> bool:
    """Whether any mask of a tree is packed."""
    return any(map(is_packed, jax.tree.leaves(masks, is_leaf=is_packed)))


def _axis(shape: tuple[int, ...]) -> int | None:
    """The last axis that 32 divides, but rather not the last of all.

    On a TPU that one lies along the lanes, where neighbours are far apart.
    """
    fits = [axis - len(shape) for axis, n in enumerate(shape) if n and n % BITS == 0]
    inner = [axis for axis in fits if axis < -1]
    return max(inner or fits, default=None)


def _pack(mask: jax.Array) -> Any:
    axis = _axis(mask.shape)
    if axis is None:
        return mask
    at = mask.ndim + axis
    shape = mask.shape[:at] + (mask.shape[at] // BITS, BITS) + mask.shape[at + 1 :]
    bits = jnp.where(mask.reshape(shape), _places(axis), np.uint32(0))
    return PackedMask(bits.sum(at + 1, dtype=jnp.uint32), axis)


def _unpack(mask: Any) -> Any:
    if not is_packed(mask):
        return mask
    words, axis = mask.words, mask.axis
    at = words.ndim + axis
    shape = words.shape[:at] + (words.shape[at] * BITS,) + words.shape[at + 1 :]
    bits = (jnp.expand_dims(words, at + 1) & _places(axis)) != 0
    # XLA for TPU would store a word for every bit, to look at them in the merged shape.
    return lax.platform_dependent(
        bits, tpu=lax.optimization_barrier, default=lambda x: x
    ).reshape(shape)


def _places(axis: int) -> np.ndarray:
    """What each bit of a word stands for, along the axis after the packed one."""
    places = np.uint32(1) << np.arange(BITS, dtype=np.uint32)
    return places.reshape(BITS, *[1] * (-1 - axis))
