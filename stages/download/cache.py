"""What came from the web and is kept, so that it need not come again: whole files and beginnings.

A whole file is called by its sha256 and looked at before each use. The beginning of a file whose
download was cut off is called by its address; a note beside it says which version of the file it
is the beginning of.
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
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gpt.base.files import sha256_of, sync_directory, whole_file, write_json

PARTIAL_SECONDS = 7 * 24 * 3600.0
"""Beginnings that nobody went on with for so long are dropped."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a server said of a file.

    Attributes:
        url: its address.
        etag: the strong name of its version, as HTTP has it.
        modified: the HTTP date of its version.
        bytes: its size.
        sha256: of all of it, once it is here.
    """

    url: str
    etag: str | None = None
    modified: str | None = None
    bytes: int | None = None
    sha256: str | None = None

    @property
    def version(self) -> str | None:
        """What tells this version from others, if the server told."""
        return self.etag or self.modified


class Cache:
    """A folder of downloads. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._making = threading.Lock()
        self._clean()

    def get(self, sha256: str) -> Path | None:
        """The file with this sha256, if it is here and undamaged."""
        path = self._folder / sha256
        try:
            if sha256_of(path) == sha256:
                return path
        except FileNotFoundError:
            return None
        path.unlink(missing_ok=True)
        return None

    def keep(self, url: str, sha256: str) -> None:
        """What came from `url` is whole now, and has this sha256."""
        partial = self.partial(url)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(self._folder / sha256)
        sync_directory(self._folder)
        self.write_note(replace(self.note(url), sha256=sha256))

    def add(self, path: Path, sha256: str) -> None:
        """Have a file too that is known to have this sha256."""
        with whole_file(self._folder / sha256) as partial:
            place(path, partial)

    def lock(self, url: str) -> threading.Lock:
        """Held by whoever downloads `url`: what another waits for may be here then."""
        with self._making:
            return self._locks[url]

    def partial(self, url: str) -> Path:
        """Where the beginning of the file at `url` is, or goes."""
        return self._folder / f"{_key(url)}.partial"

    def note(self, url: str) -> Note:
        """What is known of the file at `url`."""
        try:
            note = Note(**json.loads(self._note(url).read_bytes()))
        except (OSError, ValueError, TypeError):
            return Note(url)
        return note if note.url == url else Note(url)

    def write_note(self, note: Note) -> None:
        """Keep what is known of the file at `note.url`."""
        write_json(self._note(note.url), asdict(note))

    def forget(self, url: str) -> None:
        """Drop the beginning of the file at `url` and what is known of it."""
        self.partial(url).unlink(missing_ok=True)
        self._note(url).unlink(missing_ok=True)

    def _note(self, url: str) -> Path:
        return self._folder / f"{_key(url)}.json"

    def _clean(self) -> None:
        for path in self._folder.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > PARTIAL_SECONDS:
                    path.unlink()
                    path.with_suffix(".json").unlink(missing_ok=True)


def place(path: Path, target: Path) -> None:
    """Let the bytes at `path` be at `target` too, as one file on the disk where that can be.

    A file that somebody else shares already (DVC's cache, which takes away the right to write) is
    copied: a third one must not depend on what both do with it.
    """
    status = path.stat()
    if status.st_nlink == 1 and status.st_mode & stat.S_IWUSR:
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copyfile(path, target)


def _key(url: str) -> str:
    return f"url-{hashlib.sha256(url.encode()).hexdigest()[:32]}"
