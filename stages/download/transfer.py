"""Bytes from one place to another: bounded, hashed, cancelled; and the ways in which that fails."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from gpt.base.errors import InputError
from gpt.base.events import Log, Progress, discard

READ_SIZE = 1 << 18
"""Bytes read at once."""

GENERAL_LIMIT = 1 << 30
"""The most bytes of a file whose source states no size."""


class UnavailableError(Exception):
    """One place does not provide the file; another may."""


class WrongFileError(UnavailableError):
    """A place provides a complete file, but not the one that is wanted."""


class TransientError(Exception):
    """A fault that may pass: a lost connection, a busy server.

    Attributes:
        seconds: the pause that the server asks for; 0 if it asks for none.
    """

    def __init__(self, fault: str, seconds: float = 0) -> None:
        super().__init__(fault)
        self.seconds = seconds


class CancelledDownloadError(Exception):
    """Another source has failed, or the run was interrupted, so this one stops."""


@contextlib.contextmanager
def errors_at(path: Path, origin: str) -> Iterator[None]:
    """Let errors name the origin of a file: its `path` no longer exists when they are read."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(path), origin)) from None


def blocks_of(
    file: IO[bytes], stop: threading.Event, log: Log = discard, task: str = "", total: int = 0
) -> Iterator[bytes]:
    """The rest of an open file; if it has `total` bytes, the progress is logged as `task`.

    Raises:
        CancelledDownloadError: `stop` is set.
    """
    done = 0
    while block := file.read(READ_SIZE):
        if stop.is_set():
            raise CancelledDownloadError
        done += len(block)
        if total:
            log(Progress(task, done, total, "B"))
        yield block


def write_blocks(
    target: Path, blocks: Iterable[bytes], left: int | None = None, limit: int | None = None
) -> tuple[int, str]:
    """Write a new file; return its size in bytes and its sha256.

    Args:
        target: the file.
        blocks: its content.
        left: the most bytes that it may have.
        limit: what `left` is left of, for the message.

    Raises:
        FileExistsError: there is one already.
        UnavailableError: there are more than `left` bytes.
    """
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as file:
        for block in blocks:
            size += len(block)
            if left is not None and size > left:
                raise too_large(limit or left)
            digest.update(block)
            file.write(block)
    return size, digest.hexdigest()


def too_large(limit: int) -> UnavailableError:
    """The error for more than `limit` bytes."""
    return UnavailableError(f"more than {limit} bytes; if that is right, set the source's bytes")
