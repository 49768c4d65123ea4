"""Checkpoints that tell when they are not what was saved, on Orbax's step directories.

What is on disk is a plain Orbax checkpoint of the state, with a *manifest* beside it: a
SHA-256 of every array, shapes, dtypes, how weights were pruned, and versions.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import tree as _tree
from movement_jax.fingerprint import (
    Leaf,
    assert_same_everywhere,
    canonical,
    combined,
    covered,
    digests,
    fingerprint_of,
)
from movement_jax.state import find_state

StateT = TypeVar("StateT")

_FORMAT = 1  # of the manifest
_LOCK = ".movement_jax.lock"
_STORED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_WIDE = {"float64": "float32", "int64": "int32", "uint64": "uint32"}
_WIDE |= {"complex128": "complex64"}
_SHOWN = 5  # paths in a message
_PATIENCE = 10  # seconds, with what a failed save still does
_STATE = "state"  # how Orbax calls the one tree of a step
_TMP = ".orbax-checkpoint-tmp"  # in the name of what a save that runs has written
# Read by `json`, 1 MiB may become 20 of objects, in half a second. More than this is
# only read beside files that are larger still.
_JSON_BYTES, _JSON_PART = 4 * 2**20, 16
# What `verify` believes: compressed, an array may be far smaller than in memory.
_UNPACKED_BYTES, _UNPACKED_RATIO = 256 * 2**20, 1000


class CheckpointError(ValueError):
    """A checkpoint that could not be written whole, or is not what was asked for."""


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
    step = _checked_step(step)
    leaves = digests(state)
    _check_savable(leaves)
    try:
        assert_same_everywhere(state)
    except ValueError as error:
        raise CheckpointError(
            f"Step {step} was not saved to {directory}. {error}"
        ) from error
    manifest = _sealed(
        {
            "format": _FORMAT,
            "step": step,
            "leaves": {name: list(leaf) for name, leaf in leaves.items()},
            "config": _config_of(state),
            "fingerprint": fingerprint_of(state, leaves),
            "covered": covered(state),
            "versions": {name: importlib.metadata.version(name) for name in _STORED},
        }
    )
    state = jax.tree.map(
        lambda x: x if isinstance(x, jax.Array | np.ndarray) else jnp.asarray(x), state
    )
    with _locked(directory):
        there = steps(directory)
        if there and step <= there[-1]:
            raise CheckpointError(
                f"`step` must be larger than the last step in {directory}, which "
                f"is {there[-1]}; got {step}. Steps are never overwritten: "
                "continue from the last one, or give the run another directory."
            )
        for path in _step_like(directory):
            _refuse_links(path, f"Step {step} was not saved to {directory}")
        others = set(threading.enumerate())
        try:
            with _checkpointer(directory) as checkpointer:
                checkpointer.save(step, state, force=True, custom_metadata=manifest)
        except Exception as error:
            raise CheckpointError(
                f"Step {step} could not be saved to {directory}: {_first_line(error)}. "
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
        manifest, _ = _read_manifest(directory, found, where)
        _check_fits(manifest, _named(like), _config_of(like), where)
        _described(directory, found, manifest["leaves"], where)
        target = jax.tree.map(_target, like)
        state: StateT = jax.tree.map(_canonical, _load(directory, found, target, where))
        leaves = digests(state)
        _check_content(_leaves_of(manifest), leaves, where)
        _check_fingerprint(manifest, fingerprint_of(state, leaves), where)
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
            manifest, size = _read_manifest(directory, one, where)
            saved = manifest["leaves"]
            written = _described(directory, one, saved, where)
            target = _on_one_device(written, size, where)
            arrays = _by_saved_name(_load(directory, one, target, where), saved)
            leaves = _as_keys(digests(arrays), saved)
            _check_content(_leaves_of(manifest), leaves, where)
            mark = _recomputed(manifest, arrays, leaves, where)
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
    named = (os.path.basename(path) for path in _step_like(directory))
    return sorted(int(name) for name in named if _is_step(name))


def _is_step(name: str) -> bool:
    """Whether a directory is what :func:`save` calls one: Orbax takes others too."""
    return name.isascii() and name.isdigit() and name == str(int(name))


def _step_like(directory: Any) -> list[str]:
    """Paths of all that Orbax takes for a step that was written to its end."""
    from orbax.checkpoint import utils

    try:
        return [str(path) for path in utils.checkpoint_steps_paths(_path(directory))]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} cannot be read as a directory of checkpoints: "
            f"{_first_line(error)}."
        ) from error


def _checkpointer(directory: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    # It would clean up without telling when it is done: see `_clean`.
    cleans = _in_bucket(directory)
    return ocp.training.Checkpointer(_path(directory), cleanup_tmp_directories=cleans)


def _path(directory: str | os.PathLike[str]) -> str:
    path = os.fspath(directory)
    return path if _in_bucket(path) else os.path.abspath(path)


def _step_path(directory: Any, step: int) -> str:
    return os.path.join(_path(directory), str(step))


def _metadata(directory: Any, step: int) -> Any:
    from orbax.checkpoint import v1 as ocp

    return ocp.metadata(_step_path(directory, step))


def _in_bucket(directory: Any) -> bool:
    return "://" in os.fspath(directory)


def _found_step(directory: Any, step: int | None) -> int:
    there = steps(directory)
    if not there:
        raise CheckpointError(f"There is no checkpoint in {directory}.")
    if step is None:
        return there[-1]
    step = _checked_step(step)
    if step not in there:
        raise CheckpointError(f"There is no step {step} in {directory}, only {there}.")
    return step


def _checked_step(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(
            f"`step` must be a number of steps, got {step!r}. Of a train state it is "
            "`int(state.step)`."
        )
    if step < 0:
        raise ValueError(f"`step` must not be negative, got {step}.")
    return int(step)


def _check_savable(leaves: Mapping[str, Leaf]) -> None:
    if not leaves:
        raise ValueError("There is no array in the state: nothing to save.")
    for name, leaf in leaves.items():
        if not _is_written(leaf.dtype):
            raise ValueError(
                f"Leaf {name!r} is {leaf.dtype}, which Orbax does not write. Save "
                "`x.astype` of another dtype."
            )
        wide = _WIDE.get(leaf.dtype)
        if wide and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                f"Leaf {name!r} is {leaf.dtype}, which JAX would restore as {wide}. "
                f"Save `x.astype({wide!r})`, or switch `jax_enable_x64` on."
            )
    empty = [name for name, leaf in leaves.items() if 0 in leaf.shape]
    if empty:
        raise ValueError(
            f"Orbax saves no arrays of size zero: {empty[:_SHOWN]}. Take them out of "
            "the state; they hold nothing."
        )
    # Orbax writes each key twice, and some 30 bytes beside it; of a leaf 200 more.
    text = sum(300 + 2 * len(name) + 40 * name.count("/") for name in leaves)
    data = sum(math.prod(leaf.shape) for leaf in leaves.values())
    if text > max(_JSON_BYTES, data // _JSON_PART):
        raise ValueError(
            f"The state is of {len(leaves)} leaves with hardly anything in them, which "
            "`restore` would take for an attack. Stack them."
        )
    written: dict[str, str] = {}
    for name in leaves:
        other = written.setdefault(name.replace("/", "."), name)
        if other != name:
            raise ValueError(
                f"Orbax would write {other!r} and {name!r} to the same place, and one "
                "would be lost. Rename the key that has a dot in it."
            )
    for name in leaves:
        if _leads_out(name):
            raise ValueError(
                f"The path {name!r} of a leaf is no safe name: as that of a file it "
                "could lead out of the directory. Rename its key."
            )


def _is_written(dtype: str) -> bool:
    import tensorstore

    if dtype.startswith("key<"):
        return True  # as integers
    try:
        tensorstore.dtype(dtype)
    except ValueError:
        return False
    return True


def _leads_out(name: str) -> bool:
    """Whether a file named like a leaf could be elsewhere.

    Orbax joins the keys with dots, so that empty ones and dots may make a ``..``.
    """
    keys = name.split("/")
    return (
        name.startswith("/")
        or ".." in keys
        or any({a, b} <= {"", "."} for a, b in zip(keys, keys[1:]))
        or "\0" in name
        or name != name.encode(errors="replace").decode()
    )


def _config_of(state: Any) -> str:
    """How weights are pruned, without where in memory functions are."""
    try:
        config = find_state(state).config
    except ValueError:
        return "none"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(config))


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(manifest, sort_keys=True)
    return {**manifest, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _read_manifest(
    directory: Any, step: int, where: str
) -> tuple[dict[str, Any], int | None]:
    """What was saved, if names and files are safe to open; and their size, if local."""
    size = _refuse_links(_step_path(directory, step), where)
    try:
        written = _read_json(directory, step, "_CHECKPOINT_METADATA", size)
        manifest = dict(written["custom_metadata"])
        seal = manifest.pop("seal")
        whole = _sealed(manifest)["seal"] == seal and _is_manifest(manifest, step)
    except Exception as error:
        raise CheckpointError(
            f"{where}: its manifest cannot be read ({_first_line(error)}). It was "
            "damaged, or not written by `movement_jax.checkpoint.save`."
        ) from error
    if not whole:
        raise CheckpointError(f"{where}: its manifest was damaged.")
    written = _names_of_orbax(directory, step, size, where)
    _check_names(manifest["leaves"], written, where)
    return manifest, size


def _names_of_orbax(
    directory: Any, step: int, size: int | None, where: str
) -> list[tuple[str, bool]]:
    """Names by which Orbax would open files, and whether there is an array in them."""
    try:
        written = _read_json(directory, step, f"{_STATE}/_METADATA", size)
        return [
            (
                "/".join(str(key["key"]) for key in entry["key_metadata"]),
                not entry["value_metadata"]["skip_deserialize"],
            )
            for entry in written["tree_metadata"].values()
        ]
    except Exception as error:
        raise CheckpointError(
            f"{where} cannot be read: what Orbax wrote of it was damaged "
            f"({_first_line(error)}). Restore another step."
        ) from error


def _check_names(
    saved: Mapping[str, Any], written: list[tuple[str, bool]], where: str
) -> None:
    for name in [*saved, *(name for name, _ in written)]:
        if _leads_out(name):
            raise CheckpointError(
                f"{where}: the path {name!r} of a leaf could lead out of the "
                "directory, so nothing of it was read."
            )
    names = sorted(_saved_name(name, saved) for name, holds in written if holds)
    if names != sorted(saved):
        odd = sorted(set(names) ^ set(saved)) or names
        raise CheckpointError(
            f"{where}: its manifest and Orbax name other leaves: {odd[:_SHOWN]}. The "
            "files were damaged or changed: restore another step."
        )


def _read_json(directory: Any, step: int, name: str, size: int | None) -> Any:
    from etils import epath

    path = epath.Path(_step_path(directory, step)) / name
    limit = max(_JSON_BYTES, (size or 0) // _JSON_PART)
    if path.stat().length > limit:
        raise ValueError(f"{name} is larger than {limit} bytes")
    return json.loads(path.read_bytes())


def _is_manifest(found: dict[str, Any], step: int) -> bool:
    """Whether it says what ours say: anyone can seal anything."""
    texts = [found["config"], found["fingerprint"]]
    numbers = [found["format"], found["step"]]
    for shape, dtype, digest in found["leaves"].values():
        texts += [dtype, digest]
        numbers += shape
    for name, axis in found.get("covered", {}).values():
        texts.append(name)
        numbers.append(0 if axis is None else axis)
    return (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in numbers)
        and numbers[:2] == [_FORMAT, step]
    )


def _refuse_links(path: str, where: str) -> int | None:
    """Refuses what would be read as if it was part of the checkpoint; sums up sizes."""
    if _in_bucket(path):
        return None  # which knows no links
    pending, size = [path], 0
    while pending:
        path = pending.pop()
        try:
            found = os.lstat(path)
            if stat.S_ISDIR(found.st_mode):
                pending += [os.path.join(path, name) for name in os.listdir(path)]
                continue
        except OSError as error:
            raise CheckpointError(
                f"{where}: nothing is known of {path} ({_first_line(error)})."
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(
                f"{where}: {path} is a link or no regular file. It could be made to "
                "read other files of this machine, so nothing of it was read."
            )
        size += found.st_size
    return size


def _named(like: Any) -> dict[str, tuple[list[int], str]]:
    def kind(name: str, x: Any) -> tuple[list[int], str]:
        try:
            x = x if hasattr(x, "dtype") else jnp.asarray(x)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"`like` has {x!r} at {name!r}, which is no array. Make it as what was "
                "saved was made."
            ) from error
        return list(x.shape), str(x.dtype)

    return {name: kind(name, x) for name, x in _tree.named_leaves(like)}


def _check_fits(
    manifest: dict[str, Any],
    wanted: dict[str, tuple[list[int], str]],
    config: str,
    where: str,
) -> None:
    saved = {n: (list(x.shape), x.dtype) for n, x in _leaves_of(manifest).items()}
    for names, what in (
        (sorted(wanted.keys() - saved.keys()), "is not in it"),
        (sorted(saved.keys() - wanted.keys()), "is in it, but not in `like`"),
    ):
        if names:
            raise CheckpointError(
                f"{where} does not fit `like`: leaf {names[0]!r} {what} (of "
                f"{len(names)} such). Make `like` with the same model and optimizer."
            )
    for name, (shape, dtype) in wanted.items():
        if saved[name] != (shape, dtype):
            raise CheckpointError(
                f"{where} does not fit `like`: leaf {name!r} is {saved[name][1]}"
                f"{saved[name][0]} in it and {dtype}{shape} in `like`. Nothing is cast "
                "or cut: make `like` with the same model and dtypes."
            )
    if manifest["config"] != config:
        raise CheckpointError(
            f"{where} was pruned with {manifest['config']}, `like` with {config}. Make "
            "`like` with the same `movement_pruning`."
        )


def _leaves_of(manifest: dict[str, Any]) -> dict[str, Leaf]:
    return {n: Leaf(tuple(s), d, h) for n, (s, d, h) in manifest["leaves"].items()}


def _check_content(
    saved: Mapping[str, Leaf], found: Mapping[str, Leaf], where: str
) -> None:
    wrong = sorted(name for name in saved if found.get(name) != saved[name])
    wrong += sorted(found.keys() - saved.keys())
    if wrong:
        raise CheckpointError(
            f"{where}: leaf {wrong[0]!r} is not what was saved (of {len(wrong)} such "
            f"among {len(saved)}). The files were damaged or changed: restore another "
            "step."
        )


def _check_fingerprint(manifest: dict[str, Any], found: str, where: str) -> None:
    if found != manifest["fingerprint"]:
        raise CheckpointError(
            f"{where}: its params and masks have not the fingerprint that its manifest "
            "says. They were changed, or are not of one run: restore another step."
        )


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

    path = _step_path(directory, step)
    with _readable(where):
        return ocp.load(path, target, checkpointable_name=_STATE)


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Makes one kind of error of the many that damaged files lead to."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where} cannot be read: {_first_line(error)}. If its files were damaged, "
            "restore another step."
        ) from error


def _described(directory: Any, step: int, saved: Mapping[str, Any], where: str) -> Any:
    """The tree of arrays as their files describe them, if that is what was saved."""
    from orbax.checkpoint import v1 as ocp

    with _readable(where):
        path = _step_path(directory, step)
        written = ocp.metadata(path, checkpointable_name=_STATE).metadata
        arrays = _by_saved_name(written, saved)
        found = {n: Leaf(tuple(x.shape), str(x.dtype), "") for n, x in arrays.items()}
        chunks = {n: x.storage_metadata.chunk_shape for n, x in arrays.items()}
    wanted = {name: Leaf(tuple(s), d, "") for name, (s, d, _) in saved.items()}
    _check_content(wanted, _as_keys(found, saved), where)
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


def _saved_name(name: str, saved: Mapping[str, Any]) -> str:
    """The path in the state: those of boxes end in ``/value`` on disk."""
    return name if name in saved else name.rpartition("/")[0]


def _by_saved_name(tree: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    return {_saved_name(name, saved): x for name, x in _tree.named_leaves(tree)}


def _as_keys(found: Mapping[str, Leaf], saved: Mapping[str, Any]) -> dict[str, Leaf]:
    """Random keys as such, which Orbax may show as the integers that they are."""

    def one(name: str, leaf: Leaf) -> Leaf:
        dtype = saved[name][1] if name in saved else leaf.dtype
        if not dtype.startswith("key<") or leaf.dtype.startswith("key<"):
            return leaf
        return leaf._replace(shape=leaf.shape[:-1], dtype=dtype)

    return {name: one(name, leaf) for name, leaf in found.items()}


def _recomputed(
    manifest: dict[str, Any],
    arrays: Mapping[str, Any],
    leaves: Mapping[str, Leaf],
    where: str,
) -> str:
    """The fingerprint of what was read, as far as the manifest says what is in it."""
    covered = manifest.get("covered")
    if not covered:
        return ""
    with _readable(where):
        found = combined(covered, arrays, leaves)
    _check_fingerprint(manifest, found, where)
    return found


def _canonical(x: Any) -> Any:
    """Bools of the bytes 0 and 1, wherever they are."""
    if getattr(x, "dtype", None) != np.bool_:
        return x
    shards = [
        jax.device_put(canonical(np.asarray(shard.data)), shard.device)
        for shard in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


@contextlib.contextmanager
def _locked(directory: Any) -> Iterator[None]:
    """Keeps a second run from saving into the same directory at the same time."""
    if _in_bucket(directory):
        yield
        return
    import fcntl

    path = os.path.join(_path(directory), _LOCK)
    try:
        os.makedirs(directory, exist_ok=True)
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"Nothing can be saved to {directory}: {_first_line(error)}. Give another "
            f"directory, or take away what is in the place of {path}."
        ) from error
    free = True
    try:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            else:
                _clean(directory)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            free = bool(multihost_utils.broadcast_one_to_all(np.array(free)))
        if not free:
            raise CheckpointError(
                f"Another run is saving to {directory}. Give every run a directory of "
                "its own."
            )
        yield
    finally:
        os.close(lock)  # which gives it back, as the end of the process would


def _cleaned_up(directory: Any, others: set[threading.Thread]) -> str:
    """Cleans up after a failed save, once all the threads that it began have ended."""
    for thread in set(threading.enumerate()) - others:
        if type(thread).__name__ == "_SignalingThread":  # others wait for more work
            thread.join(_PATIENCE)
    if jax.process_index() == 0:
        _clean(directory)
    there = steps(directory)
    return f"The last good step is {there[-1]}." if there else "There is no good step."


def _clean(directory: Any) -> None:
    """Removes what failed saves have left, which would keep a full disk full."""
    if _in_bucket(directory):
        return  # Orbax does, with the next save
    for name in os.listdir(_path(directory)):
        path = os.path.join(_path(directory), name)
        if _TMP not in name:
            continue
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
        end = time.monotonic() + _PATIENCE
        while os.path.isdir(path) and time.monotonic() < end:
            shutil.rmtree(path, ignore_errors=True)  # writers may still add to it


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
