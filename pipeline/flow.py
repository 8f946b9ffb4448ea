"""The Prefect flow: each stage its own task, run through DVC, side by side where they can be.

DVC decides what is out of date (`pipeline.dag`) and runs it (`dvc repro --single-item`), so that
`dvc.lock` ends as after `dvc repro`. A stage that DVC says is unchanged ends in the state
`Cached`; so does one whose outputs came back from DVC's run cache with nothing executed.

Import this module only when `pipeline.server.environment` is in place: Prefect reads its settings
when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from gpt.errors import InputError, RunError
from gpt.events import Event
from pipeline.console import (
    EVENTS_VARIABLE,
    Display,
    EventReader,
    Level,
    PlainDisplay,
    make_display,
    seconds_in_words,
)
from pipeline.dag import Change, Dag, Stage, find_root, last_run
from pipeline.params import PARAMS_FILE, load_params, load_section
from pipeline.tracking import flatten_metrics

_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0
"""So long a stopped stage may take to save its state before it is killed."""
_LOCK_TRIES = 5

_AFTERWARDS = (
    "Generating lock file",
    "Updating lock file",
    "To track the changes",
    "Use `dvc push`",
)
"""What DVC says when a stage has ended well: advice follows, which no one needs seven times."""

_LEVELS: dict[Level, int] = {"warning": logging.WARNING, "error": logging.ERROR}


class StageError(RunError):
    """A stage that failed, in one line, and the exit code that says how."""

    def __init__(self, line: str, code: int = 1) -> None:
        super().__init__(line, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(slots=True)
class _Run:
    """What the tasks of one flow run share."""

    dag: Dag
    force: bool
    slots: threading.Semaphore
    display: Display
    changes: dict[str, list[Change]]
    touched: set[str] = field(default_factory=set)
    """Stages whose outputs may be others than before."""
    stopped_by: int = 0
    """The signal that ended the run, if one did."""
    processes: set[subprocess.Popen[str]] = field(default_factory=set)

    def reasons(self, stage: Stage) -> list[Change]:
        """Why the stage must run now, after its upstream."""
        if self.touched.isdisjoint(stage.upstream):
            return self.changes[stage.name]
        return self.dag.changes([stage.name])[stage.name]


def _flow_run_name() -> str:
    """`all stages`, or the targets."""
    return ", ".join(flow_run.parameters.get("targets") or ()) or "all stages"


@flow(
    name="gpt-pipeline",
    flow_run_name=_flow_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # most wait: `jobs` says how many work
    validate_parameters=False,
)  # type: ignore[untyped-decorator]
def gpt_pipeline(targets: Sequence[str] = (), force: bool = False, jobs: int = 3) -> State[Any]:
    """Bring the targets (by default every stage but the optional ones) and all that they depend on
    up to date.

    Args:
        targets: names of stages.
        force: run the stages even where nothing changed.
        jobs: so many stages run at the same time.

    Returns:
        A completed, failed or cancelled state; `exit_code` tells them apart.
    """
    dag = Dag(find_root(Path.cwd()))
    names = dag.plan(targets)
    began = time.monotonic()
    with make_display() as display:
        recorded = dag.recorded()
        run = _Run(dag, force, threading.Semaphore(jobs), display, dag.changes(names))
        with _stop_on_signals(run):
            futures: dict[str, PrefectFuture[Any]] = {}
            for name in names:
                stage = dag.stages[name]
                futures[name] = _task_of(run, stage).submit(
                    wait_for=[futures[each] for each in stage.upstream if each in futures]
                )
            for future in futures.values():
                future.wait()
        dag.sort_lock(recorded)
        states = {name: future.state for name, future in futures.items()}
        verdict = _verdict(run, states, began)
        if verdict.is_completed() and "evaluate" in names:
            return _promotion(run, states["evaluate"], verdict)
        return verdict


def exit_code(state: State[Any]) -> int:
    """0; that of the stage which failed first; 130 after Ctrl-C, 143 after SIGTERM; else 1."""
    if state.is_completed():
        return 0
    error = state.result(raise_on_failure=False)
    return error.code if isinstance(error, StageError) else 1


def _verdict(run: _Run, states: dict[str, State[Any]], began: float) -> State[Any]:
    took = seconds_in_words(time.monotonic() - began)
    if run.stopped_by:
        run.display.line(
            "", f"stopped after {took}; `gpt-pipeline run` goes on from here", "warning"
        )
        stopped = StageError("stopped by the user", 128 + run.stopped_by)
        return Cancelled(message=str(stopped), data=stopped)
    failed = {name: state for name, state in states.items() if state.is_failed()}
    waiting = [name for name, state in states.items() if not state.is_final()]
    if failed or waiting:
        first = min(failed, key=lambda name: failed[name].timestamp, default="")
        message = f"{', '.join(failed)} failed"
        if waiting:
            message += f"; not run: {', '.join(waiting)}"
        run.display.line("", f"{message} (after {took})", "error")
        code = exit_code(failed[first]) if first else 1
        return Failed(message=message, data=StageError(message, code))
    ran = sum(state.name != "Cached" for state in states.values())
    if ran:
        message = f"{ran} of {len(states)} stages ran, in {took}"
    else:
        message = f"{len(states)} of {len(states)} stages are up to date"
    run.display.line("", message, "good")
    return Completed(message=message)


def _promotion(run: _Run, evaluated: State[Any], verdict: State[Any]) -> State[Any]:
    """Compare what was evaluated with the champions, in a task of its own if there is news."""
    from pipeline.promotion import PromotionParams, is_decided, promote_the_better

    root = run.dag.root
    try:
        # the one section: to load all imports every stage, and mostly nothing is to be done here
        rule = load_section(root / PARAMS_FILE, "promotion") or PromotionParams()
        if evaluated.name == "Cached" and is_decided(root, rule):
            return verdict
    except InputError as error:
        run.display.line("promotion", str(error), "error")
        return Failed(message=str(error), data=StageError(str(error), 2))

    def promotion() -> State[Any]:
        logger = get_run_logger()
        try:
            params = load_params(root / PARAMS_FILE)
            decisions = promote_the_better(root, rule, params.evaluate)
        except (InputError, RunError) as error:
            code = 2 if isinstance(error, InputError) else 1
            run.display.line("promotion", str(error), "error")
            return Failed(message=str(error), data=StageError(str(error), code))
        for each in decisions:
            logger.info("%s", each)
            run.display.line("promotion", str(each), "good" if each.promoted else "warning")
        return Completed(message="; ".join(map(str, decisions)) or "nothing is registered here")

    state: State[Any] = task(name="promotion", task_run_name="promotion", cache_policy=NO_CACHE)(
        promotion
    )(return_state=True)
    if state.is_completed():
        return verdict
    message = f"{verdict.message}; the promotion failed"
    return Failed(message=message, data=state.result(raise_on_failure=False))


def _task_of(run: _Run, stage: Stage) -> Any:
    """The Prefect task of a stage, and its task run, bear the stage's name."""

    def run_stage() -> State[Any]:
        return _bring_up_to_date(run, stage)

    # DVC decides what is cached: Prefect has no say in it
    return task(name=stage.name, task_run_name=stage.name, cache_policy=NO_CACHE)(run_stage)


