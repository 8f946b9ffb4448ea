"""The points of a sweep as one Prefect flow, each brought up to date in a workspace of its own.

A workspace has the project's code, `dvc.lock` and DVC's cache, so that DVC brings back what a point
shares with the project or with another point, and executes what is left. What several points have
to make is made by the first of them while the others wait.

Import this module only when `pipeline.flow.prefect_api.environment` is in place: Prefect reads its
settings when it is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import CancelledRun, FailedRun
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from gpt.base.errors import InputError, RunError, in_one_line
from pipeline.dag.dvc_files import LOCK_FILE
from pipeline.dag.experiments import save_experiment
from pipeline.dag.graph import Dag
from pipeline.dag.repro import Processes, failure
from pipeline.dag.workspace import make_workspace
from pipeline.flow.prefect_api import note_flow_run
from pipeline.project.folders import workspace_environment
from pipeline.project.git import commit_of, git
from pipeline.project.overrides import text_with
from pipeline.project.params import PARAMS_FILE, load_params, read_params
from pipeline.run.stage import end_killed
from pipeline.show.console import Display, seconds_in_words
from pipeline.sweep.points import Point, Sweep, proposals
from pipeline.sweep.runs import Outcome, SweepRuns
from pipeline.tracking.keys import flatten_metrics
from pipeline.tracking.registry import POINT_VARIABLE


class Snapshot:
    """The project as it is now, uncommitted edits included: what every point begins from.

    Args:
        root: the project.
        folder: where the workspaces are created; existing content is removed.

    Raises:
        InputError: the project is no git repository with a commit.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.params = (root / PARAMS_FILE).read_bytes()
        self._folder = folder
        self._commit = commit_of(root, "HEAD")
        self.remove()
        edited = git(root, "diff", "--name-only", "--no-renames", "-z", "HEAD").split("\0")
        new = git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
        self._edits: dict[str, bytes | None] = {
            path: (root / path).read_bytes() if (root / path).is_file() else None
            for path in filter(None, [*edited, *new])
        }
        outputs = (":!reports", f":!*{LOCK_FILE}")
        code = git(root, "diff", "--binary", "HEAD", "--", ".", *outputs)
        whole = repr([self._commit, self.params, code])
        self.key = hashlib.sha256(whole.encode()).hexdigest()

    def remove(self) -> None:
        """Remove the content of the folder, including workspaces of a killed sweep."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def workspace(self, name: str, point: Point) -> Iterator[Path]:
        """Within the block there is a checkout with a point's parameters.

        Raises:
            RunError: it cannot be made.
        """
        folder = self._folder / name
        make_workspace(self.root, self._commit, folder)
        try:
            for path, content in self._edits.items():
                if content is None:
                    (folder / path).unlink(missing_ok=True)
                else:
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(content)
            (folder / PARAMS_FILE).write_bytes(text_with(self.params, point.set))
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(slots=True)
class _FlowState:
    """What the tasks of one flow run share."""

    sweep: Sweep
    snapshot: Snapshot
    runs: SweepRuns
    display: Display
    made: set[str] = field(default_factory=set)
    """Keys of stages whose outputs are in DVC's cache by now: see `_keys`."""
    locks: defaultdict[str, threading.Lock] = field(
        default_factory=lambda: defaultdict(threading.Lock)
    )
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By the key of the point."""
    processes: Processes = field(default_factory=Processes)


class _SweepStoppedError(Exception):
    """The sweep was interrupted."""


def run_points(
    sweep: Sweep,
    snapshot: Snapshot,
    runs: SweepRuns,
    display: Display,
    jobs: int,
) -> tuple[list[Outcome], int]:
    """Bring all points up to date, as one flow run.

    Args:
        sweep: what is swept.
        snapshot: what the points begin from.
        runs: receives the outcomes.
        display: shows the progress.
        jobs: how many points run at the same time.

    Returns:
        An outcome each, in the order in which they were proposed, and the signal that ended the
        flow, 0 if none did.
    """
    state = _FlowState(sweep, snapshot, runs, display)
    outcomes, processes = state.outcomes, state.processes

    def body() -> State[Any]:
        note_flow_run(snapshot.root, str(flow_run.id), PREFECT_API_URL.value())
        with processes.stopped_by_signals():
            for points in proposals(sweep, jobs, lambda point: outcomes[point.key].value):
                new = {point.key: point for point in points if point.key not in outcomes}
                futures = {key: _task_of(state, point).submit() for key, point in new.items()}
                for key, future in futures.items():
                    future.wait()
                    if not processes.stopped_by and key not in outcomes:  # Prefect's own fault
                        error = f"Prefect: {future.state.message}"
                        outcomes[key] = Outcome(new[key], error=error)
                if processes.stopped_by:
                    break
        if processes.stopped_by:
            return Cancelled(message="stopped by the user")
        failed = sum(bool(each.error) for each in outcomes.values())
        message = f"{len(outcomes) - failed} of {len(outcomes)} points are there"
        return Failed(message=message) if failed else Completed(message=message)

    with contextlib.suppress(FailedRun, CancelledRun):  # the outcomes tell
        flow(
            name="gpt-pipeline sweep",
            flow_run_name=_literal(runs.name),
            task_runner=ThreadPoolTaskRunner(max_workers=jobs),
        )(body)()
    return [*outcomes.values()], processes.stopped_by


def _literal(name: str) -> str:
    """Prefect takes a name for a template."""
    return name.replace("{", "{{").replace("}", "}}")


def _keys(dag: Dag, plan: Sequence[str], params: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> equal for points for which it makes the same: its parameters, and what is before it.

    DVC decides whether it really is the same; this says only who waits for whom.
    """
    keys: dict[str, str] = {}
    for name in plan:
        before = [keys[each] for each in dag.stages[name].upstream]
        whole = json.dumps([name, params.get(name), before], sort_keys=True, default=str)
        keys[name] = hashlib.sha256(whole.encode()).hexdigest()
    return keys


