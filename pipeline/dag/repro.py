"""Runs `dvc repro` for single stages in separate processes that can be stopped; used by the flow
and by sweeps.

A stopped stage saves its state and resumes from it at the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from gpt.base.errors import RunError
from gpt.base.events import Event
from pipeline.dag.cache import mend
from pipeline.dag.dvc_files import LOCK_FILE
from pipeline.dag.graph import Dag
from pipeline.dag.repository import has_remote, is_running, mend_rwlock
from pipeline.dag.set_aside import Earlier
from pipeline.project.scratch import scratch
from pipeline.show.console import EVENTS_VARIABLE, following

STOP_SECONDS = 20.0
"""Seconds that a stopped stage has to save its state before it is killed; Prefect waits 30 for a
cancelled flow run."""

AFTERWARDS = (
    "Generating lock file",
    "Updating lock file",
    "To track the changes",
    "Use `dvc push`",
)
"""DVC's output after a successful stage; the advice after it is not worth repeating per stage."""

_EXITED = "exited with "
"""DVC's message for a stage's failed command."""

_NOT_TRANSFERRED = "ERROR: failed to transfer "
"""DVC's log line for an output that it could not cache; its exit code is 0 all the same."""

_BY_A_SIGNAL = re.compile(r"exited with (-\d+|1(29|[3-9]\d))$")
"""A command ended by a signal: the number as in Python or, plus 128, as in some shells."""

_BLOCKERS = re.compile(r"^ *\(PID (\d+)\): (.*)$", re.MULTILINE)
"""DVC's message that names the processes using the same files."""

_LOOKS_SECONDS = 0.5

_LOCKED = ("Unable to acquire lock", "it is being blocked by")


class StageError(RunError):
    """A stage that failed, in one line.

    Attributes:
        code: the exit code for this kind of failure.
        kind: `input`, `failed`, `network`, `busy` (another process is running the stage), `killed`
            (it left no exit note), `time` (it was stopped at its time limit) or `cache` (it
            succeeded, but DVC could not cache its outputs).
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
        executed: whether a stage's command was executed; otherwise DVC had nothing to do or
            restored the outputs.
        code: DVC's exit code.
        output: the lines of its output.
        timed_out: it was stopped at its time limit.
        lacking: outputs that DVC reports as cached but its cache lacks, relative to the project.
        undone: the previous outputs have been put back.
    """

    executed: bool = False
    code: int = 0
    output: list[str] = field(default_factory=list)
    timed_out: bool = False
    lacking: list[str] = field(default_factory=list)
    undone: bool = False

    @property
    def blocked(self) -> bool:
        """Whether another DVC process (such as a `dvc status`) held a file's lock for too long."""
        said = any(mark in line for line in self.output for mark in _LOCKED)
        return bool(self.code) and not self.executed and said

    @property
    def blockers(self) -> dict[int, str]:
        """Process id -> command of the processes that, according to DVC, use the same files."""
        return {int(pid): cmd for pid, cmd in _BLOCKERS.findall("\n".join(self.output))}

    @property
    def who_blocks(self) -> str:
        """The blocking processes in words; empty if there are none."""
        return ", ".join(f"process {pid} ({cmd})" for pid, cmd in self.blockers.items())


