"""A table of trainings: every row is checked before any work, and is a run and an experiment."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gpt.base.errors import InputError, RunError
from gpt.base.events import Message, Metrics
from gpt.base.files import sha256_of
from gpt.model.config import GPTConfig
from gpt.model.model import GPT
from gpt.model.weights import load_model, save_model
from gpt.text.records import RawFile, write_sources
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.dag.cache import dvc_md5
from pipeline.sweep.ablation import ablate, markdown, read_rows
from pipeline.tracking.connection import connect
from pipeline.tracking.keys import flatten

ROOT = Path(__file__).resolve().parent.parent.parent.parent

TABLE = {
    "rows": [
        {"name": "All, mean", "set": {"trainable": "all", "pooling": "mean"}},
        {"name": "too deep", "set": {"trainable": "last_blocks", "blocks": 3}},
        {"name": "lora", "set": {"trainable": "lora", "lora.rank": 2, "max_length": None}},
    ]
}


# --- the table ------------------------------------------------------------------------------------


def test_the_shipped_tables_have_rows_that_can_be_trained():
    for path in sorted((ROOT / "ablations").glob("*.yaml")):
        rows = read_rows(ROOT, path)
        assert len({repr(row.params) for row in rows}) == len(rows), "no two rows are the same"
        assert len({row.experiment(path.stem) for row in rows}) == len(rows)
    rows = read_rows(ROOT, ROOT / "ablations" / "sms.yaml")
    assert len(rows) >= 8
    assert {row.params.trainable for row in rows} >= {"all", "last_block", "last_blocks", "lora"}
    by_name = {row.name: row.params for row in rows}
    assert by_name["LoRA, rank 4, last 2 blocks"].lora.rank == 4
    assert by_name["all"].lora is None, "a row changes no other"


def test_with_seeds_every_row_is_trained_with_each(tmp_path):
    (tmp_path / "t.yaml").write_text("seeds: [1, 2]\nrows: [{name: a}, {name: b}]")
    rows = read_rows(ROOT, tmp_path / "t.yaml")
    assert [(row.name, row.choice, row.params.train.seed) for row in rows] == [
        (f"{name}, seed {seed}", name, seed) for name in "ab" for seed in (1, 2)
    ]
    assert [row.experiment("t") for row in rows][:2] == ["t-a-seed-1", "t-a-seed-2"]
    assert len({row.params.split.seed for row in rows}) == 1, "all see the same parts"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rows: []", "must hold `rows`"),
        ("- a", "must hold `rows`"),
        ("rows: [{set: {}}]", "row 1: must hold `name` and `set`"),
        ("rows: [{name: a}, {name: A!}]", "row 2: give it a name of its own"),
        (f"rows: [{{name: {'x' * 101}}}]", "and at most 100 characters"),
        ("rows: [{name: '!'}]", "row 1: give it a name of its own, of letters or digits"),
        ("rows: [{name: a, set: {trainable: some}}]", r"row 'a': .*finetune_classifier\.trainable"),
        ("rows: [{name: a, set: {x: 1}}]", r"row 'a': .*finetune_classifier\.x: unknown parameter"),
        ("rows: [{name: a, set: {base.x: 1}}]", r"row 'a': finetune_classifier\.base\.x is no par"),
        ("rows: [{name: a, set: {train.devices: 2}}]", r"row 'a': .* set train\.devices to 1"),
        ("rows: [{name: a}]\nseeds: 3", "seeds: must be a list of whole numbers"),
        ("rows: [{name: a}]\nseed: [3]", "seed is neither `rows` nor `seeds`"),
        ("rows: [", "line 2, column 1: .*; correct the YAML there"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, complaint):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        read_rows(ROOT, tmp_path / "t.yaml")
    assert "\n" not in str(caught.value)


def record(choice, run, accuracy):
    scores = {"accuracy": accuracy, "validation_accuracy": 0.95, "f1_macro": 0.9}
    return {"choice": choice, "run": run * 16, "scores": scores}


def test_the_table_of_scores_leads_to_the_runs():
    heading, _, row = markdown([record("a | b", "01", 0.9667)]).splitlines()
    assert [cell.strip() for cell in heading.split("|")[1:-1]] == [
        "row", "validation", "test accuracy", "macro F1", "ROC-AUC", "calibration error",
        "MLflow run",
    ]  # fmt: skip
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["a &#124; b", "0.9500", "0.9667", "0.9000", "—", "—", "01010101"]


def test_of_several_seeds_it_tells_the_mean_and_the_lowest():
    text = markdown([record("a", "01", 0.96), record("a", "02", 0.98), record("b", "03", 0.5)])
    heading, _, a, b = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    assert heading[2:4] == ["test accuracy", "lowest"]
    assert [a[2:4], b[2:4]] == [["0.9700", "0.9600"], ["0.5000", "0.5000"]]
    assert a[-1] == "01010101, 02020202"


# --- the trainings --------------------------------------------------------------------------------


def git(root, *arguments):
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dvc(root, *arguments, code=0):
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory, empty_database):
    """A project in git with a small base and messages, that was never run; not to be changed."""
    root = tmp_path_factory.mktemp("ablation") / "project"
    for name in ("gpt", "stages"):  # the code is part of what a row is known by
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copy(empty_database, root / "mlflow.db")
    params = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    params["finetune_classifier"] = {
        "base": "pretrain",
        "trainable": "head",
        "split": {"train": 0.6, "validation": 0.2, "seed": 7},
        "max_length": 12,
        "train": {
            "device": "cpu", "threads": 1, "steps": 4, "batch_size": 8, "learning_rate": 1e-2,
            "eval_interval": 2,
        },
    }  # fmt: skip
    (root / "params.yaml").write_text("# by hand\n" + yaml.safe_dump(params))
    # as in a fresh clone: of what `evaluate` made elsewhere only the md5 is there
    for name in ("dvc.yaml", "dvc.lock"):
        whole = yaml.safe_load((ROOT / name).read_text())
        own = {k: v for k, v in whole["stages"].items() if k in ("finetune_classifier", "evaluate")}
        (root / name).write_text(yaml.safe_dump({**whole, "stages": own}))
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "all")
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=257, context_length=32, n_layer=2, n_head=2, n_embd=16))
    save_model(model, root / "models" / "pretrain", tokenizer=byte_tokenizer())
    folder = root / "data" / "raw" / "messages"
    folder.mkdir(parents=True)
    words = {"ham": "see you at", "spam": "win now"}
    lines = [f"{label}\t{words[label]} {i}\n" for i in range(30) for label in words]
    (folder / "m.tsv").write_text("".join(lines))
    size, sha256 = (folder / "m.tsv").stat().st_size, sha256_of(folder / "m.tsv")
    file = RawFile(name="m", file="m.tsv", kind="messages", format="tsv", bytes=size, sha256=sha256)
    write_sources(folder, [file])
    (root / "table.yaml").write_text(yaml.safe_dump(TABLE))
    return root


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    root = tmp_path / "project"
    shutil.copytree(made, root, symlinks=True)
    alone(monkeypatch)
    return root


def alone(patch):
    """Nothing of this machine has a say."""
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patch.setenv("DVC_NO_ANALYTICS", "true")


def files(root):
    """What a person has, but for the tools' own and what an ablation is said to make."""
    here = {p for p in root.rglob("*") if p.is_file()}
    new = (".git/", ".dvc/", ".pipeline/", "mlartifacts/", "mlflow.db", "reports/ablation/")
    names = {p.relative_to(root).as_posix(): p for p in here if "__pycache__" not in p.parts}
    return {n: p.read_bytes() for n, p in sorted(names.items()) if not n.startswith(new)}


