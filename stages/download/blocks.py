"""Bytes on their way into a file: counted, bounded, hashed, stopped when there is no use."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from gpt.base.events import Log, Progress
from stages.download.faults import NotHadError, StoppedError

BLOCK = 1 << 18
"""Bytes read at once."""

GENERAL_LIMIT = 1 << 30
"""The most bytes of a file whose size the source does not tell."""


def blocks_of(file: IO[bytes], stop: threading.Event) -> Iterator[bytes]:
    """The rest of an open file.

    Raises:
        StoppedError: `stop` is set.
    """
    while block := file.read(BLOCK):
        if stop.is_set():
            raise StoppedError
        yield block


def write_blocks(target: Path, blocks: Iterable[bytes]) -> tuple[int, str]:
    """Write a new file; return how many bytes it has, and their sha256.

    Raises:
        FileExistsError: there is one already.
    """
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as file:
        for block in blocks:
            size += len(block)
            digest.update(block)
            file.write(block)
    return size, digest.hexdigest()


def too_many(limit: int) -> NotHadError:
    """The complaint about more than `limit` bytes."""
    return NotHadError(f"more than {limit} bytes; if that is right, set the source's bytes")


def shown(blocks: Iterable[bytes], task: str, total: int, log: Log) -> Iterator[bytes]:
    """Pass `blocks` on and tell of the progress."""
    done = 0
    for block in blocks:
        done += len(block)
        if total:
            log(Progress(task, done, total, "B"))
        yield block
