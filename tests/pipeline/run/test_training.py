"""The real pretraining stage as it is run: what goes wrong, several processes, and their deaths."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from local_servers import free_port
from mlflow_server import MlflowServer

from gpt.base.files import sha256_of
from gpt.text.records import RawFile, write_sources
from pipeline.tracking.connection import connect
from pipeline.tracking.outbox import outboxes
from pipeline.tracking.sender import send_all
from stages.tokenize import TokenizeParams, tokenize

ROOT = Path(__file__).resolve().parent.parent.parent.parent
pytestmark = pytest.mark.slow

STEPS = 80


def set_train(root: Path, **values: object) -> None:
    params = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    params["tokenize"] = {"tokenizer": "bytes"}
    params["pretrain"]["model"]["dropout"] = 0.1
    params["pretrain"]["train"] |= {
        "steps": STEPS,
        "eval_interval": 40,
        "devices": 2,
        "checkpoint_seconds": 0.2,
        **values,
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    corpus = root / "data" / "raw" / "corpus"
    corpus.mkdir(parents=True)
    shutil.copy(ROOT / "samples" / "stories.txt", corpus / "stories.txt")
    write_sources(
        corpus,
        [
            RawFile(
                name="stories",
                file="stories.txt",
                kind="documents",
                format="text",
                bytes=(corpus / "stories.txt").stat().st_size,
                sha256=sha256_of(corpus / "stories.txt"),
            )
        ],
    )
    tokenize(
        TokenizeParams(tokenizer="bytes", validation=0.2, split="tail"),
        corpus=corpus,
        vocabulary=None,
        out=root / "data" / "tokens",
        metrics=root / "metrics.json",
        report=root / "report.json",
    )
    for name in ("gpt", "stages"):  # the code is part of a state's fingerprint
        shutil.copytree(ROOT / name, root / name)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    set_train(root)
    return root


def start(root: Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "stage", "pretrain"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(root: Path) -> tuple[int, str, str]:
    process = start(root)
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


def workers(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The workers of a stage by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return found


def wait_for_state(root: Path) -> None:
    end = time.monotonic() + 100
    while not list((root / ".checkpoints" / "pretrain").glob("*/step-*.pt")):
        assert time.monotonic() < end, "no state was saved"
        time.sleep(0.05)


def curve(root: Path) -> list[tuple[int, float]]:
    """The training losses that the stage's last run has in MLflow."""
    note = json.loads((root / ".pipeline" / "runs" / "pretrain.json").read_text())
    history = connect(root).get_metric_history(note["run_id"], "train_loss")
    return sorted((metric.step, metric.value) for metric in history)


def weights(root: Path) -> bytes:
    return (root / "models" / "pretrain" / "model.safetensors").read_bytes()


def leftovers(root: Path) -> list[Path]:
    return [*root.glob(".checkpoints/pretrain/*"), *root.glob(".pipeline/meeting-*")]


@pytest.fixture
def mlflow_server(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlflowServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder / "server.db")
    server = MlflowServer(folder)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


def one_line(error: str) -> str:
    """The only line on stderr."""
    assert error.count("\n") == 1, error
    return error.strip()


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_which_goes_on_once_there_is_room(project: Path) -> None:
    set_train(project, devices=1)
    assert run(project)[0] == 0
    straight = weights(project), curve(project)
    states = project / ".checkpoints"
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(states)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        code, _, error = run(project)
        assert code == 1
        said = one_line(error)
        assert said.startswith(f"error: {states}/pretrain/")
        assert "could not be saved (No space left on device); make room there" in said
        assert not list(states.rglob(".*.partial")), "nothing half-written is left"
        subprocess.run(["mount", "-o", "remount,size=64m", str(states)], check=True)
        code, _, error = run(project)
        assert code == 0, error
        assert (weights(project), curve(project)) == straight
    finally:
        subprocess.run(["umount", "-l", str(states)], check=True)


def test_a_place_where_no_state_can_be_kept_is_told_before_any_work(project: Path) -> None:
    set_train(project, devices=1)
    (project / ".checkpoints").write_text("in the way")
    code, out, error = run(project)
    assert code == 2
    assert ".checkpoints" in one_line(error)
    assert "Not a directory" in error
    assert "step" not in out
    (project / ".checkpoints").unlink()
    assert run(project)[0] == 0


def test_a_loss_that_is_not_finite_ends_with_its_step_its_rows_and_the_last_state(
    project: Path,
) -> None:
    set_train(project, devices=1, learning_rate=1e25, grad_clip=0, warmup_steps=10, eps=1e-30)
    code, _, error = run(project)
    assert code == 1
    assert re.fullmatch(
        r"error: pretrain: the loss is \S+ and the gradient norm \S+ at step \d+, on tokens [\d,]+ "
        r"to [\d,]+ of the training split; .*; and 5 more; lower the learning rate, raise "
        r"warmup_steps, or mend the data\.( The state of step \d+ is kept\.)?",
        one_line(error),
    )
    assert not (project / "models" / "pretrain").exists()


