"""What a checkpoint says of itself, and whether that is true.

A *manifest* has a SHA-256 of every array, shapes, dtypes, how weights were pruned, and
versions. Anyone can write one: all of it is read with care.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from movement_jax import tree as _tree
from movement_jax.fingerprint import Leaf, combined, covered, fingerprint_of
from movement_jax.state import find_state
from movement_jax.stepdirs import (
    STATE,
    CheckpointError,
    first_line,
    refuse_links,
    step_path,
)

_FORMAT = 1  # of the manifest
_STORED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_WIDE = {"float64": "float32", "int64": "int32", "uint64": "uint32"}
_WIDE |= {"complex128": "complex64"}
_SHOWN = 5  # paths in a message
# Read by `json`, 1 MiB may become 20 of objects, in half a second. More than this is
# only read beside files that are larger still.
_JSON_BYTES, _JSON_PART = 4 * 2**20, 16


def check_savable(leaves: Mapping[str, Leaf]) -> None:
    """Refuses a state that could not be restored as it is.

    Args:
      leaves: digests of its arrays, by path.

    Raises:
      ValueError: as :func:`movement_jax.checkpoint.save` says.
    """
    if not leaves:
        raise ValueError(
            "There is no array in the state, and nothing to save. Give `save` a train "
            "state, or `(params, opt_state)`."
        )
    for name, leaf in leaves.items():
        if not _is_written(leaf.dtype):
            raise ValueError(
                f"Leaf {name!r} is {leaf.dtype}, which Orbax does not write. Save it "
                "as another dtype, such as `x.astype('float32')`."
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
            "`restore` would take for an attack. Put small ones together, with "
            "`jnp.stack`, or leave them out."
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


def manifest_of(step: int, state: Any, leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """What is to be written beside a state.

    Args:
      step: its number.
      state: all of it, for how weights are pruned and what the fingerprint covers.
      leaves: digests of its arrays, by path.
    """
    return _sealed(
        {
            "format": _FORMAT,
            "step": step,
            "leaves": {name: list(leaf) for name, leaf in leaves.items()},
            "config": config_of(state),
            "fingerprint": fingerprint_of(state, leaves),
            "covered": covered(state),
            "versions": {name: importlib.metadata.version(name) for name in _STORED},
        }
    )


def config_of(state: Any) -> str:
    """How weights are pruned, without where in memory functions are."""
    try:
        config = find_state(state).config
    except ValueError:
        return "none"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(config))


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(manifest, sort_keys=True)
    return {**manifest, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(
    directory: Any, step: int, where: str
) -> tuple[dict[str, Any], int | None]:
    """What was saved, if names and files are safe to open; and their size, if local.

    Args:
      directory: as the user gave it.
      step: one that is there.
      where: begins the message.

    Raises:
      CheckpointError: if it holds links, names that lead elsewhere, or no manifest.
    """
    size = refuse_links(step_path(directory, step), where)
    try:
        written = _read_json(directory, step, "_CHECKPOINT_METADATA", size)
        manifest = dict(written["custom_metadata"])
        seal = manifest.pop("seal")
        whole = _sealed(manifest)["seal"] == seal and _is_manifest(manifest, step)
    except Exception as error:
        raise CheckpointError(
            f"{where}: its manifest cannot be read ({first_line(error)}). It was "
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
        written = _read_json(directory, step, f"{STATE}/_METADATA", size)
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
            f"({first_line(error)}). Restore another step."
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

    path = epath.Path(step_path(directory, step)) / name
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


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Makes one kind of error of the many that damaged files lead to."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{where} cannot be read: {first_line(error)}. If its files were damaged, "
            "restore another step."
        ) from error


def kinds_of(like: Any) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every leaf, by path.

    Raises:
      CheckpointError: if a leaf is no array.
    """

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


def check_fits(
    manifest: dict[str, Any],
    wanted: dict[str, tuple[list[int], str]],
    config: str,
    where: str,
) -> None:
    """Refuses a checkpoint of another kind of state.

    Args:
      manifest: as read.
      wanted: shapes and dtypes, by path.
      config: how the weights of ``like`` are pruned.
      where: begins the message.
    """
    saved = {n: (list(x.shape), x.dtype) for n, x in leaves_of(manifest).items()}
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


def leaves_of(manifest: dict[str, Any]) -> dict[str, Leaf]:
    """Digests of the arrays that were saved, by path."""
    return {n: Leaf(tuple(s), d, h) for n, (s, d, h) in manifest["leaves"].items()}


def check_content(
    saved: Mapping[str, Leaf], found: Mapping[str, Leaf], where: str
) -> None:
    """Refuses arrays that are not those that were saved; names one."""
    wrong = sorted(name for name in saved if found.get(name) != saved[name])
    wrong += sorted(found.keys() - saved.keys())
    if wrong:
        raise CheckpointError(
            f"{where}: leaf {wrong[0]!r} is not what was saved (of {len(wrong)} such "
            f"among {len(saved)}). The files were damaged or changed: restore another "
            "step."
        )


def check_fingerprint(manifest: dict[str, Any], found: str, where: str) -> None:
    """Refuses params and masks that are not of one run."""
    if found != manifest["fingerprint"]:
        raise CheckpointError(
            f"{where}: its params and masks have not the fingerprint that its manifest "
            "says. They were changed, or are not of one run: restore another step."
        )


def recomputed(
    manifest: dict[str, Any],
    arrays: Mapping[str, Any],
    leaves: Mapping[str, Leaf],
    where: str,
) -> str:
    """The fingerprint of what was read, as far as the manifest says what is in it.

    Args:
      manifest: as read.
      arrays: what was read, by path.
      leaves: their digests.
      where: begins the message.

    Returns:
      The fingerprint; empty if the manifest does not say what it covers.
    """
    covered = manifest.get("covered")
    if not covered:
        return ""
    with readable(where):
        found = combined(covered, arrays, leaves)
    check_fingerprint(manifest, found, where)
    return found


def _saved_name(name: str, saved: Mapping[str, Any]) -> str:
    """The path in the state: those of boxes end in ``/value`` on disk."""
    return name if name in saved else name.rpartition("/")[0]


def by_saved_name(tree: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a tree as Orbax reads it, by their paths in the state."""
    return {_saved_name(name, saved): x for name, x in _tree.named_leaves(tree)}


def as_keys(found: Mapping[str, Leaf], saved: Mapping[str, Any]) -> dict[str, Leaf]:
    """Random keys as such, which Orbax may show as the integers that they are."""

    def one(name: str, leaf: Leaf) -> Leaf:
        dtype = saved[name][1] if name in saved else leaf.dtype
        if not dtype.startswith("key<") or leaf.dtype.startswith("key<"):
            return leaf
        return leaf._replace(shape=leaf.shape[:-1], dtype=dtype)

    return {name: one(name, leaf) for name, leaf in found.items()}
