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
import re
import shutil
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from gpt.base.errors import InputError, RunError, in_one_line
from pipeline.dag.dvc_files import LOCK_FILE
from pipeline.dag.graph import Dag
from pipeline.dag.lock import read_lock
from pipeline.dag.repro import Processes, failure
from pipeline.dag.workspace import make_workspace
from pipeline.flow.prefect_api import note_flow_run
from pipeline.project.folders import workspace_environment
from pipeline.project.git import commit_of, git
from pipeline.project.overrides import text_with
from pipeline.project.params import PARAMS_FILE, read_params
from pipeline.project.stage_table import STAGES
from pipeline.project.yaml_files import parse_yaml
from pipeline.run.stage import end_killed
from pipeline.show.console import Display, seconds_in_words
from pipeline.sweep.points import Point, Sweep
from pipeline.sweep.runs import Outcome, SweepRuns
from pipeline.tracking.keys import flatten_metrics
from pipeline.tracking.run_notes import last_run


class Snapshot:
    """The project as it is now, uncommitted edits included: what every point begins from.

    Args:
        root: the project.
        folder: where the workspaces are made; whatever lies there goes.

    Raises:
        InputError: the project is no git repository with a commit.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.params = (root / PARAMS_FILE).read_bytes()
        self._folder = folder
        self._commit = commit_of(root, "HEAD")
        self.remove()
        edited = _paths(git(root, "diff", "--name-only", "--no-renames", "-z", "HEAD"))
        new = _paths(git(root, "ls-files", "--others", "--exclude-standard", "-z"))
        self._edits: dict[str, bytes | None] = {
            path: (root / path).read_bytes() if (root / path).is_file() else None
            for path in [*edited, *new]
        }
        code = {
            path: self._edits[path]
            for path in edited
            if Path(path).name != LOCK_FILE and not path.startswith("reports/")
        }
        whole = [self._commit, self.params, sorted(code.items())]
        self.key = hashlib.sha256(repr(whole).encode()).hexdigest()

    def remove(self) -> None:
        """Take away what lies in the folder: workspaces of a sweep that was killed, too."""
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
            (folder / PARAMS_FILE).write_bytes(text_with(self.params, point.values))
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _paths(listed: str) -> list[str]:
    return [path for path in listed.split("\0") if path]


@dataclass(slots=True)
class _Shared:
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
    fault: Exception | None = None
    """What ended the flow itself."""


class _StoppedError(Exception):
    """The sweep was interrupted."""


def run_points(
    sweep: Sweep,
    snapshot: Snapshot,
    runs: SweepRuns,
    display: Display,
    jobs: int,
    page: Callable[[list[Outcome]], str],
) -> tuple[list[Outcome], int]:
    """Bring all points up to date, as one flow run.

    Args:
        sweep: what is swept.
        snapshot: what the points begin from.
        runs: hears what they come to.
        display: shows what goes on.
        jobs: so many points are worked at together.
        page: the results in Markdown, for Prefect's page of the flow run.

    Returns:
        An outcome each, in the order in which they were proposed, and the signal that ended the
        flow, 0 if none did.
    """
    shared = _Shared(sweep, snapshot, runs, display)
    source = sweep.source(jobs)

    def body() -> State[Any]:
        note_flow_run(snapshot.root, str(flow_run.id), PREFECT_API_URL.value())
        with shared.processes.stopped_by_signals():
            _make_known(shared)
            while not shared.processes.stopped_by and (points := source.ask()):
                new = {point.key: point for point in points if point.key not in shared.outcomes}
                futures = {key: _task_of(shared, point).submit() for key, point in new.items()}
                for key, future in futures.items():
                    future.wait()
                    if (
                        not shared.processes.stopped_by and key not in shared.outcomes
                    ):  # Prefect's own fault
                        error = f"Prefect: {future.state.message}"
                        shared.outcomes[key] = Outcome(new[key], error=error)
                if not shared.processes.stopped_by:
                    source.tell([shared.outcomes[point.key].value for point in points])
        outcomes = list(shared.outcomes.values())
        create_markdown_artifact(
            page(outcomes),
            key=re.sub(r"[^a-z0-9]+", "-", f"sweep-{sweep.name.lower()}"),
            description=f"The points of {runs.name}",
        )
        failed = sum(bool(each.error) for each in outcomes)
        if shared.processes.stopped_by:
            return Cancelled(message="stopped by the user")
        message = f"{len(outcomes) - failed} of {len(outcomes)} points are there"
        return Failed(message=message) if failed else Completed(message=message)

    def told() -> State[Any]:
        try:
            return body()
        except Exception as error:  # Prefect keeps it to itself
            shared.fault = error
            raise

    state: State[Any] = flow(
        name="gpt-pipeline sweep",
        flow_run_name=_literal(runs.name),
        task_runner=ThreadPoolTaskRunner(max_workers=jobs),
    )(told)(return_state=True)
    if shared.fault:
        raise shared.fault
    if state.is_crashed():
        raise RunError(f"Prefect: {state.message}; see its pages in `make ui`")
    return list(shared.outcomes.values()), shared.processes.stopped_by


def _literal(name: str) -> str:
    """Prefect takes a name for a template."""
    return name.replace("{", "{{").replace("}", "}}")


def _make_known(shared: _Shared) -> None:
    """What the project itself has made need not be waited for."""
    dag = Dag(shared.snapshot.root)
    plan = dag.plan(shared.sweep.stages)
    keys = _keys(dag, plan, parse_yaml(shared.snapshot.params, PARAMS_FILE))
    changes = dag.changes(plan)
    for name in plan:
        stage = dag.stages[name]
        if not changes[name] and all(keys[each] in shared.made for each in stage.upstream):
            shared.made.add(keys[name])


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


def _task_of(shared: _Shared, point: Point) -> Any:
    """The Prefect task of a point, and its task run, bear the point's name."""
    name = _literal(point.name)

    def run_point() -> State[Any]:
        if shared.processes.stopped_by:
            return Cancelled(message="not started")
        outcome = Outcome(point)
        try:
            _run_point(shared, outcome)
        except _StoppedError:
            shared.display.line(point.name, "stopped", "warning")
            return Cancelled(message="stopped by the user")
        except Exception as error:
            if not isinstance(error, InputError | RunError):  # a mistake of ours
                traceback.print_exc()
            outcome.error = outcome.error or in_one_line(error)
        finally:
            shared.display.done(point.name)
        shared.outcomes[point.key] = outcome
        if outcome.error:
            shared.display.line(point.name, outcome.error, "error")
            return Failed(message=outcome.error)
        ran = ", ".join(outcome.executed)
        said = f"ran {ran} in {seconds_in_words(outcome.seconds)}" if ran else "cached"
        metric = f"{shared.sweep.metric.name} {outcome.value:.4g}"
        shared.display.line(point.name, f"{said}; {metric}", "good" if ran else "quiet")
        return Completed(message=f"{said}; {metric}", name="Completed" if ran else "Cached")

    return task(name=point.name, task_run_name=name, cache_policy=NO_CACHE)(run_point)


