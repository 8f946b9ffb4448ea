"""Checksums as DVC's, the cost of a step, names of runs, data sets."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stand_in
import yaml
from data_project import add_corpus, add_messages, raw_file
from pydantic import TypeAdapter

from gpt.base.errors import RunError
from gpt.base.events import Metrics
from gpt.base.files import sha256_of, write_json
from gpt.text.records import read_sources, write_sources
from gpt.tokens.token_files import Counts, Manifest, Shard, SplitManifest
from pipeline.dag.cache import dvc_md5
from pipeline.data.sets import input_sets, made_sets
from pipeline.tracking import connection
from pipeline.tracking import run as tracking
from pipeline.tracking.keys import is_result, key_of, present_metrics
from pipeline.tracking.run import DataSet, StageRun


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
    connection.connect(project)
    other = tmp_path_factory.mktemp("other")
    assert connection.tracking_uri(other) == f"sqlite:///{other.resolve()}/mlflow.db"
    connection.connect(other)
    assert (other / "mlflow.db").exists()


def test_an_error_is_shown_on_a_run_s_page_as_text(project: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, project)
    run = StageRun(project, "learn", stand_in.LearnParams(), {})
    error = "data/<img src=x>: [click](http://example.org) | no file"
    run.close("FAILED", error=error)
    tags = run.client.get_run(run.id).data.tags
    assert tags["error"] == error
    assert not any(
        each in tags["mlflow.note.content"] for each in ("<img", "[click]", "://", " | ")
    )


def test_long_lists_of_records_are_summarised() -> None:
    sources = tuple({"name": f"source-{i}", "sha256": "0" * 64} for i in range(200))
    flat = tracking.flatten(stand_in.LearnParams(sources=sources))
    assert flat["sources"].startswith("source-0, source-1, ")
    assert len(flat["sources"]) <= 500
    assert flat["train.steps"] == "20"


def test_a_run_killed_right_after_its_end_was_written_has_its_results_once(project: Path) -> None:
    state = project / "state"
    state.mkdir()
    for _ in range(2):  # the second is the start after the kill, which finds the state still there
        run = StageRun(project, "learn", stand_in.LearnParams(), {}, state=state)
        run(Metrics(1, {"train_loss": 2.0}))
        run.close("FINISHED", metrics={"accuracy": 0.5})
    for name in ("accuracy", "train_loss"):
        assert len(run.client.get_metric_history(run.id, name)) == 1, name


def test_metrics_of_earlier_runs_are_read_under_their_present_names() -> None:
    earlier = {
        "result/validation_loss": 2.0,
        "loss/validation": 2.5,
        "reward_accuracy/validation": 0.75,
        "result/validation_loss/docs": 3.0,
        "throughput/tokens": 64.0,
        "optimizer/grad_norm": 1.0,
        "system/cpu_utilization_percentage": 5.0,
        "pretrain/loss/docs": 4.0,
    }
    present = {
        "validation_loss": 2.0,  # the final value, not the last of the curve
        "validation_reward_accuracy": 0.75,
        "validation_loss/docs": 3.0,
        "tokens": 64.0,
        "grad_norm": 1.0,
        "system/cpu_utilization_percentage": 5.0,
        "pretrain/loss/docs": 4.0,
    }
    assert present_metrics(earlier) == present_metrics(present) == present
    results = {name for name in present if is_result(name)}
    assert present.keys() - results == {"grad_norm", "system/cpu_utilization_percentage"}


# --- names from outside ----------------------------------------------------------------------

ODD_NAMES = [
    "Society & Culture",
    "Society _ Culture",
    "don't know",
    "Refund (urgent) 100 %",
    "\N{GRINNING FACE}",
    "cafe\u0301",
    "a/../b",
    "a//b",
    "..",
    "a/",
    "x" * 250,
    "x" * 260,
    "x" * 261,
    "a\n",
    "nul\0",
    key_of("don't know"),  # it looks like a key that was made
]


def test_names_from_outside_have_keys_that_mlflow_takes_each_its_own() -> None:
    from mlflow.utils.validation import _validate_metric

    for prefix in ("", "classifier/f1_"):
        keys = [key_of(prefix + name) for name in ODD_NAMES]
        for key in keys:
            _validate_metric(key, 0.0, 0, 0)
        assert len(set(keys)) == len(keys)
    assert key_of("don't know").startswith("don_t know__")
    for name in ("classifier/f1_ham", "loss/python-docs", "f1_Grüße: 1", "a/b"):
        assert key_of(name) == name


def test_a_run_keeps_figures_of_classes_with_any_name(project: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, project / "mlflow.db")
    urls = [f"https://example.org/{i:0100}" for i in range(1000)]  # more than MLflow takes
    source = {"url": urls[0], "urls": urls}
    many = DataSet(name="x" * 600, digest="1", context="raw", source_type="http", source=source)
    inputs = {"my data & more": "md5"}
    run = StageRun(project, "learn", stand_in.LearnParams(), inputs, data_sets=[many])
    metrics = {"classifier": {f"f1_{name}": float(i) for i, name in enumerate(ODD_NAMES)}}
    run.close("FINISHED", metrics=metrics, outputs={"a (b)": "md5"})
    (listed,) = run.client.get_run(run.id).inputs.dataset_inputs
    assert json.loads(listed.dataset.source) == {"url": urls[0]}
    logged = run.client.get_run(run.id).data
    found = [logged.metrics[key_of(f"classifier/f1_{name}")] for name in ODD_NAMES]
    assert found == [float(i) for i in range(len(ODD_NAMES))]
    made = connection.run_that_made(run.client, "learn", None, {"a (b)": "md5"})
    assert made is not None
    assert made.info.run_id == run.id


PLACE: Any = {"context": "raw", "source_type": "local", "source": {"uri": "x"}}


def test_what_mlflow_refuses_is_not_blamed_on_its_address(project: Path) -> None:
    run = StageRun(project, "learn", stand_in.LearnParams(), {})
    run.add_data_sets([DataSet(name="x", digest="1" * 50, **PLACE)])
    with pytest.raises(RunError) as refused:
        run.close("FINISHED")
    said = str(refused.value)
    assert "'digest' exceeds the maximum length" in said
    assert said.endswith("it answers, and refuses this name or value: change that one")
    assert "MLFLOW_TRACKING_URI" not in said


# --- data sets ------------------------------------------------------------------------------------


def shown_sets(run: StageRun) -> dict[str, tuple[str, dict[str, Any]]]:
    """What the run's page lists: name -> context and profile."""
    inputs = run.client.get_run(run.id).inputs.dataset_inputs
    return {
        each.dataset.name: (each.tags[0].value, json.loads(each.dataset.profile or "{}"))
        for each in inputs
    }