def _bring_up_to_date(run: _Run, stage: Stage) -> State[Any]:
    name, logger = stage.name, get_run_logger()
    reasons = run.reasons(stage)
    if not reasons and not run.force:
        logger.info("nothing changed: the outputs in place are what running it would give")
        run.display.line(name, "cached", "quiet")
        _publish(run, stage, "Cached: nothing changed.")
        return Completed(name="Cached", message="nothing changed")
    if missing := run.dag.missing_params(name):
        # DVC would say so too, but remove the outputs first
        line = f"params.yaml: {missing[0]}: missing, and {name} needs it; add the section"
        run.display.line(name, line, "error")
        return Failed(message=line, data=StageError(line, 2))
    why = "; ".join(map(str, reasons)) or "forced"
    with run.slots:
        if run.stopped_by:
            return Cancelled(message="not started")
        logger.info("runs because %s", why)
        run.display.line(name, f"started: {_short(reasons) or 'forced'}")
        began = time.monotonic()
        executed, failure = _execute(run, name)
        run.display.done(name)
    took = seconds_in_words(time.monotonic() - began)
    if run.stopped_by:
        run.display.line(name, f"stopped after {took}", "warning")
        return Cancelled(message="stopped by the user")
    if failure:
        logger.error("%s", failure)
        run.display.line(name, str(failure), "error")
        return Failed(message=str(failure), data=failure)
    run.touched.add(name)
    if not executed:
        run.display.line(name, "cached: restored from DVC's run cache", "quiet")
        _renew_data_report(run.dag.root, name)
        _publish(run, stage, "Cached: restored from DVC's run cache, nothing was executed.")
        return Completed(name="Cached", message="restored from DVC's run cache")
    run.display.line(name, f"finished in {took}", "good")
    _publish(run, stage, f"Ran for {took} because {why}.")
    return Completed(message=f"ran for {took}")


def _renew_data_report(root: Path, name: str) -> None:
    """A stage that makes data writes it; where the data came back by itself, nobody did."""
    from pipeline.runner import STAGES

    if name in STAGES and STAGES[name].makes_data:
        from pipeline.data_report import write_report

        with contextlib.suppress(InputError):  # a rendering is no reason to fail
            write_report(root)


def _short(reasons: Sequence[Change]) -> str:
    more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    return f"{reasons[0]}{more}" if reasons else ""


# --- one stage through DVC ---------------------------------------------------------------------


