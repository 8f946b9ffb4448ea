"""Sends runs to MLflow, while their stage is running or later.

Runs reach MLflow only by the replay of an outbox, which is idempotent and can be interrupted: the
run is found by its tag `outbox.id`, steps that MLflow has are not sent again, files are replaced,
and a model that is already registered gets no second version.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from gpt.base.errors import RunError
from gpt.base.events import Message
from gpt.base.files import write_json
from pipeline.project.secrets import without_credentials
from pipeline.project.settings import TrackingParams
from pipeline.tracking.connection import (
    artifact_folder,
    check_reachable,
    connect,
    existing_run,
    experiment_of,
    lock_file,
    named_failure,
    reachable,
    run_url,
    tracking_uri,
)
from pipeline.tracking.differences import number_and_changes
from pipeline.tracking.kept_before import adopt
from pipeline.tracking.outbox import Outbox, held, outboxes, read_outbox, remove_leftovers
from pipeline.tracking.registry import log_metrics, publish, show_on_model
from pipeline.tracking.run_notes import notes_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

TAG = "outbox.id"
"""The tag of a run with the name of its outbox."""

_BATCH_PARAMS = 100  # MLflow's limit for one call


@dataclass(slots=True)
class Sender:
    """Replays one outbox; the caller must hold its lock.

    Attributes:
        outbox: the run.
        client: a client of the project's MLflow; None until MLflow has answered.
        experiment_id: the id of the stage's experiment; empty until MLflow has the run.
        run_id: the run's id in MLflow; empty until then.
        name: the run's name in MLflow; empty until then.
        status: the status at the end of the journal.
        version: the number of the model's version, once it is registered.
    """

    outbox: Outbox
    client: MlflowClient | None = None
    experiment_id: str = ""
    run_id: str = ""
    name: str = ""
    status: str = "RUNNING"
    version: int | None = None
    _sent: int = 0  # bytes of the journal already sent
    _open: bool = False
    _known: dict[str, set[int]] = field(default_factory=dict)  # metric -> its steps in MLflow
    _metrics: list[Metric] = field(default_factory=list)
    _model_id: str | None = None
    _last: int = 0  # time of the last event

    def send(self) -> None:
        """Send new events of the journal.

        Raises:
            RunError: MLflow does not answer, or refuses something. Sending can be repeated.
        """
        root = self.outbox.project
        check_reachable(root)
        self.client = self.client or connect(root)
        try:
            with named_failure(root, f"did not take a run of {self.outbox.stage}"):
                self._replay(self.client)
        except RunError:
            self._sent, self._open = 0, False  # MLflow is asked again for what it has
            check_reachable(root)  # "unreachable" is the better error message
            raise

    def finish(self) -> None:
        """Send the rest of a run whose process is gone; without an end event it was killed."""
        self.send()
        assert self.client is not None
        if self.status == "RUNNING":
            self.status = "KILLED"
            end = self._last or self.outbox.begun
            with named_failure(self.outbox.project, "did not take the end of a run"):
                self.client.set_terminated(self.run_id, self.status, end)
        self._note()
        self.outbox.remove()

    @property
    def url(self) -> str:
        """The run's page; empty before MLflow has the run."""
        return run_url(self.outbox.project, self.experiment_id, self.run_id) if self.run_id else ""

    def _replay(self, client: MlflowClient) -> None:
        if not self._open:
            self._begin(client)
            self._open = True
        if not self.outbox.journal.exists():
            return
        with self.outbox.journal.open("rb") as file:
            file.seek(self._sent)
            for line in file:
                if not line.endswith(b"\n"):  # is being written, or was cut off
                    break
                event = None
                with contextlib.suppress(ValueError):  # blank or damaged: skipped
                    event = json.loads(line)
                if event:
                    self._take(client, event)
                self._sent += len(line)
        self._send_metrics(client)

    def _take(self, client: MlflowClient, event: list[Any]) -> None:
        if event[0] != "metrics":
            self._send_metrics(client)
        match event:
            case ["metrics", step, values, when]:
                self._queue(step, values, when)
            case ["final", values, when]:
                # one step after the curves: MLflow shows the value of the highest step
                curves = [
                    max(steps)
                    for key, steps in self._known.items()
                    if key not in values and not key.startswith("system/")
                ]
                self._queue(max(curves, default=-1) + 1, values, when)
            case ["artifact", path]:
                folder = Path(path).parent.as_posix()
                file = str(self.outbox.files / path)
                client.log_artifact(self.run_id, file, None if folder == "." else folder)
            case ["data_sets", data_sets]:
                self._log_data_sets(client, data_sets)
            case ["model", name, md5, when, of_point]:
                version = publish(
                    client, self.run_id, name, md5, self.outbox.model, when, of_point=of_point
                )
                self.version = int(version.version)
                # if an earlier run made the same bytes, the model belongs to that run
                own = version.run_id == self.run_id
                self._model_id = version.source.removeprefix("models:/") if own else None
            case ["resume", times]:
                self.status = "RUNNING"
                client.update_run(self.run_id, status=self.status)
                client.set_tag(self.run_id, "resumed", str(times))
            case ["end", status, tags, when]:
                self._end(client, status, tags, when)

    def _begin(self, client: MlflowClient) -> None:
        """Find or create the run, and complete its initial data."""
        from mlflow.entities import Param

        box = self.outbox
        folder = artifact_folder(box.project, box.stage)
        self.experiment_id = experiment_of(client, box.stage, folder, box.description)
        run = self._find(client) or self._create(client)
        self.run_id, self.name = str(run.info.run_id), str(run.info.run_name)
        self._metrics.clear()
        self._known = {
            key: {each.step for each in client.get_metric_history(self.run_id, key)}
            for key in run.data.metrics
        }
        # values that MLflow has are kept: the number of processes may differ after a resume
        params = [Param(*each) for each in box.params.items() if each[0] not in run.data.params]
        for start in range(0, len(params), _BATCH_PARAMS):
            client.log_batch(self.run_id, params=params[start : start + _BATCH_PARAMS])
        lineage = box.files / "lineage"
        sent = {Path(each.path).name for each in client.list_artifacts(self.run_id, lineage.name)}
        for file in sorted(lineage.glob("*")):
            if file.name not in sent:
                client.log_artifact(self.run_id, str(file), lineage.name)
        self._log_data_sets(client, box.data_sets)

    def _find(self, client: MlflowClient) -> Run | None:
        box = self.outbox
        if (known := existing_run(client, box.run_id)) and known.info.lifecycle_stage == "active":
            client.set_tag(box.run_id, TAG, box.name)
            return known
        found = client.search_runs([self.experiment_id], f"tags.`{TAG}` = '{box.name}'")
        return next(iter(found), None)

    def _create(self, client: MlflowClient) -> Run:
        box = self.outbox
        with FileLock(lock_file(box.project)):  # otherwise two runs could get the same number
            name, changed = number_and_changes(
                client, self.experiment_id, box.params, box.tags, box.begun
            )
            tags = {**changed, **box.tags, TAG: box.name}
            return client.create_run(self.experiment_id, box.begun, tags, name)

    def _queue(self, step: int, values: Mapping[str, float], when: int) -> None:
        from mlflow.entities import Metric

        self._last = when
        for name, value in values.items():
            steps = self._known.setdefault(name, set())
            if step not in steps:
                steps.add(step)
                self._metrics.append(Metric(name, value, when, step))

    def _send_metrics(self, client: MlflowClient) -> None:
        log_metrics(client, self.run_id, self._metrics)
        self._metrics.clear()

    def _log_data_sets(self, client: MlflowClient, data_sets: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for each in data_sets:  # MLflow accepts each only once
            values = dict(each)
            context = InputTag("mlflow.data.context", values.pop("context"))
            inputs.append(DatasetInput(Dataset(**values), [context]))
        if inputs:
            client.log_inputs(self.run_id, inputs)

    def _end(self, client: MlflowClient, status: str, tags: Mapping[str, str], when: int) -> None:
        from mlflow.entities import RunTag

        client.log_batch(self.run_id, tags=[RunTag(*each) for each in tags.items()])
        if self._model_id:
            show_on_model(client, self.run_id, self._model_id)
        client.set_terminated(self.run_id, status, when)
        self.status, self._last = status, when

    def _note(self) -> None:
        """Update notes that name the run by its outbox, or list it as RUNNING."""
        box = self.outbox
        known = {
            "run_id": self.run_id,
            "name": self.name,
            "experiment_id": self.experiment_id,
            "url": self.url,
            "status": self.status,
        }
        for path, note in notes_of(box.root, box.stage):
            if note.get("run_id") in (box.name, self.run_id):
                write_json(path, {**note, **known})


def send_all(root: Path, say: Callable[[str], None], *, busy: bool = True) -> int:
    """Send all unsent runs, except those that a process is still writing.

    Args:
        root: the project.
        say: called with one line per run.
        busy: also report runs that are still being written.

    Returns:
        The number of unsent runs.

    Raises:
        RunError: MLflow does not answer, or refused some of the runs; these are kept.
    """
    failed = adopt(root)
    remove_leftovers(root)
    names = outboxes(root)
    for name in names:
        with held(root, name) as free:
            outbox = read_outbox(root, name)
            if not free and busy:
                stage = name.rpartition("-")[0]
                say(f"{stage}: a process is still at it; it can be sent when that has ended")
            if not free or outbox is None:
                continue
            sender = Sender(outbox)
            try:
                sender.finish()
            except RunError as error:
                failed.append(str(error))
            else:
                status = sender.status.lower()
                say(f"{outbox.stage}: {sender.name} ({status}) is in MLflow: {sender.url}")
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RunError(f"{failed[0]}{more}; what is not sent is kept in .pipeline/outbox")
    return len(names)


def send_quietly(root: Path) -> list[Message]:
    """Send all that can be sent, without raising; return a notice for the user."""
    failed = adopt(root)
    if not outboxes(root) or not reachable(root):
        return [Message(each, "warning") for each in failed]
    said: list[Message] = []
    try:
        send_all(root, lambda line: said.append(Message(line)), busy=False)
    except RunError as error:
        said.append(Message(str(error), "warning"))
    return said


def ready_for_promotion(root: Path, tracking: TrackingParams) -> tuple[bool, list[Message]]:
    """Whether models can be compared with the champions now; if so, send all unsent runs first.

    With `unreachable: later` the comparison is postponed until MLflow answers; with `stop` it is
    attempted and fails.

    Args:
        root: the project.
        tracking: the section of `params.yaml`.

    Returns:
        Whether to compare, and a notice for the user.
    """
    if tracking.unreachable == "later" and not reachable(root):
        place = without_credentials(tracking_uri(root))
        line = (
            f"MLflow at {place} does not answer, so no model is compared with its champion; "
            "`gpt-pipeline run` does that once it answers"
        )
        return False, [Message(line, "warning")]
    return True, send_quietly(root)
