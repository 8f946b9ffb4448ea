"""What a long-running function tells its caller while it works.

A stage takes `log: Log` and sends it these events; who listens (a terminal, a log file,
MLflow, a test) is the caller's business. `discard` is the default: nobody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Message:
    """One line for the user; a `warning` is one that should not be missed."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` `unit`s of `task`; `info` holds short figures to show beside the bar."""

    task: str
    done: int
    total: int
    unit: str = "step"
    info: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Values measured at a step. Tokens/s and the like belong here, never in an output file."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Text:
    """A text worth keeping with the run, for example sample generations: `name` is a file name."""

    name: str
    text: str


Event = Message | Progress | Metrics | Text
Log = Callable[[Event], None]


def discard(event: Event) -> None:
    """The listener that does nothing."""
