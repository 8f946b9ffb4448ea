"""The places that an MLflow database names follow its project; why a database fails is said."""

import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from gpt.base.errors import RunError
from pipeline.tracking.connection import artifact, artifact_folder, connect, experiment_of
from pipeline.tracking.database import database_file, database_uri, follow_move
from pipeline.tracking.outbox import Outbox, outboxes, place_of, read_outbox


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    """A project with a run of ours, and one of an experiment that its user made."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "old"
    root.mkdir()
    shutil.copy(empty_database, root)
    client = connect(root)
    own = client.create_experiment("my own", str(root / "mlruns" / "1"))
    for experiment in (experiment_of(client, "learn", artifact_folder(root, "learn"), ""), own):
        run = client.create_run(experiment)
        client.log_text(run.info.run_id, "kept", "notes/a.txt")
    return root


def kept(root: Path) -> list[bytes | None]:
    """The files of all runs, and that of a run that is made now."""
    client = connect(root)
    ours = client.get_experiment_by_name("gpt-pipeline/learn").experiment_id
    client.log_text(client.create_run(ours).info.run_id, "kept", "notes/a.txt")
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments)
    return [artifact(client, run.info.run_id, "notes/a.txt") for run in runs]


@pytest.mark.parametrize("name", ["new", "100 % of Jürgen's #1"])
def test_a_renamed_project_finds_its_files_and_writes_none_to_the_old_place(
    project: Path, name: str
) -> None:
    new = project.rename(project.with_name(name))
    assert kept(new) == [b"kept"] * 3
    assert not project.exists()


def test_a_copy_leaves_the_original_as_it_was(project: Path) -> None:
    copy = project.with_name("copy")
    shutil.copytree(project, copy)
    before = (project / "mlflow.db").read_bytes(), sorted(project.rglob("*"))
    assert kept(copy) == [b"kept"] * 3
    assert ((project / "mlflow.db").read_bytes(), sorted(project.rglob("*"))) == before


def test_a_file_that_was_not_brought_along_is_found_where_it_is(project: Path) -> None:
    copy = project.with_name("copy")
    copy.mkdir()
    shutil.copy(project / "mlflow.db", copy)
    assert kept(copy) == [b"kept"] * 3
    assert len(list(copy.rglob("a.txt"))) == 1  # the new run's


def test_one_folder_under_two_names_is_no_move(project: Path) -> None:
    link = project.with_name("link")
    link.symlink_to(project)
    database = project / "mlflow.db"
    before = database.read_bytes()
    follow_move(link / "mlflow.db")
    assert database.read_bytes() == before


def test_what_is_not_sent_moves_with_its_project(project: Path) -> None:
    values: Any = {"begun": 1, "description": "", "params": {}, "tags": {}, "data_sets": []}
    outbox = Outbox(folder=place_of(project, "learn-1"), root=project, stage="learn", **values)
    outbox.save()
    new = project.rename(project.with_name("new"))
    assert outboxes(new) == ["learn-1"]
    found = read_outbox(new, "learn-1")
    assert found is not None
    assert (found.root, found.folder) == (new, new / ".pipeline" / "outbox" / "learn-1")


@pytest.mark.parametrize("name", ["a b", "a%20b", "a?b", "a%b", "ü#:"])
def test_a_database_is_the_file_that_its_address_was_made_of(tmp_path: Path, name: str) -> None:
    from sqlalchemy.engine import make_url

    file = tmp_path / name / "mlflow.db"
    uri = database_uri(file)
    assert database_file(uri) == file
    assert make_url(uri).database == str(file)


def _schema(database: Path, revision: str) -> None:
    with sqlite3.connect(database) as db:
        db.execute("UPDATE alembic_version SET version_num = ?", [revision])
    db.close()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.write_bytes(os.urandom(9000)), "not a database; put a copy"),
        (lambda file: os.truncate(file, 60_000), "malformed; put a copy"),
        (lambda file: (file.unlink(), file.mkdir()), "unable to open database file; let"),
        (lambda file: _schema(file, "f" * 12), "a newer MLflow than .* made it; install"),
        (lambda file: _schema(file, "0584bdc529eb"), "an older MLflow .* `mlflow db upgrade"),
    ],
)
def test_a_database_that_cannot_be_used_is_said_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path, harm, said
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    harm(Path(shutil.copy(empty_database, tmp_path)))
    with pytest.raises(RunError, match=said):
        connect(tmp_path)
