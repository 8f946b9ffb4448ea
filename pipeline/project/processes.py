"""How Python itself is set up in the processes of the pipeline."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def collect_seldom() -> None:
    """Let Python look for unreachable cycles after 50,000 new objects, not 700, nor at its end.

    For who imports PyTorch, MLflow or Prefect, whose million objects all stay. Each look goes
    through them: a fifth of the time that the imports take, and a second when the process ends.
    What is in no cycle, a tensor for one, is freed at once as ever.
    """
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)


def import_path() -> str:
    """`PYTHONPATH` of a process that runs modules of this project from any folder.

    With Python's `-P`: the folder may be a checkout of another commit.
    """
    here = str(Path(__file__).resolve().parent.parent.parent)
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def reach_loopback_directly() -> None:
    """Let no proxy of the environment stand before the servers on this machine.

    A proxy would look for them on its own machine. What the user excepts from it stays excepted;
    the processes that this one starts inherit it. Where the environment names no proxy nothing is
    set: Python asks macOS and Windows for theirs only if there is no such variable at all.
    """
    given = {name.lower() for name, value in os.environ.items() if value} - {"no_proxy"}
    own = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    excepted = [each.strip() for each in own.split(",") if each.strip()]
    if "*" not in excepted and any(name.endswith("_proxy") for name in given):
        value = ",".join(dict.fromkeys([*excepted, *_LOOPBACK]))
        os.environ.update(no_proxy=value, NO_PROXY=value)  # libraries read the one or the other


def end_with_the_terminal() -> None:
    """Take a terminal that is closed (SIGHUP) for SIGTERM, unless `nohup` has it ignored.

    A shell and the system may both send SIGHUP, and a second SIGTERM kills: the first one counts.
    """
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        return
    terminals = [number for number in (0, 1, 2) if os.isatty(number)]

    def hung_up(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_RDWR)  # writing to the closed terminal would fail
            for each in terminals:
                os.dup2(nowhere, each)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGHUP, hung_up)


@contextlib.contextmanager
def one_interrupt() -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM raises KeyboardInterrupt; more are ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_parent(parent: int, gone: Callable[[], object]) -> None:
    """Call `gone` in a thread once this process has another parent than `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        gone()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
