"""`dvc repro` of single stages in processes of their own, which can be stopped: for the flow and
for a sweep.

A stage that is stopped saves its state and goes on from it when it is started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from gpt.errors import RunError
from gpt.events import Event
from gpt.files import whole_file
from pipeline.console import EVENTS_VARIABLE, EventReader, following
from pipeline.dvc_cache import has_remote

STOP_SECONDS = 20.0
"""So long a stopped stage may take to save its state before it is killed; who cancels a flow run in
Prefect waits 30."""

AFTERWARDS = (
    "Generating lock file",
    "Updating lock file",
    "To track the changes",
    "Use `dvc push`",
)
"""What DVC says when a stage has ended well: advice follows, which no one needs seven times."""

_EXITED = "exited with "
"""So DVC tells that the command of a stage failed."""

_BY_A_SIGNAL = re.compile(r"exited with (-\d+|1(29|[3-9]\d))$")
"""A command that a signal ended: its number as Python gives it or, plus 128, as some shells do."""

_LOCKED = ("Unable to acquire lock", "it is being blocked by")


class StageError(RunError):
    """A stage that failed, in one line.

    Attributes:
        code: the exit code that says how.
        kind: `input`, `failed`, `network`, `busy` (another process makes the same), `killed` (it
            left no word), `time` (it was stopped at its time limit) or `cache` (it ended well, but
            DVC could not keep its outputs).
    """

    def __init__(self, line: str, code: int = 1, kind: str = "failed") -> None:
        super().__init__(line, code, kind)
        self.code = code
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(slots=True)
class Ended:
    """How a `dvc repro` ended.

    Attributes:
        executed: whether the command of a stage was; else DVC had nothing to do or restored it.
        code: DVC's exit code.
        output: its lines.
        timed_out: it was stopped at its time limit.
    """

    executed: bool = False
    code: int = 0
    output: list[str] = field(default_factory=list)
    timed_out: bool = False

    @property
    def blocked(self) -> bool:
        """Another DVC (a `dvc status` in the next window) held a file's lock for too long."""
        said = any(mark in line for line in self.output for mark in _LOCKED)
        return bool(self.code) and not self.executed and said


