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

_NOT_TRANSFERRED = "ERROR: failed to transfer "
"""So it logs what it could not write into its cache, and ends as if all were well."""

_BY_A_SIGNAL = re.compile(r"exited with (-\d+|1(29|[3-9]\d))$")
"""A command that a signal ended: its number as Python gives it or, plus 128, as some shells do."""

_BLOCKERS = re.compile(r"^ *\(PID (\d+)\): (.*)$", re.MULTILINE)
"""So DVC names the processes that are at work on the same files."""

_LOOKS_SECONDS = 0.5

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
        lacking: what DVC says it keeps and its cache has not got, paths relative to the project.
        undone: the outputs are those from before it again.
    """

    executed: bool = False
    code: int = 0
    output: list[str] = field(default_factory=list)
    timed_out: bool = False
    lacking: list[str] = field(default_factory=list)
    undone: bool = False

    @property
    def blocked(self) -> bool:
        """Another DVC (a `dvc status` in the next window) held a file's lock for too long."""
        said = any(mark in line for line in self.output for mark in _LOCKED)
        return bool(self.code) and not self.executed and said

    @property
    def blockers(self) -> dict[int, str]:
        """Process id -> command of those that DVC says are at work on the same files."""
        return {int(pid): cmd for pid, cmd in _BLOCKERS.findall("\n".join(self.output))}

    @property
    def who_blocks(self) -> str:
        """The same in words; empty if there is none."""
        return ", ".join(f"process {pid} ({cmd})" for pid, cmd in self.blockers.items())


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
        """`dvc repro` of stages whose upstream is in place; its word is not taken for the outcome.

        What it restores is compared with `dvc.lock`; what is damaged is removed from the cache and
        restored from the remote or made again. What its cache has not got in the end is a failure.
        After a failure the outputs are as before, unless they are made and only the cache lacks
        them.

        Args:
            dag: of a checkout of the project.
            names: of the stages.
            show: hears the events of the stage.
            say: hears each line of the output, and whether the command of a stage has begun.
            warn: hears what else there is to tell.
            environment: variables beside this process's own.
            force: execute the stages even if nothing changed.
            made: their outputs are in place, DVC only takes them into its cache (`dvc commit`).
            seconds: the time limit.

        Raises:
            RunError: the cache cannot be written, something damaged cannot be removed, or the
                earlier outputs cannot be kept.
        """
        addresses = [dag.stages[name].address for name in names]
        commit, again = ["commit", "--force"], ["repro", "--single-item"]
        pull = ["--pull"] if has_remote(dag.root) else []  # also what only its run cache knows of
        first = commit if made else [*again, *(["--force"] if force else []), *pull]
        # a damaged copy of the remote would come back, so the last time it is not asked
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
        """`_dvc`; where it fails the outputs are as they were."""
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
        """A DVC command; how it ended is added to `done`."""
        with scratch(root) as folder:
            events = folder / "events.jsonl"
            variables = {
                **os.environ,
                **(environment or {}),
                EVENTS_VARIABLE: str(events),
                "PYTHONUNBUFFERED": "1",
                # dvc.yaml says `python`, and that is the one that runs here
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            }
            command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
            with (
                # The stage holds the other end of stdin too: its end says that we are gone.
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
        """A process that is stopped with the others; an error within the block ends it."""
        process = subprocess.Popen(
            command,
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C comes to us, and we pass it on
            **options,
        )
        self._running.add(process)
        try:
            if self.stopped_by:  # the signal came between the last look and now
                _signal(process, signal.SIGINT)
            yield process
        except BaseException:  # of a listener, as when its pipe is closed: nobody reads on
            _end(process)
            raise
        finally:
            self._running.discard(process)

    def _wait_for_others(self, root: Path, done: Ended, warn: Callable[[str], None]) -> bool:
        """Wait for the processes that DVC says are at work on the same files; whether they ended.

        False where it names none, or this run is stopped meanwhile.
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
        """A command that is stopped with the stages: its exit code and what it printed."""
        with self._started(
            root, command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def failure(root: Path, names: Sequence[str], done: Ended) -> StageError:
    """Why stages failed: their own words if they left any, else DVC's.

    A stage that never began, as another process was running it, leaves them in its output only.
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
    """Whether stages are made and DVC's cache only could not take them in."""
    outputs = (dag.root / path for name in names for path in dag.stages[name].outputs)
    return failure(dag.root, names, done).kind == "cache" and all(map(Path.exists, outputs))


def _verdict_file(root: Path, name: str) -> Path:
    """Where a stage that failed leaves its exit code and its one line: DVC passes neither on."""
    return root / ".pipeline" / "exit" / f"{name}.json"


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to DVC and the stage under it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[str]) -> None:
    """Stop DVC and the stage under it; kill them when that is not heard."""
    _signal(process, signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _limited(process: subprocess.Popen[str], seconds: float | None, done: Ended) -> Iterator[None]:
    """Stop the process, as Ctrl-C does, when its time is over; kill it when that is not heard."""

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
