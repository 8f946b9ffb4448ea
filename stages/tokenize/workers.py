"""Work shared out to processes, its results in the order of the work."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from gpt.base.errors import RunError

T = TypeVar("T")

_AHEAD = 2
"""So many pieces of work for each process are in memory: one in hand and one waiting."""


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes that do pieces of work; with `n` = 1 the caller's own process does.

    Args:
        n: how many.
        prepare: called once in each of them before its first piece of work.
        arguments: of `prepare`.

    Whoever does it, `map` gives the same: what is worked on must not depend on `n`.
    """

    def __init__(self, n: int, prepare: Callable[..., None], *arguments: Any) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._ahead = _AHEAD * n
        if n == 1:
            prepare(*arguments)
            return
        # not by fork: the caller has threads, whose locks a copy would hold for ever
        self._pool = ProcessPoolExecutor(
            n,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(prepare, arguments),
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, work: Callable[..., T], pieces: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """`work(*piece)` of every piece, in order; few pieces are drawn ahead of their turn.

        Raises:
            RunError: a process was killed.
        """
        if self._pool is None:
            yield from itertools.starmap(work, pieces)
            return
        waiting: deque[Future[T]] = deque()
        try:
            for piece in pieces:
                with _interrupts_kept_from_children():
                    waiting.append(self._pool.submit(work, *piece))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                "tokenize: a worker process was killed, as happens where memory runs out; "
                "run it again, with fewer tokenize.workers"
            ) from None


@contextlib.contextmanager
def _interrupts_kept_from_children() -> Iterator[None]:
    """Ctrl-C reaches the whole group: the parent decides what becomes of the work.

    A process that is started within the block has it blocked from its first moment on.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    """A killed parent says nothing, and its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
