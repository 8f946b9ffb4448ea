"""Sweeps on the real project at the smallest scale: what is shared is never made again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipeline.tracking.connection import connect
from pipeline.tracking.keys import EXPERIMENT_PREFIX

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RATE = "finetune_classifier.train.learning_rate"
SIZE = "finetune_classifier.train.batch_size"
STEPS = "finetune_classifier.train.steps"
METRIC = {
    "file": "reports/finetune_classifier/metrics.json",
    "name": "validation_loss",
    "goal": "minimize",
}


@pytest.fixture(scope="module")
def made(finished):
    """The project after a first run, committed."""
    finished.run("git", "commit", "-qam", "The first run")
    return finished


def write(project, name, **values):
    """A sweep's file in the project, which git does not know."""
    file = project.root / f"{name}.yaml"
    whole = {"stages": ["finetune_classifier"], "metric": METRIC, **values}
    file.write_text(yaml.safe_dump(whole, sort_keys=False))
    return file.name


def client_of(project):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return connect(project.root)


def runs(project, experiment):
    client = client_of(project)
    found = client.get_experiment_by_name(EXPERIMENT_PREFIX + experiment)
    return client.search_runs([found.experiment_id]) if found else []


def executions(project):
    """Stage -> how many runs it has, each of which is an execution."""
    return Counter(
        {name: len(runs(project, name)) for name in ("download", "tokenize", "pretrain")}
        | {"finetune_classifier": len(runs(project, "finetune_classifier"))}
    )


