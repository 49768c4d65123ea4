"""Checkpoints that tell when they are not what was saved, on Orbax's step directories.

What is on disk is a plain Orbax checkpoint of the state, with a *manifest* beside it: a
SHA-256 of every array, shapes, dtypes, how weights were pruned, and versions.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import tree as _tree
from movement_jax.fingerprint import Leaf, canonical, digests, fingerprint
from movement_jax.state import find_state

StateT = TypeVar("StateT")

_FORMAT = 1  # of the manifest
_LOCK = ".movement_jax.lock"
_STORED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_WIDE = {"float64": "float32", "int64": "int32", "uint64": "uint32"}
_WIDE |= {"complex128": "complex64"}
_SHOWN = 5  # paths in a message


class CheckpointError(ValueError):
    """A checkpoint that could not be written whole, or is not what was asked for."""


def save(directory: str | os.PathLike[str], step: int, state: Any) -> None:
    """Saves a state as ``directory/step``, and returns when all of it is there.

    Nothing is ever overwritten: a step that is there already is refused. A save that
    fails or is killed leaves all earlier steps as they were, and none of its own that
    :func:`restore` would take. With several processes all of them must call this.

    Args:
      directory: where the run keeps its steps; made if it is not there. A local path,
        or one that Orbax knows, such as ``gs://``.
      step: number of the step, larger than those there.
      state: any tree of arrays and numbers, such as Flax's ``TrainState``.

    Raises:
      ValueError: if the state could not be restored as it is: a leaf of size zero or
        that is no array, 64 bits that JAX would make 32, or two keys that Orbax would
        write to the same place.
      CheckpointError: if the step is there, another process is saving into the
        directory, or the disk is full; the message says which step is the last good.

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
    _check_step(step)
    leaves = digests(state)
    _check_savable(leaves)
    manifest = _sealed(
        {
            "format": _FORMAT,
            "step": step,
            "leaves": {name: list(leaf) for name, leaf in leaves.items()},
            "config": _config_of(state),
            "fingerprint": fingerprint(state),
            "versions": {name: importlib.metadata.version(name) for name in _STORED},
        }
    )
    state = jax.tree.map(
        lambda x: x if isinstance(x, jax.Array | np.ndarray) else jnp.asarray(x), state
    )
    with _locked(directory):
        try:
            there = steps(directory)
            if there and step <= there[-1]:
                raise CheckpointError(
                    f"`step` must be larger than the last step in {directory}, which "
                    f"is {there[-1]}; got {step}. Steps are never overwritten: "
                    "continue from the last one, or give the run another directory."
                )
            with _cleaned(directory) as checkpointer:
                checkpointer.save(step, state, force=True, custom_metadata=manifest)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"Step {step} could not be saved to {directory}: {_first_line(error)}. "
                f"{_cleaned_up(directory)}"
            ) from error
        if step not in steps(directory):
            raise CheckpointError(
                f"Step {step} was not written to {directory}. {_cleaned_up(directory)}"
            )


