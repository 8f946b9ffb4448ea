"""The whole state of a training loop, saved beside the training and read back exactly.

A state is one file, `step-NNNNNNNN.HASH.pt`, that carries its own hash (XXH3, 128 bits: it finds
damage, and costs a tenth of what a cryptographic one does) in its name: so it is there, with its
hash, from one moment to the next or not at all. The last two are kept; a damaged one is passed
over, with a warning, for the one before.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from gpt.base.errors import InputError, RunError
from gpt.base.events import Log, Message, discard
from gpt.base.files import sync_directory

KEEP = 2
_NAME = re.compile(r"step-(\d{8})\.([0-9a-f]{32})\.pt")
_PARTIAL = ".state.partial"
_CHUNK = 1 << 20
"""Bytes that are written and read at a time."""


class Checkpoints:
    """The states of one training run in a folder of their own.

    Writing goes on beside the training: `save` returns at once, and the tensors that it was given
    must not change before `wait_until_read` has returned. A failure of the writing is raised by
    the next call of any method.

    Args:
        folder: made if it is not there.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._read = threading.Event()
        self._error: OSError | None = None
        self._step = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # what a killed process left half-written; and it tells whether we may write here
            (folder / _PARTIAL).unlink(missing_ok=True)
            (folder / _PARTIAL).touch()
            (folder / _PARTIAL).unlink()
        except OSError as error:
            raise InputError(
                f"{folder}: the state of the training cannot be kept here ({_reason(error)}); "
                "make the folder writable, or remove what stands in its place"
            ) from None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to write `state` as that of `step`, once the one before is written.

        Args:
            step: steps that were done.
            state: tensors, numbers, strings, and lists and dicts of them.

        Raises:
            RunError: the state before could not be written.
        """
        self.finish()
        self._step = step
        self._read.clear()
        # no daemon: a process that ends in good order ends after its last state is on the disk
        self._thread = threading.Thread(target=self._write, args=(state,), name="checkpoint")
        self._thread.start()

    def wait_until_read(self) -> None:
        """Return when the tensors of the last `save` may change.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._read.wait()
            self._raise()

    def finish(self) -> None:
        """Return when the last `save` is on the disk.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._raise()

    def newest(self) -> int | None:
        """The step of the newest state; None if there is none."""
        states = _steps_in(self.folder)
        return states[-1][0] if states else None

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            before = self.newest()
            raise RunError(
                f"{self.folder}: the state of step {self._step} could not be saved "
                f"({_reason(error)}); make room there, and the same command "
                + ("starts anew" if before is None else f"goes on from step {before}")
            )

    def _write(self, state: Mapping[str, Any]) -> None:
        partial = self.folder / _PARTIAL
        try:
            with contextlib.closing(_StateFile(partial)) as file:
                _save(state, file)
                self._read.set()
                file.finish()
            name = f"step-{self._step:08d}.{file.digest}.pt"
            partial.replace(self.folder / name)
            sync_directory(self.folder)
            for _, old in _steps_in(self.folder)[:-KEEP]:
                old.unlink()
        except OSError as error:
            self._error = error
            partial.unlink(missing_ok=True)
        finally:
            self._read.set()

    def load(self, log: Log = discard) -> dict[str, Any] | None:
        """The newest whole state; None if there is none. Damaged ones are removed.

        Nothing in the file is executed on reading (`weights_only`).
        """
        states = _steps_in(self.folder)
        for step, path in reversed(states):
            if _hash_of(path) == _digest_in(path):
                return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
            # gone, so that it does not count among the last two
            path.unlink()
            earlier = [each for each, _ in states if each < step]
            back = f"going back to that of step {earlier[-1]}" if earlier else "starting anew"
            log(Message(f"the state of step {step} is damaged; {back}", level="warning"))
        return None


class _StateFile:
    """A file to write to that hashes what goes by, and passes the system's file cache over.

    A state is as large as everything that is trained and is seldom read again: in the cache it
    would push out what is, and to fill new pages of it takes many times the work of the copy.
    Where the file system cannot do without (Linux' O_DIRECT), the cache is used after all.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o644)
        self._memory = mmap.mmap(-1, _CHUNK)  # begins with a page, as direct writing asks for
        self._buffer = memoryview(self._memory)
        self._filled = self._size = 0
        self._hash = xxhash.xxh3_128()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            n = min(len(left), _CHUNK - self._filled)
            part = self._buffer[self._filled : self._filled + n]
            part[:] = left[:n]
            self._hash.update(part)
            self._filled += n
            left = left[n:]
            if self._filled == _CHUNK:
                self._empty(_CHUNK)
        self._size += size
        return size

    def flush(self) -> None:
        """Nothing before `finish`: torch.save asks for it after each part."""

    def _empty(self, n: int) -> None:
        left = self._buffer[:n]
        while left:
            left = left[os.write(self._file, left) :]
        self._filled = 0

    def finish(self) -> None:
        """Let everything be on the disk."""
        if self._filled:  # whole pages are written, and the file is cut to its size
            self._empty(-(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE)
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def _save(state: Mapping[str, Any], file: _StateFile) -> None:
    """`torch.save` without its own checksums, which cost more than the writing; ours is there."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(state), file)  # type: ignore[arg-type]
    except RuntimeError as error:
        # torch tells of a full disk in its own words
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(str(error).splitlines()[0]) from None
    finally:
        torch.serialization.set_crc32_options(before)


def _hash_of(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _digest_in(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match[2]


def _steps_in(folder: Path) -> list[tuple[int, Path]]:
    """The states in a folder with their steps, the oldest first."""
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return sorted(found, key=lambda each: (each[0], each[1].stat().st_mtime_ns))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
