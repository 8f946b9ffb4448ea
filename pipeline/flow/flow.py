"""The Prefect flow: one task per stage, run through DVC, in parallel where possible.

DVC decides what is out of date (`pipeline.dag.graph`) and runs it (`dvc repro --single-item`), so
`dvc.lock` ends up as after `dvc repro`. A stage that is up to date ends in the state `Cached`, and
so does one whose outputs were restored from DVC's run cache without executing its command.

Import this module only when `pipeline.flow.prefect_api.environment` is in place: Prefect reads its
settings when it is imported.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from gpt.base.errors import InputError, RunError, first_few
from gpt.base.events import Event
from pipeline.dag.cache import is_made
from pipeline.dag.dvc_files import find_root
from pipeline.dag.graph import Dag, Reason, Stage
from pipeline.dag.repro import (
    Ended,
    Processes,
    StageError,
    failure,
)
from pipeline.flow.prefect_api import note_flow_run
from pipeline.flow.resources import Resources, StoppedWaitingError, needs
from pipeline.project.params import PARAMS_FILE, load_params, load_section
from pipeline.project.settings import FlowParams, PromotionParams, TrackingParams
from pipeline.project.stage_table import STAGES
from pipeline.run.resume import size_in_words, size_of
from pipeline.run.stage import end_killed
from pipeline.show.console import Display, Level, PlainDisplay, make_display, seconds_in_words
from pipeline.show.markdown import escaped, table
from pipeline.show.terminal import safe
from pipeline.tracking.keys import flatten_metrics
from pipeline.tracking.run_notes import made_by
from pipeline.tracking.sender import ready_for_promotion

_PASSING = ("network", "killed", "busy")
"""The kinds of failure after which a retry may succeed."""

READ: ContextVar[Dag | None] = ContextVar("READ", default=None)
"""The DAG if the caller of `gpt_pipeline` has read it; Prefect would record an argument."""

_LEVELS: dict[Level, int] = {"warning": logging.WARNING, "error": logging.ERROR}


@dataclass(slots=True)
class _FlowContext:
    """State shared by the tasks of one flow run."""

    dag: Dag
    force: bool
    params: FlowParams
    processes: Processes
    resources: Resources
    display: Display
    changes: dict[str, list[Reason]]
    touched: set[str] = field(default_factory=set)
    """Stages that ran or were restored; their outputs may have changed."""

    def reasons(self, stage: Stage) -> list[Reason]:
        """Why the stage must run, now that its upstream stages have ended."""
        if self.touched.isdisjoint(stage.upstream):
            return self.changes[stage.name]
        return self.dag.changes([stage.name])[stage.name]

    def tell(self, name: str, text: str, level: Level = "info") -> None:
        """Write a line to the terminal and to Prefect's log."""
        get_run_logger().log(_LEVELS.get(level, logging.INFO), "%s", safe(text))
        self.display.line(name, text, level)

    def failed(self, name: str, error: Exception) -> State[Any]:
        """Report a failure in one line; return the failed state."""
        self.tell(name, str(error), "error")
        return failed_state(error)


def failed_state(error: Exception) -> State[Any]:
    """The failed state of a flow run or a task run; `exit_code` reads the exit code from it."""
    if not isinstance(error, StageError):
        error = StageError(str(error), 2 if isinstance(error, InputError) else 1)
    return Failed(message=str(error), data=error)


def _flow_run_name() -> str:
    """`all stages`, or the targets."""
    return ", ".join(flow_run.parameters.get("targets") or ()) or "all stages"


@flow(
    name="gpt-pipeline",
    flow_run_name=_flow_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # most wait; `jobs` limits how many run
    validate_parameters=False,
)  # type: ignore[untyped-decorator]
def gpt_pipeline(targets: Sequence[str] = (), force: bool = False, jobs: int = 3) -> State[Any]:
    """Bring the targets (by default all stages except the optional ones) and all their dependencies
    up to date.

    Args:
        targets: names of stages.
        force: run the stages even if nothing changed.
        jobs: how many stages run at the same time.

    Returns:
        A completed, failed or cancelled state; `exit_code` tells them apart.
    """
    root = find_root(Path.cwd())
    note_flow_run(root, str(flow_run.id), PREFECT_API_URL.value())
    return run_stages(root, targets, force, jobs, Processes(), dag=READ.get())