@pytest.mark.parametrize(("unreachable", "devices"), [("stop", 1), ("later", 2)])
def test_a_training_whose_mlflow_dies_loses_nothing(
    project: Path, mlflow_server: MlflowServer, unreachable: str, devices: int
) -> None:
    steps = 4 * STEPS  # long enough to find out before the end
    set_train(project, devices=devices, steps=steps)
    assert run(project)[0] == 0
    straight = weights(project), curve(project)

    set_train(project, devices=devices, steps=steps)
    with (project / "params.yaml").open("a") as params:
        params.write(f"tracking: {{unreachable: {unreachable}}}\n")
    process = start(project)
    wait_for_state(project)
    mlflow_server.kill()
    out, error = process.communicate(timeout=200)
    assert "does not answer: Connection refused: pretrain goes on" in out
    if unreachable == "stop":
        assert process.returncode == 1
        assert "Connection refused" in one_line(error)
        mlflow_server.start()
        code, out, error = run(project)
        assert code == 0, error
        assert f"continuing from step {steps} of {steps}" in out
    else:
        assert process.returncode == 0, error
        mlflow_server.start()
        send_all(project, print)
    assert (weights(project), curve(project)) == straight
    assert not leftovers(project)
    assert not outboxes(project)
    versions = connect(project).search_model_versions("name = 'base'")
    assert len(versions) == 1, "the same bytes are one version"


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_worker_is_killed_ends_as_if_it_had_not_been(project: Path, rank: int) -> None:
    code, _, error = run(project)
    assert code == 0, error
    straight = weights(project), curve(project)
    assert [step for step, _ in straight[1]] == list(range(1, STEPS + 2))

    process = start(project)
    wait_for_state(project)
    workers(process)[rank].kill()
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert "continuing from step" in out
    assert (weights(project), curve(project)) == straight
    assert not leftovers(project)


def test_a_stopped_run_goes_on_with_one_process(project: Path) -> None:
    process = start(project)
    wait_for_state(project)
    process.terminate()
    _, error = process.communicate(timeout=100)
    assert process.returncode == 143
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: pretrain stopped after step ")
    assert last.endswith(f"of {STEPS}; its state is saved, and the same command goes on from there")
    assert error.count("error:") == 1
    set_train(project, devices=1)
    code, out, error = run(project)
    assert code == 0, error
    assert "continuing from step" in out
    assert [step for step, _ in curve(project)] == list(range(1, STEPS + 2))
    assert not leftovers(project)


def test_a_step_too_small_to_be_shared_is_one_line_and_no_restarts(project: Path) -> None:
    set_train(project, batch_size=1)
    code, _, error = run(project)
    assert code == 2
    assert error.strip().splitlines() == [
        "error: train.devices: a step of 1 rows cannot be shared by 2 devices; "
        "raise batch_size or accumulation, or use fewer devices"
    ]


def test_workers_end_with_the_process_that_started_them(project: Path) -> None:
    set_train(project, steps=100_000)
    process = start(project)
    wait_for_state(project)
    started = list(workers(process).values())
    assert len(started) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


def test_two_machines_train_one_model_and_the_first_writes(project: Path, tmp_path: Path) -> None:
    code, _, error = run(project)  # two processes of one machine
    assert code == 0, error
    straight = weights(project), curve(project)
    other = tmp_path / "other"
    shutil.copytree(
        project, other, ignore=shutil.ignore_patterns("models", "reports", ".*", "*.db")
    )
    for root in (project, other):
        set_train(root, devices=1)
    port = free_port()
    nodes = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    machines = [
        start(root, **nodes, PET_NODE_RANK=str(rank)) for rank, root in enumerate((project, other))
    ]
    ends = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    assert (weights(project), curve(project)) == straight
    assert not (other / "models").exists()
    assert not (other / "mlflow.db").exists()
    assert ends[1] == ("", ""), "the second machine says nothing"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PET_NNODES": "two"}, "error: PET_NNODES: 'two' is not a whole number"),
        ({"PET_NNODES": "2"}, "error: pretrain: PET_NNODES is 2 but PET_MASTER_ADDR is not set"),
    ],
)
def test_a_wrong_variable_is_one_line(
    project: Path, variables: dict[str, str], message: str
) -> None:
    process = start(project, **variables)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith(message)
    assert error.count("\n") == 1
