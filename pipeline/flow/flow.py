"""The Prefect flow: each stage its own task, run through DVC, side by side where they can be.

DVC decides what is out of date (`pipeline.dag.graph`) and runs it (`dvc repro --single-item`), so
that `dvc.lock` ends as after `dvc repro`. A stage that DVC says is unchanged ends in the state
`Cached`; so does one whose outputs came back from DVC's run cache with nothing executed.

Import this module only when `pipeline.flow.prefect_api.environment` is in place: Prefect reads its
settings when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
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
from pipeline.dag.cache import are_in_place
from pipeline.dag.dvc_files import find_root
from pipeline.dag.graph import Change, Dag, Stage
from pipeline.dag.repro import (
    Ended,
    Processes,
    StageError,
    failure,
    forget_failure,
    forget_for_commit,
    keep_for_commit,
    kept_for_commit,
)
from pipeline.flow.lifetime import note_flow_run
from pipeline.flow.resources import Resources, needs
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
from pipeline.tracking.sync import ready_for_promotion

_PASSING = ("network", "killed", "busy")
"""The kinds of failure that another try may mend."""

READ: ContextVar[Dag | None] = ContextVar("READ", default=None)
"""The DAG, where whoever calls `gpt_pipeline` has read it: Prefect would record an argument."""

_LEVELS: dict[Level, int] = {"warning": logging.WARNING, "error": logging.ERROR}


@dataclass(slots=True)
class _Run:
    """What the tasks of one flow run share."""

    dag: Dag
    force: bool
    params: FlowParams
    processes: Processes
    resources: Resources
    display: Display
    changes: dict[str, list[Change]]
    touched: set[str] = field(default_factory=set)
    """Stages whose outputs may be others than before."""

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
    """`gpt_pipeline` within a flow: a task a stage, and one for the promotion.

    Args:
        root: the project.
        targets: names of stages.
        force: run the stages even where nothing changed.
        jobs: so many stages run at the same time.
        processes: stops the stages, from another thread too.
        dag: of the project, if it has been read.
    """
    dag = dag or Dag(root)
    began = time.monotonic()
    with make_display() as display:
        recorded = dag.recorded()
        try:
            names = dag.plan(targets)
            params = load_section(root / PARAMS_FILE, "flow") or FlowParams()
        except InputError as error:
            display.line("", str(error), "error")
            return Failed(message=str(error), data=StageError(str(error), 2, "input"))
        resources = Resources(jobs, processes.stopping)
        run = _Run(dag, force, params, processes, resources, display, dag.changes(names))
        with processes.stopped_by_signals():
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


def _params(root: Path, section: str, default: Any) -> Any:
    """One section of `params.yaml`, which may be left out.

    To load the whole file imports every stage, and mostly nothing is to be done here.
    """
    return load_section(root / PARAMS_FILE, section) or default


def exit_code(state: State[Any]) -> int:
    """0; that of the stage which failed first; 130 after Ctrl-C, 143 after SIGTERM; else 1."""
    if state.is_completed():
        return 0
    error = state.result(raise_on_failure=False)
    return error.code if isinstance(error, StageError) else 1


def _verdict(run: _Run, states: dict[str, State[Any]], began: float) -> State[Any]:
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
    from pipeline.verdict.promotion import is_decided, promote_the_better

    root = run.dag.root
    try:
        rule = _params(root, "promotion", PromotionParams())
        if evaluated.name == "Cached" and is_decided(root, rule):
            return verdict
        ready, said = ready_for_promotion(root, _params(root, "tracking", TrackingParams()))
        for each in said:
            run.display.line("promotion", each.text, each.level)
        if not ready:
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
    if run.processes.stopped_by:
        return Cancelled(message="not started")
    logger.info("runs because %s", why)
    began = time.monotonic()
    try:
        executed, failed = _execute(run, stage, first_few(reasons, 1) or "forced")
    except RunError as error:  # no slots to be had
        executed, failed = False, StageError(str(error))
    run.display.done(name)
    took = seconds_in_words(time.monotonic() - began)
    if run.processes.stopped_by:
        run.display.line(name, f"stopped after {took}", "warning")
        return Cancelled(message="stopped by the user")
    if failed:
        logger.error("%s", safe(str(failed)))
        run.display.line(name, str(failed), "error")
        return Failed(message=str(failed), data=failed)
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
    if name in STAGES and STAGES[name].makes_data:
        from pipeline.data.report import write_report

        with contextlib.suppress(InputError):  # a rendering is no reason to fail
            write_report(root)


# --- one stage through DVC ---------------------------------------------------------------------


def _execute(run: _Run, stage: Stage, why: str) -> tuple[bool, StageError | None]:
    """Run a stage through DVC, again where its fault may pass; whether its command was executed,
    and how it failed if it did."""
    spec = STAGES.get(stage.name)
    need = needs(run.dag.root, stage.name, spec is not None and spec.accelerated)
    logger = get_run_logger()

    def say(text: str) -> None:
        logger.info("%s", safe(text))
        run.display.line(stage.name, text, "quiet")

    wait = run.params.wait
    for tries_left in range(run.params.retries, -1, -1):
        with run.resources.held(need, say) as environment:
            if environment is None:
                return False, None
            made = _is_made(run, stage)
            run.display.line(
                stage.name, "made before: DVC takes it in" if made else f"started: {why}"
            )
            done = _repro(run, stage, environment, made)
        if not done.code:
            forget_for_commit(run.dag.root, stage.name)
            return done.executed or made, None
        end_killed(run.dag.root, stage.name, run.dag.root)
        if run.processes.stopped_by:
            return done.executed, None
        if done.timed_out:
            minutes = f"{run.params.time_limits[stage.name]:g}"
            return done.executed, StageError(
                f"{stage.name}: stopped after {minutes} min, its time limit (flow.time_limits in "
                f"{PARAMS_FILE}); raise it, and `gpt-pipeline run` goes on from the kept state",
                kind="time",
            )
        failed = failure(run.dag.root, [stage.name], done)
        not_taken = (made or failed.kind == "cache") and not (done.blocked or done.undone)
        if not_taken and _is_all_there(run, stage):
            if not made:
                keep_for_commit(run.dag.root, stage.name, run.dag.fingerprint(stage.name))
            return done.executed, _not_taken(run, stage, failed)
        passing = failed.kind in _PASSING or done.blocked
        if not passing or not tries_left:
            return done.executed, failed
        line = f"{failed}; tried again in {seconds_in_words(wait)} ({tries_left} left)"
        logger.warning("%s", line)
        run.display.line(stage.name, line, "warning")
        run.processes.stopping.wait(wait)
        wait *= 2
    raise AssertionError("the last try returns")


def _is_made(run: _Run, stage: Stage) -> bool:
    """Whether the outputs in place are those of a run like this one and DVC's cache lacks them: it
    could not keep them, or was deleted."""
    if run.force:
        return False
    reasons = run.reasons(stage)
    if reasons and all(each.not_in_cache for each in reasons) and are_in_place(run.dag, stage.name):
        return True
    if not (kept := kept_for_commit(run.dag.root, stage.name)):
        return False
    if kept == run.dag.fingerprint(stage.name):
        return True
    forget_for_commit(run.dag.root, stage.name)
    return False


def _not_taken(run: _Run, stage: Stage, failed: StageError) -> StageError:
    """What to tell of a stage that ended well and whose outputs DVC could not keep."""
    reason = str(failed).removeprefix(f"failed to reproduce '{stage.name}': ")
    reason = reason.removeprefix("unexpected error - ")
    remedy = "see that it can be written"
    with contextlib.suppress(OSError):  # a cache that is not there has no room either
        free = shutil.disk_usage(run.dag.root / run.dag.cache).free
        needed = sum(size_of(run.dag.root / path) for path in stage.outputs)
        if free < needed:
            remedy = "make room there"
            reason = f"{size_in_words(free)} free, {size_in_words(needed)} needed: {reason}"
    return StageError(
        f"{stage.name}: is made, but DVC could not take its outputs into {run.dag.cache} "
        f"({reason}); {remedy}, and `gpt-pipeline run` takes them in without making them again",
        kind="cache",
    )


def _is_all_there(run: _Run, stage: Stage) -> bool:
    return all((run.dag.root / path).exists() for path in stage.outputs)


def _repro(run: _Run, stage: Stage, environment: Mapping[str, str], made: bool) -> Ended:
    """`dvc repro` of one stage, shown on the terminal and in Prefect's log."""
    logger, name = get_run_logger(), stage.name
    forget_failure(run.dag.root, name)
    in_log = PlainDisplay(lambda _, text, level: logger.log(_LEVELS.get(level, logging.INFO), text))

    def show(event: Event) -> None:
        run.display.event(name, event)
        in_log.event("", event)

    def say(text: str, executed: bool) -> None:
        logger.info("%s", safe(text))
        if executed and not text.startswith(("error: ", "ERROR: ")):  # told at the end
            run.display.line(name, text, "quiet")

    def warn(text: str) -> None:
        logger.warning("%s", text)
        run.display.line(name, text, "warning")

    minutes = run.params.time_limits.get(name)
    return run.processes.repro(
        run.dag,
        [name],
        show=show,
        say=say,
        warn=warn,
        environment=environment,
        force=run.force,
        made=made,
        seconds=None if minutes is None else minutes * 60,
    )


# --- what stays to be seen ---------------------------------------------------------------------


def _publish(run: _Run, stage: Stage, headline: str) -> None:
    """A short page in Prefect: what happened, the metrics, the way to the MLflow run."""
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
