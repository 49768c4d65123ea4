"""A directory of checkpoints on disk: its steps, its lock, and what is left in it."""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

STATE = "state"  # how Orbax calls the one tree of a step
PATIENCE = 10  # seconds, with what a failed save still does
_LOCK = ".movement_jax.lock"
_TMP = ".orbax-checkpoint-tmp"  # in the name of what a save that runs has written


class CheckpointError(ValueError):
    """A checkpoint that could not be written whole, or is not what was asked for."""


def checked_step(step: Any) -> int:
    """The number of a step as a Python integer; refuses what is none."""
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(
            f"`step` must be a number of steps, got {step!r}. Of a train state it is "
            "`int(state.step)`."
        )
    if step < 0:
        raise ValueError(f"`step` must not be negative, got {step}.")
    return int(step)


def is_step(name: str) -> bool:
    """Whether a directory is what `save` calls one: Orbax takes others too."""
    return name.isascii() and name.isdigit() and name == str(int(name))


def step_like(directory: Any) -> list[str]:
    """Paths of all that Orbax takes for a step that was written to its end.

    Raises:
      CheckpointError: if there is something else in the place of the directory.
    """
    from orbax.checkpoint import utils

    try:
        return [str(path) for path in utils.checkpoint_steps_paths(_path(directory))]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} cannot be read as a directory of checkpoints: "
            f"{first_line(error)}."
        ) from error


def step_path(directory: Any, step: int) -> str:
    """Where a step is, or would be."""
    return os.path.join(_path(directory), str(step))


def _path(directory: str | os.PathLike[str]) -> str:
    path = os.fspath(directory)
    return path if _in_bucket(path) else os.path.abspath(path)


def _in_bucket(directory: Any) -> bool:
    return "://" in os.fspath(directory)


def opened(directory: Any) -> Any:
    """Orbax's own view of the directory, to save with."""
    from orbax.checkpoint import v1 as ocp

    # It would clean up without telling when it is done: see `clean`.
    cleans = _in_bucket(directory)
    return ocp.training.Checkpointer(_path(directory), cleanup_tmp_directories=cleans)


def refuse_links(path: str, where: str) -> int | None:
    """Refuses what would be read as if it was part of the checkpoint; sums up sizes.

    Args:
      path: of a step, or of what is named like one.
      where: begins the message.

    Returns:
      Bytes of all files; None in a bucket.
    """
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
                f"{where}: nothing is known of {path} ({first_line(error)})."
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(
                f"{where}: {path} is a link or no regular file. It could be made to "
                "read other files of this machine, so nothing of it was read."
            )
        size += found.st_size
    return size


@contextlib.contextmanager
def locked(directory: Any) -> Iterator[None]:
    """Keeps a second run from saving into the same directory at the same time.

    Makes the directory if it is not there, and removes what failed saves have left.
    With several processes all of them must enter. Does nothing in a bucket.

    Raises:
      CheckpointError: if another run saves there, or nothing can be written.
    """
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
            f"Nothing can be saved to {directory}: {first_line(error)}. Give another "
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
                clean(directory)
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


def clean(directory: Any) -> None:
    """Removes what failed saves have left, which would keep a full disk full."""
    if _in_bucket(directory):
        return  # Orbax does, with the next save
    for name in os.listdir(_path(directory)):
        path = os.path.join(_path(directory), name)
        if _TMP not in name:
            continue
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
        end = time.monotonic() + PATIENCE
        while os.path.isdir(path) and time.monotonic() < end:
            shutil.rmtree(path, ignore_errors=True)  # writers may still add to it


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name if it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
