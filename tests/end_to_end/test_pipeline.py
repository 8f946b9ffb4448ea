"""The whole pipeline as its user sees it: every stage, every tool, and what a change runs again.

The tests of this file build on each other: they are one story, told in its order. Its beginning is
in `story.py`, as it is the same with other servers.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from report_figures import Figures
from story import *  # noqa: F403
from story import STAGES, Servers, champions, executed, last_task_runs, prefect_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def servers(project):
    """The embedded default: MLflow's database is a file of the project. Prefect's server is one of
    its own, which outlives a command, so that it can be asked.
    """
    with prefect_server(project.root) as api:
        yield Servers(api, f"sqlite:///{project.root}/mlflow.db")


def test_dvc_sees_nothing_left_to_do(project, first_run):
    assert "up to date" in project.run("dvc", "status", "dvc.yaml")
    before = (project.root / "dvc.lock").read_bytes()
    began = executed(project)
    assert "up to date" in project.run("dvc", "repro")
    assert (project.root / "dvc.lock").read_bytes() == before
    assert executed(project) == began


def test_every_figure_of_the_report_follows_from_the_stored_predictions(project, first_run):
    figures = Figures(project.root)
    told = figures.bases() + figures.what_fine_tuning_buys() + figures.classes()
    told += figures.assistant() + figures.confusion_and_what_was_most_wrong()
    assert told > 90


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


def test_what_is_wrong_about_the_promotion_is_one_line_and_exit_code_2(project, servers, first_run):
    params, decisions = project.root / "params.yaml", project.root / ".pipeline/promotion.json"
    for path, content, line in (
        (params, "\npromotion: {at_least: -1}\n", "promotion.at_least: should be greater than"),
        (decisions, "{", "promotion.json: "),
    ):
        before = path.read_text()
        path.write_text(before + content if path == params else content)
        said = project.run("gpt-pipeline", "run", code=2, **servers.environment)
        assert line in said
        assert "Traceback" not in said
        path.write_text(before)
    for arguments, line in (
        (
            ["no-model"],
            "no-model: no candidate is registered; there are assistant, base, classifier",
        ),
        (["--version", "1"], "--version: of which model?"),
        (["base", "--version", "7"], "base: no version 7 is registered"),
    ):
        assert line in project.run("gpt-pipeline", "promote", *arguments, code=2)
    said = project.run("gpt-pipeline", "promote")
    assert "base version 1 is the champion: the first version" in said


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


def test_the_optional_stage_runs_when_it_is_asked_for(project, servers, archive, first_run):
    """Through the flow in one copy and through plain DVC in another: the same bytes."""
    assert not (project.root / "models/preferred").exists()
    lock = (project.root / "dvc.lock").read_bytes()
    project.run("gpt-pipeline", "run", "tune_preferences", **servers.environment)
    runs = last_task_runs(servers.api)
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
    project, servers, first_run
):
    crowned = champions(servers)
    (project.root / "mlartifacts").rename(project.root / "elsewhere")
    project.set("finetune_classifier.train.learning_rate", "0.003")
    said = project.run("gpt-pipeline", "run", code=2, **servers.environment)
    (line,) = [line for line in said.splitlines() if "files are gone" in line]
    assert "gpt-pipeline promote classifier" in line
    assert "Traceback" not in said
    assert champions(servers) == crowned
    assert last_task_runs(servers.api)["promotion"]["state"]["type"] == "FAILED"
    assert "up to date" in project.run("dvc", "status", "dvc.yaml"), "the stages did their work"
    assert "files are gone" in project.run("gpt-pipeline", "promote", code=2)

    by_hand = project.run("gpt-pipeline", "promote", "classifier")
    assert by_hand.startswith("classifier version 3 is the champion")
    assert champions(servers) == {**crowned, "classifier": 3}
