"""Runs that MLflow did not take when they were made, sent to it: each once, as it was.

A run that is sent bears the tag `unsent.id`, the id that it had where it was kept: after an
interruption it is found by that and completed. Of its metrics, data sets and models only what
MLflow does not have is sent; its files are sent again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from gpt.base.errors import RunError
from gpt.base.events import Message
from gpt.base.files import write_json
from pipeline.project.secrets import without_credentials
from pipeline.project.settings import TrackingParams
from pipeline.tracking.connection import (
    artifact_folder,
    connect,
    experiment_of,
    named_failure,
    reachable,
    run_url,
    tracking_uri,
)
from pipeline.tracking.database import follow_move
from pipeline.tracking.differences import what_differs
from pipeline.tracking.registry import MD5_TAG, describe, ensure_registered, version_of
from pipeline.tracking.run import BATCH_METRICS, BATCH_PARAMS, PEAK_MEMORY, show_on_model
from pipeline.tracking.run_notes import note_of_run
from pipeline.tracking.unsent import Unsent, unsent_runs
from pipeline.tracking.version_page import CHANGED_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Run
    from mlflow.entities.model_registry import ModelVersion

TAG = "unsent.id"
"""Of a run or a model: the id that it had before it was sent."""

_SYSTEM = "system/"
_OF_THE_END = ("output.", "error", "machine.threads", "mlflow.note.content")
"""Tags that a run gets when it ends, and that one which is completed gets anew."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A run that MLflow has now."""

    stage: str
    name: str
    status: str
    url: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.name} ({self.status.lower()}) is in MLflow: {self.url}"


def send_all(root: Path, say: Callable[[str], None]) -> int:
    """Send every run that can be; one that a process still writes is left for later.

    Args:
        root: the project.
        say: takes a line a run.

    Returns:
        How many there were.

    Raises:
        RunError: MLflow does not answer, or did not take some of them; these are kept.
    """
    runs = unsent_runs(root)
    if not runs:
        return 0
    server = connect(root)
    failed = []
    for run in runs:
        with run.held() as held:
            if not held:
                say(f"{run.stage}: a process is still at it; it can be sent when that has ended")
                continue
            try:
                with named_failure(root, f"did not take a run of {run.stage}"):
                    sent = _send(root, server, run)
                if sent is not None:
                    say(str(sent))
            except RunError as error:
                failed.append(str(error))
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RunError(f"{failed[0]}{more}; what is unsent is kept in .pipeline/unsent")
    return len(runs)


def send_quietly(root: Path) -> list[Message]:
    """Send what can be sent, and never fail: what a person should know of it."""
    if not unsent_runs(root) or not reachable(root):
        return []
    said: list[Message] = []
    try:
        send_all(root, lambda line: said.append(Message(line)))
    except RunError as error:
        said.append(Message(str(error), "warning"))
    return said


def ready_for_promotion(root: Path, tracking: TrackingParams) -> tuple[bool, list[Message]]:
    """Whether models can be compared with the champions now, after what is unsent was sent.

    With `unreachable: later` that waits for MLflow to answer; with `stop` it is to fail by itself.

    Args:
        root: the project.
        tracking: the section of `params.yaml`.

    Returns:
        Whether to go on, and what to tell a person.
    """
    if tracking.unreachable == "later" and not reachable(root):
        place = without_credentials(tracking_uri(root))
        line = (
            f"MLflow at {place} does not answer, so no model is compared with its champion; "
            "`gpt-pipeline run` does that once it answers"
        )
        return False, [Message(line, "warning")]
    return True, send_quietly(root)