def _execute(run: _Run, name: str) -> tuple[bool, StageError | None]:
    """Run one stage through DVC; whether its command was executed, and how it failed if it did."""
    for attempt in range(_LOCK_TRIES):
        executed, code, output = _repro(run, name)
        # Another DVC (a `dvc status` in the next window) held a file's lock for a moment.
        busy = code and not executed and any(_is_lock_error(line) for line in output)
        if not busy or run.stopped_by:
            break
        time.sleep(2.0**attempt / 2)
    return executed, _failure(run.dag.root, name, output) if code else None


def _is_lock_error(line: str) -> bool:
    return "Unable to acquire lock" in line or "it is being blocked by" in line


def _failure(root: Path, name: str, output: Sequence[str]) -> StageError:
    """The stage's own words if it left any, else DVC's.

    A stage that never began, as another process was running it, leaves them in its output only.
    """
    try:
        verdict = json.loads(_verdict_file(root, name).read_text(encoding="utf-8"))
        return StageError(str(verdict["error"]), int(verdict["code"]))
    except (OSError, ValueError, KeyError):
        for mark in ("error: ", "ERROR: "):
            if said := [line for line in output if line.startswith(mark)]:
                return StageError(said[-1].removeprefix(mark))
        return StageError(f"dvc repro {name} failed")


def _verdict_file(root: Path, name: str) -> Path:
    """Where a stage that failed leaves its exit code and its one line: DVC passes neither on."""
    return root / ".pipeline" / "exit" / f"{name}.json"


def _repro(run: _Run, name: str) -> tuple[bool, int, list[str]]:
    """`dvc repro` of one stage: whether its command was executed, DVC's exit code, the output."""
    logger = get_run_logger()
    root = run.dag.root
    _verdict_file(root, name).unlink(missing_ok=True)
    in_log = PlainDisplay(lambda _, text, level: logger.log(_LEVELS.get(level, logging.INFO), text))

    def show(event: Event) -> None:
        run.display.event(name, event)
        in_log.event("", event)

    address = run.dag.stages[name].address
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", address]
    if run.force:
        command.append("--force")
    executed, output = False, []
    with tempfile.TemporaryDirectory(prefix="gpt-pipeline-") as folder:
        events = Path(folder) / "events.jsonl"
        process = subprocess.Popen(
            command,
            cwd=root,
            env={
                **os.environ,
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
        run.processes.add(process)
        if run.stopped_by:  # the signal came between the last look and now
            _signal(process, signal.SIGINT)
        try:
            with _following(EventReader(events), show):
                assert process.stdout is not None
                for line in process.stdout:
                    text = line.rstrip()
                    if text.startswith(_AFTERWARDS):
                        process.stdout.read()
                        break
                    if not text:
                        continue
                    output.append(text)
                    logger.info("%s", text)
                    if executed and not text.startswith(("error: ", "ERROR: ")):  # told at the end
                        run.display.line(name, text, "quiet")
                    executed = executed or text.startswith("> ")
                code = process.wait()
        finally:
            run.processes.discard(process)
    return executed, code, output


@contextlib.contextmanager
def _following(reader: EventReader, show: Callable[[Event], None]) -> Iterator[None]:
    """Within the block, show a stage's events as they come."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_POLL_SECONDS):
            for event in reader.read():
                show(event)

    thread = threading.Thread(target=copy_context().run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for event in reader.read():
            show(event)


# --- stopping ----------------------------------------------------------------------------------


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to DVC and the stage under it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _stop_on_signals(run: _Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM let the running stages save their state and start no more of them.

    A second signal, or patience at its end, kills them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def kill() -> None:
        for process in list(run.processes):
            _signal(process, signal.SIGKILL)

    def stop(number: int, frame: FrameType | None) -> None:
        if run.stopped_by:
            kill()
            return
        run.stopped_by = number
        for process in list(run.processes):
            _signal(process, signal.SIGINT)
        timer = threading.Timer(_STOP_SECONDS, kill)
        timer.daemon = True
        timer.start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what stays to be seen ---------------------------------------------------------------------


def _publish(run: _Run, stage: Stage, headline: str) -> None:
    """A short page in Prefect: what happened, the metrics, the way to the MLflow run."""
    lines = [f"# {stage.name}", "", headline, ""]
    for path in stage.metrics:
        metrics = flatten_metrics(json.loads((run.dag.root / path).read_text(encoding="utf-8")))
        lines += ["| metric | value |", "|---|---:|"]
        lines += [f"| {key} | {value:.6g} |" for key, value in metrics.items()]
        lines.append("")
    if url := last_run(run.dag.root, stage.name).get("url"):
        lines.append(f"[The stage's last run in MLflow]({url})")
    create_markdown_artifact(
        "\n".join(lines),
        key=stage.name.replace("_", "-"),
        description=f"{stage.name}: metrics and MLflow run",
    )
