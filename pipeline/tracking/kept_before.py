"""Converts unsent runs of earlier versions, each in a separate database, into outboxes."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

from filelock import FileLock, Timeout

from gpt.base.errors import in_one_line
from gpt.base.files import write_json
from pipeline.project.folders import shared_folder
from pipeline.tracking.database import database_uri, follow_move
from pipeline.tracking.outbox import Outbox, held, place_of
from pipeline.tracking.run_notes import notes_of

_OF_THE_END = ("output.", "error", "machine.threads", "mlflow.note.content")
"""Tags that are set when a run ends."""


def unsent(root: Path) -> list[Path]:
    """The notes of the runs in `.pipeline/unsent`."""
    return list((shared_folder(root) / ".pipeline" / "unsent").glob("*/unsent.json"))


def adopt(root: Path) -> list[str]:
    """Convert the runs in `.pipeline/unsent`, except those that a process is still writing.

    Returns:
        A line for each that cannot be read; it is kept.
    """
    failed = []
    for about in unsent(root):
        lock = FileLock(about.with_name("lock"), blocking=False)
        try:
            with contextlib.suppress(Timeout), lock, held(root, about.parent.name) as free:
                if free:
                    _convert(root, about)
                    about.unlink()
                    shutil.rmtree(about.parent)
        except Exception as error:  # a database may be damaged in any way
            if about.exists():  # otherwise another process converted it
                reason = in_one_line(error)
                failed.append(f".pipeline/unsent/{about.parent.name}: cannot be read ({reason})")
    return failed


def _convert(root: Path, about: Path) -> None:
    from mlflow import MlflowClient

    said = json.loads(about.read_text(encoding="utf-8"))
    database = about.with_name("mlflow.db")
    follow_move(database)
    client = MlflowClient(database_uri(database), database_uri(database))
    experiments = client.search_experiments()
    runs = client.search_runs([each.experiment_id for each in experiments])
    if not runs:  # the process was killed before its run started
        return
    run, folder = runs[0], place_of(root, about.parent.name)
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted attempt
    ends = {key: value for key, value in run.data.tags.items() if key.startswith(_OF_THE_END)}
    outbox = Outbox(
        folder=folder,
        root=root,
        stage=said["stage"],
        begun=run.info.start_time,
        description=next((each.tags.get("mlflow.note.content", "") for each in experiments), ""),
        params=run.data.params,
        tags={
            key: value
            for key, value in run.data.tags.items()
            if key not in ("number", "mlflow.runName") and not key.startswith("changed.")
        },
        data_sets=[
            {**each.dataset.to_dictionary(), "context": each.tags[0].value}
            for each in run.inputs.dataset_inputs
        ],
        run_id=said["continues"] or "",
    )
    outbox.files.mkdir(parents=True)
    if (artifacts := _path(run.info.artifact_uri)).exists():  # otherwise it had no file yet
        shutil.copytree(artifacts, outbox.files, dirs_exist_ok=True)
    for file in outbox.files.iterdir():
        outbox.write("artifact", file.name)
    for key in run.data.metrics:
        for each in client.get_metric_history(run.info.run_id, key):
            # without a server, system-metric samples were numbered from 0
            seconds = (each.timestamp - outbox.begun) // 1000
            step = seconds if key.startswith("system/") else each.step
            outbox.write("metrics", step, {key: each.value}, each.timestamp)
    for version in client.search_model_versions():
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        shutil.copytree(_path(model.artifact_location), outbox.model)
        outbox.write("model", version.name, version.tags["md5"], version.creation_timestamp, False)
    if run.info.status != "RUNNING":
        outbox.write("end", run.info.status, ends, run.info.end_time)
    outbox.save()
    for path, note in notes_of(root, outbox.stage):
        if note.get("run_id") == run.info.run_id:
            write_json(path, {**note, "run_id": outbox.name})


def _path(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path))
