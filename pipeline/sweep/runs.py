"""A sweep in MLflow: a parent run, and below it a run for each point that links to its stages.

A sweep that is started again after an interruption uses the same runs: the parent is found by a
hash of what the sweep is made of, a child by its values.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.base.errors import RunError, shortened
from pipeline.dag.lock import read_lock
from pipeline.project.stage_table import STAGES
from pipeline.show.markdown import escaped
from pipeline.sweep.points import Point, Sweep
from pipeline.tracking.connection import (
    artifact_folder,
    connect,
    experiment_of,
    named_failure,
    run_that_made,
    run_url,
)
from pipeline.tracking.keys import NAME_LENGTH, VALUE_LENGTH, key_of
from pipeline.tracking.provenance import git_state
from pipeline.tracking.registry import version_of
from pipeline.tracking.run_notes import last_run

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import Run

EXPERIMENT = "sweep"
SWEEPS_TAG = "sweep"
"""Of a stage's run: the sweeps that it is a point of. `sweep.key` of a parent is the hash of what
the sweep is made of, `sweep.point` of a child its values."""


@dataclass(slots=True)
class Outcome:
    """What a point came to."""

    point: Point
    value: float | None = None
    """Of the sweep's metric."""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """How long the runs of its stages took, now or before."""
    executed: list[str] = field(default_factory=list)
    """The stages that were executed for it now."""
    runs: dict[str, str] = field(default_factory=dict)
    """Stage -> the MLflow run that made what the point holds."""
    versions: dict[str, int] = field(default_factory=dict)
    """Registered model -> the point's version of it."""
    error: str = ""
    """Why it failed, in one line."""