def _task_of(state: _FlowState, point: Point) -> Any:
    """The Prefect task of a point, and its task run, bear the point's name."""
    name = _literal(point.name)

    def run_point() -> State[Any]:
        if state.processes.stopped_by:
            return Cancelled(message="not started")
        outcome = Outcome(point)
        try:
            _run_point(state, outcome)
        except _SweepStoppedError:
            state.display.line(point.name, "stopped", "warning")
            return Cancelled(message="stopped by the user")
        except Exception as error:
            if not isinstance(error, InputError | RunError):  # a mistake of ours
                traceback.print_exc()
            outcome.error = outcome.error or in_one_line(error)
        finally:
            state.display.done(point.name)
        state.outcomes[point.key] = outcome
        if outcome.error:
            state.display.line(point.name, outcome.error, "error")
            return Failed(message=outcome.error)
        ran = ", ".join(outcome.executed)
        said = f"ran {ran} in {seconds_in_words(outcome.seconds)}" if ran else "cached"
        metric = f"{state.sweep.metric.name} {outcome.value:.4g}"
        state.display.line(point.name, f"{said}; {metric}", "good" if ran else "quiet")
        return Completed(message=f"{said}; {metric}", name="Completed" if ran else "Cached")

    return task(name=point.name, task_run_name=name, cache_policy=NO_CACHE)(run_point)


def _run_point(state: _FlowState, outcome: Outcome) -> None:
    """Bring a point up to date and fill in its outcome."""
    point, runs, sweep = outcome.point, state.runs, state.sweep
    child = runs.begin(point)
    try:
        name = hashlib.sha256(point.key.encode()).hexdigest()[:12]
        with state.snapshot.workspace(name, point) as folder:
            dag = Dag(folder)
            plan = dag.plan(sweep.stages)
            scored = folder / ".pipeline" / "scores"
            try:
                _bring_up_to_date(state, point, folder, dag, plan)
                outcome.metrics = _metrics(sweep, folder, dag)
                value = _value(sweep, outcome.metrics)
                if sweep.test_scores:
                    outcome.metrics |= _score_classifier(folder, scored)
                if sweep.points:
                    experiment = Point(f"{sweep.name}-{point.name}").word
                    save_experiment(state.snapshot.root, folder, experiment, sweep.stages)
                outcome.value = value
            except (InputError, RunError) as error:
                outcome.error = str(error)
            runs.look_up(outcome, folder, plan)
            runs.end(child, outcome, scored)
    except BaseException:
        runs.stopped(child)
        raise