def add_manifest(folder: Path) -> None:
    counts = Counts(documents=3, bytes=40, tokens=10)
    shard = Shard(file="train-0.bin", source="docs", sha256="0" * 64, counts=counts)
    split = SplitManifest(shards=(shard,))
    manifest = Manifest(dtype="uint16", vocab_size=257, tokenizer="0", splits={"train": split})
    write_json(folder / "manifest.json", TypeAdapter(Manifest).dump_python(manifest))


def test_a_training_s_page_says_what_it_learnt_from(project: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, project / "mlflow.db")
    add_manifest(project / "data" / "tokens")
    add_messages(project, [("ham", "a"), ("spam", "b")])
    paths = ("data/tokens", "data/raw/messages", "models/gpt2")
    (project / "models" / "gpt2").mkdir(parents=True)
    md5s = {path: dvc_md5(project / path) for path in paths}
    sets = input_sets(project, md5s, trains=True)
    run = StageRun(project, "learn", stand_in.LearnParams(), md5s, data_sets=sets)
    run.close("FINISHED")
    figures = {"documents": 3, "bytes": 40, "tokens": 10}
    size = (project / "data/raw/messages/messages.tsv").stat().st_size
    assert shown_sets(run) == {
        "data/tokens": ("training", figures | {f"train_{key}": n for key, n in figures.items()}),
        "data/raw/messages": ("training", {"rows": 2, "files": 1, "bytes": size}),
        "models/gpt2": ("input", {}),
    }


def test_a_data_set_is_known_by_the_bytes_of_its_files(project: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, project / "mlflow.db")
    add_corpus(project, ["local", "web"])
    folder = "data/raw/corpus"
    first = made_sets(project, {}, {folder: "md5"})
    assert [(each.name, each.context, each.source_type) for each in first] == [
        ("local", "raw", "local"),
        ("web", "raw", "http"),
    ]
    sha256 = sha256_of(project / folder / "0.txt")
    assert first[0].digest == f"{sha256[:16]}-100"
    assert first[0].source["sha256"] == sha256
    files = read_sources(project / folder)
    both = [dataclasses.replace(file, name="both") for file in files]
    write_sources(project / folder, both)
    (joined,) = made_sets(project, {}, {folder: "md5"})
    assert joined.digest not in {each.digest for each in first}
    assert joined.profile["files"] == 2
    # what MLflow keeps of the first is not told of other documents out of the same bytes
    write_sources(project / folder, [dataclasses.replace(file, records=7) for file in files])
    again = made_sets(project, {}, {folder: "md5"})
    assert not {each.digest for each in again} & {each.digest for each in first}
    # once more by a process that went on where the first was killed: each is there once
    run = StageRun(project, "learn", stand_in.LearnParams(), {})
    run.add_data_sets([*first, joined])
    run.add_data_sets([*first, joined])
    run.close("FINISHED")
    assert set(shown_sets(run)) == {"local", "web", "both"}
    assert len(run.client.get_run(run.id).inputs.dataset_inputs) == 3


def test_the_tokens_that_a_stage_made_are_named_for_training(project: Path) -> None:
    add_corpus(project, ["docs"])
    add_manifest(project / "data" / "tokens")
    sets = made_sets(project, {"data/raw/corpus": "a"}, {"data/tokens": "b.dir", "reports/x": "c"})
    assert [(each.name, each.digest, each.context) for each in sets][1:] == [
        ("data/tokens", "b.dir", "train")
    ]
    # what the stage only read is no data set that it made
    assert made_sets(project, {"data/tokens": "b.dir"}, {}) == []


def test_files_of_a_model_are_no_data_set(project: Path) -> None:
    folder = project / "data" / "raw" / "gpt2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_sources(folder, [raw_file(folder / "config.json", "config", "file", "file", 0)])
    assert made_sets(project, {}, {"data/raw/gpt2": "a"}) == []
