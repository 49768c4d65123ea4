"""Checkpoints that tell when they are not what was saved, on Orbax's step directories.

What is on disk is a plain Orbax checkpoint of the state, with a *manifest* beside it: a
SHA-256 of every array, shapes, dtypes, how weights were pruned, and versions.
"""

import math
import os
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax.fingerprint import (
    Leaf,
    assert_same_everywhere,
    canonical,
    digests,
    fingerprint_of,
)
from movement_jax.manifest import (
    as_keys,
    by_saved_name,
    check_content,
    check_fingerprint,
    check_fits,
    check_savable,
    config_of,
    kinds_of,
    leaves_of,
    manifest_of,
    read_manifest,
    readable,
    recomputed,
)
from movement_jax.stepdirs import (
    PATIENCE,
    STATE,
    checked_step,
    clean,
    first_line,
    is_step,
    locked,
    opened,
    refuse_links,
    step_like,
    step_path,
)
from movement_jax.stepdirs import CheckpointError as CheckpointError

StateT = TypeVar("StateT")

# What `verify` believes: compressed, an array may be far smaller than in memory.
_UNPACKED_BYTES, _UNPACKED_RATIO = 256 * 2**20, 1000


def save(directory: str | os.PathLike[str], step: int, state: Any) -> None:
    """Saves a state as ``directory/step``, and returns when all of it is there.

    Nothing is ever overwritten: a step that is there already is refused. A save that
    fails or is killed leaves all earlier steps as they were, and none of its own that
    :func:`restore` would take. With several processes all of them must call this.

    The schedule of the sparsity is code and no part of the state: it may be another one
    when the state is restored. That weights are alive under a mask is no reason to
    refuse either; :func:`movement_jax.health` shows them.

    Args:
      directory: where the run keeps its steps; made if it is not there. A local path,
        or one that Orbax knows, such as ``gs://``.
      step: number of the step, larger than those there.
      state: any tree of arrays and numbers, such as Flax's ``TrainState``.

    Raises:
      ValueError: if the state could not be restored as it is: no leaves, one of size
        zero, of a dtype that Orbax does not write or that is no array, 64 bits that JAX
        would make 32, or two keys that Orbax would write to the same place.
      CheckpointError: if copies of an array differ between devices or processes, the
        step is there, another process is saving into the directory, the directory
        cannot be written or the disk is full; then the message says which step is the
        last good.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, movement_jax as mj
      >>> directory = tempfile.mkdtemp()
      >>> tx = mj.movement_pruning(None, mj.Magnitude())
      >>> params = {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2)}
      >>> state = mj.prune((params, tx.init(params)), 0.5)
      >>> mj.checkpoint.save(directory, 1, state)
      >>> like = params, tx.init(params)
      >>> restored, _ = mj.checkpoint.restore(directory, like=like)
      >>> print(restored["kernel"])
      [[0. 0.]
       [3. 4.]]
    """
    step = checked_step(step)
    leaves = digests(state)
    check_savable(leaves)
    try:
        assert_same_everywhere(state)
    except ValueError as error:
        raise CheckpointError(
            f"Step {step} was not saved to {directory}. {error}"
        ) from error
    manifest = manifest_of(step, state, leaves)
    state = jax.tree.map(
        lambda x: x if isinstance(x, jax.Array | np.ndarray) else jnp.asarray(x), state
    )
    with locked(directory):
        there = steps(directory)
        if there and step <= there[-1]:
            raise CheckpointError(
                f"`step` must be larger than the last step in {directory}, which "
                f"is {there[-1]}; got {step}. Steps are never overwritten: "
                "continue from the last one, or give the run another directory."
            )
        for path in step_like(directory):
            refuse_links(path, f"Step {step} was not saved to {directory}")
        others = set(threading.enumerate())
        try:
            with opened(directory) as checkpointer:
                checkpointer.save(step, state, force=True, custom_metadata=manifest)
        except Exception as error:
            raise CheckpointError(
                f"Step {step} could not be saved to {directory}: {first_line(error)}. "
                f"{_cleaned_up(directory, others)}"
            ) from error
        if step not in steps(directory):
            raise CheckpointError(
                f"Step {step} was not written to {directory}. "
                f"{_cleaned_up(directory, others)}"
            )


def restore(
    directory: str | os.PathLike[str], like: StateT, step: int | None = None
) -> StateT:
    """Restores a state that :func:`save` saved, or says why it is not that state.

    Every array is compared with the digest that was taken when it was saved, and params
    and masks with their common fingerprint. Nothing is cast, dropped or made up. With
    several processes all of them must call this.

    The schedule of the sparsity is not compared, since it is no part of the state: give
    ``like`` another one to go on with another one.

    Args:
      directory: as given to :func:`save`. May come from a stranger.
      like: a state of the same structure, such as a fresh one; arrays or, from
        ``jax.eval_shape``, ``jax.ShapeDtypeStruct``. Arrays are put where those of
        ``like`` are: another mesh than at saving is fine.
      step: which one; the last one by default.

    Returns:
      The state: a tree like ``like`` of ``jax.Array``.

    Raises:
      CheckpointError: if there is no such step; if it holds links or files that are no
        files; if its paths, shapes, dtypes or the way of pruning are not those of
        ``like``; or if any array is not what was saved. Names the directory and leaf.

    Examples:
      See :func:`save`.
    """
    found = _found_step(directory, step)
    where = f"Step {found} in {directory}"
    try:
        manifest, _ = read_manifest(directory, found, where)
        check_fits(manifest, kinds_of(like), config_of(like), where)
        _described(directory, found, manifest["leaves"], where)
        target = jax.tree.map(_target, like)
        state: StateT = jax.tree.map(_canonical, _load(directory, found, target, where))
        leaves = digests(state)
        check_content(leaves_of(manifest), leaves, where)
        check_fingerprint(manifest, fingerprint_of(state, leaves), where)
    except CheckpointError as error:
        others = [one for one in steps(directory) if one != found]
        if step is not None or not others:
            raise
        raise CheckpointError(
            f"{error} Other steps there: {others}; give `step=` to restore one of "
            "them. `verify` says which are good."
        ) from error
    return state


