"""Flows on an agent: a real Prefect server, work pool and worker, a git remote and a DVC remote.

The tests of this file build on each other: they are one story, told in its order.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from browser import EVIL, needs_chromium, visit
from filelock import FileLock, Timeout
from local_servers import end_server, free_port
from story import STAGES, call_api

from pipeline.flow.prefect_api import answers, environment

# long enough to be stopped in the middle, and kept often
LONG = {"pretrain.train.steps": 600, "pretrain.train.checkpoint_seconds": 1.0}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Site:
    """A team's Prefect server, a project that its agent has cloned, and the agent."""

    def __init__(self, origin: Any, folder: Path) -> None:
        self.origin, self.folder = origin, folder
        self.root = folder / "agent"
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        subprocess.run(["git", "clone", "-q", origin.root, self.root], check=True)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))},
            **environment(folder),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(self.root),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        self.server = self.start("prefect", "server", "start", "--port", str(port))
        self.environment["PREFECT_API_URL"] = self.api
        self.until(lambda: answers(self.api), 120)
        self.do("dvc", "remote", "add", "--local", "-d", "store", str(folder / "store"))

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}-{command[1]}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def do(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return call_api(self.api, path, body)

    def schedule(self, seconds: float = 0.0, **parameters: Any) -> str:
        """A run of the deployment `on-demand`, so many seconds from now; its id."""
        deployment = self.ask("deployments/name/gpt-pipeline/on-demand")
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": when}}
        body = {"parameters": parameters, "state": state}
        return str(self.ask(f"deployments/{deployment['id']}/create_flow_run", body)["id"])

    def run(self, flow_run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"flow_runs/{flow_run}")
        return found

    def ended(self, flow_run: str, seconds: float = 900) -> dict[str, Any]:
        final = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        self.until(lambda: self.run(flow_run)["state"]["type"] in final, seconds)
        return self.run(flow_run)

    def tasks(self, flow_run: str) -> dict[str, str]:
        """The states of its tasks; the last ones arrive a moment later."""
        body = {"flow_runs": {"id": {"any_": [flow_run]}}, "limit": 100}
        self.until(
            lambda: all(
                each["state"]["type"] != "RUNNING"
                for each in self.ask("task_runs/filter", body)
                if self.run(flow_run)["state"]["type"] != "RUNNING"
            ),
            30,
        )
        # of a run that was taken up again, the last word about each
        found = sorted(self.ask("task_runs/filter", body), key=lambda each: each["created"])
        return {each["name"]: each["state"]["name"] for each in found}

    def slots(self) -> int:
        """Slots that are held, of the only one."""
        folder = Path(tempfile.gettempdir()) / f"gpt-pipeline-cards-{os.getuid()}"
        try:
            with FileLock(folder / "slot-0.lock", blocking=False):
                return 0
        except Timeout:
            return 1

    def training(self, stage: str = "pretrain") -> bool:
        """Whether a state of a training has been kept: it is under way."""
        return any((self.root / ".checkpoints" / stage).glob("*/step-*"))

    def worker(self) -> psutil.Process:
        """The worker of the agent."""
        (found,) = (each for each in psutil.Process(self.agent.pid).children() if each.is_running())
        return found

    def process(self, stage: str) -> psutil.Process:
        """What trains for a flow run."""
        for each in psutil.process_iter(["cmdline", "cwd"]):
            words, folder = each.info["cmdline"] or [], each.info["cwd"] or ""
            if words[1:] == ["-m", "pipeline", "stage", stage] and folder.startswith(
                str(self.root)
            ):
                return each
        raise AssertionError(f"nothing trains {stage}")

    def runs(self, stage: str) -> list[Any]:
        """The stage's runs in MLflow, oldest first."""
        import mlflow

        uri = f"sqlite:///{self.root}/mlflow.db"
        client = mlflow.MlflowClient(uri, uri)
        experiment = client.get_experiment_by_name(f"gpt-pipeline/{stage}")
        if experiment is None:
            return []
        return list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))

    def until(self, what: Any, seconds: float) -> float:
        """Wait until it holds; how many seconds that took."""
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < seconds, f"not within {seconds} s"
            time.sleep(0.3)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def site(project, tmp_path_factory):
    site = Site(project, tmp_path_factory.mktemp("site"))
    agent = None
    try:
        agent = site.agent = site.start("gpt-pipeline", "agent", "--slots", "1", "--runs", "2")
        log = site.folder / "gpt-pipeline-agent.log"
        site.until(lambda: "work pool 'gpu'" in log.read_text(), 120)
        site.do("prefect", "--no-prompt", "deploy", "--all")
        # at two in the morning the nightly run would come between, and every quarter of an hour
        # the watch
        scheduled = [each for each in site.ask("deployments/filter", {}) if each["schedules"]]
        assert {each["name"] for each in scheduled} == {"nightly", "watch"}
        for each in scheduled:
            site.ask(f"deployments/{each['id']}/pause_deployment", {})
        yield site
    finally:
        if agent is not None:
            agent.send_signal(signal.SIGTERM)
            agent.wait(90)
        end_server(site.server)