def run_stages(
    root: Path,
    targets: Sequence[str],
    force: bool,
    jobs: int,
    processes: Processes,
    *,
    dag: Dag | None = None,
) -> State[Any]:
    """`gpt_pipeline` inside a running flow: one task per stage, and one for the promotion.

    Args:
        root: the project.
        targets: names of stages.
        force: run the stages even if nothing changed.
        jobs: how many stages run at the same time.
        processes: stops the stages; may be used from another thread.
        dag: the project's DAG, if it has been read.
    """
    dag = dag or Dag(root)
    began = time.monotonic()
    with make_display() as display:
        try:
            names = dag.plan(targets)
            params = load_section(root / PARAMS_FILE, "flow") or FlowParams()
        except InputError as error:
            display.line("", str(error), "error")
            return failed_state(error)
        resources = Resources(jobs, processes.stopping)
        run = _FlowContext(dag, force, params, processes, resources, display, dag.changes(names))
        with processes.stopped_by_signals():
            futures: dict[str, PrefectFuture[Any]] = {}
            for name in names:
                stage = dag.stages[name]
                futures[name] = _task_of_stage(run, stage).submit(
                    wait_for=[futures[each] for each in stage.upstream if each in futures]
                )
            for future in futures.values():
                future.wait()
        dag.sort_lock()
        states = {name: future.state for name, future in futures.items()}
        verdict = _verdict(run, states, began)
        if verdict.is_completed() and "evaluate" in names:
            promoted = _promotion(run, states["evaluate"])
            if promoted is not None and promoted.is_failed():
                fault = promoted.result(raise_on_failure=False)
                return Failed(message=f"{verdict.message}; the promotion failed", data=fault)
        return verdict


def exit_code(state: State[Any]) -> int:
    """0 for success, 130 after Ctrl-C, 143 after SIGTERM, the first failed stage's code, or 1."""
    if state.is_completed():
        return 0
    error = state.result(raise_on_failure=False)
    return error.code if isinstance(error, StageError) else 1


def _verdict(run: _FlowContext, states: dict[str, State[Any]], began: float) -> State[Any]:
    took = seconds_in_words(time.monotonic() - began)
    if number := run.processes.stopped_by:
        run.display.line(
            "", f"stopped after {took}; `gpt-pipeline run` goes on from here", "warning"
        )
        stopped = StageError("stopped by the user", 128 + number)
        return Cancelled(message=str(stopped), data=stopped)
    failed = {name: state for name, state in states.items() if state.is_failed()}
    waiting = [name for name, state in states.items() if not state.is_final()]
    if failed or waiting:
        message = f"{', '.join(failed)} failed"
        if waiting:
            message += f"; not run: {', '.join(waiting)}"
        run.display.line("", f"{message} (after {took})", "error")
        in_order = sorted(failed.values(), key=lambda state: state.timestamp)
        return failed_state(StageError(message, max(map(exit_code, in_order[:1]), default=1)))
    ran = sum(state.name != "Cached" for state in states.values())
    message = f"{ran} of {len(states)} stages ran, in {took}"
    if not ran:
        message = f"{len(states)} of {len(states)} stages are up to date"
    run.display.line("", message, "good")
    return Completed(message=message)


