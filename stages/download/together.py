"""Several downloads at once; the caller's thread alone hears of them, and can be interrupted."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gpt.base.events import Event, Log
from stages.download.faults import StoppedError

T = TypeVar("T")

PARTING_SECONDS = 1.0
"""How long the others may take to stop once one has failed; who waits for a server is left."""


@dataclass(frozen=True, slots=True)
class _End:
    task: int
    value: Any = None
    error: BaseException | None = None


def run_together(
    tasks: Sequence[Callable[[Log], T]], n_threads: int, stop: threading.Event, log: Log
) -> list[T]:
    """Run `tasks` on threads, begun in their order; return what they return, in their order.

    Args:
        tasks: each takes a `log` of its own.
        n_threads: how many run at the same time.
        stop: set once one of them fails or the caller is interrupted; tasks look at it often.
        log: called on the caller's thread only.

    Raises:
        BaseException: what the first (in their order) of those raised that failed.
    """
    said: queue.SimpleQueue[Event | _End] = queue.SimpleQueue()
    waiting = iter(enumerate(tasks))
    taking = threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with taking:
                number, task = next(waiting, (-1, None))
            if task is None:
                return
            try:
                said.put(_End(number, task(said.put)))
            except BaseException as error:
                said.put(_End(number, error=error))

    # Daemons: whoever waits for an answer of a server must not keep the process from ending.
    threads = [
        threading.Thread(target=work, name=f"download-{i}", daemon=True)
        for i in range(min(n_threads, len(tasks)))
    ]
    ends: dict[int, _End] = {}
    try:
        for thread in threads:
            thread.start()
        while len(ends) < len(tasks):
            item = said.get()
            if not isinstance(item, _End):
                log(item)
                continue
            ends[item.task] = item
            if item.error is not None:
                break
    finally:
        stop.set()
        ends_at = time.monotonic() + PARTING_SECONDS
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join(max(0.0, ends_at - time.monotonic()))
    while not said.empty():
        item = said.get()
        if isinstance(item, _End):
            ends[item.task] = item
    for _, end in sorted(ends.items()):
        if end.error is not None and not isinstance(end.error, StoppedError):
            raise end.error
    return [ends[number].value for number in range(len(tasks))]
