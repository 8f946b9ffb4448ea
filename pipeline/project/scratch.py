"""Scratch folders that exist as long as their process.

Each lies under `.pipeline/tmp` beside a lock that the system releases when the process ends, even
if it is killed. A process that finds a free lock removes the folder. Folders of other machines,
which may share the disk, are left alone.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.project.folders import shared_folder


def _place(root: Path) -> Path:
    machine = "".join(each if each.isalnum() else "-" for each in socket.gethostname())
    return shared_folder(root) / ".pipeline" / "tmp" / machine


@contextlib.contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A new folder, removed after the block; if the process is killed, it becomes `abandoned`."""
    place = _place(root)
    place.mkdir(parents=True, exist_ok=True)
    folder = place / uuid.uuid4().hex
    lock = folder.with_suffix(".lock")
    with FileLock(lock):  # lock first: a folder without a lock counts as abandoned
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def abandoned(root: Path) -> Iterator[Path]:
    """The folders of killed processes; each is locked while the caller handles it."""
    for folder in sorted(_place(root).glob("*/")):
        lock = FileLock(folder.with_suffix(".lock"))
        with contextlib.suppress(Timeout, OSError), lock.acquire(blocking=False):
            if folder.exists():
                yield folder
            if not folder.exists():
                Path(lock.lock_file).unlink(missing_ok=True)