def _promotion(run: _FlowContext, evaluated: State[Any]) -> State[Any] | None:
    """Compare the evaluated models with the champions, as a separate task; None if there is
    nothing to compare."""
    from pipeline.verdict.promotion import is_decided, promote_the_better

    file = run.dag.root / PARAMS_FILE
    try:
        # only this section: loading the whole file would import the modules of all stages
        rule = load_section(file, "promotion") or PromotionParams()
        if evaluated.name == "Cached" and is_decided(run.dag.root, rule):
            return None
        tracking = load_section(file, "tracking") or TrackingParams()
        ready, said = ready_for_promotion(run.dag.root, tracking)
    except InputError as error:
        return run.failed("promotion", error)
    for each in said:
        run.display.line("promotion", each.text, each.level)
    if not ready:
        return None

    def promotion() -> State[Any]:
        try:
            decisions = promote_the_better(run.dag.root, rule, load_params(file).evaluate)
        except (InputError, RunError) as error:
            return run.failed("promotion", error)
        for each in decisions:
            run.tell("promotion", str(each), "good" if each.promoted else "warning")
        return Completed(message="; ".join(map(str, decisions)) or "nothing is registered here")

    state: State[Any] = task_of("promotion", promotion)(return_state=True)
    return state


def task_of(name: str, function: Callable[..., State[Any]]) -> Any:
    """A Prefect task whose run has the same name; caching is left to DVC."""
    return task(name=name, task_run_name=name, cache_policy=NO_CACHE)(function)


def _task_of_stage(run: _FlowContext, stage: Stage) -> Any:
    return task_of(stage.name, lambda: _bring_up_to_date(run, stage))


def _bring_up_to_date(run: _FlowContext, stage: Stage) -> State[Any]:
    name = stage.name
    reasons = run.reasons(stage)
    if not reasons and not run.force:
        run.tell(name, "cached", "quiet")
        return _cached(run, stage, "nothing changed")
    if missing := run.dag.missing_params(name):
        # DVC would report this too, but only after removing the outputs
        line = f"params.yaml: {missing[0]}: missing, and {name} needs it; add the section"
        return run.failed(name, InputError(line))
    if run.processes.stopped_by:
        return Cancelled(message="not started")
    why = "; ".join(map(str, reasons)) or "forced"
    get_run_logger().info("runs because %s", why)
    began = time.monotonic()
    executed = False
    failed: Exception | None = None
    try:
        executed = _execute(run, stage, first_few(reasons, 1) or "forced")
    except (RunError, StoppedWaitingError) as error:
        failed = error
    run.display.done(name)
    took = seconds_in_words(time.monotonic() - began)
    if run.processes.stopped_by:
        run.display.line(name, f"stopped after {took}", "warning")
        return Cancelled(message="stopped by the user")
    if failed:
        return run.failed(name, failed)
    run.touched.add(name)
    if not executed:
        run.tell(name, "cached: restored from DVC's run cache", "quiet")
        _renew_data_report(run.dag.root, name)
        return _cached(run, stage, "restored from DVC's run cache")
    run.tell(name, f"finished in {took}", "good")
    _publish(run, stage, f"Ran for {took} because {why}.")
    return Completed(message=f"ran for {took}")


def _cached(run: _FlowContext, stage: Stage, message: str) -> State[Any]:
    _publish(run, stage, f"Cached: {message}; nothing was executed.")
    return Completed(name="Cached", message=message)


def _renew_data_report(root: Path, name: str) -> None:
    """Rewrite the data report after a restore: the stage that writes it did not run."""
    if name in STAGES and STAGES[name].makes_data:
        from pipeline.data.report import write_report

        with contextlib.suppress(InputError):  # a failed report must not fail the run
            write_report(root)


# --- one stage through DVC ---------------------------------------------------------------------


def _execute(run: _FlowContext, stage: Stage, why: str) -> bool:
    """Run a stage through DVC, with retries after failures that may be temporary; return whether
    its command was executed.

    Prefect's `retries` are not used: their delays would block Ctrl-C.

    Raises:
        StageError: the stage failed.
        StoppedWaitingError: the flow was stopped before the stage started.
    """
    name, root = stage.name, run.dag.root
    spec = STAGES.get(name)
    need = needs(root, name, spec is not None and spec.accelerated)
    for tried in itertools.count():  # until it returns or raises
        with run.resources.held(need, lambda text: run.tell(name, text, "quiet")) as environment:
            made = not run.force and is_made(run.dag, name, run.reasons(stage))
            run.display.line(name, "made before: DVC takes it in" if made else f"started: {why}")
            done = _repro(run, stage, environment, made)
        if not done.code:
            return done.executed or made
        end_killed(root, name, root)
        if run.processes.stopped_by:
            return done.executed
        failed = _failure_of(run, stage, done, made)
        left = run.params.retries - tried
        if not left or not (failed.kind in _PASSING or done.blocked):
            raise failed
        wait = run.params.wait * 2**tried
        line = f"{failed}; tried again in {seconds_in_words(wait)} ({left} left)"
        run.tell(name, line, "warning")
        run.processes.stopping.wait(wait)
    raise AssertionError("the last try returns")


