"""What a person sees while stages run: bars on a terminal, plain lines everywhere else.

A stage sends `gpt.base.events`; `make_log` picks who listens. A stage that runs by itself draws its
own bar or prints its own lines. A stage inside the flow appends its events as JSON lines to the
file named by the environment variable `GPT_PIPELINE_EVENTS`, and the flow, which alone knows what
else is running, draws them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import BinaryIO, Literal

from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    RenderableType,
    RenderHook,
)
from rich.progress import BarColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.segment import Segment
from rich.text import Text as Styled

from gpt.base.errors import in_one_line, shortened
from gpt.base.events import Event, Log, Message, Metrics, Progress, Text
from pipeline.show.terminal import safe, say

EVENTS_VARIABLE = "GPT_PIPELINE_EVENTS"
"""Names the file to which a stage inside the flow appends its events."""

PLAIN_INTERVAL = 5.0
"""Seconds between two progress lines of one task where there is no terminal."""

_POLL_SECONDS = 0.2

Level = Literal["info", "warning", "error", "good", "quiet"]

_EVENT_KINDS: dict[str, type[Event]] = {
    kind.__name__.lower(): kind for kind in (Message, Progress, Metrics, Text)
}


def event_to_json(event: Event) -> str:
    """One event as one line of JSON, without the line's end."""
    return json.dumps({"event": type(event).__name__.lower(), **dataclasses.asdict(event)})


def event_from_json(line: str) -> Event:
    """The event that `event_to_json` wrote.

    Raises:
        ValueError: the line is not such an event.
    """
    try:
        fields = json.loads(line)
        return _EVENT_KINDS[fields.pop("event")](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event: {line[:80]!r}") from error


class _SafeRenderable:
    """Something that rich draws, its texts `safe`."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self._inner, options):
            yield Segment(text if control else safe(text), style, control)


class _SafeHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_SafeRenderable(each) for each in renderables]


def safe_console(console: Console | None = None, *, soft_wrap: bool = False) -> Console:
    """A console that shows text from outside and does not obey it; by default standard output."""
    console = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap)
    console.push_render_hook(_SafeHook())
    return console


def report_console(console: Console | None = None) -> Console:
    """Where a report is printed: on a terminal as wide as it is, else no line is broken."""
    console = safe_console(console)
    if not console.is_terminal:
        console.width = 10_000
    return console


def n_of(n: int, what: str) -> str:
    """So many of something: `1 slot`, `2 slots`."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def seconds_in_words(seconds: float) -> str:
    """A duration as a person says it: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _figures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _amount(event: Progress) -> str:
    if event.unit == "B":
        return f"{event.done / 1e6:.1f}/{event.total / 1e6:.1f} MB"
    return f"{event.unit} {event.done}/{event.total}"


def _pace(task: Task, event: Progress) -> str:
    """Rate and time left; empty as long as there is too little to tell them from.

    The rate is the average since the task began: events come in bursts, so the time between two
    of them says nothing.
    """
    seconds, done = task.elapsed or 0.0, event.done - task.fields["first"]
    if seconds < 1 or done <= 0:
        return ""
    rate = done / seconds
    words = f"{rate / 1e6:.3g} MB/s" if event.unit == "B" else f"{rate:.3g} {event.unit}/s"
    if event.done < event.total:
        words += f"  {seconds_in_words((event.total - event.done) / rate)} left"
    return words


class Display:
    """Shows what stages do. Safe to call from several threads.

    Args:
        bars: rich's record of the running tasks, which it may draw.
    """

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._lock = threading.RLock()
        self._tasks: dict[tuple[str, str], Task] = {}

    def event(self, stage: str, event: Event) -> None:
        """Show what a stage said; metrics are not for the terminal."""
        match event:
            case Progress():
                self._progress(stage, event)
            case Message(text, level):
                self.line(stage, text.removeprefix(f"{stage}: "), level)
            case Text(name, text):
                self.line(stage, f"{name}: {shortened(in_one_line(text), 96)}", "quiet")

    def line(self, stage: str, text: str, level: Level = "info") -> None:
        """Show one line about a stage."""
        raise NotImplementedError

    def done(self, stage: str) -> None:
        """Forget the tasks of a stage that has ended."""
        with self._lock:
            for key in [key for key in self._tasks if key[0] == stage]:
                self._bars.remove_task(self._tasks.pop(key).id)

    def _progress(self, stage: str, event: Progress) -> None:
        key = (stage, event.task)
        # without the stage's name, which stands before it already
        name = event.task.removeprefix(stage).strip() or event.unit
        with self._lock:
            if key not in self._tasks:
                fields = {"first": event.done, "amount": "", "pace": "", "info": ""}
                self._bars.add_task(safe(f"{stage} {name}"), True, event.total, 0, True, **fields)
                self._tasks[key] = self._bars.tasks[-1]
            task = self._tasks[key]
            self._bars.update(
                task.id,
                total=event.total,
                completed=event.done,
                amount=safe(_amount(event)),
                pace=safe(_pace(task, event)),
                info=safe(_figures(event.info)),
            )
            self._progressed(stage, name, task)
            if task.finished:
                self._bars.remove_task(self._tasks.pop(key).id)

    def _progressed(self, stage: str, name: str, task: Task) -> None:
        """Called when a task has gone on; rich draws its bar by itself."""


def _print_line(stage: str, text: str, level: Level) -> None:
    """Flushed, so that a log file grows as the work goes on."""
    prefix = f"{stage} | " if stage else ""
    mark = f"{level}: " if level in ("warning", "error") else ""
    say(f"{prefix}{mark}{text}")


class PlainDisplay(Display):
    """Lines such as `pretrain | step 200/800  loss 3.21  12.3 step/s  49 s left`.

    Args:
        write: takes a stage, a text and its level.
        interval: seconds between two progress lines of a stage.
        clock: a monotonic one, in seconds.
    """

    def __init__(
        self,
        write: Callable[[str, str, Level], None] = _print_line,
        *,
        interval: float = PLAIN_INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(Bars(get_time=clock, disable=True))
        self._write = write
        self._interval = interval
        self._clock = clock
        self._shown: dict[str, float] = {}  # when a stage last had a progress line

    def line(self, stage: str, text: str, level: Level = "info") -> None:
        """Write one line."""
        with self._lock:
            self._write(stage, safe(text), level)

    def _progressed(self, stage: str, name: str, task: Task) -> None:
        now = self._clock()
        last = self._shown.setdefault(stage, now)
        ends = task.finished and (task.elapsed or 0.0) >= self._interval
        if now - last >= self._interval or ends:
            self._shown[stage] = now
            parts = (task.fields[key] for key in ("amount", "info", "pace"))
            self.line(stage, f"{name}: {'  '.join(filter(None, parts))}")


_LEVEL_STYLES: dict[Level, str] = {
    "info": "",
    "warning": "yellow",
    "error": "bold red",
    "good": "green",
    "quiet": "dim",
}


class LiveDisplay(Display):
    """A bar for each running task of each stage at the foot of the terminal, lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        bars = Bars(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}", style="green", markup=False),
            TextColumn("{task.fields[pace]}", style="cyan", markup=False),
            TextColumn("{task.fields[info]}", style="dim", markup=False),
            console=console or Console(highlight=False),
            transient=True,
            refresh_per_second=5,
        )
        super().__init__(bars)

    def __enter__(self) -> LiveDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def line(self, stage: str, text: str, level: Level = "info") -> None:
        """Print one line above the bars."""
        prefix = Styled(f"{stage:<20} " if stage else "", style="bold")
        self._bars.console.print(prefix + Styled(safe(text), style=_LEVEL_STYLES[level]))


