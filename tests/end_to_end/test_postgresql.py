"""A team's servers: MLflow and Prefect on PostgreSQL instead of SQLite.

First what in `story.py` concerns the servers, then what is only true of them. The tests build on
each other.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest
import stand_in
import story
from local_servers import free_port
from postgres import Postgres, needs_postgresql
from story import Servers, prefect_server, serving

from gpt.base.events import Text
from pipeline.flow.prefect_api import answers
from pipeline.tracking.connection import quiet_environment
from pipeline.tracking.run import StageRun

# the first setup starts three servers, makes their tables and runs the whole pipeline
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), needs_postgresql]

first_run = story.first_run
test_a_second_run_executes_nothing_and_shows_every_stage_as_cached = (
    story.test_a_second_run_executes_nothing_and_shows_every_stage_as_cached
)
test_each_task_has_an_artifact_with_its_metrics_and_its_mlflow_run = (
    story.test_each_task_has_an_artifact_with_its_metrics_and_its_mlflow_run
)
test_mlflow_has_a_run_a_stage_and_serves_the_three_models = (
    story.test_mlflow_has_a_run_a_stage_and_serves_the_three_models
)
test_the_first_versions_become_the_champions_each_with_its_card = (
    story.test_the_first_versions_become_the_champions_each_with_its_card
)


@pytest.fixture(scope="module")
def database():
    with Postgres() as server:
        yield server


@pytest.fixture(scope="module")
def servers(project, database, tmp_path_factory):
    """`mlflow server` and `prefect server`, each with a database, MLflow's files kept by itself."""
    files = tmp_path_factory.mktemp("files")
    port = free_port()
    mlflow = f"http://127.0.0.1:{port}"
    command = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    settings = {
        **quiet_environment(),
        "MLFLOW_BACKEND_STORE_URI": database.create("mlflow", "psycopg2"),
        "MLFLOW_ARTIFACTS_DESTINATION": files.as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    prefect = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database.create("prefect", "asyncpg")}
    log = project.root / ".pipeline" / "mlflow-server.log"
    log.parent.mkdir()
    with (
        prefect_server(project.root, **prefect) as api,
        serving(log, lambda: answers(mlflow), *command, **settings),
    ):
        yield Servers(api, mlflow, {"MLFLOW_TRACKING_URI": mlflow})


def test_all_records_are_in_the_two_databases_and_none_in_the_project(project, database, first_run):
    runs = database.ask("mlflow", "SELECT count(*), count(DISTINCT experiment_id) FROM runs")
    assert runs == "7|7", "one run a stage, each in an experiment of its own"
    assert int(database.ask("prefect", "SELECT count(*) FROM flow_run")) >= 2
    left = {path.name for path in project.root.rglob("*") if path.suffix == ".db"}
    assert not left & {"mlflow.db", "prefect.db"}
    assert not (project.root / "mlartifacts").exists()


def test_a_database_that_does_not_answer_is_named_in_one_line_and_at_once(
    project, database, first_run
):
    for address, reason in (
        (database.address("mlflow", password=f"not-{database.secret}"), "password authentication"),
        (database.address("nothing"), 'database "nothing" does not exist'),
        (database.address("mlflow").replace(f":{database.port}/", ":9/"), "Connection refused"),
    ):
        began = time.monotonic()
        said = project.run("gpt-pipeline", "promote", code=1, MLFLOW_TRACKING_URI=address)
        assert time.monotonic() - began < 60, "MLflow alone tries for 100 seconds"
        (line,) = said.splitlines()
        assert line.startswith("error: MLflow at postgresql+psycopg2://127.0.0.1:")
        assert reason in line
        assert "MLFLOW_TRACKING_URI" in line


def test_prefect_without_its_database_is_named_in_one_line(project, database, first_run):
    wrong = database.address("prefect", "asyncpg", password=f"not-{database.secret}")
    said = project.run("gpt-pipeline", "run", code=1, PREFECT_SERVER_DATABASE_CONNECTION_URL=wrong)
    *waits, line = said.splitlines()
    assert all(each.startswith("waiting for Prefect's server") for each in waits)
    assert line.startswith("error: Prefect's server did not start: ")
    assert "password authentication failed" in line
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" in line


def test_ui_serves_the_databases_that_the_environment_names(
    project, database, tmp_path, monkeypatch, first_run
):
    """With no server in between: the runs' files are in the project's `mlartifacts`."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.create("direct"))
    run = StageRun(tmp_path, "learn", stand_in.LearnParams(), {})
    run(Text("samples/a.txt", "a sample"))
    run.close("FINISHED")
    assert (tmp_path / "mlartifacts/learn" / run.id / "artifacts/samples/a.txt").is_file()

    code = (
        "from pathlib import Path; from pipeline.flow import ui;"
        f"ui.serve(Path({str(tmp_path)!r}), mlflow_port={free_port()}, prefect_port={free_port()})"
    )
    prefect = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database.address("prefect", "asyncpg")}
    addresses = tmp_path / ".pipeline/ui.json"
    with (
        (project.root / ".pipeline/ui.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **prefect, "PYTHONPATH": str(project.root)},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            end = time.monotonic() + 150
            while not addresses.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
            told = json.loads(addresses.read_text())
            artifact = f"{told['mlflow']}/get-artifact?run_uuid={run.id}&path=samples/a.txt"
            with urllib.request.urlopen(artifact, timeout=30) as response:
                assert response.read() == b"a sample"
            counted = urllib.request.Request(f"{told['prefect']}/flow_runs/count", data=b"{}")
            counted.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(counted, timeout=30) as response:
                assert int(response.read()) >= 2
            commands = " ".join(
                word
                for each in psutil.process_iter(["cmdline"])
                for word in each.info["cmdline"] or ()  # of one that ends there is none
            )
            assert database.secret not in commands, "everyone on the machine sees a command"
        finally:
            process.terminate()
            process.wait(30)


def test_no_password_is_in_a_line_a_log_a_page_or_a_record(project, database, tmp_path, first_run):
    secret = database.secret
    assert not [said for said in project.said if secret in said]
    files = [path for path in project.root.rglob("*") if path.is_file()]
    logs = {"mlflow-server.log", "prefect-server.log", "server.log", "ui.log", "report.html"}
    assert logs <= {path.name for path in files}
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in database.log.read_text()
    for name in ("mlflow", "prefect", "direct"):
        assert secret not in database.dump(name)
