"""Locks that die with their process: one process a stage, one a resume state.

Whoever writes or removes what a stage makes holds the stage's lock. The system keeps the locks, so
that none outlives its process.
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
    """Another process is at the same work: it can be done when that one has ended."""


@contextlib.contextmanager
def stage_lock(root: Path, stage: str) -> Iterator[None]:
    """Within the block no other process runs the stage in this project.

    The system keeps the lock: it is free again when this process is gone, however it went.

    Raises:
        BusyError: another process holds it; at once, without waiting.
        InputError: it cannot be taken.
    """
    with _held(root, stage, stage, "is running this stage here"):
        yield


@contextlib.contextmanager
def state_lock(root: Path, stage: str, state: Path) -> Iterator[None]:
    """Within the block nobody else goes on from the state, in no other checkout either.

    Raises:
        BusyError: another process does; at once, without waiting.
        InputError: it cannot be taken.
    """
    name = state_lock_name(stage, state)
    with _held(
        shared_folder(root), name, stage, "makes just this in another checkout of the project"
    ):
        yield


def state_lock_name(stage: str, state: Path) -> str:
    """What the lock of a resume state is called."""
    return f"{stage}-{state.name}"


@contextlib.contextmanager
def _held(root: Path, name: str, stage: str, what: str) -> Iterator[None]:
    """Hold a lock, and let others know who does."""
    with locked(root, name, stage, what):
        pid = _pid_file(root, name)
        with contextlib.suppress(OSError):  # it only serves a better message
            pid.write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                pid.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(root: Path, name: str, stage: str, what: str = "is at work on it") -> Iterator[None]:
    """Hold a lock without saying who does.

    Args:
        root: the project.
        name: of the lock.
        stage: whose work it is, in an error.
        what: another process does, in an error.

    Raises:
        BusyError: another process holds it; at once, without waiting.
        InputError: it cannot be taken.
    """
    path = _pid_file(root, name).with_suffix(".lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise BusyError(f"{stage}: {_holder(root, name)} {what}; wait for it or stop it") from None
    except OSError as error:
        raise InputError(
            f"{path.relative_to(root)}: cannot be locked ({error.strerror or error}); "
            "make the folder writable"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _holder(root: Path, name: str) -> str:
    """Who holds a lock, as far as it can be told."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        pid = int(_pid_file(root, name).read_text())
        if pid > 0 and psutil.pid_exists(pid):  # else it is of one that was killed before
            return f"process {pid}"
    return "another process"


def _pid_file(root: Path, name: str) -> Path:
    return root / ".pipeline" / "locks" / f"{name}.pid"
