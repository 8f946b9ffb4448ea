"""The two ways a run can end badly that a person can do something about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where, and what to do. Exit code 2.
    """


class RunError(RuntimeError):
    """A run failed through no fault of its input (a loss that is not finite, say).

    The message is one line: what happened, where, and what to do. Exit code 1.
    """


NOT_FINITE = (
    "the model's logits are not finite numbers; its weights are damaged, or their precision is too "
    "narrow for it: use fp32, or make the model again"
)
"""The message of a `RunError` for a model whose outputs are not finite."""


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and cut where it is long."""
    return shortened(repr(value), 60)


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; where it is cut it ends in an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def in_one_line(what: object) -> str:
    """A text or an error's message without line breaks; an error without one by its class."""
    nothing = type(what).__name__ if isinstance(what, BaseException) else ""
    return " ".join(str(what).split()) or nothing


def first_few(words: Sequence[object], most: int = 3) -> str:
    """The first of many for a line of text: `one, two, three and 4 more`."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(map(str, words[:most])) + more


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means out of memory; PyTorch and NumPy report that differently."""
    signs = ("out of memory", "DefaultCPUAllocator", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def first_problem(error: ValidationError, within: str = "") -> str:
    """The first validation error of what was read: its location and the reason.

    Args:
        error: what pydantic raised.
        within: the name of the validated value, if it is only a part of a file.
    """
    first = error.errors()[0]
    where = ".".join([*([within] if within else []), *map(str, first["loc"])])
    why = first["msg"].removeprefix("Value error, ")  # pydantic's prefix for our own checks
    return f"{where}: {why}" if where else why
