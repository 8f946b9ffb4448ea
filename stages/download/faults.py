"""How fetching a file can fail, before it becomes a line that the user reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gpt.base.errors import InputError


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
