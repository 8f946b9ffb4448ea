"""MLflow that is not there, dies or comes back: what a stage does, and what is logged later.

The servers are real ones, killed with SIGKILL.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import stand_in
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_server import MlflowServer

from gpt.base.errors import RunError
from gpt.base.events import Metrics, Text
from gpt.base.files import write_json
from gpt.model.config import GPTConfig
from gpt.model.model import GPT
from gpt.model.weights import load_model, save_model
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.dag.cache import dvc_md5
from pipeline.project.settings import TrackingParams
from pipeline.run.stage import run_stage
from pipeline.tracking import connection, registry, sender
from pipeline.tracking.connection import connect
from pipeline.tracking.outbox import held, outboxes, read_outbox
from pipeline.tracking.provenance import Provenance
from pipeline.tracking.run import StageRun

HERE = Path(__file__).parent.parent
LATER = {"tracking": {"unreachable": "later"}}
CONFIG = GPTConfig(vocab_size=257, context_length=32, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def one_server(
    empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "server.db")
    made = MlflowServer(folder)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def server(one_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """The project's MLflow: a server, which a test may kill."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
    if one_server.process is None:
        one_server.start()
    return one_server


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's MLflow is where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in.install(monkeypatch)
    (tmp_path / "data" / "prepared").mkdir(parents=True)
    (tmp_path / "data" / "prepared" / "text").write_text("some text")
    return stand_in.make_project(tmp_path)


