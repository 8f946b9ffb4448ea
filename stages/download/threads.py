"""Several downloads at once; only the caller's thread logs, and it can be interrupted."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from gpt.base.events import Event, Log

T = TypeVar("T")

PARTING_SECONDS = 1.0
"""How long the other threads may take to stop once one has failed."""


def run_in_threads(
    tasks: Sequence[Callable[[Log], T]], n_threads: int, stop: threading.Event, log: Log
) -> list[T]:
    """Run `tasks` on threads, started in their order; return their results, in their order.

    Args:
        tasks: each takes a `log` of its own.
        n_threads: how many run at the same time.
        stop: set once one of them fails or the caller is interrupted; tasks check it often.
        log: called on the caller's thread only.

    Raises:
        BaseException: the first error of a task.
    """
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()  # None: a result
    waiting = iter(enumerate(tasks))
    results: dict[int, T] = {}

    def work() -> None:
        for number, task in waiting:
            try:
                results[number] = task(events.put)
                events.put(None)
            except BaseException as error:
                events.put(error)
            if stop.is_set():
                return

    # daemons: a thread that waits for a server must not keep the process from ending
    threads = [
        threading.Thread(target=work, name=f"download-{i}", daemon=True)
        for i in range(min(n_threads, len(tasks)))
    ]
    try:
        for thread in threads:
            thread.start()
        n_done = 0
        while n_done < len(tasks):
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                n_done += 1
            else:
                log(event)
    finally:
        stop.set()
        ends = time.monotonic() + PARTING_SECONDS
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join(max(0.0, ends - time.monotonic()))
    return [results[number] for number in range(len(tasks))]
