"""The story of a project from its first run on, whatever keeps MLflow's and Prefect's records.

A test file that tells it imports these tests and gives the fixture `servers`. They build on each
other, in this order.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from local_servers import end_server, free_port

from pipeline.flow.prefect_api import answers, environment

STAGES = [
    "download",
    "tokenize",
    "pretrain",
    "load_gpt2",
    "finetune_classifier",
    "finetune_instruct",
    "evaluate",
]


@dataclass(frozen=True)
class Servers:
    """Where the project's user finds MLflow and Prefect."""

    api: str
    """Prefect's."""
    tracking: str
    """MLflow's address."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What the user sets besides Prefect's address."""

    @property
    def environment(self) -> dict[str, str]:
        return {"PREFECT_API_URL": self.api, **self.variables}

    def registry(self) -> Any:
        """MLflow's client."""
        import mlflow

        return mlflow.MlflowClient(self.tracking, self.tracking)


@contextlib.contextmanager
def serving(
    log: Path, answers: Callable[[], bool], *command: str, **settings: str
) -> Iterator[None]:
    """A server, its output in `log`, from when it answers until the end of the block."""
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **settings},
            stdout=file,
            stderr=file,
        ) as server,
    ):
        try:
            end = time.monotonic() + 240
            while not answers():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield
        finally:
            end_server(server)