def _bring_up_to_date(
    state: _FlowState, point: Point, folder: Path, dag: Dag, plan: Sequence[str]
) -> None:
    """Run the stages through DVC; one that another point is making is waited for."""
    keys = _keys(dag, plan, read_params(folder / PARAMS_FILE))
    ready: list[str] = []
    for name in plan:
        key = keys[name]
        with state.locks[key] if key not in state.made else contextlib.nullcontext():
            ready.append(name)
            if key not in state.made:
                _repro(state, point, dag, ready)
                state.made.add(key)
                ready = []
    if ready:
        _repro(state, point, dag, ready)


def _repro(state: _FlowState, point: Point, dag: Dag, names: Sequence[str]) -> None:
    """`dvc repro` of stages whose upstream is in place.

    Raises:
        StageError: a stage failed.
    """
    done = state.processes.repro(
        dag,
        names,
        show=lambda event: state.display.event(point.name, event),
        say=lambda text, _: get_run_logger().info("%s", text),
        warn=lambda text: state.display.line(point.name, text, "warning"),
        environment={
            **workspace_environment(state.snapshot.root, dag.root),
            POINT_VARIABLE: "1",
        },
    )
    if done.code:
        for name in names:
            end_killed(dag.root, name, state.snapshot.root)
    if state.processes.stopped_by:
        raise _SweepStoppedError
    if done.code:
        raise failure(dag.root, names, done)


# --- what a point came to ------------------------------------------------------------------------


def _metrics(sweep: Sweep, folder: Path, dag: Dag) -> dict[str, float]:
    """The metrics of the swept stages; those of the compared file by their own names."""
    found: dict[str, float] = {}
    for stage in dag.plan(sweep.stages):
        for path in dag.stages[stage].metrics:
            compared = path == sweep.metric.file
            if compared or stage in sweep.stages:
                values = json.loads((folder / path).read_text(encoding="utf-8"))
                found |= flatten_metrics(values, "" if compared else stage)
    return found


def _score_classifier(folder: Path, out: Path) -> dict[str, float]:
    """Score the classifier of a workspace on every part of its messages, as `evaluate` does.

    Args:
        folder: the workspace.
        out: a folder, for the confusion matrices and the messages that were most wrong.
    """
    from gpt.model.device import prepare_device
    from pipeline.show.plots import draw_confusion
    from stages.evaluate.classifier import measure_classifier
    from stages.evaluate.intervals import bounds

    params = load_params(folder / PARAMS_FILE).evaluate
    scores, tables = measure_classifier(
        folder / "models" / "classifier",
        folder / "data" / "raw" / "messages",
        prepare_device(params.device, params.threads),
        params.batch_size,
        bounds(params.resamples, params.seed),
    )
    out.mkdir()
    for name in ("classifier_confusion", "classifier_most_wrong"):
        tables[name].to_csv(out / f"{name}.csv", index=False)
    draw_confusion(out / "classifier_confusion.csv", out)
    return flatten_metrics(scores, "classifier")


def _value(sweep: Sweep, metrics: Mapping[str, float]) -> float:
    metric = sweep.metric
    if metric.name not in metrics:
        raise InputError(
            f"{sweep.file.name}: metric.name: {metric.file} has no {metric.name}; it has "
            f"{', '.join(metrics)}"
        )
    value = metrics[metric.name]
    if not math.isfinite(value):
        raise RunError(f"{metric.name} is {value}: the training diverged")
    return value