class SweepRuns:
    """The runs of one sweep; safe to use from several threads.

    Args:
        root: the project.
        sweep: what is swept.
        key: a hash of what the sweep is made of: equal for one that is started again.

    Raises:
        RunError: MLflow cannot be reached.
    """

    def __init__(self, root: Path, sweep: Sweep, key: str) -> None:
        self._root = root
        self._sweep = sweep
        self._lock = threading.Lock()
        self.client = connect(root)
        with self._alone():
            folder = artifact_folder(root, EXPERIMENT)
            what = "A run for each sweep, and below it one for each point"
            self._experiment_id = experiment_of(self.client, EXPERIMENT, folder, what)
            known = self._runs("sweep.key", key)
            parent = known[0] if known else self._create_parent(key)
            self.id: str = parent.info.run_id
            self.name: str = parent.info.run_name
            self.told = f"{'goes on as' if known else 'is'} {self.name}"
            self.client.update_run(self.id, status="RUNNING")
        self.url = run_url(root, self._experiment_id, self.id)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the block no other thread asks MLflow, and its failures are one line."""
        from pipeline.tracking.mlflow_classes import MlflowException

        with named_failure(self._root, "does not take a sweep", MlflowException), self._lock:
            yield

    def _runs(self, tag: str, value: str) -> list[Run]:
        return list(self.client.search_runs([self._experiment_id], f"tags.`{tag}` = '{value}'"))

    def _create(self, name: str, tags: dict[str, str], params: dict[str, str]) -> Run:
        from pipeline.tracking.mlflow_classes import Param

        run = self.client.create_run(
            self._experiment_id,
            run_name=shortened(name, NAME_LENGTH),
            tags={
                "mlflow.source.name": f"gpt-pipeline sweep {self._sweep.file.name}",
                "mlflow.source.type": "LOCAL",
                **git_state(self._root),
                **tags,
            },
        )
        logged = [Param(name, shortened(value, VALUE_LENGTH)) for name, value in params.items()]
        self.client.log_batch(run.info.run_id, params=logged)
        return run

    def _create_parent(self, key: str) -> Run:
        sweep = self._sweep
        numbers = [int(r.data.tags.get("number", 0)) for r in self._runs("sweep.name", sweep.name)]
        number = 1 + max(numbers, default=0)
        params = {
            "stages": ", ".join(sweep.stages),
            "metric": f"{sweep.metric.goal} {sweep.metric.name} of {sweep.metric.file}",
            "swept": ", ".join(sweep.paths),
        }
        tags = {"number": str(number), "sweep.key": key, "sweep.name": sweep.name}
        run = self._create(f"{sweep.name} #{number}", tags, params)
        self.client.log_artifact(run.info.run_id, str(sweep.file))
        return run

    def begin(self, point: Point) -> str:
        """The child run of a point: a new one, or the one that was begun before.

        Raises:
            RunError: MLflow does not take it.
        """
        with self._alone():
            children = self._runs("mlflow.parentRunId", self.id)
            known = [run for run in children if run.data.tags.get("sweep.point") == point.key]
            params = {path: str(value) for path, value in point.set.items()}
            tags = {"mlflow.parentRunId": self.id, "sweep.point": point.key}
            run = known[0] if known else self._create(point.name, tags, params)
            self.client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)

    def look_up(self, outcome: Outcome, folder: Path, plan: Sequence[str]) -> None:
        """Fill in which runs and versions hold what the point is, and what was executed for it now.

        Args:
            outcome: of the point.
            folder: its workspace.
            plan: its stages, in the order of execution.
        """
        locked = read_lock(folder)
        for name in plan:
            note = last_run(folder, name)  # a workspace is new: only an execution leaves one
            if note:
                outcome.executed.append(name)
            elif name not in self._sweep.stages or outcome.error:
                continue
            outputs = locked[name].outputs if name in locked else {}
            with self._alone():
                run = run_that_made(self.client, name, note.get("run_id"), outputs)
                if run is None:
                    continue
                outcome.runs[name] = run.info.run_id
                if run.info.end_time:
                    outcome.seconds += (run.info.end_time - run.info.start_time) / 1000
                model = STAGES[name].model
                if model and not outcome.error:
                    md5 = outputs[STAGES[name].outputs["out"]]
                    if version := version_of(self.client, model.name, md5=md5):
                        outcome.versions[model.name] = int(version.version)

    def end(self, run_id: str, outcome: Outcome, files: Path | None = None) -> None:
        """Write what a point came to, and link its stages' runs and the sweep to each other.

        Args:
            run_id: of the point's run.
            outcome: of the point.
            files: a folder that the run keeps, if it is there.

        Raises:
            RunError: MLflow does not take it.
        """
        with self._alone():
            tags = {"error": outcome.error}
            links = []
            for stage, stage_run in outcome.runs.items():
                run = self.client.get_run(stage_run)
                url = run_url(self._root, run.info.experiment_id, stage_run)
                tags |= {f"run.{stage}": stage_run, f"url.{stage}": url}
                links.append(f"[{escaped(f'{stage}: {run.info.run_name}')}]({url})")
                known = [each for each in run.data.tags.get(SWEEPS_TAG, "").split(", ") if each]
                if self.name not in known:
                    self.client.set_tag(stage_run, SWEEPS_TAG, ", ".join([*known, self.name]))
            for model, version in outcome.versions.items():
                tags[f"model.{model}"] = f"models:/{model}/{version}"
            words = filter(None, [escaped(outcome.error), *links])
            tags["mlflow.note.content"] = "\n\n".join(words)
            metrics = {} if outcome.error else {**outcome.metrics, "seconds": outcome.seconds}
            self._log(run_id, metrics, tags)
            if files is not None and files.is_dir():
                self.client.log_artifacts(run_id, str(files))
            self.client.set_terminated(run_id, "FAILED" if outcome.error else "FINISHED")

    def _log(self, run_id: str, metrics: dict[str, float], tags: dict[str, str]) -> None:
        from pipeline.tracking.mlflow_classes import Metric, RunTag

        now = int(time.time() * 1000)
        self.client.log_batch(
            run_id,
            metrics=[Metric(key_of(name), value, now, 0) for name, value in metrics.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def stopped(self, run_id: str) -> None:
        """End a point's run that was interrupted."""
        with contextlib.suppress(RunError), self._alone():
            self.client.set_terminated(run_id, "KILLED")

    def close(self, status: str, best: Outcome | None, page: str) -> None:
        """End the parent.

        Args:
            status: of MLflow's.
            best: the best point; None if there is none.
            page: the table of all, in Markdown.

        Raises:
            RunError: MLflow does not take it.
        """
        with self._alone():
            tags, metrics = {"mlflow.note.content": page}, {}
            if best is not None and best.value is not None:
                tags["best"] = best.point.name
                metrics[f"best/{self._sweep.metric.name}"] = best.value
            self._log(self.id, metrics, tags)
            self.client.log_text(self.id, page, f"{self._sweep.name}.md")
            self.client.set_terminated(self.id, status)