@contextlib.contextmanager
def prefect_server(root: Path, **settings: str) -> Iterator[str]:
    """Prefect's server on a free port; its API's address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = ("prefect", "server", "start", "--port", str(port))
    log = root / ".pipeline" / "prefect-server.log"
    log.parent.mkdir(exist_ok=True)
    with serving(log, lambda: answers(url), *command, **environment(root), **settings):
        yield url


def call_api(api: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """What Prefect's API answers; something is posted to it if there is a body."""
    asked = urllib.request.Request(
        f"{api}/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            # Prefect's word where its SQLite is being written to; its own client asks again too
            if error.code != 503 or time.monotonic() > until:
                raise
            time.sleep(0.5)


def ask(api: str, what: str, **body: object) -> list[dict[str, object]]:
    """What Prefect's API finds."""
    found: list[dict[str, object]] = call_api(api, f"{what}/filter", body)
    return found


def last_task_runs(api: str) -> dict[str, dict[str, object]]:
    flow_run = ask(api, "flow_runs", sort="START_TIME_DESC", limit=1)[0]
    runs = ask(api, "task_runs", flow_runs={"id": {"any_": [flow_run["id"]]}}, limit=50)
    return {str(run["name"]): run for run in runs}


def executed(project) -> dict[str, float]:
    """When each stage last began to run."""
    return {
        path.stem: path.stat().st_mtime
        for path in (project.root / ".pipeline" / "runs").glob("*.json")
    }


def champions(servers: Servers) -> dict[str, int]:
    """Which version of each registered model is the champion."""
    models = servers.registry().search_registered_models()
    found = {model.name: model.aliases.get("champion") for model in models}
    return {name: int(version) for name, version in found.items() if version}


@pytest.fixture(scope="module")
def first_run(project, servers):
    return project.run("gpt-pipeline", "run", **servers.environment)


def test_a_run_makes_every_output_and_ends_with_a_report(project, first_run):
    assert "7 of 7 stages ran" in first_run
    for name in ("pretrain", "gpt2", "classifier", "assistant"):
        assert (project.root / "models" / name / "model.safetensors").is_file()
    for heading in ("Stages", "Base models", "Classifier", "Assistant", "Next"):
        assert heading in first_run
    assert not list(project.root.rglob("*.partial"))
    assert not list((project.root / ".checkpoints").glob("*/*")), "resume state of finished runs"


def test_prefect_knows_the_seven_tasks_their_order_and_their_states(servers, first_run):
    runs = last_task_runs(servers.api)
    assert sorted(runs) == sorted([*STAGES, "promotion"])
    assert {run["state"]["type"] for run in runs.values()} == {"COMPLETED"}
    upstream = {
        name: {
            other
            for other, candidate in runs.items()
            for parent in run["task_inputs"].get("wait_for", [])
            if parent["id"] == candidate["id"]
        }
        for name, run in runs.items()
    }
    assert upstream["download"] == set()
    assert upstream["tokenize"] == {"download"}
    assert upstream["pretrain"] == {"tokenize"}
    assert upstream["finetune_classifier"] == {"download", "pretrain"}
    assert upstream["evaluate"] >= {"pretrain", "load_gpt2", "finetune_classifier"}


def test_the_two_fine_tunings_overlap_in_time(servers, first_run):
    runs = last_task_runs(servers.api)
    one, other = runs["finetune_classifier"], runs["finetune_instruct"]
    assert one["start_time"] < other["end_time"]
    assert other["start_time"] < one["end_time"]


def test_each_task_has_an_artifact_with_its_metrics_and_its_mlflow_run(servers, first_run):
    artifacts = ask(servers.api, "artifacts", limit=50)
    texts = {str(each["key"]): str(each["data"]) for each in artifacts}
    assert len(texts) >= len(STAGES)
    classifier = next(text for key, text in texts.items() if "finetune-classifier" in key)
    assert "validation_accuracy" in classifier
    assert "/runs/" in classifier


def test_mlflow_has_a_run_a_stage_and_serves_the_three_models(project, servers, first_run):
    client = servers.registry()
    runs = [
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
    ]
    assert sorted(run.data.tags["dvc.stage"] for run in runs) == sorted(STAGES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {model.name for model in client.search_registered_models()} == {
        "base",
        "classifier",
        "assistant",
    }
    lock = project.outputs()
    pretrain = next(run for run in runs if run.data.tags["dvc.stage"] == "pretrain")
    assert lock["models/pretrain"] in pretrain.data.tags.values()


def test_a_registered_model_predicts_from_the_registry_alone(project, servers, first_run):
    code = (
        "import mlflow, pandas as pd; "
        "model = mlflow.pyfunc.load_model('models:/classifier@champion'); "
        "print(model.predict(pd.DataFrame({'text': ['You won a prize! Text WIN to 80800']})))"
    )
    said = project.run("python", "-c", code, MLFLOW_TRACKING_URI=servers.tracking)
    assert "ham" in said or "spam" in said


def test_the_first_versions_become_the_champions_each_with_its_card(project, servers, first_run):
    assert champions(servers) == {"base": 1, "classifier": 1, "assistant": 1}
    for name in champions(servers):
        assert f"{name} version 1 is the champion: the first version" in first_run
        version = servers.registry().get_model_version(name, "1")
        assert version.description.startswith(f"# {name}, version 1")
        assert version.tags["verdict"] == "champion: the first version"


def test_the_report_is_one_page_that_mlflow_keeps_and_is_written_only_when_there_is_news(
    project, servers, first_run
):
    page = project.root / "reports/report.html"
    client = servers.registry()
    experiment = client.get_experiment_by_name("gpt-pipeline/evaluate")
    (run,) = client.search_runs([experiment.experiment_id])
    kept = Path(client.download_artifacts(run.info.run_id, "report/report.html"))
    assert kept.read_bytes() == page.read_bytes()
    assert run.data.metrics["system/process_peak_memory_megabytes"] > 50
    written = page.stat().st_mtime_ns
    project.run("gpt-pipeline", "run", **servers.environment)
    assert page.stat().st_mtime_ns == written
    project.run("gpt-pipeline", "report", **servers.environment)
    assert page.stat().st_mtime_ns > written


def test_a_second_run_executes_nothing_and_shows_every_stage_as_cached(project, servers, first_run):
    began = executed(project)
    output = project.run("gpt-pipeline", "run", **servers.environment)
    assert "7 of 7 stages are up to date" in output
    assert executed(project) == began
    assert {run["state"]["name"] for run in last_task_runs(servers.api).values()} == {"Cached"}


def test_a_changed_learning_rate_runs_its_stage_and_evaluate_and_changing_back_runs_nothing(
    project, servers, first_run
):
    params = (project.root / "params.yaml").read_bytes()
    lock, outputs = (project.root / "dvc.lock").read_bytes(), project.outputs()
    began = executed(project)
    project.set("finetune_classifier.train.learning_rate", "0.002")
    status = project.run("gpt-pipeline", "status", **servers.environment)
    assert "learning_rate" in status
    said = project.run("gpt-pipeline", "run", **servers.environment)
    assert "classifier version 2 is" in said
    assert "version 1" in said.partition("classifier version 2 is")[2].partition("\n")[0]
    crowned = champions(servers)
    after = executed(project)
    ran = {name for name in STAGES if after[name] != began[name]}
    assert ran == {"finetune_classifier", "evaluate"}
    assert project.outputs()["models/classifier"] != outputs["models/classifier"]

    (project.root / "params.yaml").write_bytes(params)
    project.run("gpt-pipeline", "run", **servers.environment)
    assert champions(servers) == crowned, "going back to what was worse or equal promotes nothing"
    assert executed(project) == after, "nothing is executed: DVC's run cache has both"
    assert project.outputs() == outputs
    assert (project.root / "dvc.lock").read_bytes() == lock
    assert "up to date" in project.run("dvc", "status", "dvc.yaml")
