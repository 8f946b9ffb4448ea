"""Checksums as DVC's, the cost of a step, names of runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in
import yaml

from gpt.events import Metrics
from pipeline import tracking
from pipeline.tracking import StageRun, dvc_md5


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_checksums_are_those_of_dvc(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "é.txt").write_text("text\r\n", encoding="utf-8")
    (folder / "b" / "c" / "bytes").write_bytes(bytes(range(256)) * 5000)
    (folder / "b.txt").touch()
    (tmp_path / "file").write_text("one\n")
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}

    def dvc(*arguments: str) -> None:
        command = [sys.executable, "-m", "dvc", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)

    dvc("init", "--no-scm")
    dvc("add", "folder", "file")
    for name in ("folder", "file"):
        (out,) = yaml.safe_load((tmp_path / f"{name}.dvc").read_text())["outs"]
        assert dvc_md5(tmp_path / name) == out["md5"]


def test_a_step_is_logged_in_microseconds(project: Path) -> None:
    run = StageRun(project, "learn", stand_in.LearnParams(), {})
    values = {f"group/{i}": float(i) for i in range(6)}
    started = time.perf_counter()
    for step in range(2000):
        run(Metrics(step, values))
    each = (time.perf_counter() - started) / 2000
    run.close("FINISHED")
    assert each < 0.001
    history = run.client.get_metric_history(run.id, "group/5")
    assert [entry.step for entry in history] == list(range(2000))


def test_a_write_that_fails_for_a_while_loses_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.02)
    run = StageRun(project, "learn", stand_in.LearnParams(), {})
    write, failures = run.client.log_batch, []

    def fails_at_first(*arguments: object, **keywords: object) -> None:
        if len(failures) < 3:
            failures.append(1)
            raise OSError("database is locked")
        write(*arguments, **keywords)

    monkeypatch.setattr(run.client, "log_batch", fails_at_first)
    for step in range(100):
        run(Metrics(step, {"x": 1.0}))
        time.sleep(0.002)
    run.close("FINISHED")
    assert len(failures) == 3
    history = run.client.get_metric_history(run.id, "x")
    assert [entry.step for entry in history] == list(range(100))


def test_another_project_in_the_same_process_has_its_own_database(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tracking.connect(project)
    other = tmp_path_factory.mktemp("other")
    assert tracking.tracking_uri(other) == f"sqlite:///{other.resolve()}/mlflow.db"
    tracking.connect(other)
    assert (other / "mlflow.db").exists()


def test_long_lists_of_records_are_summarised() -> None:
    sources = tuple({"name": f"source-{i}", "sha256": "0" * 64} for i in range(200))
    flat = tracking.flatten(stand_in.LearnParams(sources=sources))
    assert flat["sources"].startswith("source-0, source-1, ")
    assert len(flat["sources"]) <= 500
    assert flat["train.steps"] == "20"


def test_git_tags_say_whether_the_code_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    assert tracking.git_state(tmp_path) == {}
    git("init", "-q")
    for name in ("code.py", "dvc.lock"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    assert tracking.git_state(tmp_path)["git.dirty"] == "false"
    (tmp_path / "dvc.lock").write_text("2")  # what a run itself changes
    assert tracking.git_state(tmp_path)["git.dirty"] == "false"
    (tmp_path / "code.py").write_text("2")
    assert tracking.git_state(tmp_path)["git.dirty"] == "true"


def test_a_run_killed_right_after_its_end_was_written_has_its_results_once(project: Path) -> None:
    state = project / "state"
    state.mkdir()
    for _ in range(2):  # the second is the start after the kill, which finds the state still there
        run = StageRun(project, "learn", stand_in.LearnParams(), {}, state=state)
        run(Metrics(1, {"loss/train": 2.0}))
        run.close("FINISHED", metrics={"result": {"accuracy": 0.5}})
    for name in ("result/accuracy", "loss/train"):
        assert len(run.client.get_metric_history(run.id, name)) == 1, name
