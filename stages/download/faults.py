"""How bringing a file here can fail, short of a line that the user has to read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gpt.base.errors import InputError


class NotHadError(Exception):
    """One place does not give the file; others may."""


class WrongFileError(NotHadError):
    """What a place gives is whole, but not the file that is wanted."""


class TryAgainError(Exception):
    """A fault that may pass: a lost connection, a busy server.

    Attributes:
        seconds: how long the server asks to be left alone; 0 where it does not ask.
    """

    def __init__(self, fault: str, seconds: float = 0) -> None:
        super().__init__(fault)
        self.seconds = seconds


class StoppedError(Exception):
    """Another source has failed, or the run was interrupted: there is no use in going on."""


@contextlib.contextmanager
def errors_at(path: Path, origin: str) -> Iterator[None]:
    """Let errors name where a file came from: `path` is gone once they are read."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(path), origin)) from None
