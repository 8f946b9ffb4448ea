"""A stage executed: exit codes, lines, the MLflow run, and going on after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_in

from pipeline.dag.cache import dvc_md5
from pipeline.run.stage import MIRROR_VARIABLE, end_killed, run_stage, system_fault
from pipeline.tracking.connection import connect

HERE = Path(__file__).parent.parent


@pytest.fixture
def fresh_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)
    stand_in.install(monkeypatch)
    return stand_in.make_project(tmp_path)


@pytest.fixture
def project(fresh_project: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, fresh_project / "mlflow.db")
    return fresh_project


def note(project: Path, stage: str) -> dict[str, Any]:
    return json.loads((project / ".pipeline" / "runs" / f"{stage}.json").read_text())


def run_of(project: Path, stage: str) -> Any:
    return connect(project).get_run(note(project, stage)["run_id"])


def steps(project: Path, stage: str, metric: str) -> list[int]:
    history = connect(project).get_metric_history(note(project, stage)["run_id"], metric)
    return [entry.step for entry in history]


def start(stage: str, project: Path, **environment: str) -> subprocess.Popen[str]:
    """The stage in a process of its own."""
    path = os.pathsep.join((str(HERE), str(HERE.parent.parent)))
    return subprocess.Popen(
        [sys.executable, str(HERE / "stand_in.py"), stage, str(project)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def checkpoint(project: Path) -> Path | None:
    return next((project / ".checkpoints" / "learn").glob("*/step.json"), None)


def test_a_finished_stage_leaves_a_run_with_parameters_metrics_and_lineage(project: Path) -> None:
    assert run_stage("prepare", project) == 0
    assert run_stage("learn", project) == 0
    written = note(project, "learn")
    assert written["status"] == "FINISHED"
    assert written["experiment"] == "gpt-pipeline/learn"
    page = f"/#/experiments/{written['experiment_id']}/runs/{written['run_id']}"
    assert page in written["url"]
    run = run_of(project, "learn")
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.5"
    assert run.data.params["sources"] == "a, b"
    assert run.data.metrics["validation_loss"] == 0.1
    assert run.data.tags["dvc.stage"] == "learn"
    assert run.data.tags["input.data/prepared"] == dvc_md5(project / "data/prepared")
    assert run.data.tags["output.models/learnt"] == dvc_md5(project / "models/learnt")
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["data/prepared"]
    prepared = run_of(project, "prepare")
    assert prepared.data.metrics["by_source/b"] == 2
    assert prepared.data.tags["output.data/prepared"] == run.data.tags["input.data/prepared"]


def test_every_step_the_samples_and_the_curves_are_in_the_run(project: Path) -> None:
    run_stage("prepare", project)
    run_stage("learn", project)
    assert steps(project, "learn", "train_loss") == list(range(1, 21))
    assert steps(project, "learn", "validation_loss") == [5, 10, 15, 20, 21]
    client, run_id = connect(project), note(project, "learn")["run_id"]
    assert "system/cpu_utilization_percentage" in client.get_run(run_id).data.metrics
    samples = [file.path for file in client.list_artifacts(run_id, "samples")]
    assert samples == [f"samples/step-{step:06d}.txt" for step in (5, 10, 15, 20)]
    plots = [file.path for file in client.list_artifacts(run_id, "plots")]
    assert plots == ["plots/learning_rate.png", "plots/loss.png"]


@pytest.mark.parametrize("what", ["code.py", "params.yaml", "data/prepared"])
def test_a_stage_edited_while_it_runs_fails_and_goes_on_when_that_is_put_back(
    project: Path, tmp_path: Path, what: str
) -> None:
    assert run_stage("prepare", project) == 0
    hold = tmp_path / "hold"
    hold.touch()
    stand_in.set_params(project, learn={"hold": str(hold), "train": {"learning_rate": 0.5}})
    file = project / what
    file = next(file.iterdir()) if file.is_dir() else file
    before = file.read_text()
    process = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    file.write_text(before.replace("0.5", "0.25") + "\n" * (what != "params.yaml"))
    hold.unlink()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    edited = "learn in params.yaml" if what == "params.yaml" else what
    assert f"error: learn: {edited} changed while it ran, so nobody could say what made" in said
    failed = run_of(project, "learn")
    assert failed.info.status == "FAILED"
    assert not [tag for tag in failed.data.tags if tag.startswith("output.")]

    file.write_text(before)
    assert run_stage("learn", project) == 0
    run = run_of(project, "learn")
    assert (run.info.run_id, run.info.status) == (failed.info.run_id, "FINISHED")
    assert run.data.tags["resumed"] == "1"


def test_a_second_run_is_named_after_what_differs(project: Path) -> None:
    run_stage("prepare", project)
    run_stage("learn", project)
    stand_in.set_params(project, learn={"train": {"learning_rate": 0.25}})
    run_stage("learn", project)
    assert run_of(project, "learn").info.run_name == "#2 train.learning_rate=0.25"


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("input", 2, "source.txt: line 3 is bad; correct it"),
        ("secret", 2, "https://host/file?token=*** (403); correct it"),
        ("run", 1, "the disk is full; free some"),
    ],
)
def test_a_failure_is_one_line_an_exit_code_and_a_failed_run(
    project: Path, capsys: pytest.CaptureFixture[str], kind: str, code: int, line: str
) -> None:
    stand_in.set_params(project, prepare={"fail": kind})
    assert run_stage("prepare", project) == code
    assert capsys.readouterr().err == f"error: {line}\n"
    verdict = json.loads((project / ".pipeline/exit/prepare.json").read_text())
    assert verdict == {"code": code, "error": line}
    run = run_of(project, "prepare")
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == line
    stand_in.set_params(project)
    assert run_stage("prepare", project) == 0
    assert not (project / ".pipeline/exit/prepare.json").exists()


def test_out_of_memory_is_told_with_what_to_lower() -> None:
    assert system_fault(MemoryError()).startswith("out of memory; lower batch_size")


def test_a_mistake_of_ours_shows_its_traceback_and_fails_the_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.set_params(project, prepare={"fail": "bug"})
    assert run_stage("prepare", project) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run_of(project, "prepare").info.status == "FAILED"


def test_a_missing_input_is_named_with_its_remedy_and_no_run_is_made(
    fresh_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = fresh_project
    assert run_stage("learn", project) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "data/prepared" in error
    assert "gpt-pipeline run" in error
    assert not (project / "mlflow.db").exists()


def test_an_unreachable_mlflow_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/no/such/folder/mlflow.db")
    (project / "no").write_text("a file, so no folder can be made there")
    assert run_stage("prepare", project) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "MLFLOW_TRACKING_URI" in error


def test_the_mirror_comes_from_the_environment(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MIRROR_VARIABLE, "/a/folder")
    run_stage("prepare", project)
    assert "mirror /a/folder" in capsys.readouterr().out


def test_a_run_killed_hard_goes_on_as_the_same_run_with_each_step_once(project: Path) -> None:
    run_stage("prepare", project)
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 60}})
    process = start("learn", project)
    wait_for(lambda: (c := checkpoint(project)) is not None and int(c.read_text()) >= 10)
    process.kill()
    process.communicate()
    killed = note(project, "learn")
    assert killed["status"] == "RUNNING"
    process = start("learn", project)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert note(project, "learn")["run_id"] == killed["run_id"]
    assert steps(project, "learn", "train_loss") == list(range(1, 61))
    assert steps(project, "learn", "validation_loss") == [*range(5, 61, 5), 61]
    assert run_of(project, "learn").data.tags["resumed"] == "1"
    assert not list((project / ".checkpoints/learn").iterdir())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_stopped_run_is_marked_killed(project: Path, number: signal.Signals, code: int) -> None:
    run_stage("prepare", project)
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 1000}})
    process = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == code
    assert error.count("\n") == 1
    assert run_of(project, "learn").info.status == "KILLED"
    assert note(project, "learn")["status"] == "KILLED"


def test_a_stage_ends_with_the_flow_that_started_it(project: Path) -> None:
    run_stage("prepare", project)
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 1000}})
    process = start("learn", project, GPT_PIPELINE_EVENTS=str(project / "events.jsonl"))
    wait_for(lambda: checkpoint(project) is not None)
    assert process.stdin is not None
    process.stdin.close()  # as it is when the flow's process is gone
    assert process.wait(timeout=30) == 143
    assert run_of(project, "learn").info.status == "KILLED"


def test_whoever_sees_that_a_stage_was_killed_ends_its_run_and_the_stage_goes_on_with_it(
    project: Path,
) -> None:
    run_stage("prepare", project)
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 60}})
    process = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    end_killed(project, "learn", project)
    assert run_of(project, "learn").info.status == "RUNNING"
    process.kill()
    process.communicate()
    killed = note(project, "learn")["run_id"]
    end_killed(project, "learn", project)
    assert run_of(project, "learn").info.status == note(project, "learn")["status"] == "KILLED"
    process = start("learn", project)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert note(project, "learn")["run_id"] == killed
    assert run_of(project, "learn").info.status == "FINISHED"


def test_other_parameters_start_anew_and_end_the_run_that_was_left_behind(project: Path) -> None:
    run_stage("prepare", project)
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 1000}})
    process = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    process.kill()
    process.communicate()
    abandoned = note(project, "learn")["run_id"]
    stand_in.set_params(project, learn={"train": {"steps": 10}})
    assert run_stage("learn", project) == 0
    assert note(project, "learn")["run_id"] != abandoned
    assert connect(project).get_run(abandoned).info.status == "KILLED"
    assert steps(project, "learn", "train_loss") == list(range(1, 11))


@pytest.mark.parametrize("changed", ["params", "input", "code"])
def test_state_is_found_again_only_under_equal_parameters_inputs_and_code(
    project: Path, changed: str
) -> None:
    run_stage("prepare", project)
    stand_in.set_params(project, learn={"fail_at": 13})
    assert run_stage("learn", project) == 1
    first = checkpoint(project)
    assert first is not None
    match changed:
        case "params":
            stand_in.set_params(project, learn={"fail_at": 14})
        case "input":
            (project / "data/prepared/text").write_text("other")
        case "code":
            (project / "code.py").write_text("x = 2\n")
    assert run_stage("learn", project) == 1
    assert len(list((project / ".checkpoints/learn").iterdir())) == 2


def test_stages_that_start_side_by_side_in_a_fresh_project_all_get_their_run(
    fresh_project: Path,
) -> None:
    project = fresh_project
    stages = ("prepare", "copy", "third")
    processes = [start(stage, project) for stage in stages]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert [run_of(project, stage).info.status for stage in stages] == ["FINISHED"] * 3