def start(stage: str, project: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(HERE), str(HERE.parent.parent)))
    return subprocess.Popen(
        [sys.executable, str(HERE / "stand_in.py"), stage, str(project)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def note(project: Path, stage: str = "learn") -> dict[str, Any]:
    return json.loads((project / ".pipeline" / "runs" / f"{stage}.json").read_text())


def steps(client: MlflowClient, run: Run, metric: str) -> list[int]:
    return [entry.step for entry in client.get_metric_history(run.info.run_id, metric)]


def told(project: Path) -> list[str]:
    lines: list[str] = []
    sender.send_all(project, lines.append)
    return lines


def assert_whole(project: Path, total: int) -> Run:
    """The last run of `learn` is in MLflow: each step once, every text, the end."""
    client = connect(project)
    run = client.get_run(note(project)["run_id"])
    assert run.info.status == "FINISHED"
    assert steps(client, run, "train_loss") == list(range(1, total + 1))
    assert steps(client, run, "validation_loss") == [*range(5, total + 1, 5), total + 1]
    samples = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    assert samples == [f"samples/step-{step:06d}.txt" for step in range(5, total + 1, 5)]
    plots = [file.path for file in client.list_artifacts(run.info.run_id, "plots")]
    assert plots == ["plots/learning_rate.png", "plots/loss.png"]
    assert run.data.tags["output.models/learnt"] == dvc_md5(project / "models/learnt")
    assert run.info.run_id in note(project)["url"]
    assert not outboxes(project)
    return run


# --- not there at the start -----------------------------------------------------------------------


@pytest.mark.usefixtures("elsewhere")
def test_without_mlflow_a_stage_stops_before_any_work_and_within_seconds(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = time.monotonic()
    assert run_stage("learn", project) == 1
    assert time.monotonic() - before < 15
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not answer: Connection refused; check that MLFLOW_TRACKING_URI answers" in error
    assert not (project / "models").exists()
    assert not outboxes(project)


def test_a_run_made_without_mlflow_is_logged_later_as_it_was(
    project: Path,
    elsewhere: None,
    one_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in.set_params(project, **LATER)
    assert run_stage("learn", project) == 0
    shown = capsys.readouterr()
    assert "learn goes on, and what is missing is logged later" in shown.out
    assert "gpt-pipeline sync" in shown.out
    with pytest.raises(RunError, match="does not answer"):
        told(project)
    (name,) = outboxes(project)
    kept = read_outbox(project, name)
    assert kept is not None
    ended = time.time()
    time.sleep(1.5)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
    if one_server.process is None:
        one_server.start()
    (line,) = told(project)
    assert line.startswith("learn: #1")
    assert "(finished) is in MLflow: http://127.0.0.1" in line
    run = assert_whole(project, 20)
    assert kept.begun == run.info.start_time
    assert run.info.start_time <= run.info.end_time < (ended + 0.5) * 1000
    assert run.data.params["train.learning_rate"] == "0.5"
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == ["data/prepared"]
    files = connect(project).list_artifacts(run.info.run_id, "lineage")
    assert [file.path for file in files] == ["lineage/code.json", "lineage/params.yaml"]
    assert told(project) == []


def test_the_next_run_sends_what_is_kept(
    project: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.set_params(project, **LATER)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run_stage("learn", project) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    kept = assert_kept(project)
    stand_in.set_params(project, learn={"train": {"learning_rate": 0.25}})
    assert run_stage("learn", project) == 0
    client, last = connect(project), assert_whole(project, 20)
    sent = client.search_runs(
        [last.info.experiment_id], f"tags.`{sender.TAG}` = '{kept}'", max_results=2
    )
    assert len(sent) == 1
    assert int(last.data.tags["number"]) == int(sent[0].data.tags["number"]) + 1
    assert last.data.tags["changed.train.learning_rate"] == "0.5 → 0.25"
    assert last.info.run_name.endswith(" train.learning_rate=0.25")


def assert_kept(project: Path) -> str:
    """The id of the run that the stage's note names, which is kept here."""
    assert len(outboxes(project)) == 1
    return str(note(project)["run_id"])


@pytest.mark.usefixtures("elsewhere")
def test_without_mlflow_the_promotion_waits_or_fails_as_params_say(tmp_path: Path) -> None:
    ready, (message,) = sender.ready_for_promotion(tmp_path, TrackingParams(unreachable="later"))
    assert not ready
    assert message.level == "warning"
    assert "no model is compared with its champion" in message.text
    assert sender.ready_for_promotion(tmp_path, TrackingParams()) == (True, [])


# --- dying in the middle --------------------------------------------------------------------------


def trained_until_it_died(project: Path, server: MlflowServer) -> subprocess.Popen[str]:
    """A training whose server is killed after some of its steps are there."""
    process = start("learn", project)

    def has_steps() -> bool:
        if not (project / ".pipeline/runs/learn.json").exists():
            return False
        run = connect(project).get_run(note(project)["run_id"])
        return "train_loss" in run.data.metrics

    wait_for(has_steps)
    server.kill()
    return process


@pytest.mark.slow
def test_mlflow_killed_in_the_middle_has_the_whole_run_later(
    project: Path, server: MlflowServer
) -> None:
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 80}}, **LATER)
    process = trained_until_it_died(project, server)
    begun = note(project)["run_id"]
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "does not answer: Connection refused: learn goes on, and what is missing" in out
    assert out.count("does not answer") == 1, out
    assert note(project)["run_id"] == begun
    server.start()
    (line,) = told(project)
    assert begun in line
    assert assert_whole(project, 80).info.run_id == begun


@pytest.mark.slow
def test_mlflow_killed_in_the_middle_and_stop_loses_nothing(
    project: Path, server: MlflowServer
) -> None:
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 160}})
    process = trained_until_it_died(project, server)
    begun = note(project)["run_id"]
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.count("\n") == 1
    assert "Connection refused" in error
    assert "learn goes on, but cannot end well before it answers; the state is kept" in out
    (kept,) = (project / ".checkpoints").rglob("step.json")
    assert json.loads(kept.read_text()) == 160, "no step is made again"
    server.start()
    process = start("learn", project)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    run = assert_whole(project, 160)
    assert run.info.run_id == begun
    assert run.data.tags["resumed"] == "1"


@pytest.mark.slow
def test_mlflow_that_comes_back_before_the_end_gets_all_of_it(
    project: Path, server: MlflowServer
) -> None:
    stand_in.set_params(project, learn={"pause": 0.1, "train": {"steps": 300}}, **LATER)
    process = trained_until_it_died(project, server)
    time.sleep(3)
    server.start()
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "answers again" in out
    assert not outboxes(project)
    assert_whole(project, 300)