@pytest.fixture(scope="module")
def done(made, tmp_path_factory):
    """The project after an ablation of which one row failed, and what was heard."""
    root = tmp_path_factory.mktemp("done") / "project"
    shutil.copytree(made, root, symlinks=True)
    (root / "gpt" / "errors.py").open("a").write("# an edit that is in no commit\n")
    before = files(root), git(root, "status", "--porcelain")
    heard = []
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        with pytest.raises(RunError) as caught:
            ablate(root, root / "table.yaml", heard.append)
        runs = connect(root).search_runs(["1"])
        assert (files(root), git(root, "status", "--porcelain")) == before
        yield root, heard, str(caught.value), {run.info.run_name: run for run in runs}


def test_a_row_that_fails_is_one_line_and_loses_no_other(done):
    root, heard, error, runs = done
    warnings = [e.text for e in heard if isinstance(e, Message) and e.level == "warning"]
    (said,) = [text for text in warnings if text.startswith("ablation:")]
    assert said.startswith("ablation: too deep failed: finetune_classifier.blocks: 3 blocks are")
    assert error.startswith("1 of 3 rows failed (too deep), as was said above; the others are in ")
    assert "\n" not in said + error
    page = (root / "reports" / "ablation" / "table.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in page] == ["All, mean", "lora"]
    assert {name: run.info.status for name, run in runs.items()} == {
        "All, mean": "FINISHED", "too deep": "FAILED", "lora": "FINISHED",
    }  # fmt: skip
    assert runs["too deep"].data.tags["error"] == said.partition("failed: ")[2]


def test_every_row_is_a_run_that_leads_back_to_its_parameters(done):
    root, _, _, runs = done
    for row in read_rows(root, root / "table.yaml"):
        run = runs[row.name].data
        assert run.params == flatten(row.params)
        assert json.loads(run.tags["ablation.set"]) == row.changes
        assert run.tags["ablation.table"] == row.name
        assert run.tags["dvc.experiment"] == row.experiment("table")
        for path in ("models/pretrain", "data/raw/messages"):
            assert run.tags[f"input.{path}"] == dvc_md5(root / path)
        assert run.tags["git.commit"] == git(root, "rev-parse", "HEAD").strip()
        if row.name != "too deep":
            assert 0 <= run.metrics["classifier/accuracy"] <= 1
            assert 0 <= run.metrics["classifier/validation_roc_auc"] <= 1
            # the adapters' last loss; the merged layers round otherwise on some processors
            rounding = 1e-6 if row.params.trainable == "lora" else 0
            history = connect(root).get_metric_history(
                runs[row.name].info.run_id, "validation_loss"
            )
            *_, last, final = (each.value for each in sorted(history, key=lambda each: each.step))
            assert last == pytest.approx(final, rel=rounding, abs=0)
    kept = {
        path.relative_to(root / "mlartifacts").as_posix().partition("artifacts/")[2]
        for path in (root / "mlartifacts").rglob("*.*")
        if runs["lora"].info.run_id in path.parts
    }
    assert {"plots/confusion_matrix.png", "plots/loss.png", "classifier_most_wrong.csv"} <= kept


def test_every_row_is_an_experiment_that_shows_its_parameters_and_scores(done):
    root, _, _, runs = done
    _, commit = json.loads(dvc(root, "exp", "show", "--json"))
    found = {each["name"]: each["revs"][0] for each in commit["experiments"]}
    assert set(found) == {"table-all-mean", "table-lora"}

    def data(kind, path):
        return found["table-lora"]["data"][kind][path]["data"]

    section = data("params", "params.yaml")["finetune_classifier"]
    assert (section["trainable"], section["lora"]) == ("lora", {"rank": 2})
    assert "max_length" not in section
    scores = data("metrics", "reports/evaluation/metrics.json")["classifier"]
    assert scores["accuracy"] == runs["lora"].data.metrics["classifier/accuracy"]
    final = data("metrics", "reports/finetune_classifier/metrics.json")
    assert final["validation_loss"] == runs["lora"].data.metrics["validation_loss"]


def test_an_experiment_can_be_taken_and_then_nothing_is_left_to_train(done, tmp_path, monkeypatch):
    alone(monkeypatch)
    root = tmp_path / "project"
    shutil.copytree(done[0], root, symlinks=True)
    git(root, "config", "user.name", "Test")  # DVC puts edits aside in a commit
    git(root, "config", "user.email", "test@localhost")
    # it complains of what `evaluate` made, which is nowhere
    dvc(root, "exp", "apply", "table-lora", code=255)
    text = (root / "params.yaml").read_text()
    assert text.startswith("# by hand\n"), "comments stay"
    assert yaml.safe_load(text)["finetune_classifier"]["lora"] == {"rank": 2}
    assert "an edit that is in no commit" in (root / "gpt" / "errors.py").read_text()
    load_model(root / "models" / "classifier")
    assert "up to date" in dvc(root, "status", "finetune_classifier")


def test_what_was_stopped_goes_on_and_what_is_done_is_not_trained_again(project):
    table = project / "table.yaml"
    table.write_text(yaml.safe_dump({"rows": [TABLE["rows"][0], TABLE["rows"][2]]}))
    heard = []

    def stop(event):
        """In the second row."""
        heard.append(event)
        rows = [e for e in heard if isinstance(e, Message) and " of 2: " in e.text]
        if isinstance(event, Metrics) and event.step == 2 and len(rows) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ablate(project, table, stop)
    client = connect(project)
    before = {run.info.run_name: run.info for run in client.search_runs(["1"])}
    assert (before["All, mean"].status, before["lora"].status) == ("FINISHED", "KILLED")
    again = []
    records = ablate(project, table, again.append)
    assert Message("lora: continuing from step 2 of 4") in again
    assert {event.step for event in again if isinstance(event, Metrics)} <= {3, 4}
    after = {run.info.run_name: run.info for run in client.search_runs(["1"])}
    assert {name: info.run_id for name, info in after.items()} == {
        name: info.run_id for name, info in before.items()
    }, "the run goes on, and there is no other"
    assert {info.status for info in after.values()} == {"FINISHED"}
    assert [each["run"] for each in records] == [after[n].run_id for n in ("All, mean", "lora")]
    # and no state or model is left over beside the results
    left = [p for p in (project / ".pipeline" / "ablation").rglob("*") if p.is_file()]
    assert {path.name for path in left} == {"result.json"}
    other = project / "other.yaml"
    other.write_text(yaml.safe_dump({"rows": [{**TABLE["rows"][2], "name": "mine"}]}))
    third = []
    (taken,) = ablate(project, other, third.append)
    assert not [event for event in third if isinstance(event, Metrics)]
    assert taken == {**records[1], "name": "mine", "choice": "mine"}
    tags = client.get_run(taken["run"]).data.tags
    assert (tags["ablation.table"], tags["ablation.other"]) == ("lora", "mine")


def test_without_git_there_are_no_experiments_and_that_is_said_before_any_work(project):
    shutil.rmtree(project / ".git")
    with pytest.raises(InputError, match=r"this is no git repository with one; run `git init`"):
        ablate(project, project / "table.yaml", lambda event: None)
    assert not (project / ".pipeline" / "ablation").exists()
