"""The stage of docs/extending.md, added to a copy of the project as it stands there."""

import json
import re
from pathlib import Path

import mlflow
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
DOC = Path(__file__).parents[2] / "docs" / "extending.md"


def insert(file: Path, before: str, text: str) -> None:
    content = file.read_text(encoding="utf-8")
    assert content.count(before) == 1, (file, before)
    file.write_text(content.replace(before, text + before), encoding="utf-8")


@pytest.fixture(scope="module")
def extended(finished):
    """The project with the example stage in its four places, run by the flow."""
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)
    stage, entry, field, lines, section = blocks
    root = finished.root
    (root / "stages/adapt.py").write_text(stage, encoding="utf-8")
    insert(root / "pipeline/project/stage_table.py", '    "evaluate": StageSpec(', entry)
    insert(root / "pipeline/project/params.py", "    evaluate: EvaluateParams", field)
    insert(
        root / "pipeline/project/params.py",
        "    from stages.download.sources import DownloadParams",
        "    from stages.adapt import AdaptParams\n",
    )
    insert(root / "dvc.yaml", "  evaluate:\n", lines + "\n")
    with (root / "params.yaml").open("a", encoding="utf-8") as file:
        file.write(section)
    finished.run("gpt-pipeline", "run")
    return finished


def test_the_flow_runs_it_and_mlflow_has_its_run_and_its_model(extended):
    client = mlflow.MlflowClient(f"sqlite:///{extended.root}/mlflow.db")
    experiment = client.get_experiment_by_name("gpt-pipeline/adapt")
    (run,) = client.search_runs([experiment.experiment_id])
    figures = json.loads((extended.root / "reports/adapt/metrics.json").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "20"
    assert run.data.metrics["validation_loss"] == figures["validation_loss"]
    assert client.get_model_version_by_alias("adapted", "candidate").run_id == run.info.run_id


def test_status_report_and_estimate_show_it(extended):
    status = json.loads(extended.run("gpt-pipeline", "status", "--json"))
    (row,) = (each for each in status["stages"] if each["name"] == "adapt")
    assert row["state"] == "up to date"
    assert "perplexity" in row["metrics"]
    extended.run("gpt-pipeline", "report")
    page = (extended.root / "reports/report.html").read_text(encoding="utf-8")
    assert ">adapt<" in page
    assert "adapt" in extended.run("gpt-pipeline", "estimate", "adapt")


def test_dvc_runs_it_when_its_parameter_changes_and_nothing_else(extended):
    extended.set("adapt.train.steps", "10")
    said = extended.run("dvc", "repro")
    assert "Running stage 'adapt'" in said
    assert said.count("Running stage") == 1
    assert "up to date" in extended.run("dvc", "repro")


def test_its_code_dependencies_are_held_against_its_imports(extended):
    extended.run("python", "-m", "pytest", "-q", "tests/test_dvc_yaml.py")
