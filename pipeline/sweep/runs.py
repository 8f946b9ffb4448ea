"""A sweep in MLflow: a parent run, and below it a run for each point that leads to its stages'.

A sweep that was interrupted goes on in the same runs: a parent is known by what the sweep is made
of, a child by its values.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.base.errors import RunError, shortened
from pipeline.show.markdown import escaped
from pipeline.sweep.points import Choices, Point, Sweep
from pipeline.tracking.connection import (
    artifact_folder,
    connect,
    experiment_of,
    named_failure,
    run_that_made,
    run_url,
)
from pipeline.tracking.keys import NAME_LENGTH, key_of
from pipeline.tracking.provenance import git_state
from pipeline.tracking.registry import CANDIDATE, version_of

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import ModelVersion, Run

EXPERIMENT = "sweep"
TAG = "sweep"
"""Of a stage's run: the sweeps that it is a point of. `sweep.key` of a parent is what it is made
of, `sweep.point` of a child its values, `sweep.candidate.MODEL` of a parent the version that was
the candidate before."""
_DESCRIPTION = "Sweeps: a run each, and below it a run for each point of it"


@dataclass(slots=True)
class Outcome:
    """What a point came to."""

    point: Point
    value: float | None = None
    """Of the sweep's metric."""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """So long the runs of its stages took, now or before."""
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
        key: what the sweep is made of: equal for one that is started again.

    Raises:
        RunError: MLflow cannot be reached.
    """

    def __init__(self, root: Path, sweep: Sweep, key: str) -> None:
        self._root = root
        self._sweep = sweep
        self._lock = threading.Lock()
        self.client = connect(root)
        with self._named():
            folder = artifact_folder(root, EXPERIMENT)
            self._experiment_id = experiment_of(self.client, EXPERIMENT, folder, _DESCRIPTION)
            parent = self._found(f"tags.`sweep.key` = '{key}'")
            self.resumed = parent is not None
            if parent is None:
                parent = self._create(key)
            else:
                self.client.update_run(parent.info.run_id, status="RUNNING")
            self.id: str = parent.info.run_id
            self.name: str = parent.info.run_name
            self._before = {
                key.removeprefix("sweep.candidate."): value
                for key, value in parent.data.tags.items()
                if key.startswith("sweep.candidate.")
            }
        self.url = run_url(root, self._experiment_id, self.id)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        from pipeline.tracking.mlflow_classes import MlflowException

        with named_failure(self._root, "does not take a sweep", MlflowException):
            yield

    def _found(self, what: str) -> Run | None:
        return next(iter(self.client.search_runs([self._experiment_id], what, max_results=1)), None)

    def _create(self, key: str) -> Run:
        from pipeline.tracking.mlflow_classes import Param

        sweep = self._sweep
        earlier = self.client.search_runs(
            [self._experiment_id], f"tags.`sweep.name` = '{sweep.name}'"
        )
        number = 1 + max((int(run.data.tags.get("number", 0)) for run in earlier), default=0)
        tags = {
            "number": str(number),
            "sweep.key": key,
            "sweep.name": sweep.name,
            "mlflow.source.name": f"gpt-pipeline sweep {sweep.file.name}",
            "mlflow.source.type": "LOCAL",
            **git_state(self._root),
            **{f"sweep.candidate.{model}": version for model, version in self._candidates()},
        }
        run = self.client.create_run(
            self._experiment_id,
            tags=tags,
            run_name=shortened(f"{sweep.name} #{number}", NAME_LENGTH),
        )
        params = {
            "stages": ", ".join(sweep.stages),
            "metric": f"{sweep.metric.goal} {sweep.metric.name} of {sweep.metric.file}",
            **_space(sweep),
        }
        self.client.log_batch(
            run.info.run_id, params=[Param(name, value[:500]) for name, value in params.items()]
        )
        self.client.log_artifact(run.info.run_id, str(sweep.file))
        return run

    def _candidates(self) -> Iterator[tuple[str, str]]:
        for model in self.client.search_registered_models():
            if (version := version_of(self.client, model.name, CANDIDATE)) is not None:
                yield model.name, str(version.version)

    def begin(self, point: Point) -> str:
        """The child run of a point: a new one, or the one that was begun before.

        Raises:
            RunError: MLflow does not take it.
        """
        from pipeline.tracking.mlflow_classes import Param

        with self._named(), self._lock:
            for run in self._children():
                if run.data.tags.get("sweep.point") == point.key:
                    if run.info.status != "FINISHED":
                        self.client.update_run(run.info.run_id, status="RUNNING")
                    return str(run.info.run_id)
            tags = {
                "mlflow.parentRunId": self.id,
                "mlflow.source.name": f"gpt-pipeline sweep {self._sweep.file.name}",
                "mlflow.source.type": "LOCAL",
                "sweep.point": point.key,
                **git_state(self._root),
            }
            created = self.client.create_run(
                self._experiment_id, tags=tags, run_name=shortened(point.name, NAME_LENGTH)
            )
            run_id = str(created.info.run_id)
            params = [Param(path, str(value)) for path, value in point.values.items()]
            self.client.log_batch(run_id, params=params)
            return run_id

    def _children(self) -> list[Run]:
        what = f"tags.`mlflow.parentRunId` = '{self.id}'"
        return list(self.client.search_runs([self._experiment_id], what))

    def stage_run(self, stage: str, run_id: str | None, outputs: Mapping[str, str]) -> Run | None:
        """The run that made a point's outputs of a stage, as far as MLflow knows it.

        Args:
            stage: its name.
            run_id: of the run if the stage was executed just now.
            outputs: path -> md5.
        """
        with self._named(), self._lock:
            return run_that_made(self.client, stage, run_id, outputs)

    def version(self, model: str, md5: str) -> int | None:
        """The registered version with these files; None if there is none."""
        with self._named(), self._lock:
            found = version_of(self.client, model, md5=md5)
        return int(found.version) if found is not None else None

    def end(self, run_id: str, outcome: Outcome) -> None:
        """Write what a point came to, and lead from its stages' runs to the sweep.

        Raises:
            RunError: MLflow does not take it.
        """
        from pipeline.tracking.mlflow_classes import Metric, RunTag

        with self._named(), self._lock:
            tags = {"error": outcome.error} if outcome.error else {}
            links = []
            for stage, stage_run in outcome.runs.items():
                run = self.client.get_run(stage_run)
                url = run_url(self._root, run.info.experiment_id, stage_run)
                tags |= {f"run.{stage}": stage_run, f"url.{stage}": url}
                links.append(f"[{escaped(f'{stage}: {run.info.run_name}')}]({url})")
                known = [each for each in run.data.tags.get(TAG, "").split(", ") if each]
                if self.name not in known:
                    self.client.set_tag(stage_run, TAG, ", ".join([*known, self.name]))
            for model, version in outcome.versions.items():
                tags[f"model.{model}"] = f"models:/{model}/{version}"
            words = filter(None, [escaped(outcome.error), *links])
            tags["mlflow.note.content"] = "\n\n".join(words)
            now = int(time.time() * 1000)
            values = {key_of(name): value for name, value in outcome.metrics.items()}
            values["seconds"] = outcome.seconds
            child = self.client.get_run(run_id)
            before = child.data.metrics
            news = [
                Metric(name, value, now, 0)
                for name, value in values.items()
                if before.get(name) != value and not outcome.error
            ]
            self.client.log_batch(
                run_id, metrics=news, tags=[RunTag(key, value) for key, value in tags.items()]
            )
            if not outcome.error and "error" in child.data.tags:  # of a try before
                self.client.delete_tag(run_id, "error")
            if child.info.status == "FINISHED" and not outcome.error:
                return  # it ended when it was made
            self.client.set_terminated(run_id, "FAILED" if outcome.error else "FINISHED")

    def stopped(self, run_id: str) -> None:
        """End a point's run that was interrupted."""
        with contextlib.suppress(RunError), self._named(), self._lock:
            if self.client.get_run(run_id).info.status != "FINISHED":
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
        from pipeline.tracking.mlflow_classes import Metric, RunTag

        with self._named(), self._lock:
            tags = {"mlflow.note.content": page}
            metrics = []
            if best is not None and best.value is not None:
                tags["best"] = best.point.name
                now = int(time.time() * 1000)
                metrics.append(
                    Metric(key_of(f"best/{self._sweep.metric.name}"), best.value, now, 0)
                )
            self.client.log_batch(
                self.id, metrics=metrics, tags=[RunTag(key, value) for key, value in tags.items()]
            )
            self.client.log_text(self.id, page, f"{self._sweep.name}.md")
            self.client.set_terminated(self.id, status)

    def give_back_candidates(self) -> None:
        """Let each model's candidate be the one that it was before the sweep.

        To register a version moves it there, but a point is not what the project made last. What
        somebody else registered in the meantime stays.

        Raises:
            RunError: MLflow does not take it.
        """
        with self._named(), self._lock:
            for model, now in list(self._candidates()):
                before = self._before.get(model)
                version = self.client.get_model_version(model, now)
                if now == before or not self._is_ours(version):
                    continue
                if before is None:
                    self.client.delete_registered_model_alias(model, CANDIDATE)
                else:
                    self.client.set_registered_model_alias(model, CANDIDATE, before)

    def _is_ours(self, version: ModelVersion) -> bool:
        address = f"models:/{version.name}/{version.version}"
        if any(run.data.tags.get(f"model.{version.name}") == address for run in self._children()):
            return True
        tags = self.client.get_run(version.run_id).data.tags if version.run_id else {}
        return self.name in tags.get(TAG, "").split(", ")


def _space(sweep: Sweep) -> dict[str, str]:
    """Path -> what is tried, as a person reads it."""
    if sweep.search:
        said = {
            path: json.dumps(each.choices, default=str)
            if isinstance(each, Choices)
            else f"{each.low} to {each.high}{', log' if each.log else ''}"
            for path, each in sweep.search.items()
        }
        return {**said, "trials": str(sweep.trials), "seed": str(sweep.seed)}
    tried: dict[str, dict[str, None]] = {path: {} for path in sweep.paths}
    for point in sweep.grid:
        for path, value in point.values.items():
            tried[path][str(value)] = None
    return {path: ", ".join(values) for path, values in tried.items()}
