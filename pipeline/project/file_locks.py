"""Locks that end with their process: one per stage, one per resume state.

A process holds the stage's lock while it writes or removes the stage's outputs. These are locks of
the operating system, so none outlives its process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from gpt.base.errors import InputError
from pipeline.project.folders import shared_folder


class BusyError(InputError):
    """Another process is doing the same work; a retry can succeed once it has ended."""


def stage_lock(root: Path, stage: str) -> contextlib.AbstractContextManager[None]:
    """Within the block no other process runs the stage in this project: see `locked`."""
    return locked(root, stage, stage, "is running this stage here")


def state_lock(root: Path, stage: str, state: Path) -> contextlib.AbstractContextManager[None]:
    """Within the block no other process continues the resume state, in no other checkout either:
    see `locked`."""
    what = "makes just this in another checkout of the project"
    return locked(shared_folder(root), f"{stage}-{state.name}", stage, what)


@contextlib.contextmanager
def locked(root: Path, name: str, stage: str, what: str) -> Iterator[None]:
    """Hold a lock, and note beside it which process does.

    The operating system releases the lock when this process ends, even if it is killed.

    Args:
        root: the project.
        name: the name of the lock.
        stage: the stage's name in error messages.
        what: what the other process is doing, in error messages.

    Raises:
        BusyError: another process holds the lock; raised at once, without waiting.
        InputError: the lock cannot be taken.
    """
    path = root / ".pipeline" / "locks" / f"{name}.lock"
    note = path.with_suffix(".pid")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise BusyError(f"{stage}: {_holder(note)} {what}; wait for it or stop it") from None
    except OSError as error:
        raise InputError(
            f"{path.relative_to(root)}: cannot be locked ({error.strerror or error}); "
            "make the folder writable"
        ) from None
    try:
        with contextlib.suppress(OSError):  # only improves the error message
            note.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.release()


def _holder(note: Path) -> str:
    """The holder of a lock, if the note can be read."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        pid = int(note.read_text())
        if psutil.pid_exists(pid):
            return f"process {pid}"
    return "another process"
