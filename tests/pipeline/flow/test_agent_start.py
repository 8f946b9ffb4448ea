"""What an agent runs of what a Prefect server asks for: what the project's prefect.yaml says."""

import ast
import asyncio
import json
import os
import runpy
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from gpt.base.errors import InputError
from pipeline.flow import agent_start as agent_run
from pipeline.flow.agent_start import (
    AGENT_VARIABLE,
    COMMAND,
    WORKER_VARIABLE,
    held_by_project,
)
from pipeline.flow.prefect_api import LocalServer
from pipeline.flow.resources import SLOTS_VARIABLE
from pipeline.project.folders import HOME_VARIABLE
from pipeline.project.git import commit_of

ROOT = Path(__file__).parents[3]
ENTRYPOINT = "pipeline/agent_flow.py:gpt_pipeline_on_agent"
TEMPLATE = {
    "variables": {"properties": {"command": {"default": COMMAND}, "env": {}, "working_dir": {}}},
    "job_configuration": {name: f"{{{{ {name} }}}}" for name in ("command", "env", "working_dir")},
}


def held(
    folder: Path = ROOT,
    name: str = "on-demand",
    entrypoint: str = ENTRYPOINT,
    of_run: Any = None,
    **of_deployment: Any,
) -> dict[str, str]:
    """The environment of a flow run, as of this project's deployment where nothing is said."""
    deployment = SimpleNamespace(name=name, entrypoint=entrypoint, **of_deployment)
    return held_by_project(folder, deployment, SimpleNamespace(job_variables=of_run))  # type: ignore[arg-type]


def test_what_the_projects_own_file_says_is_run_whatever_else_the_server_says() -> None:
    assert held() == {}
    asked = {"command": "touch /tmp/x", "env": {"LD_PRELOAD": "x"}, "working_dir": "/tmp"}
    pull = [{"prefect.deployments.steps.run_shell_script": {}}]
    assert held(job_variables=asked, pull_steps=pull) == {}


DOORS: dict[str, tuple[dict[str, Any], str]] = {
    "deployment": ({"name": "evil"}, f"deployment 'evil' with entrypoint '{ENTRYPOINT}'"),
    "entrypoint": (
        {"entrypoint": "/tmp/x.py:f"},
        "deployment 'on-demand' with entrypoint '/tmp/x.py:f'",
    ),
    "the run's command": ({"of_run": {"command": "x"}}, "job variables {'command': 'x'}"),
    "the run's env": ({"of_run": {"env": {"PYTHONPATH": "/tmp"}}}, "job variables {'env': "),
    "escapes for a terminal": ({"name": "\x1b]0;x"}, r"deployment '\x1b]0;x'"),
}


@pytest.mark.parametrize("door", DOORS)
def test_whatever_else_a_server_asks_for_is_refused_in_a_line_that_names_it(door: str) -> None:
    like, line = DOORS[door]
    with pytest.raises(InputError) as refused:
        held(**like)
    assert str(refused.value).startswith(f"refused: {line}")
    assert str(refused.value).isprintable()


def test_env_is_that_of_the_file(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    content["deployments"][0]["work_pool"]["job_variables"] = {"env": {"THREADS": 2}}
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(content))
    assert held(tmp_path, job_variables={"env": {"THREADS": 3}}) == {"THREADS": "2"}


def test_a_deployment_without_a_work_pool_of_its_own_is_run_and_stops_no_other(
    tmp_path: Path,
) -> None:
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    content["deployments"] = [{"name": "mine", "entrypoint": "mine.py:f"}, *content["deployments"]]
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(content))
    assert held(tmp_path) == held(tmp_path, "mine", "mine.py:f") == {}


@pytest.mark.parametrize("content", [None, "[]", "deployments: [1]", "deployments:\n- name: a\n"])
def test_a_commit_without_a_file_that_can_be_read_runs_nothing(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "prefect.yaml").write_text(content)
    with pytest.raises(InputError, match=r"prefect\.yaml"):
        held(tmp_path)


