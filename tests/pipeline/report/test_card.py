"""A model's card: its parts, its figures, how to load it, and nothing but text from outside."""

import dataclasses
import shutil

import pytest
from data_project import HOSTILE
from markdown_it import MarkdownIt
from report_project import MD5, add_verdicts, decision, evaluation, make_report_project

from gpt.base.errors import InputError
from pipeline.report.card import model_card
from pipeline.report.facts import LastRun, report_facts
from pipeline.tracking.connection import connect
from pipeline.tracking.keys import flatten_metrics
from pipeline.tracking.version_page import LONGEST

MODELS = ("base", "classifier", "assistant", "preferred")


@pytest.fixture
def facts(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_report_project(tmp_path)
    add_verdicts(tmp_path, decision("classifier", version=7))
    return report_facts(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_every_card_has_the_same_parts(facts, name):
    headings = [line for line in model_card(facts, name).splitlines() if line.startswith("## ")]
    assert headings == [
        "## Model details",
        "## Intended use",
        "## Metrics",
        "## Evaluation data",
        "## Training data",
        "## Caveats",
        "## Parameters",
    ]
    assert "License: MIT License" in model_card(facts, name)


def test_the_scores_are_those_of_the_evaluation_with_their_intervals(facts):
    of = facts.scores("classifier")
    low, value, high = (of[f"accuracy{end}"] * 100 for end in ("_low", "", "_high"))
    card = model_card(facts, "classifier")
    assert f"{value:.1f} % ({low:.1f}–{high:.1f})" in card
    assert f"| ham   |    {of['precision_ham'] * 100:.1f} % |" in card
    assert f"{of['majority_accuracy'] * 100:.1f} %" in card
    of = facts.scores("assistant")
    card = model_card(facts, "assistant")
    assert f"{of['base_rouge_l'] * 100:.1f} % (" in card
    assert f"{of['loss']:.3f} ({of['loss_low']:.3f}–{of['loss_high']:.3f})" in card
    assert f"{facts.scores('pretrain')['perplexity']:.1f}" in model_card(facts, "base")


def test_it_says_from_what_it_was_made(facts):
    run = LastRun(commit="c" * 40, dirty=True, params={"train.epochs": "3", "base": "gpt2"})
    facts = dataclasses.replace(facts, runs={"finetune_classifier": run})
    card = model_card(facts, "classifier")
    assert "Base: models/gpt2" in card
    assert f"Code: commit {'c' * 40}, with uncommitted changes" in card
    assert f"| data/raw/messages | {MD5}.dir" in card
    assert facts.sources["messages"][0].files[0].sha256 in card
    assert "base gpt2, train.epochs 3" in card
    assert "2 of its examples share text with the training part" in card
    assert "It was trained on 907 examples" in card


def test_it_says_how_to_load_this_version(facts):
    assert 'mlflow.pyfunc.load_model("models:/classifier/7")' in model_card(facts, "classifier")
    assert model_card(facts, "classifier").startswith("# classifier, version 7\n")
    assert 'mlflow.pyfunc.load_model("models:/base/VERSION")' in model_card(facts, "base")


def test_hostile_labels_and_names_stay_text(tmp_path):
    hostile = f"{HOSTILE} ](x) <img src=x>"
    make_report_project(tmp_path, labels=[hostile, "*b*"], sources=[hostile], text=hostile)
    facts = report_facts(tmp_path)
    run = LastRun(params={hostile: hostile})
    facts = dataclasses.replace(facts, runs={"finetune_classifier": run}, license=hostile)
    renderer = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for name in MODELS:
        tokens = renderer.parse(model_card(facts, name))
        tokens = [each for token in tokens for each in (token, *(token.children or ()))]
        kinds = {token.type for token in tokens}
        assert kinds.isdisjoint({"html_inline", "html_block", "em_open", "link_open", "image"})
        code = {token.content for token in tokens if token.type == "code_inline"}
        assert len(code) == 1
        assert code.pop().startswith("mlflow.pyfunc.load_model")


def test_it_is_never_longer_than_mlflow_keeps(facts):
    many = evaluation([f"a class with a long name, number {i}" for i in range(200)], ["s"])
    run = LastRun(params={f"parameter.{i}": "x" * 100 for i in range(100)})
    facts = dataclasses.replace(
        facts,
        results={**facts.results, "evaluate": flatten_metrics(many)},
        runs={"finetune_classifier": run},
    )
    card = model_card(facts, "classifier")
    assert 1000 < len(card) <= LONGEST
    assert card.endswith("## Parameters\n\nParameters: in MLflow, with the run\n"), (
        "nothing is cut off"
    )


def test_mlflow_takes_it_as_a_version_s_description(facts, tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    client = connect(tmp_path)
    client.create_registered_model("classifier")
    client.create_model_version("classifier", str(tmp_path))
    card = model_card(facts, "classifier")
    client.update_model_version("classifier", "1", card)
    assert client.get_model_version("classifier", "1").description == card


def test_an_unknown_model_is_named(facts):
    with pytest.raises(InputError, match="x: no such model; use one of base, classifier"):
        model_card(facts, "x")
