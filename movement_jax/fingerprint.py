"""What a state is, bit for bit: a digest of every array, the same on any mesh."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import packing
from movement_jax import tree as _tree
from movement_jax.packing import PackedMask, is_packed
from movement_jax.prune import unpack
from movement_jax.state import find_stored

_SHOWN = 10  # paths in a message


class Leaf(NamedTuple):
    """One array of a tree, without what is in it.

    Attributes:
      shape: its shape.
      dtype: name of its dtype.
      sha256: of its bytes in C order, as 64 hexadecimal digits.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str


def digests(tree: Any) -> dict[str, Leaf]:
    """A digest of every array of a tree, by its ``/``-joined path.

    Two arrays have the same digest if they are the same bits, however they are sharded.
    Reads every array once. With several processes all of them must call this; an array
    that none of them has whole is sent to all, one array at a time.

    Args:
      tree: of arrays and numbers.

    Raises:
      ValueError: if a leaf is no array or number, or two leaves have the same path.

    Examples:
      >>> import jax.numpy as jnp
      >>> from movement_jax.fingerprint import digests
      >>> leaf = digests({"kernel": jnp.ones((2, 2))})["kernel"]
      >>> leaf.shape, leaf.dtype, leaf.sha256[:8]
      ((2, 2), 'float32', 'f6bb1294')
    """
    named = _tree.named_leaves(tree)
    found = {name: _digest(name, leaf) for name, leaf in named}
    if len(found) < len(named):
        names = [name for name, _ in named]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"Two leaves have the same path: {twice[:_SHOWN]}. Rename one of them, so "
            "that neither is taken for the other."
        )
    return found


def fingerprint(state: Any) -> str:
    """One digest of what a state computes with: its params and its masks.

    Args:
      state: a train state as for :func:`movement_jax.prune`; of any other tree all
        leaves count.

    Returns:
      64 hexadecimal digits, the same on every process and for every sharding.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(None, mj.Magnitude())
      >>> params = {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2)}
      >>> state = params, tx.init(params)
      >>> mj.fingerprint(state) == mj.fingerprint(mj.prune(state, 0.5))
      False
    """
    return _combined(digests(jax.tree.map(_plain, _counted(state), is_leaf=is_packed)))


def fingerprint_of(state: Any, leaves: Mapping[str, Leaf]) -> str:
    """The fingerprint of a state, of which ``leaves`` are the :func:`digests`."""
    parts = covered(state)
    arrays = dict(_tree.named_leaves(state))
    return combined(parts, arrays, leaves) if parts else fingerprint(state)


def covered(state: Any) -> dict[str, tuple[str, int | None]]:
    """What the fingerprint of a state covers, and where in the state it is.

    Returns:
      ``{name: (path, axis)}``: path of a leaf, and along which axis a mask is packed;
      empty if anything of it is not itself a leaf of the state.
    """
    paths = {id(leaf): name for name, leaf in _tree.named_leaves(state)}
    flat = jax.tree_util.tree_flatten_with_path(_counted(state), is_leaf=is_packed)[0]
    found = {}
    for path, node in flat:
        leaf, axis = (node.words, node.axis) if is_packed(node) else (node, None)
        if id(leaf) not in paths:
            return {}
        found[_tree.path_name(path)] = paths[id(leaf)], axis
    return found


def combined(
    parts: Mapping[str, tuple[str, int | None]],
    arrays: Mapping[str, Any],
    leaves: Mapping[str, Leaf],
) -> str:
    """The fingerprint that covers those parts of a state.

    Args:
      parts: as :func:`covered` tells them.
      arrays: leaves of the state, by their path.
      leaves: digests of them.
    """
    found = {}
    for name, (path, axis) in parts.items():
        found[name] = leaves[path]
        if axis is not None:
            found[name] = _digest(name, _plain(PackedMask(arrays[path], axis)))
    return _combined(found)


