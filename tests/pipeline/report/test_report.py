"""The terminal's report says what the metrics say, and writes the page."""

import io
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow.exceptions import MlflowException
from report_project import (
    MD5,
    add_champion,
    add_note,
    add_verdicts,
    decision,
    make_report_project,
)
from rich.console import Console

from gpt.base.errors import InputError
from pipeline.report.card import model_card
from pipeline.report.facts import report_facts
from pipeline.report.page import verdicts
from pipeline.report.terminal import print_report
from pipeline.tracking.connection import connect
from pipeline.tracking.run import PEAK_MEMORY


def _report(root, **settings):
    console = Console(file=io.StringIO(), width=120, highlight=False)
    print_report(root, console, **settings)
    return console.file.getvalue()


@pytest.fixture
def client(tmp_path, empty_database, monkeypatch):
    """Of the MLflow of a project in `tmp_path`, where nothing was tracked yet."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_report_project(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return connect(tmp_path)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project's folder, its figures, and what was printed."""
    root = tmp_path_factory.mktemp("project")
    figures = make_report_project(root)
    add_verdicts(root, decision("classifier"))
    add_note(root, "tokenize", 1.5, status="FAILED")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return root, figures, _report(root)


def test_figures_are_those_in_the_metrics_with_their_intervals(project):
    _, figures, text = project
    for model in ("classifier", "pretrain", "gpt2"):
        name = "accuracy" if model == "classifier" else "zero_shot_accuracy"
        value, low, high = (figures[model][name + end] * 100 for end in ("", "_low", "_high"))
        assert f"{value:.1f} % ({low:.1f}–{high:.1f})" in text
    of = figures["assistant"]
    assert f"{of['loss']:.3f} ({of['loss_low']:.3f}–{of['loss_high']:.3f})" in text
    assert f"{of['base_perplexity']:.1f}" in text
    assert "1 min 23 s" in text


def test_three_answers_from_all_over_the_test_part_are_shown_before_and_after(project):
    *_, text = project
    for i in (0, 3, 6):
        assert f"answer {i}" in text
    assert "answer 1" not in text
    assert "[base]" in text, "what a model wrote is text, not markup"


def test_verdicts_are_told(project):
    *_, text = project
    lines = [line.strip(" •") for line in text.splitlines()]
    at = lines.index("Classifier, version 4: promoted")
    assert lines[at + 1] == "Score: 43.2 % (38.9–46.3) accuracy"
    assert lines[lines.index("Base: not compared yet") + 1] == "Score: 0.471 (0.429–0.503) loss"


def test_it_says_what_to_type_next_and_where_the_page_is(project):
    root, _, text = project
    for command in ("gpt-pipeline chat", "gpt-pipeline classify", "make ui"):
        assert command in text
    assert "reports/report.html: the whole report" in text
    assert (root / "reports" / "report.html").is_file()
    assert (root / "reports" / "report.md").is_file()


def test_the_time_of_a_run_that_failed_is_not_given_as_the_stage_s(project):
    *_, text = project
    assert " pretrain  " in text
    assert "tokenize" not in text


def test_it_is_written_again_when_there_is_news_or_it_is_gone_and_only_then(tmp_path, client):
    add_verdicts(tmp_path, decision("assistant"))
    for note in tmp_path.glob(".pipeline/runs/*.json"):
        note.unlink()
    page, markdown = (tmp_path / "reports" / f"report.{end}" for end in ("html", "md"))
    printed = _report(tmp_path, always=False)

    def is_written() -> bool:
        page.write_text("old") if page.exists() else None
        assert _report(tmp_path, always=False) == printed
        return page.read_text() != "old"

    assert not is_written()
    markdown.unlink()
    assert is_written()
    page.unlink()
    assert is_written()
    add_champion(tmp_path)
    assert is_written()
    shutil.rmtree(tmp_path / "reports/report")
    assert is_written()
    add_champion(tmp_path, "other words", version=2)
    assert is_written()
    assert not is_written()
    page.write_text("old")
    _report(tmp_path)
    assert page.read_text() != "old", "whoever asks for it gets it anew"