def test_the_agent_says_what_it_has_to_work_with(site):
    said = site.do("gpt-pipeline", "agent", "--check")
    for what in ("device", "memory", "disk", "Prefect", "MLflow", "git", "DVC remote"):
        assert any(line.startswith(what) for line in said.splitlines()), said
    # another one in the same checkout would take the same runs
    said = site.do("gpt-pipeline", "agent", code=2)
    assert "error: agent: process " in said


def test_a_scheduled_run_is_completed_and_shared(site):
    flow_run = site.schedule(seconds=3)
    ended = site.ended(flow_run)
    assert ended["state"]["type"] == "COMPLETED", ended["state"]
    assert site.tasks(flow_run) == {
        **dict.fromkeys(STAGES, "Completed"),
        **dict.fromkeys(("dvc pull", "dvc push", "promotion"), "Completed"),
    }
    assert list((site.folder / "store").rglob("*.dir")), "DVC's remote has the outputs"
    assert {len(site.runs(stage)) for stage in STAGES} == {1}
    assert site.slots() == 0


def test_a_second_run_is_all_cached(site):
    flow_run = site.schedule()
    assert site.ended(flow_run)["state"]["type"] == "COMPLETED"
    states = site.tasks(flow_run)
    assert {states[stage] for stage in STAGES} == {"Cached"}
    assert {len(site.runs(stage)) for stage in STAGES} == {1}
    site.until(lambda: not list((site.root / ".pipeline/agent/workspaces").glob("*")), 30)


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        (
            {"overrides": {"pretrain.train.stepz": 3}},
            "overrides: params.yaml: pretrain.train.stepz",
        ),
        ({"preset": "nothing"}, "nothing: no such preset; there are "),
        ({"targets": ["pretrian"]}, "pretrian: no such stage; use one of "),
        ({"commit": "nowhere"}, "commit nowhere: is not in the agent's project"),
    ],
    ids=["override", "preset", "target", "commit"],
)
def test_parameters_of_a_run_are_checked_as_params_yaml_is(site, parameters, line):
    ended = site.ended(site.schedule(**parameters))
    assert ended["state"]["type"] == "FAILED"
    assert ended["state"]["message"].startswith(line)


@needs_chromium
def test_an_attackers_page_has_an_agent_run_nothing_through_any_door(site, tmp_path):
    """Where the server answers every page, as Prefect's own command starts it."""
    for name in ("evil.py", "sitecustomize.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'loaded')!r}, 'w')\n")
    touch = f"touch {tmp_path}/touched"
    ours = {"command": "gpt-pipeline flow-run"}
    doors = {
        "command": {"job_variables": {"command": touch}},
        "env": {"job_variables": {**ours, "env": {"PYTHONPATH": str(tmp_path)}}},
        "working_dir": {"job_variables": {**ours, "working_dir": str(tmp_path)}},
        "pull steps": {
            "pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": touch}}]
        },
        "entrypoint": {"entrypoint": f"{tmp_path}/evil.py:flow"},
    }
    on_demand = site.ask("deployments/name/gpt-pipeline/on-demand")
    kept = ("flow_id", "entrypoint", "pull_steps", "job_variables", "work_pool_name")
    bodies = {
        name: {**{key: on_demand[key] for key in kept}, "name": f"evil {name}", **changed}
        for name, changed in doors.items()
    }
    script = f"""
      const ask = async (path, body) => {{
        let answer;
        do answer = await fetch({json.dumps(site.api)} + '/' + path, {{
          method: 'POST', body: JSON.stringify(body),
          headers: {{ 'content-type': 'application/json' }},
        }}); while (answer.status === 503);  // its SQLite file is locked
        return answer.json();
      }};
      const runs = {{}};
      for (const [name, body] of Object.entries({json.dumps(bodies)})) {{
        const deployment = await ask('deployments/', body);
        const state = {{ state: {{ type: 'SCHEDULED' }} }};
        runs[name] = (await ask(`deployments/${{deployment.id}}/create_flow_run`, state)).id;
      }}
      return runs;"""
    runs = visit(script, tmp_path / "profile", host=EVIL)
    assert runs.keys() == doors.keys()
    for name, run in runs.items():
        state = site.ended(run)["state"]
        assert state["type"] == "FAILED"
        assert state["message"].startswith(f"refused: deployment 'evil {name}' ")
        log = site.folder / "gpt-pipeline-agent.log"
        site.until(lambda run=run, log=log: f"flow run {run}: refused: " in log.read_text(), 30)
    assert {path.name for path in tmp_path.iterdir()} == {"evil.py", "sitecustomize.py", "profile"}


