"""Local notes about a stage's latest MLflow run, and about which run made which outputs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt.base.files import write_json
from pipeline.dag.graph import Dag


def note_of_run(root: Path, name: str) -> Path:
    """The file with the note of a stage's last MLflow run."""
    return root / ".pipeline" / "runs" / f"{name}.json"


def note_of_maker(root: Path, name: str, outputs: Mapping[str, str]) -> Path:
    """The file with the note of the last MLflow run that made these outputs (path -> md5)."""
    content = json.dumps(outputs, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()
    return root / ".pipeline" / "runs" / name / f"{key[:16]}.json"


def last_run(root: Path, name: str) -> dict[str, Any]:
    """The note of the stage's last MLflow run; empty if there is none."""
    return _note(note_of_run(root, name))


def made_by(dag: Dag, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """The note of the MLflow run that made the outputs recorded in `dvc.lock`, for each stage.

    If no such run is known, the stage's last run is used, unless its note lists other outputs; the
    result is then empty.

    Args:
        dag: the project's DAG.
        names: the names of the stages; by default all.
    """
    notes = {}
    for name, made in dag.recorded_outputs(names).items():
        last = last_run(dag.root, name)
        notes[name] = _note(note_of_maker(dag.root, name, made)) or (
            {} if last.get("outputs", made) != made else last
        )
    return notes


def _note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def notes_of(root: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All notes of a stage's MLflow runs, with their files."""
    last = note_of_run(root, name)
    for path in (last, *last.with_suffix("").glob("*.json")):
        yield path, _note(path)


def write_note(
    root: Path,
    stage: str,
    run: Mapping[str, str],
    status: str,
    seconds: float,
    outputs: Mapping[str, str] | None = None,
) -> None:
    """Write a note of a run: its status, its duration in seconds, its outputs (path -> md5)."""
    note: dict[str, Any] = {**run, "status": status, "seconds": round(seconds, 2)}
    note["pid"] = os.getpid()
    if outputs is not None:
        note["outputs"] = outputs
        write_json(note_of_maker(root, stage, outputs), note)
    write_json(note_of_run(root, stage), note)