@pytest.mark.parametrize("commit", ["--all", "--upload-pack=x", "--git-dir", "-n"])
def test_a_commit_is_no_option_of_git(commit: str, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    with pytest.raises(InputError, match="no such commit"):
        commit_of(tmp_path, commit)


def test_a_worker_takes_neither_command_nor_flow_from_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect.workers import process

    from pipeline.flow import agent_worker

    values = {"command": "touch /tmp/x", "env": {"LD_PRELOAD": "x"}, "working_dir": "/tmp"}
    make = agent_worker.AgentWorker.job_configuration.from_template_and_values
    made = asyncio.run(make(base_job_template=TEMPLATE, values=values, client=None))
    assert (made.command, made.env, made.working_dir) == (COMMAND, {}, None)

    watched: list[int] = []
    monkeypatch.setattr(agent_worker, "watch_parent", lambda agent, _: watched.append(agent))
    monkeypatch.setattr(process, "load_flow_from_flow_run", None)
    monkeypatch.setattr(agent_worker.anyio, "run", lambda start: None)
    agent_worker.work("gpu", "name", 1)
    assert watched == [os.getppid()]
    flow = asyncio.run(process.load_flow_from_flow_run(SimpleNamespace(deployment_id="1")))
    assert not flow.on_crashed_hooks
    assert not flow.on_cancellation_hooks


class Evil:
    """Makes the file `unpickled` where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.slow
def test_no_result_that_a_server_names_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.results import ResultRecord, ResultRecordMetadata
    from prefect.serializers import PickleSerializer

    for name in ("PREFECT_HOME", "PREFECT_SERVER_DATABASE_CONNECTION_URL"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "result"
    where = ResultRecordMetadata(
        storage_key=str(place), serializer=PickleSerializer(picklelib="pickle")
    )
    place.write_bytes(ResultRecord(result=Evil(), metadata=where).serialize())
    ended = {"type": "COMPLETED", "data": json.loads(where.model_dump_json())}

    with LocalServer(tmp_path) as server:

        def ask(path: str, body: dict[str, Any]) -> Any:
            request = urllib.request.Request(f"{server.url}/{path}", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)

        flow = ask("flows/", {"name": "gpt-pipeline"})["id"]
        run = ask("flow_runs/", {"flow_id": flow})["id"]
        assert ask(f"flow_runs/{run}/set_state", {"state": ended, "force": True})["state"]["data"]
        done = subprocess.run(
            [sys.executable, "-c", agent_run._ENGINE],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PREFECT_API_URL": server.url,
                "PREFECT__FLOW_RUN_ID": run,
                "PREFECT__FLOW_ENTRYPOINT": f"{ROOT}/{ENTRYPOINT}",
            },
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert "Completed" in done.stderr
    assert not (tmp_path / "unpickled").exists()


def test_an_agent_that_runs_on_through_an_update_starts_its_worker_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[tuple[Any, ...]] = []
    worker = SimpleNamespace(work=lambda *arguments: began.append(arguments))
    monkeypatch.setitem(sys.modules, "pipeline.flow.agent_worker", worker)
    monkeypatch.setattr(sys, "argv", ["agent_worker.py", "gpu", "vm", "2"])
    runpy.run_module("pipeline.agent_worker", run_name="__main__")
    assert began == [("gpu", "vm", 2)]


def test_an_agent_and_a_commit_of_another_age_call_things_by_the_same_names() -> None:
    """An agent runs on through updates and is handed earlier commits; deployments stay as made."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flows = {each["entrypoint"].removeprefix("pipeline/agent_flow.py:") for each in deployments}
    assert flows == {"gpt_pipeline_on_agent", "watch_sources"}
    code = ast.parse((ROOT / "pipeline" / "agent_flow.py").read_text())
    (imported,) = (each for each in code.body if isinstance(each, ast.ImportFrom))
    assert {alias.name for alias in imported.names} == flows
    assert COMMAND == "gpt-pipeline flow-run"
    assert AGENT_VARIABLE == "GPT_PIPELINE_AGENT"
    assert WORKER_VARIABLE == "GPT_PIPELINE_WORKER"
    assert SLOTS_VARIABLE == "GPT_PIPELINE_SLOT_COUNT"
    assert HOME_VARIABLE == "GPT_PIPELINE_HOME"
