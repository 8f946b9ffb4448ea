"""The whole state of a training loop, saved in the background and restored exactly.

A state is one file, `step-NNNNNNNN.HASH.pt`, with its own hash in its name (XXH3, 128 bits: it
detects damage, and costs a tenth of a cryptographic hash). So file and hash appear atomically.
The last two states are kept; if one is damaged, a warning is given and the previous one is used.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from gpt.base.errors import InputError, RunError
from gpt.base.events import Log, Message, discard
from gpt.base.files import sync_directory, sync_file

KEEP = 2
_NAME = re.compile(r"step-(\d{8})\.([0-9a-f]{32})\.pt")
_PARTIAL = ".state.partial"
_CHUNK = 1 << 20
"""Bytes that are read at a time."""


class Checkpoints:
    """The states of one training run in a folder of their own.

    States are written in the background: `save` returns at once, and its tensors must not change
    before `wait_until_read` has returned. If writing fails, the next call of any method raises
    the error.

    Args:
        folder: created if it does not exist.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # not a daemon thread: a process that exits normally writes its last state first
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._read = threading.Event()
        self._step = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # removes partial files of a killed process, and checks that the folder is writable
            (folder / _PARTIAL).touch()
            (folder / _PARTIAL).unlink()
        except OSError as error:
            raise InputError(
                f"{folder}: the state of the training cannot be kept here "
                f"({error.strerror or error}); make the folder writable, or remove what stands in "
                "its place"
            ) from None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Start writing `state` as that of `step`, once the previous one is written.

        Args:
            step: the number of completed steps.
            state: tensors, numbers, strings, and lists and dicts of them.

        Raises:
            RunError: the previous state could not be written.
        """
        self.finish()
        self._step = step
        self._read.clear()
        self._writing = self._writer.submit(self._write, state)
        self._writing.add_done_callback(lambda _: self._read.set())

    def wait_until_read(self) -> None:
        """Return when the tensors of the last `save` may change.

        Raises:
            RunError: it could not be written.
        """
        if self._writing is not None:
            self._read.wait()
            if self._writing.done():
                self.finish()

    def finish(self) -> None:
        """Return when the last `save` is on the disk.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            before = self.newest()
            raise RunError(
                f"{self.folder}: the state of step {self._step} could not be saved "
                f"({error.strerror or error}); make room there, and the same command "
                + ("starts anew" if before is None else f"goes on from step {before}")
            ) from None

    def newest(self) -> int | None:
        """The step of the newest state; None if there is none."""
        return max((step for step, _ in _steps_in(self.folder)), default=None)

    def _write(self, state: Mapping[str, Any]) -> None:
        partial = self.folder / _PARTIAL
        try:
            with partial.open("wb") as file:
                _save(state, file)
                self._read.set()
            sync_file(partial)
            partial.replace(self.folder / f"step-{self._step:08d}.{_hash_of(partial)}.pt")
            sync_directory(self.folder)
            for _, old in _steps_in(self.folder)[:-KEEP]:
                old.unlink()
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def load(self, log: Log = discard) -> dict[str, Any] | None:
        """The newest whole state; None if there is none. Damaged ones are removed.

        Nothing in the file is executed on reading (`weights_only`).
        """
        states = _steps_in(self.folder)
        for step, path in reversed(states):
            if _hash_of(path) == path.name.split(".")[1]:
                return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
            # gone, so that it does not count among the last two
            path.unlink()
            earlier = [each for each, _ in states[: states.index((step, path))]]
            back = f"going back to that of step {earlier[-1]}" if earlier else "starting anew"
            log(Message(f"the state of step {step} is damaged; {back}", level="warning"))
        return None


def _save(state: Mapping[str, Any], file: BinaryIO) -> None:
    """`torch.save` without its own checksums, which take longer than writing; we have our own."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(state), file)
    except RuntimeError as error:  # PyTorch's own, where the file's write failed
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        torch.serialization.set_crc32_options(before)


def _hash_of(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _steps_in(folder: Path) -> list[tuple[int, Path]]:
    """The states in a folder with their steps, the oldest first."""
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return sorted(found, key=lambda each: (each[0], each[1].stat().st_mtime_ns))