def _failure_of(run: _FlowContext, stage: Stage, done: Ended, made: bool) -> StageError:
    """Why a stage failed or, if its command succeeded, why DVC could not cache its outputs."""
    name, root = stage.name, run.dag.root
    if done.timed_out:
        return StageError(
            f"{name}: stopped after {run.params.time_limits[name]:g} min, its time limit "
            f"(flow.time_limits in {PARAMS_FILE}); raise it, and `gpt-pipeline run` goes on from "
            "the kept state",
            kind="time",
        )
    failed = failure(root, [name], done)
    outputs = [root / path for path in stage.outputs]
    not_kept = (made or failed.kind == "cache") and not (done.blocked or done.undone)
    if not (not_kept and all(path.exists() for path in outputs)):
        return failed
    if not made:
        run.dag.note_made(name)
    reason = str(failed).removeprefix(f"failed to reproduce '{name}': ")
    reason = reason.removeprefix("unexpected error - ")
    remedy = "see that it can be written"
    with contextlib.suppress(OSError):  # the cache may not exist
        free, needed = shutil.disk_usage(root / run.dag.cache).free, sum(map(size_of, outputs))
        if free < needed:
            remedy = "make room there"
            reason = f"{size_in_words(free)} free, {size_in_words(needed)} needed: {reason}"
    return StageError(
        f"{name}: is made, but DVC could not take its outputs into {run.dag.cache} "
        f"({reason}); {remedy}, and `gpt-pipeline run` takes them in without making them again",
        kind="cache",
    )


def _repro(run: _FlowContext, stage: Stage, environment: Mapping[str, str], made: bool) -> Ended:
    """Run `dvc repro` for one stage; its output goes to the terminal and to Prefect's log."""
    logger, name = get_run_logger(), stage.name
    in_log = PlainDisplay(lambda _, text, level: logger.log(_LEVELS.get(level, logging.INFO), text))

    def show(event: Event) -> None:
        run.display.event(name, event)
        in_log.event("", event)

    def say(text: str, executed: bool) -> None:
        logger.info("%s", safe(text))
        if executed and not text.startswith(("error: ", "ERROR: ")):  # reported at the end
            run.display.line(name, text, "quiet")

    minutes = run.params.time_limits.get(name)
    return run.processes.repro(
        run.dag,
        [name],
        show=show,
        say=say,
        warn=lambda text: run.tell(name, text, "warning"),
        environment=environment,
        force=run.force,
        made=made,
        seconds=None if minutes is None else minutes * 60,
    )


# --- what Prefect shows ---------------------------------------------------------------------------


def _publish(run: _FlowContext, stage: Stage, headline: str) -> None:
    """Create a short Prefect artifact: the outcome, the metrics, a link to the MLflow run."""
    lines = [f"# {escaped(stage.name)}", "", escaped(headline), ""]
    for path in stage.metrics:
        metrics = flatten_metrics(json.loads((run.dag.root / path).read_text(encoding="utf-8")))
        rows = [(key, f"{value:.6g}") for key, value in metrics.items()]
        lines += [table(["metric", "value"], rows), ""]
    if url := made_by(run.dag, [stage.name])[stage.name].get("url"):
        lines.append(f"[The run in MLflow that made it]({url})")
    create_markdown_artifact(
        "\n".join(lines),
        key=stage.name.replace("_", "-"),
        description=f"{stage.name}: metrics and MLflow run",
    )
