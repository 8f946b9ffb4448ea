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


def test_a_history_goes_on_in_the_next_server_and_one_that_was_removed_begins_anew(tmp_path):
    with LocalServer(tmp_path) as server:
        add_flow(server.url, "first")
    with LocalServer(tmp_path) as server:
        assert names(server.url) == ["first"]

    folder = tmp_path / ".prefect"
    with closing(sqlite3.connect(folder / "prefect.db")) as database:
        (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
    assert (folder / "prefect.db.tables").read_text().split()[1] == revision

    for file in folder.glob("prefect.db*"):
        if file.suffix != ".tables":
            file.unlink()
    with LocalServer(tmp_path) as server:
        assert names(server.url) == []
