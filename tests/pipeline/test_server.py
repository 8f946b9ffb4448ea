"""A Prefect API for the length of a run."""

import json
import sqlite3
import urllib.request
from contextlib import closing

import pytest

from pipeline.server import LocalServer


@pytest.fixture(autouse=True)
def _database_of_the_project(monkeypatch):
    for name in ("PREFECT_HOME", "PREFECT_SERVER_DATABASE_CONNECTION_URL"):
        monkeypatch.delenv(name, raising=False)


def names(api):
    """The flows that the API knows."""
    request = urllib.request.Request(f"{api}/flows/filter", data=b"{}")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as response:
        return [each["name"] for each in json.load(response)]


def add_flow(api, name):
    request = urllib.request.Request(f"{api}/flows/", data=json.dumps({"name": name}).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30):
        pass


def test_tables_are_migrated_where_they_may_be_old_and_made_where_there_are_none(tmp_path):
    with LocalServer(tmp_path) as server:
        add_flow(server.url, "first")

    folder = tmp_path / ".prefect"
    with closing(sqlite3.connect(folder / "prefect.db")) as database:
        (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
    note = folder / "prefect.db.tables"
    assert note.read_text().split()[1] == revision

    # of a revision that no migration knows: only who looks at none goes on with them
    with closing(sqlite3.connect(folder / "prefect.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'unknown'")
        database.commit()
    note.write_text(note.read_text().replace(revision, "unknown"))
    with LocalServer(tmp_path) as server:
        assert names(server.url) == ["first"]

    for file in folder.glob("prefect.db*"):
        if file.suffix != ".tables":
            file.unlink()
    with LocalServer(tmp_path) as server:
        assert names(server.url) == []