def _run_point(shared: _Shared, outcome: Outcome) -> None:
    """Bring a point up to date and fill in what it came to."""
    point, runs = outcome.point, shared.runs
    child = runs.begin(point)
    try:
        name = hashlib.sha256(point.key.encode()).hexdigest()[:12]
        with shared.snapshot.workspace(name, point) as folder:
            dag = Dag(folder)
            plan = dag.plan(shared.sweep.stages)
            try:
                _bring_up_to_date(shared, point, folder, dag, plan)
                outcome.metrics = _metrics(shared.sweep, folder, dag)
                outcome.value = _value(shared.sweep, outcome.metrics)
            except (InputError, RunError) as error:
                outcome.error = str(error)
            _look_up(shared, outcome, folder, plan)
        runs.end(child, outcome)
    except BaseException:
        runs.stopped(child)
        raise


def _bring_up_to_date(
    shared: _Shared, point: Point, folder: Path, dag: Dag, plan: Sequence[str]
) -> None:
    """Run the stages through DVC; one that another point is making is waited for."""
    keys = _keys(dag, plan, read_params(folder / PARAMS_FILE))
    ready: list[str] = []
    for name in plan:
        if missing := dag.missing_params(name):
            raise InputError(f"{PARAMS_FILE}: {missing[0]}: missing, and {name} needs it; add it")
        key = keys[name]
        with shared.locks[key] if key not in shared.made else contextlib.nullcontext():
            ready.append(name)
            if key not in shared.made:
                _repro(shared, point, dag, ready)
                shared.made.add(key)
                ready = []
    if ready:
        _repro(shared, point, dag, ready)


def _repro(shared: _Shared, point: Point, dag: Dag, names: Sequence[str]) -> None:
    """`dvc repro` of stages whose upstream is in place.

    Raises:
        StageError: a stage failed.
    """
    logger = get_run_logger()
    done = shared.processes.repro(
        dag,
        names,
        show=lambda event: shared.display.event(point.name, event),
        say=lambda text, _: logger.info("%s", text),
        warn=lambda text: shared.display.line(point.name, text, "warning"),
        environment=workspace_environment(shared.snapshot.root, dag.root),
    )
    if done.code:
        for name in names:
            end_killed(dag.root, name, shared.snapshot.root)
    if shared.processes.stopped_by:
        raise _StoppedError
    if done.code:
        raise failure(dag.root, names, done)


# --- what a point came to ------------------------------------------------------------------------


def _metrics(sweep: Sweep, folder: Path, dag: Dag) -> dict[str, float]:
    """The metrics of the swept stages; those of the compared file by their own names."""
    found: dict[str, float] = {}
    for stage in dict.fromkeys((*sweep.stages, *dag.plan(sweep.stages))):
        for path in dag.stages[stage].metrics:
            if path != sweep.metric.file and stage not in sweep.stages:
                continue
            values = flatten_metrics(json.loads((folder / path).read_text(encoding="utf-8")))
            prefix = "" if path == sweep.metric.file else f"{stage}/"
            found |= {f"{prefix}{name}": value for name, value in values.items()}
    return found


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


def _look_up(shared: _Shared, outcome: Outcome, folder: Path, plan: Sequence[str]) -> None:
    """Which runs and versions hold what the point is, and what was executed for it now."""
    locked = read_lock(folder)
    for name in plan:
        note = last_run(folder, name)  # a workspace is new: only an execution leaves one
        if note:
            outcome.executed.append(name)
        elif name not in shared.sweep.stages or outcome.error:
            continue
        outputs = locked[name].outputs if name in locked else {}
        run = shared.runs.stage_run(name, note.get("run_id"), outputs)
        if run is None:
            continue
        outcome.runs[name] = run.info.run_id
        if run.info.end_time:
            outcome.seconds += (run.info.end_time - run.info.start_time) / 1000
        spec = STAGES[name]
        if spec.model and not outcome.error:
            version = shared.runs.version(spec.model.name, outputs[spec.outputs["out"]])
            if version is not None:
                outcome.versions[spec.model.name] = version