class Processes:
    """The DVC processes of one flow run, and whether and why they were stopped."""

    def __init__(self) -> None:
        self.stopped_by = 0
        """The signal that ended the run, if one did."""
        self.stopping = threading.Event()
        self._running: set[subprocess.Popen[str]] = set()

    def stop(self, number: int) -> None:
        """Let the running stages save their state; a second call, or patience at its end, kills
        them."""
        if self.stopped_by:
            self._send(signal.SIGKILL)
            return
        self.stopped_by = number
        self.stopping.set()
        self._send(signal.SIGINT)
        timer = threading.Timer(STOP_SECONDS, self._send, [signal.SIGKILL])
        timer.daemon = True
        timer.start()

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Within the block Ctrl-C and SIGTERM stop them."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.stop(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def repro(
        self,
        root: Path,
        addresses: Sequence[str],
        *,
        show: Callable[[Event], None],
        say: Callable[[str, bool], None],
        environment: Mapping[str, str] | None = None,
        force: bool = False,
        made: bool = False,
        seconds: float | None = None,
    ) -> Ended:
        """`dvc repro` of stages whose upstream is in place.

        Args:
            root: a checkout of the project.
            addresses: what DVC calls the stages.
            show: hears the events of the stage.
            say: hears each line of the output, and whether the command of a stage has begun.
            environment: variables beside this process's own.
            force: execute the stages even if nothing changed.
            made: their outputs are in place, DVC only takes them into its cache (`dvc commit`).
            seconds: the time limit.
        """
        done = Ended()
        command = [sys.executable, "-m", "dvc", "--wait-for-lock"]
        if made:
            command += ["commit", "--force"]
        else:
            command += ["repro", "--single-item", *(["--force"] if force else [])]
            if has_remote(root):  # what `dvc pull --run-cache` knows of, its bytes still there
                command.append("--pull")
        with tempfile.TemporaryDirectory(prefix="gpt-pipeline-") as folder:
            events = Path(folder) / "events.jsonl"
            process = subprocess.Popen(
                [*command, *addresses],
                cwd=root,
                env={
                    **os.environ,
                    **(environment or {}),
                    EVENTS_VARIABLE: str(events),
                    "PYTHONUNBUFFERED": "1",
                    # dvc.yaml says `python`, and that is the one that runs here
                    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                },
                # The stage holds the other end of this too: its end says that we are gone.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C comes to us, and we pass it on
            )
            self._running.add(process)
            if self.stopped_by:  # the signal came between the last look and now
                _signal(process, signal.SIGINT)
            try:
                with _limited(process, seconds, done), following(EventReader(events), show):
                    assert process.stdout is not None
                    for line in process.stdout:
                        text = line.rstrip()
                        if text.startswith(AFTERWARDS):
                            process.stdout.read()
                            break
                        if not text:
                            continue
                        done.output.append(text)
                        say(text, done.executed)
                        done.executed = done.executed or text.startswith("> ")
                    done.code = process.wait()
            finally:
                self._running.discard(process)
        return done

    def run(self, root: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A command that is stopped with the stages.

        Args:
            root: where it works.
            command: its words.

        Returns:
            Its exit code and what it printed.
        """
        process = subprocess.Popen(
            command,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._running.add(process)
        try:
            if self.stopped_by:
                _signal(process, signal.SIGINT)
            out, err = process.communicate()
        finally:
            self._running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _send(self, number: int) -> None:
        for process in list(self._running):
            _signal(process, number)


def forget_failure(root: Path, name: str) -> None:
    """Before a stage runs: what it left of its last failure."""
    _verdict_file(root, name).unlink(missing_ok=True)


def failure(root: Path, names: Sequence[str], done: Ended) -> StageError:
    """Why stages failed: their own words if they left any, else DVC's.

    A stage that never began, as another process was running it, leaves them in its output only.
    """
    for name in names:
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads(_verdict_file(root, name).read_text(encoding="utf-8"))
            code = int(said["code"])
            kind = str(said.get("kind") or ("input" if code == 2 else "failed"))
            return StageError(str(said["error"]), code, kind)
    name = ", ".join(names)
    for mark in ("error: ", "ERROR: "):
        if lines := [line for line in done.output if line.startswith(mark)]:
            line = lines[-1].removeprefix(mark)
            of_dvc = done.executed and mark == "ERROR: "
            if of_dvc and _BY_A_SIGNAL.search(line):
                return StageError(line, kind="killed")
            return StageError(line, kind="cache" if of_dvc and _EXITED not in line else "failed")
    return StageError(f"dvc repro {name} failed", kind="killed" if done.executed else "failed")


def keep_for_commit(root: Path, name: str, fingerprint: str) -> None:
    """Note that the outputs in place are what the stage made, though DVC has them not.

    Args:
        root: the project.
        name: the stage.
        fingerprint: of the stage and its outputs, `pipeline.dag.Dag.fingerprint`.
    """
    path = _uncommitted_file(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(fingerprint, encoding="utf-8")


def kept_for_commit(root: Path, name: str) -> str:
    """The fingerprint under which the stage's outputs wait for DVC; empty if they do not."""
    with contextlib.suppress(OSError):
        return _uncommitted_file(root, name).read_text(encoding="utf-8")
    return ""


def forget_for_commit(root: Path, name: str) -> None:
    """DVC has the outputs, or others are made."""
    _uncommitted_file(root, name).unlink(missing_ok=True)


def _uncommitted_file(root: Path, name: str) -> Path:
    return root / ".pipeline" / "uncommitted" / name


def _verdict_file(root: Path, name: str) -> Path:
    """Where a stage that failed leaves its exit code and its one line: DVC passes neither on."""
    return root / ".pipeline" / "exit" / f"{name}.json"


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to DVC and the stage under it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _limited(process: subprocess.Popen[str], seconds: float | None, done: Ended) -> Iterator[None]:
    """Stop the process, as Ctrl-C does, when its time is over; kill it when that is not heard."""
    if seconds is None:
        yield
        return

    def stop() -> None:
        done.timed_out = True
        _signal(process, signal.SIGINT)

    timers = [
        threading.Timer(seconds, stop),
        threading.Timer(seconds + STOP_SECONDS, _signal, (process, signal.SIGKILL)),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
