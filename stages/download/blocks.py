"""Reading and writing files in blocks: counted, bounded, hashed, cancelled."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from gpt.base.events import Log, Progress, discard
from stages.download.faults import CancelledDownloadError, UnavailableError

READ_SIZE = 1 << 18
"""Bytes read at once."""

GENERAL_LIMIT = 1 << 30
"""The most bytes of a file whose source states no size."""


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
