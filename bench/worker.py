"""An alternative in a process of its own.

What one library does to its process (its allocator, its thread pools) would reach the others in
the same one, and memory could not be told apart. So each alternative gets a worker: it builds what
it needs, says so, and then waits to be told to run once, so that only one works at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpt.base.errors import InputError, RunError
from gpt.model.device import prepare_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What an alternative does, made once in its worker."""

    run: Callable[[], Any]
    """The work: only this is timed."""
    before: Callable[[], None] | None = None
    """What must stand before each run, and is no part of it."""
    report: Callable[[Any], Any] | None = None
    """What `run` gave as plain values that can be compared; also untimed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """One run."""

    seconds: float
    result: Any
    """What was computed, in plain values."""
    peak_memory: int = 0
    """The most bytes that the process held, from when everything was built to the end of this
    run; 0 where the system does not tell."""


def as_it_comes(threads: int) -> None:
    """Torch as a peer's user has it, with the same number of threads."""
    torch.set_num_threads(threads)


def as_ours(threads: int) -> None:
    """What every stage of this project does first."""
    prepare_device("cpu", threads)


@dataclass(frozen=True, slots=True)
class Alternative:
    """What a worker is told: everything in it travels to another process.

    Attributes:
        build: a function of a module, called once in the worker with `arguments`.
        arguments: of `build`.
        setting: a function of a module, called before with the number of threads.
    """

    build: Callable[..., Job]
    arguments: tuple[Any, ...] = ()
    setting: Callable[[int], None] = as_it_comes


class Worker:
    """A process that holds one alternative; a call is one run there.

    Raises:
        InputError: the worker raised one, or lacks a module.
        RunError: anything else went wrong there, or it died.
    """

    def __init__(self, name: str, alternative: Alternative, threads: int) -> None:
        self.name = name
        # a fresh interpreter: a forked one would inherit this process's threads and memory
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # no daemon: what is measured may start processes of its own
        self._process = context.Process(
            target=_serve, args=(theirs, alternative, threads), name=name, daemon=False
        )
        self._process.start()
        theirs.close()  # theirs alone: so its death is an end of file here
        self._answer()

    def __call__(self) -> Ran:
        """Run once."""
        with contextlib.suppress(BrokenPipeError):  # it died between two runs: see below
            self._pipe.send(None)
        ran: Ran = self._answer()
        return ran

    def close(self) -> None:
        """End the process and give its memory back; it may be in the middle of a run."""
        self._pipe.close()
        self._process.kill()
        self._process.join()
        self._process.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RunError(f"{self.name}: its process {_end(self._process.exitcode)}") from None
        if kind == "done":
            return value
        error = InputError if kind == "input" else RunError
        raise error(f"{self.name}: {value}")


@contextlib.contextmanager
def workers(alternatives: Mapping[str, Alternative], threads: int) -> Iterator[dict[str, Worker]]:
    """A worker for each alternative, built one after another, all ended with the block."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, alternative in alternatives.items():
            started[name] = Worker(name, alternative, threads)
            stack.callback(started[name].close)
        yield started


def _end(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "was killed; was there too little memory?"
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


# --- in the worker --------------------------------------------------------------------------------


def _serve(pipe: Connection, alternative: Alternative, threads: int) -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends this
    try:
        alternative.setting(threads)
        job = alternative.build(*alternative.arguments)
        _forget_peak()
        pipe.send(("done", None))
        while True:
            pipe.recv()
            pipe.send(("done", _run(job)))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass  # the parent has what it wants, or is gone
    except InputError as error:
        pipe.send(("input", str(error)))
    except ModuleNotFoundError as error:
        pipe.send(("input", f"{error}; install the peers with `pip install -e .[dev]`"))
    except Exception as error:  # whatever it was, it must be told there, in one line
        first = (str(error).strip().splitlines() or [""])[0]
        pipe.send(("error", f"{type(error).__name__}: {first}"))


def _run(job: Job) -> Ran:
    if job.before is not None:
        job.before()
    gc.collect()  # not in the middle of what is timed
    started = time.perf_counter()
    result = job.run()
    seconds = time.perf_counter() - started
    peak = _peak_memory()
    return Ran(
        seconds=seconds,
        result=job.report(result) if job.report is not None else result,
        peak_memory=peak,
    )


def _die_with_parent() -> None:
    """Also when it is killed in the middle of a run; elsewhere the closed pipe ends the next."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _forget_peak() -> None:
    """Count memory from now: what was built from copies of our weights held them twice."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
