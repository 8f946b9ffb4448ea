"""Scratch folders that last as long as their process.

Each lies under `.pipeline/tmp`, a lock beside it, which the system frees when the process is gone,
however it went: whoever finds one free cleans up. Folders of other machines, which may share the
disk, are left alone.
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
    """A new folder that goes after the block; that of a killed process is then `abandoned`."""
    place = _place(root)
    place.mkdir(parents=True, exist_ok=True)
    folder = place / uuid.uuid4().hex
    lock = folder.with_suffix(".lock")
    with FileLock(lock):  # before the folder is there: one that is not locked is nobody's
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def abandoned(root: Path) -> Iterator[Path]:
    """Folders of killed processes, each locked while it is looked at."""
    for folder in sorted(_place(root).glob("*/")):
        lock = FileLock(folder.with_suffix(".lock"))
        with contextlib.suppress(Timeout, OSError), lock.acquire(blocking=False):
            if folder.exists():
                yield folder
            if not folder.exists():
                Path(lock.lock_file).unlink(missing_ok=True)
