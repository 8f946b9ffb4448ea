"""A project of an earlier version, updated to today's code: what it holds is read and goes on.

`earlier/project.tar.xz` holds what such a project has besides its code: `params.yaml`, `dvc.lock`,
`.pipeline`, `reports`, MLflow's database (as SQL) and the files of some runs and of the champion
`classifier/1`. It was made at the commit 488e5bf with the preset `smoke`: `gpt-pipeline run`, a
sweep of two learning rates, the better one put into `params.yaml`, `gpt-pipeline run` again.
Pictures, and the files of the models that no test here loads, were taken out.
"""

import json
import re
import sqlite3
import tarfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EARLIER = Path(__file__).parent / "earlier" / "project.tar.xz"


@pytest.fixture(scope="module")
def updated(project):
    """Today's code over the earlier project's records."""
    with tarfile.open(EARLIER) as archive:
        archive.extractall(project.root, filter="data")
    sql = project.root / "mlflow.sql"
    with sqlite3.connect(project.root / "mlflow.db") as database:
        database.executescript(sql.read_text(encoding="utf-8"))
    database.close()
    sql.unlink()
    return project


def test_status_knows_the_runs_and_their_metrics_and_says_why_the_stages_run_again(updated):
    stages = {
        each["name"]: each
        for each in json.loads(updated.run("gpt-pipeline", "status", "--json"))["stages"]
    }
    assert stages["pretrain"]["run"]["id"] == "a281a1f6db5a4c4a8721e6b3a3d6e952"
    assert stages["pretrain"]["run"]["name"] == "#1 8f508e2"
    assert stages["finetune_classifier"]["metrics"]["validation_loss"] == pytest.approx(0.667, 1e-3)
    assert stages["evaluate"]["metrics"]["classifier/accuracy"] > 0
    assert all(each["state"] != "up to date" for each in stages.values())
    assert stages["pretrain"]["reasons"]


def test_compare_reads_two_points_of_the_sweep_under_todays_names(updated):
    told = json.loads(
        updated.run("gpt-pipeline", "compare", "classifier/1", "classifier/2", "--json")
    )
    loss = next(each for each in told["metrics"] if each["name"] == "validation_loss")
    assert loss["before"] == pytest.approx(0.6912, 1e-3)
    assert loss["after"] == pytest.approx(0.6670, 1e-3)
    assert not [each["name"] for each in told["metrics"] if each["name"].startswith("result/")]
    said = updated.run("gpt-pipeline", "compare", "classifier/1", "classifier/2")
    assert "train.learning_rate" in said


def test_lineage_leads_from_a_version_to_its_sources(updated):
    said = updated.run("gpt-pipeline", "lineage", "classifier/2", "--up")
    for what in ("classifier/2", "finetune_classifier", "pretrain", "tokenize", "stories.txt"):
        assert what in said


def test_reproduce_says_in_one_line_that_the_commit_is_not_here(updated):
    said = updated.run("gpt-pipeline", "reproduce", "classifier/1", code=2)
    assert "Traceback" not in said
    assert re.search(r"error: .*1f0112f|error: .*8f508e2", said), said


def test_the_champion_answers_and_another_version_takes_its_place(updated):
    said = updated.run("gpt-pipeline", "promote", code=2)
    assert "evaluate is out of date" in said
    code = (
        "import mlflow; m = mlflow.pyfunc.load_model('models:/classifier@champion');"
        "print(m.predict([{'text': 'You won a prize'}]))"
    )
    uri = f"sqlite:///{updated.root}/mlflow.db"
    assert "label" in updated.run("python", "-c", code, MLFLOW_TRACKING_URI=uri)
    said = updated.run("gpt-pipeline", "promote", "classifier", "--version", "2")
    assert "classifier version 2 is the champion" in said


def test_the_next_run_of_a_stage_is_counted_on_and_says_what_changed(updated):
    updated.run("gpt-pipeline", "run", "download")
    (stage,) = (
        each
        for each in json.loads(updated.run("gpt-pipeline", "status", "--json"))["stages"]
        if each["name"] == "download"
    )
    assert stage["state"] == "up to date"
    assert stage["run"]["name"].startswith("#2 ")
