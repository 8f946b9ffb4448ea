"""The whole pipeline as its user sees it: every stage, every tool, and what a change runs again.

The tests of this file build on each other: they are one story, told in its order.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
import torch
from report_figures import Figures

STAGES = [
    "download",
    "tokenize",
    "pretrain",
    "load_gpt2",
    "finetune_classifier",
    "finetune_instruct",
    "evaluate",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def api(project):
    """A Prefect server on a free port, with its own database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    from pipeline.server import environment

    with subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env={**environment_of_this_process(), **environment(project.root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        url = f"http://127.0.0.1:{port}/api"
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def environment_of_this_process() -> dict[str, str]:
    import os

    return dict(os.environ)


def ask(api: str, what: str, **body: object) -> list[dict[str, object]]:
    request = urllib.request.Request(
        f"{api}/{what}/filter",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def last_task_runs(api: str) -> dict[str, dict[str, object]]:
    flow_run = ask(api, "flow_runs", sort="START_TIME_DESC", limit=1)[0]
    runs = ask(api, "task_runs", flow_runs={"id": {"any_": [flow_run["id"]]}}, limit=50)
    return {str(run["name"]): run for run in runs}


def executed(project) -> dict[str, float]:
    """When each stage last began to run."""
    return {
        path.stem: path.stat().st_mtime
        for path in (project.root / ".pipeline" / "runs").glob("*.json")
    }


def registry(project):
    """MLflow's client for the project's own database."""
    import mlflow

    uri = f"sqlite:///{project.root}/mlflow.db"
    return mlflow.MlflowClient(uri, uri)


def champions(project) -> dict[str, int]:
    """Which version of each registered model is the champion."""
    models = registry(project).search_registered_models()
    found = {model.name: model.aliases.get("champion") for model in models}
    return {name: int(version) for name, version in found.items() if version}


@pytest.fixture(scope="module")
def first_run(project, api):
    return project.run("gpt-pipeline", "run", PREFECT_API_URL=api)


def test_a_run_makes_every_output_and_ends_with_a_report(project, first_run):
    assert "7 of 7 stages ran" in first_run
    for name in ("pretrain", "gpt2", "classifier", "assistant"):
        assert (project.root / "models" / name / "model.safetensors").is_file()
    for heading in ("Stages", "Base models", "Classifier", "Assistant", "Next"):
        assert heading in first_run
    assert not list(project.root.rglob("*.partial"))
    assert not list((project.root / ".checkpoints").glob("*/*")), "resume state of finished runs"


def test_dvc_sees_nothing_left_to_do(project, first_run):
    assert "up to date" in project.run("dvc", "status", "dvc.yaml")
    before = (project.root / "dvc.lock").read_bytes()
    began = executed(project)
    assert "up to date" in project.run("dvc", "repro")
    assert (project.root / "dvc.lock").read_bytes() == before
    assert executed(project) == began


def test_prefect_knows_the_seven_tasks_their_order_and_their_states(api, first_run):
    runs = last_task_runs(api)
    assert sorted(runs) == sorted([*STAGES, "promotion"])
    assert {run["state"]["type"] for run in runs.values()} == {"COMPLETED"}
    upstream = {
        name: {
            other
            for other, candidate in runs.items()
            for parent in run["task_inputs"].get("wait_for", [])
            if parent["id"] == candidate["id"]
        }
        for name, run in runs.items()
    }
    assert upstream["download"] == set()
    assert upstream["tokenize"] == {"download"}
    assert upstream["pretrain"] == {"tokenize"}
    assert upstream["finetune_classifier"] == {"download", "pretrain"}
    assert upstream["evaluate"] >= {"pretrain", "load_gpt2", "finetune_classifier"}


def test_the_two_fine_tunings_overlap_in_time(api, first_run):
    runs = last_task_runs(api)
    one, other = runs["finetune_classifier"], runs["finetune_instruct"]
    assert one["start_time"] < other["end_time"]
    assert other["start_time"] < one["end_time"]


def test_each_task_has_an_artifact_with_its_metrics_and_its_mlflow_run(api, first_run):
    artifacts = ask(api, "artifacts", limit=50)
    texts = {str(each["key"]): str(each["data"]) for each in artifacts}
    assert len(texts) >= len(STAGES)
    classifier = next(text for key, text in texts.items() if "finetune-classifier" in key)
    assert "validation_accuracy" in classifier
    assert "/runs/" in classifier


def test_mlflow_has_a_run_a_stage_and_serves_the_three_models(project, first_run):
    client = registry(project)
    runs = [
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
    ]
    assert sorted(run.data.tags["dvc.stage"] for run in runs) == sorted(STAGES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {model.name for model in client.search_registered_models()} == {
        "base",
        "classifier",
        "assistant",
    }
    lock = project.outputs()
    pretrain = next(run for run in runs if run.data.tags["dvc.stage"] == "pretrain")
    assert lock["models/pretrain"] in pretrain.data.tags.values()


def test_the_first_versions_become_the_champions_each_with_its_card(project, first_run):
    assert champions(project) == {"base": 1, "classifier": 1, "assistant": 1}
    for name in champions(project):
        assert f"{name} version 1 is the champion: the first version" in first_run
        version = registry(project).get_model_version(name, "1")
        assert version.description.startswith(f"# {name}, version 1")
        assert version.tags["verdict"] == "champion: the first version"


def test_every_figure_of_the_report_follows_from_the_stored_predictions(project, first_run):
    figures = Figures(project.root)
    told = figures.bases() + figures.what_fine_tuning_buys() + figures.classes()
    told += figures.assistant() + figures.confusion_and_what_was_most_wrong()
    assert told > 90


def test_the_report_is_one_page_that_mlflow_keeps_and_is_written_only_when_there_is_news(
    project, api, first_run
):
    page = project.root / "reports/report.html"
    client = registry(project)
    experiment = client.get_experiment_by_name("gpt-pipeline/evaluate")
    (run,) = client.search_runs([experiment.experiment_id])
    kept = Path(client.download_artifacts(run.info.run_id, "report/report.html"))
    assert kept.read_bytes() == page.read_bytes()
    assert run.data.metrics["system/process_peak_memory_megabytes"] > 50
    written = page.stat().st_mtime_ns
    project.run("gpt-pipeline", "run", PREFECT_API_URL=api)
    assert page.stat().st_mtime_ns == written
    project.run("gpt-pipeline", "report")
    assert page.stat().st_mtime_ns > written


def test_transformers_loads_every_model_as_it_stands(project, first_run):
    from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

    from gpt import load_model, load_tokenizer

    texts = [
        line.split("\t")[1]
        for line in (project.root / "samples/messages.tsv").read_text().splitlines()[:20]
    ]
    for name in ("pretrain", "gpt2", "assistant", "classifier"):
        directory = project.root / "models" / name
        tokenizer = load_tokenizer(directory)
        rows = [ids[:128] for ids in tokenizer.encode_batch(texts)]
        ours = load_model(directory)
        if name == "classifier":
            theirs = AutoModelForSequenceClassification.from_pretrained(directory).eval()
            lengths = torch.tensor([len(ids) for ids in rows])
            idx = torch.full((len(rows), int(lengths.max())), tokenizer.eot)
            for row, ids in zip(idx, rows, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            assert torch.allclose(ours(idx, lengths), theirs(idx).logits, atol=1e-4)
        else:
            theirs = GPT2LMHeadModel.from_pretrained(directory).eval()
            for ids in rows:
                idx = torch.tensor([ids])
                assert torch.allclose(ours(idx), theirs(idx).logits, atol=1e-4)


def test_a_second_run_executes_nothing_and_shows_every_stage_as_cached(project, api, first_run):
    began = executed(project)
    output = project.run("gpt-pipeline", "run", PREFECT_API_URL=api)
    assert "7 of 7 stages are up to date" in output
    assert executed(project) == began
    assert {run["state"]["name"] for run in last_task_runs(api).values()} == {"Cached"}


def test_what_is_wrong_about_the_promotion_is_one_line_and_exit_code_2(project, api, first_run):
    params, decisions = project.root / "params.yaml", project.root / ".pipeline/promotion.json"
    for path, content, line in (
        (params, "\npromotion: {at_least: -1}\n", "promotion.at_least: should be greater than"),
        (decisions, "{", "promotion.json: "),
    ):
        before = path.read_text()
        path.write_text(before + content if path == params else content)
        said = project.run("gpt-pipeline", "run", code=2, PREFECT_API_URL=api)
        assert line in said
        assert "Traceback" not in said
        path.write_text(before)
    for arguments, line in (
        (["no-model"], "no-model: no such model; use one of base, classifier, assistant"),
        (["--version", "1"], "--version: of which model?"),
        (["base", "--version", "7"], "base: no version 7 is registered"),
    ):
        assert line in project.run("gpt-pipeline", "promote", *arguments, code=2)
    said = project.run("gpt-pipeline", "promote")
    assert "base version 1 is the champion: the first version" in said


def test_a_changed_learning_rate_runs_its_stage_and_evaluate_and_changing_back_runs_nothing(
    project, api, first_run
):
    params = (project.root / "params.yaml").read_bytes()
    lock, outputs = (project.root / "dvc.lock").read_bytes(), project.outputs()
    began = executed(project)
    project.set("finetune_classifier.train.learning_rate", "0.002")
    status = project.run("gpt-pipeline", "status")
    assert "learning_rate" in status
    said = project.run("gpt-pipeline", "run", PREFECT_API_URL=api)
    assert "classifier version 2 is" in said
    assert "version 1" in said.partition("classifier version 2 is")[2].partition("\n")[0]
    crowned = champions(project)
    after = executed(project)
    ran = {name for name in STAGES if after[name] != began[name]}
    assert ran == {"finetune_classifier", "evaluate"}
    assert project.outputs()["models/classifier"] != outputs["models/classifier"]

    (project.root / "params.yaml").write_bytes(params)
    project.run("gpt-pipeline", "run", PREFECT_API_URL=api)
    assert champions(project) == crowned, "going back to what was worse or equal promotes nothing"
    assert executed(project) == after, "nothing is executed: DVC's run cache has both"
    assert project.outputs() == outputs
    assert (project.root / "dvc.lock").read_bytes() == lock
    assert "up to date" in project.run("dvc", "status", "dvc.yaml")


def test_dvc_shows_metrics_and_plots(project, first_run):
    assert "accuracy" in project.run("dvc", "metrics", "show")
    project.run("dvc", "plots", "show", "--out", "plots_page")
    page = (project.root / "plots_page" / "index.html").read_text()
    for title in ("validation_loss", "confusion"):
        assert title in page


def test_the_three_commands_that_talk_answer(project, first_run):
    assert project.run("gpt-pipeline", "generate", "The old clock", "--max-new-tokens", "5")
    assert project.run("gpt-pipeline", "chat", "What is the capital of Peru?")
    answer = project.run("gpt-pipeline", "classify", "You won a prize! Text WIN to 80800")
    assert "ham" in answer or "spam" in answer


def test_another_copy_gives_the_same_bytes_through_plain_dvc(project, archive, first_run):
    """In another folder, without git, without Prefect, without side by side: the same md5s."""
    archive.run("dvc", "repro")
    assert archive.outputs() == project.outputs()


def test_predictions_are_a_row_a_test_example(project, first_run):
    folder = project.root / "reports/evaluation/predictions"
    metrics = json.loads((project.root / "reports/evaluation/metrics.json").read_text())
    classifier = pd.read_csv(folder / "classifier.csv", keep_default_na=False)
    assistant = pd.read_csv(folder / "assistant.csv", keep_default_na=False)
    assert len(classifier) == metrics["classifier"]["rows"]
    assert len(assistant) == metrics["assistant"]["records"]
    accuracy = (classifier["actual"] == classifier["predicted"]).mean()
    assert metrics["classifier"]["accuracy"] == pytest.approx(accuracy)


def test_the_optional_stage_runs_when_it_is_asked_for(project, api, archive, first_run):
    """Through the flow in one copy and through plain DVC in another: the same bytes."""
    assert not (project.root / "models/preferred").exists()
    lock = (project.root / "dvc.lock").read_bytes()
    project.run("gpt-pipeline", "run", "tune_preferences", PREFECT_API_URL=api)
    runs = last_task_runs(api)
    assert set(runs) == {*STAGES[:3], "finetune_instruct", "tune_preferences"}
    states = {name: run["state"]["name"] for name, run in runs.items()}
    assert states.pop("tune_preferences") == "Completed"
    assert set(states.values()) == {"Cached"}
    assert (project.root / "dvc.lock").read_bytes() == lock
    assert "up to date" in project.run("dvc", "status")
    assert project.run("gpt-pipeline", "chat", "Name a bird.", "--model", "models/preferred")
    archive.run("dvc", "repro", "optional/dvc.yaml")
    for path in ("models/preferred/model.safetensors", "optional/dvc.lock"):
        assert (archive.root / path).read_bytes() == (project.root / path).read_bytes()


def test_the_copy_is_not_this_checkout(project):
    where = project.run("python", "-c", "import gpt; print(gpt.__file__)")
    assert Path(where.strip()).is_relative_to(project.root)


def test_a_champion_whose_files_are_gone_fails_the_run_in_one_line_and_nothing_is_promoted(
    project, api, first_run
):
    crowned = champions(project)
    (project.root / "mlartifacts").rename(project.root / "elsewhere")
    project.set("finetune_classifier.train.learning_rate", "0.003")
    said = project.run("gpt-pipeline", "run", code=2, PREFECT_API_URL=api)
    (line,) = [line for line in said.splitlines() if "files are gone" in line]
    assert "gpt-pipeline promote classifier" in line
    assert "Traceback" not in said
    assert champions(project) == crowned
    assert last_task_runs(api)["promotion"]["state"]["type"] == "FAILED"
    assert "up to date" in project.run("dvc", "status", "dvc.yaml"), "the stages did their work"
    assert "files are gone" in project.run("gpt-pipeline", "promote", code=2)

    by_hand = project.run("gpt-pipeline", "promote", "classifier")
    assert by_hand.startswith("classifier version 3 is the champion")
    assert champions(project) == {**crowned, "classifier": 3}