def family(project, name):
    """The parent of a sweep, and its children by their names."""
    found = runs(project, "sweep")
    (parent,) = [run for run in found if run.data.tags.get("sweep.name") == name]
    children = [
        run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    by_name = {run.info.run_name: run for run in children}
    assert len(by_name) == len(children)
    return parent, by_name


def files(project):
    """What the person has, but for the tools' own and the sweep's page."""
    left_out = (
        ".git/",
        ".dvc/",
        ".pipeline/",
        ".prefect/",
        ".checkpoints/",
        "mlartifacts/",
        "mlflow",
        "reports/sweep",
    )
    return {
        name: path.read_bytes()
        for path in sorted(project.root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
        if not (name := path.relative_to(project.root).as_posix()).startswith(left_out)
    }


def aliases(project, model="classifier"):
    return dict(client_of(project).get_registered_model(model).aliases)


def test_six_points_execute_nothing_that_they_share(made):
    name = write(made, "six", grid={RATE: [1e-4, 3e-4, 2e-3], SIZE: [8, 16]})
    (made.root / "gpt" / "errors.py").open("a").write("# an edit that is in no commit\n")
    made.run("gpt-pipeline", "run", "finetune_classifier")
    before, kept, stood = executions(made), files(made), aliases(made)
    said = made.run("gpt-pipeline", "sweep", name)
    assert executions(made) - before == Counter(finetune_classifier=6)
    assert files(made) == kept
    assert aliases(made) == stood, "the candidate is the project's"
    assert not (made.root / ".pipeline" / "sweep" / "six").exists()

    parent, children = family(made, "six")
    assert len(children) == 6
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    of_stage = {run.info.run_id: run for run in runs(made, "finetune_classifier")}
    for child in children.values():
        values = json.loads(child.data.tags["sweep.point"])
        assert child.data.params == {path: str(value) for path, value in values.items()}
        run = of_stage[child.data.tags["run.finetune_classifier"]].data
        assert run.params["train.learning_rate"] == str(values[RATE])
        assert run.params["train.batch_size"] == str(values[SIZE])
        assert run.metrics["validation_loss"] == child.data.metrics["validation_loss"]
        assert run.tags["sweep"] == parent.info.run_name == "six #1"
        assert (
            child.data.tags["run.finetune_classifier"] in child.data.tags["url.finetune_classifier"]
        )

    best = min(children.values(), key=lambda run: run.data.metrics["validation_loss"])
    page = (made.root / "reports" / "sweep" / "six.md").read_text()
    assert page in said
    assert f"\nBest: {best.info.run_name}\n" in page
    assert parent.data.tags["best"] == best.info.run_name
    assert parent.data.tags["mlflow.note.content"] == page.strip() or page
    losses = [float(line.split("|")[2]) for line in page.splitlines() if line.startswith("| learn")]
    assert losses == sorted(losses)
    assert len(losses) == 6


def start(project, *command):
    """A command that is not waited for."""
    log = (project.root / ".pipeline" / "sweep.log").open("w")
    return subprocess.Popen(
        command,
        cwd=project.root,
        stdout=log,
        stderr=log,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(project.root),
        },
    )


def wait_for(what, seconds=120):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_what_was_interrupted_goes_on_as_the_same_runs(made, number, code):
    title = f"cut{-code if code < 0 else code}"
    # of the second a state every second, and enough steps that one is there before the end
    steps = [40 + code, 1540 + code]
    saves = "finetune_classifier.train.checkpoint_seconds"
    name = write(made, title, grid={STEPS: steps, saves: [1]})
    before = executions(made)
    process = start(made, "gpt-pipeline", "sweep", name)
    first = f"steps={steps[0]}, checkpoint_seconds=1"

    def second_trains():
        # the first is done, and the second has saved a state
        if len(runs(made, "finetune_classifier")) < before["finetune_classifier"] + 2:
            return False
        return any((made.root / ".checkpoints" / "finetune_classifier").glob("*/step-*"))

    wait_for(second_trains, 300)
    process.send_signal(number)
    assert process.wait(60) == code
    # a killed sweep's stage hears of it, saves its state and ends
    wait_for(
        lambda: not [r for r in runs(made, "finetune_classifier") if r.info.status == "RUNNING"]
    )
    parent, children = family(made, title)
    assert children[first].info.status == "FINISHED"
    after_cut = executions(made)

    said = made.run("gpt-pipeline", "sweep", name)
    assert f"goes on as {title} #1" in said
    assert f"{first} | cached" in said
    assert "continuing from step" in said
    again, points = family(made, title)
    assert again.info.run_id == parent.info.run_id
    assert {name: run.info.run_id for name, run in children.items()} == {
        name: run.info.run_id for name, run in points.items()
    }
    assert {run.info.status for run in (again, *points.values())} == {"FINISHED"}
    assert executions(made) == after_cut, "the second went on in its run"
    assert after_cut - before == Counter(finetune_classifier=2)


def test_what_points_share_and_the_project_lacks_is_executed_once(made):
    grid = {
        "pretrain.train.steps": [22],
        RATE: [1e-3, 2e-3],
        "finetune_classifier.pooling": ["mean"],
    }
    before = executions(made)
    made.run("gpt-pipeline", "sweep", write(made, "shared", grid=grid), "--jobs", "2")
    assert executions(made) - before == Counter(pretrain=1, finetune_classifier=2)


def test_a_point_that_fails_is_told_and_the_others_go_on(made):
    grid = {
        "finetune_classifier.trainable": ["last_blocks"],
        "finetune_classifier.blocks": [3, 1],
    }
    said = made.run("gpt-pipeline", "sweep", write(made, "bad", grid=grid), code=1)
    parent, children = family(made, "bad")
    assert {name: run.info.status for name, run in children.items()} == {
        "trainable=last_blocks, blocks=3": "FAILED",
        "trainable=last_blocks, blocks=1": "FINISHED",
    }
    assert parent.info.status == "FAILED"
    last = said.splitlines()[-1]
    assert last.startswith("error: 1 of 2 points failed (trainable=last_blocks, blocks=3)")
    assert "3 blocks are" in children["trainable=last_blocks, blocks=3"].data.tags["error"]


def test_the_best_of_a_search_is_promoted_and_applied_and_nothing_is_left_to_run(made):
    search = {RATE: {"low": 1e-3, "high": 1e-1, "log": True}}
    name = write(made, "search", search=search, trials=3, seed=7)
    params = made.root / "params.yaml"
    params.write_text("# by hand\n" + params.read_text())
    refused = made.run("gpt-pipeline", "sweep", name, "--apply", code=2)
    assert refused.startswith("error: --apply: params.yaml holds edits")
    made.run("git", "commit", "-qam", "By hand")
    said = made.run("gpt-pipeline", "sweep", name, "--promote", "--apply")
    _, children = family(made, "search")
    assert len(children) == 3
    best = min(children.values(), key=lambda run: run.data.metrics["validation_loss"])
    version = best.data.tags["model.classifier"].rpartition("/")[2]
    assert f"classifier version {version} is the champion" in said
    assert str(aliases(made)["champion"]) == version
    assert params.read_text().startswith("# by hand\n")
    rate = yaml.safe_load(params.read_text())["finetune_classifier"]["train"]["learning_rate"]
    assert float(rate) == float(best.data.params[RATE])

    before = executions(made)
    made.run("gpt-pipeline", "run", "finetune_classifier")
    assert executions(made) == before
    # the same file proposes the same points
    again = write(made, "again", search=search, trials=3, seed=7)
    made.run("gpt-pipeline", "sweep", again)
    assert set(family(made, "again")[1]) == set(children)
    assert executions(made) == before


def test_an_ablation_scores_every_row_and_saves_it_as_an_experiment(made):
    rows = [
        {"name": "Head, mean", "set": {"trainable": "head", "pooling": "mean"}},
        {"name": "too deep", "set": {"trainable": "last_blocks", "blocks": 3}},
        {"name": "head", "set": {"trainable": "head", "max_length": None}},
    ]
    (made.root / "table.yaml").write_text(yaml.safe_dump({"rows": rows}))
    kept, stood = files(made), aliases(made)
    before = executions(made)
    said = made.run("gpt-pipeline", "ablate", "table.yaml", code=1)
    assert said.splitlines()[-1].startswith("error: 1 of 3 points failed (too deep)")
    assert (files(made), aliases(made)) == (kept, stood)
    assert executions(made) - before == Counter(finetune_classifier=3)
    _, children = family(made, "table")
    for name in ("Head, mean", "head"):
        metrics = children[name].data.metrics
        assert 0 <= metrics["classifier/accuracy"] <= 1
        assert 0 <= metrics["classifier/validation_roc_auc"] <= 1
    artifacts = {each.path for each in client_of(made).list_artifacts(children["head"].info.run_id)}
    assert {"confusion_matrix.png", "classifier_most_wrong.csv"} <= artifacts

    _, commit = json.loads(made.run("dvc", "exp", "show", "--json"))
    found = {each["name"]: each["revs"][0]["data"] for each in commit["experiments"]}
    assert set(found) == {"table-head-mean", "table-head"}
    data = found["table-head"]
    assert data["params"]["params.yaml"]["data"]["finetune_classifier"]["trainable"] == "head"
    final = data["metrics"]["reports/finetune_classifier/metrics.json"]["data"]
    assert final["validation_loss"] == children["head"].data.metrics["validation_loss"]

    again = made.run("gpt-pipeline", "ablate", "table.yaml", code=1)
    assert "head | cached" in again
    assert executions(made) - before == Counter(finetune_classifier=3), "the same runs"
    # it is applied whole; DVC then misses what the optional stage would have made
    said = made.run("dvc", "exp", "apply", "table-head", code=255)
    missed = [line for line in said.splitlines() if line.startswith(("models/", "reports/"))]
    assert sorted(missed) == ["models/preferred", "reports/tune_preferences/history.csv"]
    section = yaml.safe_load((made.root / "params.yaml").read_text())["finetune_classifier"]
    assert section["trainable"] == "head"
    assert "max_length" not in section
    assert "up to date" in made.run("dvc", "status", "finetune_classifier")
    made.run("git", "checkout", "-q", ".")