@contextmanager
def make_display() -> Iterator[Display]:
    """Bars where standard output is a terminal, plain lines where it is not."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        with LiveDisplay() as display:
            yield display
    else:
        yield PlainDisplay()


@contextmanager
def make_log(stage: str = "") -> Iterator[Log]:
    """The listener of a stage that runs in this process, picked by the environment.

    Inside the flow (`GPT_PIPELINE_EVENTS` is set): JSON lines to the flow. Else on a terminal:
    a bar with rate and time left. Else: plain lines.
    """
    if path := os.environ.get(EVENTS_VARIABLE):
        # One event, one write, flushed with its line end: the flow reads whole lines only.
        with Path(path).open("a", encoding="utf-8", buffering=1) as file:
            yield lambda event: print(event_to_json(event), file=file)
    else:
        with make_display() as display:
            yield lambda event: display.event(stage, event)


def read_events(file: BinaryIO) -> Iterator[Event]:
    """The events from here on in a file that a stage writes; a line still being written waits."""
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield event_from_json(line.decode("utf-8"))


@contextmanager
def following(path: Path, show: Callable[[Event], None]) -> Iterator[None]:
    """Within the block, show the events that a stage writes to a file as they come."""
    ended = threading.Event()
    path.touch()
    with path.open("rb") as file:

        def follow() -> None:
            while not ended.wait(_POLL_SECONDS):
                for event in read_events(file):
                    show(event)

        thread = threading.Thread(target=copy_context().run, args=(follow,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for event in read_events(file):
                show(event)