def _send(root: Path, server: MlflowClient, unsent: Unsent) -> Sent | None:
    """One run, and what is kept of it goes; None if its process was killed before it had begun."""
    from mlflow import MlflowClient

    follow_move(unsent.database)
    local = MlflowClient(unsent.uri, unsent.uri)
    found = local.search_runs([each.experiment_id for each in local.search_experiments()])
    if not found:
        unsent.remove()
        return None
    run = found[0]
    about = local.get_experiment(run.info.experiment_id)
    folder = artifact_folder(root, unsent.stage)
    description = about.tags.get("mlflow.note.content", "")
    experiment_id = experiment_of(server, unsent.stage, folder, description)
    target = _target(server, experiment_id, unsent, run)
    run_id, own = target.info.run_id, target.info.run_id != unsent.continues

    _send_params(server, target, run)
    _send_metrics(local, server, target, run)
    _send_tags(server, target, run)
    _send_data_sets(server, run_id, run)
    files = _path(run.info.artifact_uri)
    if files.is_dir() and any(files.iterdir()):
        server.log_artifacts(run_id, str(files))
    _send_models(local, server, target, run)
    if unsent.model_id:
        show_on_model(server, run_id, unsent.model_id, _last(server, run_id))

    status, end = run.info.status, run.info.end_time
    if status == "RUNNING" and own:  # its process was killed
        status, end = "KILLED", end or max(_times(local, run), default=run.info.start_time)
    if status != "RUNNING":  # else who goes on with it ends it
        server.set_terminated(run_id, status, end)
    name = str(target.info.run_name)
    url = run_url(root, experiment_id, run_id)
    _rename(unsent, run.info.run_id, run_id, experiment_id, url)
    unsent.remove()
    return Sent(unsent.stage, name, status, url)


def _target(server: MlflowClient, experiment_id: str, unsent: Unsent, run: Run) -> Run:
    """The run in MLflow: the one it goes on with, the one that was begun to be sent, or new."""
    from mlflow.exceptions import MlflowException

    if unsent.continues:
        try:
            known = server.get_run(unsent.continues)
            if known.info.lifecycle_stage == "active":
                return known
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    begun = server.search_runs([experiment_id], f"tags.`{TAG}` = '{run.info.run_id}'")
    if begun:
        return begun[0]
    tags = {
        key: value
        for key, value in run.data.tags.items()
        if key not in ("number", "mlflow.runName") and not key.startswith("changed.")
    }
    differs = what_differs(server, experiment_id, run.data.params, tags, run.info.start_time)
    made = server.create_run(
        experiment_id,
        start_time=run.info.start_time,
        tags={**tags, **differs.tags, TAG: run.info.run_id},
        run_name=differs.name,
    )
    return server.get_run(made.info.run_id)


def _send_params(server: MlflowClient, target: Run, run: Run) -> None:
    from mlflow.entities import Param

    # those that MLflow has stay: how many processes share the work may differ when it goes on
    new = [Param(k, v) for k, v in run.data.params.items() if k not in target.data.params]
    for start in range(0, len(new), BATCH_PARAMS):
        server.log_batch(target.info.run_id, params=new[start : start + BATCH_PARAMS])


def _send_metrics(local: MlflowClient, server: MlflowClient, target: Run, run: Run) -> None:
    """Whole histories with their times; a step that MLflow has is not sent again."""
    from mlflow.entities import Metric

    new: list[Metric] = []
    run_id = target.info.run_id
    for key in run.data.metrics:
        history = local.get_metric_history(run.info.run_id, key)
        known = server.get_metric_history(run_id, key) if key in target.data.metrics else []
        new += [
            Metric(key, each.value, each.timestamp, step)
            for each, step in _missing(key, history, known)
        ]
    for start in range(0, len(new), BATCH_METRICS):
        server.log_batch(run_id, metrics=new[start : start + BATCH_METRICS])


def _missing(
    key: str, history: Iterable[Metric], known: Iterable[Metric]
) -> Iterator[tuple[Metric, int]]:
    """The entries that MLflow does not have, and their steps there."""
    steps = {each.step for each in known}
    times = {each.timestamp for each in known}
    following = max(steps, default=-1) + 1
    for each in sorted(history, key=lambda entry: (entry.step, entry.timestamp)):
        if key.startswith(_SYSTEM) and key != PEAK_MEMORY:
            # samples of the machine are counted anew by who cannot ask how many there are
            if each.timestamp not in times:
                yield each, max(following, each.step)
                following = max(following, each.step) + 1
        elif each.step not in steps:
            yield each, each.step


def _send_tags(server: MlflowClient, target: Run, run: Run) -> None:
    from mlflow.entities import RunTag

    new = [
        RunTag(key, value)
        for key, value in run.data.tags.items()
        if key.startswith(_OF_THE_END)
        or (key not in target.data.tags and not key.startswith(("mlflow.", "changed.")))
    ]
    if new:
        server.log_batch(target.info.run_id, tags=new)


def _send_data_sets(server: MlflowClient, run_id: str, run: Run) -> None:
    if run.inputs and run.inputs.dataset_inputs:  # MLflow takes each of them once
        server.log_inputs(run_id, list(run.inputs.dataset_inputs))