@pytest.mark.slow
@pytest.mark.parametrize("back", [True, False], ids=["back", "still gone"])
def test_a_stage_and_mlflow_both_killed_go_on_as_the_same_run(
    project: Path, server: MlflowServer, back: bool
) -> None:
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 160}}, **LATER)
    process = trained_until_it_died(project, server)
    begun = note(project)["run_id"]
    time.sleep(2)
    process.kill()
    process.communicate()
    if back:
        server.start()
    process = start("learn", project)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    if not back:
        server.start()
        assert len(told(project)) == 1
    assert assert_whole(project, 160).info.run_id == begun


@pytest.mark.slow
def test_a_run_begun_without_mlflow_and_killed_goes_on_once_it_is_there(
    project: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 160}}, **LATER)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    process = start("learn", project)
    wait_for(lambda: bool(list((project / ".checkpoints").rglob("step.json"))))
    process.kill()
    process.communicate()
    assert_kept(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    process = start("learn", project)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "(killed) is in MLflow" in out
    run = assert_whole(project, 160)
    assert sender.TAG in run.data.tags
    assert run.data.tags["resumed"] == "1"


@pytest.mark.slow
def test_a_server_that_says_nothing_is_given_up_within_seconds(
    project: Path, server: MlflowServer
) -> None:
    server.freeze()
    before = time.monotonic()
    try:
        assert not connection.reachable(project)
        assert time.monotonic() - before < 15
    finally:
        server.kill()


# --- sent once, whole -----------------------------------------------------------------------------


class _Breaking:
    """A client whose server is gone after so many calls."""

    def __init__(self, client: MlflowClient, calls: int) -> None:
        self.client, self.calls = client, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.calls == 0:
                raise ConnectionError("cut off")
            self.calls -= 1
            return method(*arguments, **keywords)

        return call


def made_without_mlflow(root: Path) -> Path:
    """A run with a registered model."""
    torch.manual_seed(1)
    directory = root / "models" / "pretrain"
    save_model(GPT(CONFIG), directory, tokenizer=byte_tokenizer())
    run = StageRun(
        root,
        "pretrain",
        CONFIG,
        {"data/tokens": "1"},
        made_of=Provenance(files={"params.yaml": b"x: 1\n"}),
        unreachable="later",
    )
    for step in range(1, 1501):
        run(Metrics(step, {"train_loss": 1 / step, "tokens": 8.0 * step}))
    run(Text("samples/step.txt", "once"))
    run.add_model("base", directory, dvc_md5(directory))
    run.close("FINISHED", metrics={"loss": 0.5}, outputs={"models/pretrain": "2"})
    return directory


@pytest.mark.slow
def test_an_interrupted_sync_is_completed_and_sends_everything_once(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    directory = made_without_mlflow(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    client = connect(tmp_path)
    (name,) = outboxes(tmp_path)
    kept = read_outbox(tmp_path, name)
    assert kept is not None
    cuts = 0
    while True:  # cut off at the first call, the second, and so on to the last
        try:
            sender.Sender(kept, _Breaking(client, cuts)).finish()  # type: ignore[arg-type]
        except RunError:
            cuts += 1
            assert outboxes(tmp_path)
        else:
            break
    assert cuts > 12
    assert not outboxes(tmp_path)
    assert not list((tmp_path / ".pipeline" / "outbox").glob("*/"))

    experiment = client.get_experiment_by_name("gpt-pipeline/pretrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert sorted(steps(client, run, "train_loss")) == list(range(1, 1501))
    assert steps(client, run, "loss") == [1501]
    (version,) = client.search_model_versions("name = 'base'")
    assert version.run_id == run.info.run_id
    assert version.tags["md5"] == dvc_md5(directory)
    assert run.info.run_id in version.description
    assert client.get_model_version_by_alias("base", "candidate").version == version.version
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert [each.model_id for each in run.outputs.model_outputs] == [model.model_id]
    assert model.status == "READY"
    shown = {metric.key: (metric.value, metric.step) for metric in model.metrics}
    assert shown["loss"] == (0.5, 1501)
    assert shown["train_loss"] == (1 / 1500, 1500)
    assert shown["tokens"] == (12000.0, 1500)
    assert model.params["n_embd"] == "16"
    files = Path(mlflow.artifacts.download_artifacts("models:/base@candidate"))
    described = (files / "MLmodel").read_text()
    assert model.model_id in described
    assert run.info.run_id in described
    sent_model = load_model(files / "artifacts" / "pretrain")
    assert sum(p.sum().item() for p in sent_model.parameters()) == pytest.approx(
        sum(p.sum().item() for p in load_model(directory).parameters())
    )


@pytest.mark.slow
def test_an_alias_never_goes_back_to_an_older_run(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("first", "second"):
        (tmp_path / stage).mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    made_without_mlflow(tmp_path / "first")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    directory = tmp_path / "second" / "models" / "pretrain"
    torch.manual_seed(2)
    save_model(GPT(CONFIG), directory, tokenizer=byte_tokenizer())
    run = StageRun(tmp_path / "second", "pretrain", CONFIG, {})
    version = run.add_model("base", directory, dvc_md5(directory))
    run.close("FINISHED")
    sender.send_all(tmp_path / "first", lambda line: None)
    candidate = connect(tmp_path).get_model_version_by_alias("base", "candidate")
    assert int(candidate.version) == version


def test_a_run_that_is_still_written_is_not_sent(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = StageRun(tmp_path, "learn", stand_in.LearnParams(), {}, unreachable="later")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    (line,) = told(tmp_path)
    assert line.startswith("learn: a process is still at it")
    run.close("FINISHED")  # MLflow answers again: the run itself sends what is there
    assert run.client.get_run(run.id).info.status == "FINISHED"
    assert told(tmp_path) == []


def abandoned(root: Path) -> StageRun:
    """A run that MLflow did not answer, whose process was killed."""
    files = {"code.json": b"{}", "params.yaml": b"x: 1\n"}
    made_of = Provenance(tags={"code": "c"}, files=files)
    run = StageRun(root, "learn", stand_in.LearnParams(), {}, made_of=made_of, unreachable="later")
    run(Metrics(1, {"train_loss": 0.5}))
    run._stop.set()
    run._thread.join()
    run._held.close()
    return run


def test_a_run_of_another_checkout_goes_to_the_projects_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an experiment of DVC's has one, whose folder is gone by then."""
    project = tmp_path / "project"
    checkout = project / ".dvc" / "tmp" / "exps" / "x"
    checkout.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    abandoned(checkout)
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.rmtree(checkout)
    assert len(told(project)) == 1
    client = connect(project)
    experiment = client.get_experiment_by_name("gpt-pipeline/learn")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    assert not checkout.exists()


def test_a_line_that_was_cut_off_and_half_an_upload_stop_nothing(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    box = abandoned(tmp_path)._outbox
    with box.journal.open("ab") as file:
        file.write(b'["metrics", 2, {"train_')
    box.write("metrics", 3, {"train_loss": 0.25}, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    aside = box.files / "params.yaml"
    (box.files / "lineage" / "params.yaml").rename(aside)  # as if it had not been reached yet
    with monkeypatch.context() as patch:
        patch.setattr(sender.Sender, "_log_data_sets", lambda *_: 1 / 0)
        with pytest.raises(RunError):
            told(tmp_path)
    aside.rename(box.files / "lineage" / "params.yaml")
    assert len(told(tmp_path)) == 1
    client = connect(tmp_path)
    run = client.search_runs(
        [each.experiment_id for each in client.search_experiments()],
        f"tags.`outbox.id` = '{box.name}'",
    )[0]
    assert sorted(steps(client, run, "train_loss")) == [1, 3]
    lineage = {each.path for each in client.list_artifacts(run.info.run_id, "lineage")}
    assert lineage == {"lineage/code.json", "lineage/params.yaml"}


def test_a_kept_run_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / ".pipeline" / "unsent" / "learn-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "unsent.json").write_text("{")
    (line,) = [each.text for each in sender.send_quietly(tmp_path)]
    assert line.startswith(".pipeline/unsent/learn-0123456789ab: cannot be read")
    assert folder.exists()


def test_a_run_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path, "learn-1") as ours:
        assert ours
        with held(tmp_path, "learn-1") as ours:
            assert not ours
    assert not list((tmp_path / ".pipeline" / "outbox").iterdir())


# --- kept by earlier versions ---------------------------------------------------------------------


def kept_before(root: Path, continues: str | None) -> None:
    """A run as earlier versions kept it: a database of its own, the files beside it."""
    folder = root / ".pipeline" / "unsent" / "pretrain-0123456789ab"
    folder.mkdir(parents=True)
    uri = f"sqlite:///{folder}/mlflow.db"
    with connection._unchanged_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    client = MlflowClient()
    place = (folder / "artifacts").as_uri()
    experiment = client.create_experiment("gpt-pipeline/pretrain", place)
    run_id = client.create_run(experiment, 1_000_000, {"number": "1", "code": "c"}).info.run_id
    client.log_param(run_id, "train.steps", "2")
    for step in (1, 2, 3):
        client.log_metric(run_id, "loss/train", 1 / step, 1_000_000 + 1000 * step, step)
    client.log_metric(run_id, "system/cpu", 1.0, 1_060_000, 0)
    client.log_text(run_id, "once", "samples/a.txt")
    directory = root / "models" / "pretrain"
    save_model(GPT(CONFIG), directory, tokenizer=byte_tokenizer())
    registry.save_model("base", directory, root / "saved")
    model = client.create_logged_model(experiment, "base", run_id)
    client.log_model_artifacts(model.model_id, str(root / "saved"))
    client.create_registered_model("base")
    source, tags = f"models:/{model.model_id}", {"md5": "m"}
    client.create_model_version("base", source, run_id, tags, model_id=model.model_id)
    client.set_tag(run_id, "output.models/pretrain", "m")
    client.set_terminated(run_id, "FINISHED", 1_070_000)
    about = {"stage": "pretrain", "root": str(root), "home": str(root), "state": None}
    write_json(folder / "unsent.json", {**about, "continues": continues, "begun": 1000.0})
    write_json(root / ".pipeline/runs/pretrain.json", {"run_id": continues or run_id})


@pytest.mark.parametrize("continued", [False, True])
def test_a_run_that_an_earlier_version_kept_is_sent(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, continued: bool
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path)
    continues = None
    if continued:
        client = connect(tmp_path)
        place = connection.artifact_folder(tmp_path, "pretrain")
        experiment = connection.experiment_of(client, "pretrain", place, "")
        continues = client.create_run(experiment, 900_000).info.run_id
        client.log_metric(continues, "loss/train", 1.0, 1_001_000, 1)
        client.log_metric(continues, "system/cpu", 1.0, 1_000_500, 0)
    (tmp_path / ".pipeline" / "runs").mkdir(parents=True)
    kept_before(tmp_path, continues)
    (line,) = told(tmp_path)
    assert "(finished) is in MLflow" in line
    assert told(tmp_path) == []
    client = connect(tmp_path)
    run = client.get_run(note(tmp_path, "pretrain")["run_id"])
    assert continues in (None, run.info.run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", 1_070_000)
    assert run.data.tags["output.models/pretrain"] == "m"
    assert run.data.params["train.steps"] == "2"
    assert steps(client, run, "loss/train") == [1, 2, 3]
    assert steps(client, run, "system/cpu") == ([0, 60] if continued else [60])
    assert client.list_artifacts(run.info.run_id, "samples")
    version = client.get_model_version_by_alias("base", "candidate")
    assert (version.run_id, version.tags["md5"]) == (run.info.run_id, "m")
    assert not list((tmp_path / ".pipeline" / "unsent").iterdir())
