"""The two ways a run can end badly that a person can do something about."""

from __future__ import annotations

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
"""What a `RunError` says of a model that can choose nothing."""


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is that there is not enough memory, which PyTorch and NumPy say apart."""
    signs = ("out of memory", "DefaultCPUAllocator", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def first_problem(error: ValidationError, within: str = "") -> str:
    """The first thing that is wrong with what was read: where it stands, and why it is refused.

    Args:
        error: what pydantic raised.
        within: the name of the value that was validated, where it is a part of a file.
    """
    first = error.errors()[0]
    where = ".".join([*([within] if within else []), *map(str, first["loc"])])
    return f"{where or 'file'}: {first['msg']}"
