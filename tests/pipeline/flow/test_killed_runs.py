"""What is left by a process that was killed, and who settles it."""

import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing

import pytest

from pipeline.flow.prefect_api import LocalServer, environment, settle
from pipeline.project.processes import import_path
from pipeline.project.scratch import scratch

_HOLD = """
import os, signal, sys
from pathlib import Path
from pipeline.project.scratch import scratch
with scratch(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

_FLOW = """
import os, sys
from pathlib import Path
from pipeline.flow.prefect_api import use_api
root = Path(sys.argv[1])
server = use_api(root)
from prefect import flow, task
from prefect.runtime import flow_run
from pipeline.flow.prefect_api import note_flow_run
if server:
    server.wait()
@task
def work():
    print(flow_run.id, flush=True)
    sys.stdin.read()
@flow
def killed():
    note_flow_run(root, str(flow_run.id), os.environ["PREFECT_API_URL"])
    work()
killed()
"""


@pytest.fixture(autouse=True)
def _prefect_of_the_project(monkeypatch):
    for name in ("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL"):
        monkeypatch.delenv(name, raising=False)


def folders(root):
    return [each for each in (root / ".pipeline").rglob("*") if each.parent.parent.name == "tmp"]


def test_a_scratch_folder_goes_with_its_block_or_once_its_process_was_killed(tmp_path):
    with scratch(tmp_path) as mine:
        subprocess.run([sys.executable, "-c", _HOLD, str(tmp_path)], check=False)
        assert len([each for each in folders(tmp_path) if each.is_dir()]) == 2
        settle(tmp_path, "http://127.0.0.1:9/api")
        assert [each for each in folders(tmp_path) if each.is_dir()] == [mine]
    assert folders(tmp_path) == []


def test_a_flow_run_of_another_server_waits_for_that_one(tmp_path):
    subprocess.run([sys.executable, "-c", _HOLD, str(tmp_path)], check=False)
    (folder,) = (each for each in folders(tmp_path) if each.is_dir())
    note = {"id": "0", "api": "https://prefect.example/api"}
    (folder / "flow-run.json").write_text(json.dumps(note))
    settle(tmp_path, "http://127.0.0.1:9/api")
    assert folder.exists()


def states(api, what):
    request = urllib.request.Request(
        f"{api}/{what}/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return [each["state_type"] for each in json.load(answer)]


def start_flow(root, **variables):
    process = subprocess.Popen(
        [sys.executable, "-c", _FLOW, str(root)],
        env={**environment(root), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline().strip()
    return process


@pytest.mark.slow
def test_a_killed_flow_run_and_its_tasks_crash_in_prefect_and_a_running_one_goes_on(tmp_path):
    variables = {**os.environ, "PYTHONPATH": import_path()}
    with LocalServer(tmp_path) as server:
        variables["PREFECT_API_URL"] = server.url
        killed = start_flow(tmp_path, **variables)
        until = time.monotonic() + 30
        while "RUNNING" not in states(server.url, "task_runs") and time.monotonic() < until:
            time.sleep(0.2)  # it comes by an event
        killed.kill()
        killed.wait()
        assert "RUNNING" in states(server.url, "flow_runs")
        going_on = start_flow(tmp_path, **variables)
        assert sorted(states(server.url, "flow_runs")) == ["CRASHED", "RUNNING"]
        going_on.communicate(timeout=60)
        assert sorted(states(server.url, "flow_runs")) == ["COMPLETED", "CRASHED"]
        assert "CRASHED" in states(server.url, "task_runs")


@pytest.mark.slow
def test_the_server_of_a_killed_run_settles_it_and_ends(tmp_path):
    killed = start_flow(tmp_path, **{**os.environ, "PYTHONPATH": import_path()})
    killed.kill()
    killed.wait()
    until = time.monotonic() + 60
    while folders(tmp_path) and time.monotonic() < until:
        time.sleep(0.2)
    assert folders(tmp_path) == []
    with closing(sqlite3.connect(tmp_path / ".prefect" / "prefect.db")) as database:
        assert database.execute("SELECT state_type FROM flow_run").fetchall() == [("CRASHED",)]