def test_mlflow_is_not_asked_again_about_the_same_runs_unless_the_user_asks(tmp_path, client):
    run = client.create_run(client.create_experiment("gpt-pipeline/pretrain"))
    client.log_metric(run.info.run_id, PEAK_MEMORY, 1234.4)
    client.set_terminated(run.info.run_id)
    for stage in ("finetune_classifier", "finetune_instruct"):
        (tmp_path / f".pipeline/runs/{stage}.json").unlink()
    add_note(tmp_path, "pretrain", 3.0, run_id=run.info.run_id)
    first = _report(tmp_path)
    assert "1,234 MB" in first
    client.log_metric(run.info.run_id, PEAK_MEMORY, 4321.2)
    assert _report(tmp_path, always=False) == first
    assert "4,321 MB" in _report(tmp_path)
    add_note(tmp_path, "pretrain", 4.0, run_id=run.info.run_id)
    assert "4.0 s" in _report(tmp_path, always=False)
    (tmp_path / ".pipeline/report.json").write_text("{")
    assert "4,321 MB" in _report(tmp_path, always=False)


def test_a_verdict_of_an_earlier_version_is_not_told_of_this_one(tmp_path, client):
    add_verdicts(tmp_path, decision("base", version=1))
    client.create_registered_model("base")
    for md5 in ("another", f"{MD5[::-1]}.dir"):
        client.create_model_version("base", str(tmp_path), tags={"md5": md5})
    base = verdicts(report_facts(tmp_path))[0]
    assert (base["title"], base["decision"]) == ("Base, version 2", None)


def test_what_dvc_brought_back_is_told_of_the_run_that_made_it(tmp_path, client):
    experiment = client.create_experiment("gpt-pipeline/pretrain")
    runs = []
    for rate, md5 in (("0.1", f"{MD5[::-1]}.dir"), ("0.2", "another")):
        tags = {"output.models/pretrain": md5, "git.commit": rate * 10}
        run = client.create_run(experiment, 1000 * (len(runs) + 1), tags)
        client.log_param(run.info.run_id, "rate", rate)
        client.set_terminated(run.info.run_id, end_time=1000 * (len(runs) + 1) + 500)
        runs.append(run.info.run_id)
    add_note(tmp_path, "pretrain", 83.4, run_id=runs[1])
    found = report_facts(tmp_path).runs["pretrain"]
    assert (found.run_id, found.params["rate"], found.seconds) == (runs[0], "0.1", 0.5)
    add_note(tmp_path, "pretrain", 83.4, run_id=runs[0])
    assert report_facts(tmp_path).runs["pretrain"].seconds == 83.4


def test_a_card_is_of_the_version_that_was_evaluated(tmp_path, client):
    """Since then another one may have been trained."""
    path = tmp_path / "dvc.lock"
    locked = yaml.safe_load(path.read_text())
    read = [{"path": "models/classifier", "md5": "evaluated"}]
    locked["stages"]["evaluate"] = {"deps": read, "outs": []}
    path.write_text(yaml.safe_dump(locked))
    client.create_registered_model("classifier")
    for md5 in ("evaluated", f"{MD5[::-1]}.dir"):
        client.create_model_version("classifier", str(tmp_path), tags={"md5": md5})
    _report(tmp_path)
    assert client.get_model_version("classifier", "1").description.startswith("# classifier")
    assert not client.get_model_version("classifier", "2").description


def test_mlflow_gets_the_page_and_each_version_its_card_or_one_line_says_why_not(
    tmp_path, client, monkeypatch
):
    place = (tmp_path / "mlartifacts").as_uri()
    run = client.create_run(client.create_experiment("gpt-pipeline/evaluate", place))
    client.set_terminated(run.info.run_id)
    add_note(tmp_path, "evaluate", 3.0, run_id=run.info.run_id)
    client.create_registered_model("base")
    md5 = f"{MD5[::-1]}.dir"
    client.create_model_version("base", str(tmp_path), tags={"md5": md5})
    client.create_model_version("base", str(tmp_path), tags={"md5": "another"})
    assert "did not take" not in _report(tmp_path)
    card = client.get_model_version("base", "1").description
    assert card == model_card(report_facts(tmp_path), "base")
    assert not client.get_model_version("base", "2").description
    kept = client.download_artifacts(run.info.run_id, "report/report.html")
    assert Path(kept).read_bytes() == (tmp_path / "reports/report.html").read_bytes()

    def full(*_):
        raise MlflowException("no space\nleft")

    monkeypatch.setattr("mlflow.MlflowClient.log_artifact", full)
    (line,) = [line for line in _report(tmp_path).splitlines() if "did not take" in line]
    assert line.endswith("`gpt-pipeline report` tries again: no space left")


def test_without_results_it_says_how_to_get_them(tmp_path):
    with pytest.raises(InputError, match="nothing to report yet; run `gpt-pipeline run`"):
        _report(tmp_path)