def assert_same_everywhere(state: Any) -> None:
    """Makes sure that all copies of an array are the same, on all processes.

    Hosts that were given different data, seeds or checkpoints go on without an error,
    with params that were meant to be equal drifting apart. All processes must call
    this.

    Args:
      state: any tree of arrays.

    Raises:
      ValueError: if copies differ, with the paths of the first that do.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> mj.assert_same_everywhere({"kernel": jnp.ones((2, 2))})
    """
    named = _tree.named_leaves(state)
    wrong = [name for name, x in named if not _same_everywhere(x)]
    if wrong:
        shown = ", ".join(wrong[:_SHOWN]) + (", ..." if len(wrong) > _SHOWN else "")
        raise ValueError(
            f"Copies of {len(wrong)} of {len(named)} arrays differ between devices or "
            f"processes: {shown}. Give all processes the same seeds and checkpoints."
        )


def canonical(array: np.ndarray) -> np.ndarray:
    """Bools made of the bytes 0 and 1: files may hold others, which count wrong.

    Examples:
      >>> import numpy as np
      >>> mask = np.array([0, 1, 7], np.uint8).view(np.bool_)
      >>> print(canonical(mask).view(np.uint8))
      [0 1 1]
    """
    return array.view(np.uint8) != 0 if array.dtype == np.bool_ else array


def _counted(state: Any) -> Any:
    """The part of a state that it computes with, its masks as they are kept."""
    try:
        params, opt_state, _ = unpack(state)
        return {"params": params, "masks": find_stored(opt_state).masks}
    except ValueError:
        return state


def _plain(node: Any) -> Any:
    return packing.unpack(node) if is_packed(node) else node


def _combined(leaves: Mapping[str, Leaf]) -> str:
    total = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        total.update(repr((name, *leaf)).encode())
    return total.hexdigest()


def _digest(name: str, x: Any) -> Leaf:
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        if not isinstance(x, bool | int | float | complex):
            raise ValueError(
                f"Leaf {name!r} is a {type(x).__name__}, not an array or a number. "
                "Leave it out of the tree, or make it static."
            )
        try:
            x = jnp.asarray(x)
        except OverflowError as error:
            raise ValueError(
                f"Leaf {name!r} is {x}, too large for the integers of JAX. Save it as "
                "a float, or leave it out of the tree."
            ) from error
    return Leaf(tuple(x.shape), str(x.dtype), _sha256(_whole(_without_key(x))))


def _sha256(array: np.ndarray) -> str:
    data = np.ascontiguousarray(canonical(array)).reshape(-1).view(np.uint8)
    return hashlib.sha256(data.data).hexdigest()


def _without_key(x: Any) -> Any:
    """The integers of an array of random keys; everything else unchanged."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    return x


def _whole(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return _gathered(x, tiled=True)


def _same_everywhere(x: Any) -> bool:
    """Whether each part of an array is the same wherever it is kept."""
    if _kept_once(x):
        return True
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        parts, here = ["()"], {"()": [_sha256(x)]}
    else:
        x = _without_key(x)
        indices = x.sharding.devices_indices_map(x.shape).values()
        parts, here = sorted(set(map(str, indices))), {}
        for shard in x.addressable_shards:
            sha256 = _sha256(np.asarray(shard.data))
            here.setdefault(str(shard.index), []).append(sha256)
    # Of each part the largest and the smallest digest; of one not held, no bounds.
    none = "0" * 64, "f" * 64
    bounds = [(max(here[p]), min(here[p])) if p in here else none for p in parts]
    if jax.process_count() > 1:
        as_bytes = np.array([[list(bytes.fromhex(d)) for d in b] for b in bounds])
        everywhere = _gathered(as_bytes.astype(np.uint8))
        bounds = [
            (max(map(bytes, highest)).hex(), min(map(bytes, lowest)).hex())
            for highest, lowest in everywhere.transpose(1, 2, 0, 3)
        ]
    return all(highest == lowest for highest, lowest in bounds)


def _kept_once(x: Any) -> bool:
    """Whether there is one copy of each part, so that nothing can differ."""
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if here and jax.process_count() > 1:
        return False
    if not isinstance(x, jax.Array):
        return True
    indices = [str(i) for i in x.sharding.devices_indices_map(x.shape).values()]
    return len(set(indices)) == len(indices)


def _gathered(x: Any, tiled: bool = False) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=tiled))