def restore(
    directory: str | os.PathLike[str], like: StateT, step: int | None = None
) -> StateT:
    """Restores a state that :func:`save` saved, or says why it is not that state.

    Every array is compared with the digest that was taken when it was saved. Nothing is
    cast, dropped or made up. With several processes all of them must call this.

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
    step = _found_step(directory, step)
    where = f"Step {step} in {directory}"
    manifest = _read_manifest(directory, step, where)
    wanted = _named(like)
    _check_fits(manifest, wanted, _config_of(like), where)
    target = jax.tree.map(_target, like)
    state: StateT = jax.tree.map(_canonical, _load(directory, step, target, where))
    _check_content(manifest, digests(state), where)
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
      The fingerprint of every step looked at (see :func:`movement_jax.fingerprint`).

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
            manifest = _read_manifest(directory, one, where)
            found = digests(_load(directory, one, None, where))
            _check_content(manifest, _as_saved(found, manifest["leaves"]), where)
        except CheckpointError as error:
            bad.append(str(error))
        else:
            good[one] = str(manifest["fingerprint"])
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
    from orbax.checkpoint import utils

    return sorted(utils.checkpoint_steps(_path(directory)))


def _cleaned(directory: Any) -> Any:
    """An Orbax checkpointer for a directory without what failed saves have left."""
    from orbax.checkpoint import v1 as ocp

    return ocp.training.Checkpointer(_path(directory), cleanup_tmp_directories=True)


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
    _check_step(step)
    if step not in there:
        raise CheckpointError(f"There is no step {step} in {directory}, only {there}.")
    return step


def _check_step(step: Any) -> None:
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(
            f"`step` must be a number of steps, got {step!r}. Of a train state it is "
            "`int(state.step)`."
        )
    if step < 0:
        raise ValueError(f"`step` must not be negative, got {step}.")


def _check_savable(leaves: Mapping[str, Leaf]) -> None:
    for name, leaf in leaves.items():
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
    written: dict[str, str] = {}
    for name in leaves:
        other = written.setdefault(name.replace("/", "."), name)
        if other != name:
            raise ValueError(
                f"Orbax would write {other!r} and {name!r} to the same place, and one "
                "would be lost. Rename the key that has a dot in it."
            )
    for name in leaves:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(
                f"The path {name!r} of a leaf could lead out of the directory. Rename "
                "its key."
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


def _read_manifest(directory: Any, step: int, where: str) -> dict[str, Any]:
    _refuse_links(directory, step, where)
    try:
        manifest = dict(_metadata(directory, step).custom_metadata)
        seal = manifest.pop("seal")
        whole = _sealed(manifest)["seal"] == seal and _is_manifest(manifest, step)
    except Exception as error:
        raise CheckpointError(
            f"{where}: its manifest cannot be read ({_first_line(error)}). It was "
            "damaged, or not written by `movement_jax.checkpoint.save`."
        ) from error
    if not whole:
        raise CheckpointError(f"{where}: its manifest was damaged.")
    return manifest


def _is_manifest(found: dict[str, Any], step: int) -> bool:
    """Whether it says what ours say: anyone can seal anything."""
    texts = [found["config"], found["fingerprint"]]
    numbers = [found["format"], found["step"]]
    for shape, dtype, digest in found["leaves"].values():
        texts += [dtype, digest]
        numbers += shape
    return (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in numbers)
        and numbers[:2] == [_FORMAT, step]
    )


def _refuse_links(directory: Any, step: int, where: str) -> None:
    """A link, or a device, would be read as if it was part of the checkpoint."""
    if _in_bucket(directory):
        return  # which knows no links
    pending = [_step_path(directory, step)]
    while pending:
        path = pending.pop()
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            pending += [os.path.join(path, name) for name in os.listdir(path)]
        elif not stat.S_ISREG(mode):
            raise CheckpointError(
                f"{where}: {path} is a link or no regular file. It could be made to "
                "read other files of this machine, so nothing of it was read."
            )


def _named(like: Any) -> dict[str, tuple[list[int], str]]:
    def kind(x: Any) -> tuple[list[int], str]:
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        return list(x.shape), str(x.dtype)

    return {name: kind(x) for name, x in _tree.named_leaves(like)}


def _check_fits(
    manifest: dict[str, Any],
    wanted: dict[str, tuple[list[int], str]],
    config: str,
    where: str,
) -> None:
    saved = {name: (shape, dtype) for name, (shape, dtype, _) in _leaves_of(manifest)}
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


def _leaves_of(manifest: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    yield from manifest["leaves"].items()


def _check_content(
    manifest: dict[str, Any], found: Mapping[str, Leaf], where: str
) -> None:
    saved = {name: Leaf(tuple(s), d, h) for name, (s, d, h) in _leaves_of(manifest)}
    wrong = sorted(name for name in saved if found.get(name) != saved[name])
    wrong += sorted(found.keys() - saved.keys())
    if wrong:
        raise CheckpointError(
            f"{where}: leaf {wrong[0]!r} is not what was saved (of {len(wrong)} such "
            f"among {len(saved)}). The files were damaged or changed: restore another "
            "step."
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

    try:
        if target is None:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                _metadata(directory, step).metadata,
            )
        return ocp.load(_step_path(directory, step), target)
    except Exception as error:
        raise CheckpointError(
            f"{where} cannot be read: {_first_line(error)}. If its files were damaged, "
            "restore another step."
        ) from error


def _as_saved(found: Mapping[str, Leaf], saved: Mapping[str, Any]) -> dict[str, Leaf]:
    """Digests of plain dicts by the paths that they have in the state.

    Those of boxes end in ``/value`` on disk, and random keys are plain integers.
    """
    named = {}
    for name, leaf in found.items():
        name = name if name in saved else name.rpartition("/")[0]
        named[name] = leaf
        if name in saved and saved[name][1].startswith("key<"):
            named[name] = leaf._replace(shape=leaf.shape[:-1], dtype=saved[name][1])
    return named


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

    os.makedirs(directory, exist_ok=True)
    path = os.path.join(_path(directory), _LOCK)
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
    free = True
    try:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
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


def _cleaned_up(directory: Any) -> str:
    """Removes what a failed save has left, which would keep a full disk full."""
    with _cleaned(directory):
        there = steps(directory)
    return f"The last good step is {there[-1]}." if there else "There is no good step."


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
