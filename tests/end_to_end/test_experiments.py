"""DVC's own commands, as a user of this project types them: experiments, differences, plots.

The tests build on each other.
"""

import json
from typing import Any

import pytest
from test_remote import commit, executed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RATE = "finetune_classifier.train.learning_rate"


def runs(project, stage: str) -> list[Any]:
    """A stage's runs in the project's own MLflow, the oldest first."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project.root}/mlflow.db")
    experiment = client.get_experiment_by_name(f"gpt-pipeline/{stage}")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def shown(project) -> list[dict[str, Any]]:
    """What `dvc exp show` says of the experiments of the last commit."""
    said = project.run("dvc", "exp", "show", "--json")
    told = json.loads(said[said.index("[") :])
    (head,) = [each for each in told if each["rev"] != "workspace"]
    return [each["revs"][0] for each in head["experiments"] or []]


@pytest.fixture(scope="module")
def committed(finished):
    """The project after a first run, committed."""
    commit(finished, "First results")
    return finished


def test_an_experiment_runs_what_its_parameter_changes_and_nothing_else(committed):
    said = committed.run("dvc", "exp", "run", "-n", "faster", "-S", f"{RATE}=0.002")
    assert said.count("Running stage") == 2
    assert "Ran experiment(s): faster" in said
    assert [run.info.run_name for run in runs(committed, "finetune_classifier")][1:] == [
        "#2 train.learning_rate=0.002"
    ]


def test_the_differences_are_the_parameter_and_the_metrics_that_follow_from_it(committed):
    header, params = committed.run("dvc", "params", "diff").splitlines()
    assert header.split() == ["Path", "Param", "HEAD", "workspace"]
    assert params.split() == ["params.yaml", RATE, "0.001", "0.002"]
    header, *rows = committed.run("dvc", "metrics", "diff").splitlines()
    assert header.split() == ["Path", "Metric", "HEAD", "workspace", "Change"]
    files = {row.split()[0] for row in rows}
    assert files == {"reports/evaluation/metrics.json", "reports/finetune_classifier/metrics.json"}
    named = {row.split()[1] for row in rows}
    assert "validation_loss" in named
    assert {name.partition(".")[0] for name in named if "." in name} == {"classifier"}


def test_the_plots_lay_both_versions_over_each_other(committed):
    committed.run("dvc", "plots", "diff")
    page = (committed.root / "dvc_plots/index.html").read_text()
    for title in ("classifier loss", "classifier accuracy", "confusion matrix of the classifier"):
        assert title in page
    assert '"rev": "HEAD"' in page
    assert '"rev": "workspace"' in page
    assert "dvc_plots" not in committed.run("git", "status", "--porcelain")


def test_queued_experiments_run_beside_the_project_and_are_logged_in_its_mlflow(committed):
    before = (committed.root / "params.yaml").read_bytes()
    began = [path.stat().st_mtime_ns for path in executed(committed)]
    for rate in ("0.003", "0.004"):
        committed.run(
            "dvc", "exp", "run", "--queue", "-n", f"rate-{rate[2:]}", "-S", f"{RATE}={rate}"
        )
    committed.run("dvc", "exp", "run", "--run-all")
    assert (committed.root / "params.yaml").read_bytes() == before
    assert [path.stat().st_mtime_ns for path in executed(committed)] == began
    made = runs(committed, "finetune_classifier")
    assert [run.info.run_name for run in made][2:] == [
        "#3 train.learning_rate=0.003",
        "#4 train.learning_rate=0.004",
    ]
    assert {run.info.status for run in made} == {"FINISHED"}
    assert not any((committed.root / ".checkpoints").glob("finetune_classifier/*"))


def test_the_table_has_a_row_for_each_with_what_differs(committed):
    named = {each["name"] for each in shown(committed)}
    assert named == {"faster", "rate-003", "rate-004"}
    less = "--drop=.*(train_|validation_|_high|_low|_ham|_spam|precision|recall|models/|State|Exec)"
    said = committed.run("dvc", "exp", "show", "--only-changed", "--md", less)
    header, _, *rows = [line for line in said.splitlines() if line.startswith("|")]
    columns = [word.strip() for word in header.strip("|").split("|")]
    assert RATE in columns
    assert "classifier.roc_auc" in columns
    assert len(columns) <= 10, "a table that can be read"
    assert sum("[rate-" in row or "[faster]" in row for row in rows) == 3


def test_an_experiment_that_is_applied_is_up_to_date(committed):
    # it is applied whole; DVC then misses what the optional stage would have made
    said = committed.run("dvc", "exp", "apply", "rate-003", code=255)
    missed = [line for line in said.splitlines() if line.startswith(("models/", "reports/"))]
    assert sorted(missed) == ["models/preferred", "reports/tune_preferences/history.csv"]
    began = [path.stat().st_mtime_ns for path in executed(committed)]
    assert "7 of 7 stages are up to date" in committed.run("gpt-pipeline", "run")
    assert [path.stat().st_mtime_ns for path in executed(committed)] == began
