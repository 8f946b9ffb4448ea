"""Downloads that are kept: complete files by content, and the beginnings of interrupted downloads.

A complete file is named by its sha256, which is checked before each use. The beginning of a file is
named by its address; a note beside it says which version of the file it belongs to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gpt.base.files import sha256_of, sync_directory, whole_file, write_json

PARTIAL_SECONDS = 7 * 24 * 3600.0
"""Beginnings that have not been continued for so long are removed."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a server stated about a file.

    Attributes:
        url: its address.
        etag: its strong ETag.
        modified: the HTTP date of its last modification.
        bytes: its size.
        sha256: of the complete file, once it is there.
    """

    url: str
    etag: str | None = None
    modified: str | None = None
    bytes: int | None = None
    sha256: str | None = None

    @property
    def version(self) -> str | None:
        """What identifies this version, if the server stated anything."""
        return self.etag or self.modified


class Cache:
    """A folder of downloads, safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._locks: dict[str, threading.Lock] = {}
        for path in folder.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > PARTIAL_SECONDS:
                    path.unlink()
                    path.with_suffix(".json").unlink(missing_ok=True)

    def get(self, sha256: str) -> Path | None:
        """The file with this sha256, if it is there and undamaged."""
        path = self._folder / sha256
        if not path.is_file():
            return None
        if sha256_of(path) == sha256:
            return path
        path.unlink(missing_ok=True)
        return None

    def keep(self, url: str, sha256: str) -> None:
        """The download from `url` is complete, and has this sha256."""
        partial = self.partial(url)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(self._folder / sha256)
        sync_directory(self._folder)
        self.write_note(replace(self.note(url), sha256=sha256))

    def add(self, path: Path, sha256: str) -> None:
        """Add a file that is known to have this sha256."""
        with whole_file(self._folder / sha256) as partial:
            place(path, partial)

    def lock(self, url: str) -> threading.Lock:
        """Held while `url` is downloaded: another source may want the same file."""
        return self._locks.setdefault(url, threading.Lock())

    def partial(self, url: str) -> Path:
        """The path of the beginning of the file at `url`."""
        return self._folder / f"url-{hashlib.sha256(url.encode()).hexdigest()[:32]}.partial"

    def note(self, url: str) -> Note:
        """What is known of the file at `url`."""
        try:
            return Note(**json.loads(self.partial(url).with_suffix(".json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return Note(url)

    def write_note(self, note: Note) -> None:
        """Keep what is known of the file at `note.url`."""
        write_json(self.partial(note.url).with_suffix(".json"), asdict(note))

    def forget(self, url: str) -> None:
        """Remove the beginning of the file at `url` and its note."""
        self.partial(url).unlink(missing_ok=True)
        self.partial(url).with_suffix(".json").unlink(missing_ok=True)


def place(path: Path, target: Path) -> None:
    """Put the file at `path` at `target` too: as a hard link where possible, else as a copy.

    A file that already has another link (DVC's cache, which also removes write permission) is
    copied, so that it does not depend on what two other owners do with it.
    """
    status = path.stat()
    if status.st_nlink == 1 and status.st_mode & stat.S_IWUSR:
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copyfile(path, target)