class Processes:
    """The DVC processes of one flow run, and whether and why they were stopped."""

    def __init__(self) -> None:
        self.stopped_by = 0
        """The signal that stopped the run, if any."""
        self.stopping = threading.Event()
        self._running: set[subprocess.Popen[str]] = set()

    def stop(self, number: int) -> None:
        """Ask the running stages to save their state and stop; a second call or the time limit
        kills them."""
        running = list(self._running)
        if self.stopped_by:
            for process in running:
                _signal(process, signal.SIGKILL)
            return
        self.stopped_by = number
        self.stopping.set()
        for process in running:
            threading.Thread(target=_end, args=[process], daemon=True).start()

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
        dag: Dag,
        names: Sequence[str],
        *,
        show: Callable[[Event], None],
        say: Callable[[str, bool], None],
        warn: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        force: bool = False,
        made: bool = False,
        seconds: float | None = None,
    ) -> Ended:
        """Run `dvc repro` for stages whose upstream is up to date, and verify the outcome.

        Restored outputs are compared with `dvc.lock`; damaged ones are removed from the cache and
        restored from the remote or made again. It is a failure if the cache lacks an output at the
        end. After a failure the previous outputs are put back, unless the new ones are complete
        and only missing from the cache.

        Args:
            dag: the DAG of a checkout of the project.
            names: the names of the stages.
            show: called with the events of the stage.
            say: called with each line of output, and whether a stage's command has started.
            warn: called with warnings.
            environment: variables added to those of this process.
            force: execute the stages even if nothing changed.
            made: the outputs are complete, DVC only adds them to its cache (`dvc commit`).
            seconds: the time limit.

        Raises:
            RunError: the cache cannot be written, something damaged cannot be removed, or the
                earlier outputs cannot be kept.
        """
        addresses = [dag.stages[name].address for name in names]
        commit, again = ["commit", "--force"], ["repro", "--single-item"]
        pull = ["--pull"] if has_remote(dag.root) else []  # for its run cache, too
        first = commit if made else [*again, *(["--force"] if force else []), *pull]
        # the last attempt does not use the remote, whose copy may be damaged
        ways = [first, [*again, *pull], again]
        for name in names:
            _verdict_file(dag.root, name).unlink(missing_ok=True)
        done = Ended()
        hears = (done, show, say, environment, seconds)
        dag.check_cache()
        while True:
            arguments = [*ways.pop(0), *addresses]
            self._dvc_or_as_before(dag, names, arguments, *hears)
            while done.blocked and self._wait_for_others(dag.root, done, warn):
                done.code, done.output = 0, []
                self._dvc_or_as_before(dag, names, arguments, *hears)
            if done.code or done.timed_out or self.stopped_by:
                return done
            flaws = mend(dag, names)
            if flaws.damaged:
                what = f"{', '.join(flaws.damaged)}: not what {LOCK_FILE} says"
                if not ways:
                    raise RunError(f"{what}, however often it is made; check memory and disk")
                if pull and len(ways) == 1:
                    places = ", ".join(f"files/md5/{md5[:2]}/{md5[2:]}" for md5 in flaws.dropped)
                    warn(
                        f"{what}, nor is what the remote has: made again; remove {places} there, "
                        "and `gpt-pipeline push` replaces it"
                    )
                else:
                    warn(f"{what}: removed, here and from DVC's cache; made again")
            elif flaws.lacking and flaws.dropped and ways:
                ways.insert(0, commit)
            else:
                done.lacking = flaws.lacking
                done.code = 1 if flaws.lacking else 0
                return done

    def _dvc_or_as_before(
        self, dag: Dag, names: Sequence[str], arguments: Sequence[str], done: Ended, *hears: Any
    ) -> None:
        """Call `_dvc`; if it fails, put the previous outputs back."""
        with scratch(dag.root) as folder:
            earlier = Earlier(dag, names, folder)
            try:
                self._dvc(dag.root, arguments, done, *hears)
            except BaseException:
                earlier.put_back(replacing=done.executed)
                raise
            if done.code and not _only_not_kept(dag, names, done):
                done.undone = earlier.put_back(replacing=done.executed)

    def _dvc(
        self,
        root: Path,
        arguments: Sequence[str],
        done: Ended,
        show: Callable[[Event], None],
        say: Callable[[str, bool], None],
        environment: Mapping[str, str] | None,
        seconds: float | None,
    ) -> None:
        """Run a DVC command; its outcome is appended to `done`."""
        with scratch(root) as folder:
            events = folder / "events.jsonl"
            variables = {
                **os.environ,
                **(environment or {}),
                EVENTS_VARIABLE: str(events),
                "PYTHONUNBUFFERED": "1",
                # makes `python` in dvc.yaml the running interpreter
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            }
            command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
            with (
                # The stage inherits this stdin: when the pipe closes, we are gone.
                self._started(
                    root, command, env=variables, stdin=subprocess.PIPE, stderr=subprocess.STDOUT
                ) as process,
                _limited(process, seconds, done),
                following(events, show),
            ):
                assert process.stdout is not None
                for line in process.stdout:
                    text = line.rstrip()
                    if text.startswith(AFTERWARDS):
                        process.stdout.read()
                        break
                    if text:
                        done.output.append(text)
                        begun = done.executed
                        done.executed = begun or text.startswith("> ")
                        say(text, begun)
                done.code = process.wait()

    @contextlib.contextmanager
    def _started(
        self, root: Path, command: Sequence[str], **options: Any
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a process that is stopped with the others; an error in the block terminates it."""
        process = subprocess.Popen(
            command,
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # we receive Ctrl-C and pass it on
            **options,
        )
        self._running.add(process)
        try:
            if self.stopped_by:  # the signal arrived since the last check
                _signal(process, signal.SIGINT)
            yield process
        except BaseException:  # of a callback, such as a closed pipe: nothing reads the output
            _end(process)
            raise
        finally:
            self._running.discard(process)

    def _wait_for_others(self, root: Path, done: Ended, warn: Callable[[str], None]) -> bool:
        """Wait for the processes that, according to DVC, use the same files; whether they ended.

        False if DVC names none, or if this run is stopped in the meantime.
        """
        if mend_rwlock(root):
            return True
        if done.blockers:
            warn(f"waits for {done.who_blocks}, which works on the same files")
        while any(is_running(pid, cmd) for pid, cmd in done.blockers.items()):
            if self.stopping.wait(_LOOKS_SECONDS):
                return False
        return bool(done.blockers)

    def run(self, root: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command that is stopped with the stages; return its exit code and output."""
        with self._started(
            root, command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def failure(root: Path, names: Sequence[str], done: Ended) -> StageError:
    """Why stages failed: the stage's error message if there is one, otherwise DVC's.

    If a stage did not start because another process was running it, only its output has a message.
    """
    for name in names:
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads(_verdict_file(root, name).read_text(encoding="utf-8"))
            kind = said.get("kind") or ("input" if said["code"] == 2 else "failed")
            return StageError(str(said["error"]), int(said["code"]), kind)
    name = ", ".join(names)
    if done.lacking:
        reasons = [line for line in done.output if line.startswith(_NOT_TRANSFERRED)]
        reason = reasons[-1].partition(" - ")[2] if reasons else ""
        return StageError(reason or f"{', '.join(done.lacking)} is not in it", kind="cache")
    if who := done.who_blocks:
        return StageError(f"{name}: {who} works on the same files; wait for it or stop it")
    for mark in ("error: ", "ERROR: "):
        if lines := [line for line in done.output if line.startswith(mark)]:
            line = lines[-1].removeprefix(mark)
            of_dvc = done.executed and mark == "ERROR: "
            if of_dvc and _BY_A_SIGNAL.search(line):
                return StageError(line, kind="killed")
            return StageError(line, kind="cache" if of_dvc and _EXITED not in line else "failed")
    return StageError(f"dvc repro {name} failed", kind="killed" if done.executed else "failed")


def _only_not_kept(dag: Dag, names: Sequence[str], done: Ended) -> bool:
    """Whether the outputs are complete and DVC only failed to cache them."""
    outputs = (dag.root / path for name in names for path in dag.stages[name].outputs)
    return failure(dag.root, names, done).kind == "cache" and all(map(Path.exists, outputs))


def _verdict_file(root: Path, name: str) -> Path:
    """The file for a failed stage's exit code and error line, as DVC passes on neither."""
    return root / ".pipeline" / "exit" / f"{name}.json"


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to DVC and the stage under it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[str]) -> None:
    """Stop DVC and the stage under it; kill them if they do not end in time."""
    _signal(process, signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _limited(process: subprocess.Popen[str], seconds: float | None, done: Ended) -> Iterator[None]:
    """Interrupt the process at its time limit, as Ctrl-C does; kill it if it does not end."""

    def stop() -> None:
        done.timed_out = True
        _end(process)

    timer = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