def _send_models(local: MlflowClient, server: MlflowClient, target: Run, run: Run) -> None:
    """The versions that were registered; bytes that MLflow has a version of are not sent again."""
    for version in local.search_model_versions():
        name, md5 = version.name, version.tags[MD5_TAG]
        known = version_of(server, name, md5=md5)
        if known is None:
            model = local.get_logged_model(version.source.removeprefix("models:/"))
            model_id = _send_model(local, server, target, model)
            known = _send_version(local, server, target, version, model_id)
        for alias, number in local.get_registered_model(name).aliases.items():
            if int(number) == int(version.version):
                _move(server, name, alias, known, target)


def _send_model(local: MlflowClient, server: MlflowClient, target: Run, model: LoggedModel) -> str:
    """A logged model with its files; its id in MLflow."""
    from mlflow.entities import LoggedModelOutput

    experiment_id, run_id = target.info.experiment_id, target.info.run_id
    begun = server.search_logged_models(
        [experiment_id], filter_string=f"tags.`{TAG}` = '{model.model_id}'"
    )
    if begun:
        sent = begun[0]
    else:
        sent = server.create_logged_model(
            experiment_id,
            name=model.name,
            source_run_id=run_id,
            tags={
                **{k: v for k, v in model.tags.items() if not k.startswith("mlflow.")},
                TAG: model.model_id,
            },
            params=model.params,
            model_type=model.model_type,
        )
    model_id = str(sent.model_id)
    if str(sent.status) != "READY":
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "model"
            shutil.copytree(_path(model.artifact_location), copy)
            _name_anew(copy / "MLmodel", {model.model_id: model_id, model.source_run_id: run_id})
            server.log_model_artifacts(model_id, str(copy))
        server.finalize_logged_model(model_id, "READY")
    outputs = server.get_run(run_id).outputs
    if model_id not in {each.model_id for each in (outputs.model_outputs if outputs else ())}:
        server.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    show_on_model(server, run_id, model_id, _last(server, run_id))
    return model_id


def _send_version(
    local: MlflowClient,
    server: MlflowClient,
    target: Run,
    version: ModelVersion,
    model_id: str,
) -> ModelVersion:
    name = version.name
    ensure_registered(server, name, local.get_registered_model(name).description)
    # its place is among those that MLflow has, where the run is another one
    description, changed = describe(server, server.get_run(target.info.run_id), name)
    kept = {key: value for key, value in version.tags.items() if key != CHANGED_TAG}
    return server.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=target.info.run_id,
        model_id=model_id,
        tags={**kept, **changed},
        description=description,
    )


def _move(server: MlflowClient, name: str, alias: str, to: ModelVersion, run: Run) -> None:
    """Let an alias stand at a version, unless it stands at what a later run made."""
    from mlflow.exceptions import MlflowException

    now = version_of(server, name, alias)
    if now is not None and now.run_id and now.run_id != run.info.run_id:
        try:
            if server.get_run(now.run_id).info.start_time > run.info.start_time:
                return
        except MlflowException as error:  # its run was deleted
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    server.set_registered_model_alias(name, alias, str(to.version))


def _name_anew(file: Path, ids: dict[str, str]) -> None:
    """A model's own description names itself and its run."""
    text = file.read_text(encoding="utf-8")
    for old, new in ids.items():
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


def _last(client: MlflowClient, run_id: str) -> dict[str, tuple[float, int, int]]:
    found = {}
    for key in client.get_run(run_id).data.metrics:
        newest: Any = max(client.get_metric_history(run_id, key), key=lambda each: each.step)
        found[key] = (newest.value, newest.timestamp, newest.step)
    return found


def _times(local: MlflowClient, run: Run) -> Iterator[int]:
    for key in run.data.metrics:
        yield from (each.timestamp for each in local.get_metric_history(run.info.run_id, key))


def _path(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path))


def _rename(unsent: Unsent, old: str, new: str, experiment_id: str, url: str) -> None:
    """What names the run by its old id, or waits for its page, has the new one from now on."""
    note = note_of_run(unsent.root, unsent.stage)
    named: dict[str, str | None] = {"run_id": new, "experiment_id": experiment_id, "url": url}
    notes = [(path, named) for path in (note, *note.with_suffix("").glob("*.json"))]
    if unsent.state:
        notes.append((unsent.state / "run.json", {"run_id": new, "unsent": None}))
    for path, values in notes:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if said.get("run_id") in (old, unsent.continues):
            write_json(path, {**said, **values})