def verify(
    directory: str | os.PathLike[str], step: int | None = None
) -> dict[int, str]:
    """Reads checkpoints in full and compares every array with what was saved.

    One process is enough, whatever the number and the mesh that saved.

    Args:
      directory: as given to :func:`save`.
      step: which one; all of them by default.

    Returns:
      The fingerprint of every step looked at (see :func:`movement_jax.fingerprint`),
      computed from what was read; empty where the manifest does not say what it covers,
      as those of the first version did not.

    Raises:
      CheckpointError: if there are none, or any is not what was saved; the message
        lists those that are not and those that are.

    Examples:
      >>> import tempfile, jax.numpy as jnp, movement_jax as mj
      >>> directory = tempfile.mkdtemp()
      >>> mj.checkpoint.save(directory, 1, {"kernel": jnp.ones((2, 2))})
      >>> list(mj.checkpoint.verify(directory))
      [1]
    """
    good, bad = {}, []
    for one in steps(directory) if step is None else [_found_step(directory, step)]:
        where = f"Step {one} in {directory}"
        try:
            manifest, size = read_manifest(directory, one, where)
            saved = manifest["leaves"]
            written = _described(directory, one, saved, where)
            target = _on_one_device(written, size, where)
            arrays = by_saved_name(_load(directory, one, target, where), saved)
            leaves = as_keys(digests(arrays), saved)
            check_content(leaves_of(manifest), leaves, where)
            mark = recomputed(manifest, arrays, leaves, where)
        except CheckpointError as error:
            bad.append(str(error))
        else:
            good[one] = mark
    if bad:
        raise CheckpointError(" ".join([*bad, f"Good steps: {list(good) or 'none'}."]))
    if not good:
        raise CheckpointError(f"There is no checkpoint in {directory}.")
    return good


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps in a directory that were written to their end, in order.

    Reads the directory afresh, so a save that failed is not among them.

    Args:
      directory: as given to :func:`save`; there need be nothing yet.

    Examples:
      >>> import tempfile, jax.numpy as jnp, movement_jax as mj
      >>> directory = tempfile.mkdtemp()
      >>> mj.checkpoint.steps(directory)
      []
    """
    named = (os.path.basename(path) for path in step_like(directory))
    return sorted(int(name) for name in named if is_step(name))


def _found_step(directory: Any, step: int | None) -> int:
    there = steps(directory)
    if not there:
        raise CheckpointError(f"There is no checkpoint in {directory}.")
    if step is None:
        return there[-1]
    step = checked_step(step)
    if step not in there:
        raise CheckpointError(f"There is no step {step} in {directory}, only {there}.")
    return step


def _target(x: Any) -> jax.ShapeDtypeStruct:
    """What Orbax is to restore: on the devices of ``x``, if it has any."""
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError(
                "With several processes every array of `like` must say where it is to "
                "be: give it a sharding."
            )
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _load(directory: Any, step: int, target: Any, where: str) -> Any:
    from orbax.checkpoint import v1 as ocp

    path = step_path(directory, step)
    with readable(where):
        return ocp.load(path, target, checkpointable_name=STATE)


def _described(directory: Any, step: int, saved: Mapping[str, Any], where: str) -> Any:
    """The tree of arrays as their files describe them, if that is what was saved."""
    from orbax.checkpoint import v1 as ocp

    with readable(where):
        path = step_path(directory, step)
        written = ocp.metadata(path, checkpointable_name=STATE).metadata
        arrays = by_saved_name(written, saved)
        found = {n: Leaf(tuple(x.shape), str(x.dtype), "") for n, x in arrays.items()}
        chunks = {n: x.storage_metadata.chunk_shape for n, x in arrays.items()}
    wanted = {name: Leaf(tuple(s), d, "") for name, (s, d, _) in saved.items()}
    check_content(wanted, as_keys(found, saved), where)
    for name, chunk in chunks.items():
        if any(a > b for a, b in zip(chunk, found[name].shape)):
            raise CheckpointError(
                f"{where}: leaf {name!r} is {list(found[name].shape)} in chunks of "
                f"{list(chunk)}, which may be meant to fill the memory."
            )
    return written


def _on_one_device(written: Any, size: int | None, where: str) -> Any:
    """What Orbax is to restore for `verify`, which has no `like` to tell how much."""
    leaves = jax.tree.leaves(written)
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    if size and total > max(_UNPACKED_BYTES, size * _UNPACKED_RATIO):
        raise CheckpointError(
            f"{where}: its {size} bytes are said to hold {total}, which may be meant "
            "to fill the memory. `restore` reads it: it knows from `like` how large "
            "the state is."
        )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), written
    )


def _canonical(x: Any) -> Any:
    """Bools of the bytes 0 and 1, wherever they are."""
    if getattr(x, "dtype", None) != np.bool_:
        return x
    shards = [
        jax.device_put(canonical(np.asarray(shard.data)), shard.device)
        for shard in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def _cleaned_up(directory: Any, others: set[threading.Thread]) -> str:
    """Cleans up after a failed save, once all the threads that it began have ended."""
    for thread in set(threading.enumerate()) - others:
        if type(thread).__name__ == "_SignalingThread":  # others wait for more work
            thread.join(PATIENCE)
    if jax.process_index() == 0:
        clean(directory)
    there = steps(directory)
    return f"The last good step is {there[-1]}." if there else "There is no good step."