def test_a_run_that_fails_is_told_to_a_notification_block(site):
    heard: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{hook.server_port}/"
        block = (
            "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block;"
            f"Block(name='ops', url='{address}', json_data={{'text': '{{{{body}}}}'}}).save('ops')"
        )
        site.do(sys.executable, "-c", block)
        said = site.do("gpt-pipeline", "notify", "custom-webhook/ops")
        assert said.endswith("made: custom-webhook/ops hears of runs that fail\n")
        assert "changed" in site.do("gpt-pipeline", "notify", "custom-webhook/ops")
        said = site.do("gpt-pipeline", "notify", "custom-webhook/none", code=2)
        assert "error: custom-webhook/none: the Prefect server has no such block" in said
        time.sleep(5)  # until the server has read the automation
        site.ended(site.schedule(preset="nothing"))
        site.until(lambda: heard, 60)
        assert "nothing: no such preset" in heard[0]
    finally:
        hook.shutdown()


@pytest.fixture(scope="module")
def straight(site):
    """The md5 of what the long training comes to when nothing stops it, in a project of its own."""
    root = site.folder / "straight"
    subprocess.run(["git", "clone", "-q", site.origin.root, root], check=True)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["pretrain"]["train"].update(
        {path.rpartition(".")[2]: each for path, each in LONG.items()}
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    mine = {**site.environment, "PYTHONPATH": str(root)}
    del mine["PREFECT_API_URL"]
    done = subprocess.run(
        ["gpt-pipeline", "run", "pretrain"], cwd=root, env=mine, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    outs = {out["path"]: out["md5"] for out in lock["stages"]["pretrain"]["outs"]}
    return outs["models/pretrain"]


def test_cancelling_frees_the_slot_and_the_next_run_goes_on_to_the_same_bytes(site, straight):
    first = site.schedule(targets=["pretrain"], overrides=LONG)
    site.until(site.training, 300)
    assert site.slots() == 1
    site.ask(f"flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}, "force": True})
    assert site.until(lambda: site.slots() == 0, 30) < 30
    assert site.ended(first)["state"]["type"] == "CANCELLED"
    assert site.training(), "its state is kept"
    assert len(site.runs("pretrain")) == 2

    second = site.schedule(targets=["pretrain"], overrides=LONG)
    assert site.ended(second)["state"]["type"] == "COMPLETED"
    _, run = site.runs("pretrain")
    assert run.data.tags["resumed"] == "1"
    assert run.data.tags["output.models/pretrain"] == straight


def test_a_killed_workers_run_is_taken_up_by_a_new_one_and_finished(site):
    flow_run = site.schedule(
        targets=["pretrain"], overrides={**LONG, "pretrain.train.learning_rate": 0.002}
    )
    site.until(site.training, 300)
    worker = site.worker()
    worker.kill()
    ended = site.ended(flow_run)
    assert ended["state"]["type"] == "COMPLETED", ended["state"]
    assert ended["run_count"] == 2
    assert site.runs("pretrain")[-1].data.tags["resumed"] == "1"
    assert site.worker() != worker


def test_a_killed_flow_process_is_taken_up_again_too(site):
    flow_run = site.schedule(
        targets=["pretrain"], overrides={**LONG, "pretrain.train.learning_rate": 0.004}
    )
    site.until(site.training, 300)
    note = json.loads((site.root / f".pipeline/agent/runs/{flow_run}.json").read_text())
    psutil.Process(note["pid"]).kill()
    # the worker says that it crashed, and the agent that it is to be run again
    site.until(lambda: site.run(flow_run)["state"]["type"] == "COMPLETED", 600)
    assert site.runs("pretrain")[-1].data.tags["resumed"] == "1"


def test_two_runs_share_one_slot_and_the_rest_of_them_overlaps(site):
    first = site.schedule(
        targets=["finetune_classifier"],
        overrides={
            "finetune_classifier.train.steps": 2000,
            "finetune_classifier.train.checkpoint_seconds": 0.5,
        },
    )
    site.until(lambda: site.training("finetune_classifier"), 300)
    training = site.process("finetune_classifier")
    training.suspend()  # it holds the slot for as long as the other run needs, on any machine
    second = site.schedule(
        targets=["load_gpt2", "finetune_instruct"],
        overrides={
            "load_gpt2.sample_prompt": "The new clock",
            "finetune_instruct.train.learning_rate": 0.0007,
        },
    )
    try:
        site.until(
            lambda: [run.info.status for run in site.runs("load_gpt2")][1:] == ["FINISHED"], 300
        )
    finally:
        training.resume()
    assert {site.ended(each)["state"]["type"] for each in (first, second)} == {"COMPLETED"}
    classifier, instruct, load = (
        site.runs(stage)[-1].info
        for stage in ("finetune_classifier", "finetune_instruct", "load_gpt2")
    )
    assert instruct.start_time >= classifier.end_time, "both hold the only slot"
    assert classifier.start_time < load.start_time < classifier.end_time, "it needs no slot"
