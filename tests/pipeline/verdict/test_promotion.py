"""A version takes the champion's place where it is better by the rule, and nowhere else.

Real models, a real registry: the versions are a trained one and what is made of its weights.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest
import torch
import yaml
from data_project import add_corpus, add_instructions, add_messages
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from gpt.base.errors import NOT_FINITE, InputError, RunError
from gpt.model.config import GPTConfig
from gpt.model.model import GPT
from gpt.model.weights import save_model
from gpt.scores.bootstrap import Comparison
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.dag.cache import dvc_md5
from pipeline.project.file_locks import stage_lock
from pipeline.project.settings import PromotionParams
from pipeline.tracking.connection import connect
from pipeline.tracking.registry import CHAMPION, PREVIOUS, version_of
from pipeline.tracking.run import StageRun
from pipeline.verdict import promotion
from pipeline.verdict.promotion import (
    BY_HAND,
    CHAMPION_ANSWERS,
    DECISIONS,
    is_decided,
    promote_by_hand,
    promote_the_better,
    read_decisions,
    roll_back,
)
from pipeline.verdict.same_examples import NotComparableError, SameExamples
from stages.evaluate import EvaluateParams, evaluate
from stages.finetune_classifier import FinetuneClassifierParams, finetune_classifier
from stages.finetune_instruct import FinetuneInstructParams, finetune_instruct
from stages.pretrain import PretrainParams, pretrain
from stages.tokenize import TokenizeParams, tokenize

CONFIG = GPTConfig(vocab_size=257, context_length=128, n_layer=1, n_head=2, n_embd=32)
EVALUATE = EvaluateParams(
    device="cpu", threads=1, batch_size=8, max_new_tokens=3, resamples=50, shots=1
)
RULE = PromotionParams(resamples=200)
TRAIN = {"device": "cpu", "threads": 1, "batch_size": 8, "learning_rate": 1e-2, "steps": 20}
SPLIT = {"train": 0.5, "validation": 0.1}
_WIDTHS = ("n_layer", "n_head", "n_embd")
STAGES = {"base": "pretrain", "classifier": "finetune_classifier", "assistant": "finetune_instruct"}
PATHS = {"base": "pretrain", "classifier": "classifier", "assistant": "assistant"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project whose models were trained and evaluated; nothing is registered."""
    root = tmp_path_factory.mktemp("trained")
    add_messages(
        root, [("spam", f"win £{i} now") if i % 2 else ("ham", f"see you {i}") for i in range(80)]
    )
    records = [
        {"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(40)
    ]
    add_instructions(root, records)
    add_corpus(root, ["2024"])  # a name that could be taken for a number
    (root / "data/raw/corpus/0.txt").write_text("a text of some words, again and again. " * 60)
    tokenize(
        TokenizeParams(tokenizer="bytes", validation=0.4, split="tail"),
        corpus=root / "data/raw/corpus",
        vocabulary=None,
        out=root / "data/tokens",
        metrics=root / "tokens.json",
        report=root / "tokens-report.json",
    )
    shape = {name: getattr(CONFIG, name) for name in ("context_length", *_WIDTHS)}
    pretrain(
        TypeAdapter(PretrainParams).validate_python({"model": shape, "train": TRAIN}),
        tokens=root / "data/tokens",
        out=root / "models/pretrain",
        metrics=root / "metrics.json",
        history=root / "history.csv",
    )
    for function, params, data, name in (
        (finetune_classifier, FinetuneClassifierParams, "messages", "classifier"),
        (finetune_instruct, FinetuneInstructParams, "instructions", "assistant"),
    ):
        own = {"base": "pretrain", "split": SPLIT, "train": TRAIN}
        if name == "assistant":
            own["template"] = "phi3"
        function(
            TypeAdapter(params).validate_python(own),
            base=root / "models/pretrain",
            out=root / "models" / name,
            metrics=root / "metrics.json",
            history=root / "history.csv",
            **{data: root / "data/raw" / data},
        )
    evaluate_again(root)
    return root


def evaluate_again(root):
    """What the stage does, and what DVC notes of it."""
    models = {name: root / "models" / name for name in ("pretrain", "classifier", "assistant")}
    raw = root / "data/raw"
    evaluate(
        EVALUATE,
        **models,
        gpt2=root / "models/pretrain",
        tokens=root / "data/tokens",
        messages=raw / "messages",
        instructions=raw / "instructions",
        predictions=root / "reports/evaluation/predictions",
        metrics=root / "reports/evaluation/metrics.json",
    )
    deps = [{"path": f"models/{name}", "md5": dvc_md5(path)} for name, path in models.items()]
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"evaluate": {"deps": deps}}}))


@pytest.fixture(scope="module")
def first(trained, tmp_path_factory):
    """The same with the models registered and decided on for the first time."""
    root = tmp_path_factory.mktemp("first") / "project"
    shutil.copytree(trained, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in STAGES:
            enter(root, name)
        decisions = promote_the_better(root, RULE, EVALUATE)
    assert [(each.model, each.version, each.promoted) for each in decisions] == [
        (name, 1, True) for name in STAGES
    ]
    return root


@pytest.fixture
def project(first, tmp_path, monkeypatch):
    """A copy of its own: the first versions are the champions. Their files stay where they were."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "project"
    shutil.copytree(first, root, ignore=shutil.ignore_patterns("mlartifacts"))
    return root


def enter(root, name):
    """Register the model directory as the stage's end does."""
    run = StageRun(root, STAGES[name], CONFIG, {})
    directory = root / "models" / PATHS[name]
    version = run.add_model(name, directory, dvc_md5(directory))
    run.close("FINISHED")
    return version


def change(root, name, how):
    """Another version of a model: its weights through a function; registered and evaluated."""
    path = root / "models" / PATHS[name] / "model.safetensors"
    weights = load_file(path)
    how(weights)
    same = {"same": "weights"} if how is keep else {}
    save_file(weights, path, metadata={"format": "pt", **same})
    version = enter(root, name)
    evaluate_again(root)
    return version


def spoil(weights):
    """Every final norm is turned round: what was likely is unlikely."""
    weights["transformer.ln_f.weight"].neg_()
    weights["transformer.ln_f.bias"].neg_()


def keep(weights):
    """Other bytes, the same answers."""


def aliases(root, name):
    client = connect(root)
    found = {alias: version_of(client, name, alias) for alias in (CHAMPION, PREVIOUS)}
    return {alias: int(version.version) for alias, version in found.items() if version}


def decision(decisions, name):
    (found,) = [each for each in decisions if each.model == name]
    return found


def test_the_first_versions_are_the_champions(project):
    for name in STAGES:
        assert aliases(project, name) == {CHAMPION: 1}
        version = version_of(connect(project), name, 1)
        assert version.tags["verdict"] == "champion: the first version"


@pytest.mark.parametrize("name", list(STAGES))
def test_a_worse_version_is_not_promoted_and_a_better_one_is(project, name):
    assert change(project, name, spoil) == 2
    worse = decision(promote_the_better(project, RULE, EVALUATE), name)
    assert (worse.champion, worse.version, worse.promoted) == (1, 2, False)
    assert worse.why.startswith("worse: ")
    assert aliases(project, name) == {CHAMPION: 1}
    # the worse one is put in the champion's place by hand; then the first is the better one
    assert promote_by_hand(project, name) == 2
    assert aliases(project, name) == {CHAMPION: 2, PREVIOUS: 1}
    change(project, name, spoil)  # back: the first version's bytes again
    better = decision(promote_the_better(project, RULE, EVALUATE), name)
    assert (better.champion, better.version, better.promoted) == (2, 1, True)
    assert better.why.startswith("better: ")
    assert better.difference == pytest.approx(better.new - better.old)
    assert better.low <= better.difference <= better.high
    assert aliases(project, name) == {CHAMPION: 1, PREVIOUS: 2}
    # and once more: the same decision, nothing moves
    again = decision(promote_the_better(project, RULE, EVALUATE), name)
    assert again == better
    assert aliases(project, name) == {CHAMPION: 1, PREVIOUS: 2}


@pytest.mark.parametrize("name", list(STAGES))
@pytest.mark.parametrize("sure", [True, False])
def test_an_equal_version_is_not_promoted(project, name, sure):
    assert change(project, name, keep) == 2
    # another batch size rounds otherwise, as another processor would
    asked_otherwise = replace(EVALUATE, batch_size=5)
    decisions = promote_the_better(project, replace(RULE, sure=sure), asked_otherwise)
    equal = decision(decisions, name)
    assert not equal.promoted
    assert equal.why == "equal to version 1 on every example"
    assert equal.difference == pytest.approx(0, abs=1e-5)
    assert aliases(project, name) == {CHAMPION: 1}
    assert version_of(connect(project), name, 2).tags["verdict"].startswith("not promoted")


def test_what_is_better_but_not_for_sure_is_promoted_only_where_the_rule_says_so(
    project, monkeypatch
):
    """Of the whole interval, not of the difference alone."""
    change(project, "classifier", keep)
    found = Comparison(0.02, -0.01, 0.05, better=False, worse=False)
    monkeypatch.setattr("pipeline.verdict.promotion.compare", lambda *_, **__: found)
    unsure = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
    assert unsure.why == (
        "not better by the rule: accuracy +0.0200 on version 1's, 95 % interval -0.0100 to +0.0500"
    )
    assert not unsure.promoted
    for at_least, promoted in ((0.03, False), (0.01, True)):
        rule = replace(RULE, sure=False, at_least=at_least)
        assert decision(promote_the_better(project, rule, EVALUATE), "classifier").promoted is (
            promoted
        )
    assert aliases(project, "classifier") == {CHAMPION: 2, PREVIOUS: 1}


def test_what_a_person_chose_stays_until_something_new_is_better(project):
    change(project, "classifier", spoil)
    promote_by_hand(project, "classifier")
    change(project, "classifier", spoil)
    assert decision(promote_the_better(project, RULE, EVALUATE), "classifier").version == 1
    assert aliases(project, "classifier") == {CHAMPION: 1, PREVIOUS: 2}
    promote_by_hand(project, "classifier", 2)  # over the better one, which is at hand
    for _ in range(2):
        kept = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
        assert (kept.promoted, kept.why) == (False, "version 2 was chosen by hand")
        assert aliases(project, "classifier") == {CHAMPION: 2, PREVIOUS: 1}
    change(project, "classifier", lambda weights: weights["score.weight"].mul_(1.5))
    new = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
    assert (new.version, new.promoted) == (3, True)


def by_hand(root, name):
    tag = connect(root).get_registered_model(name).tags.get(BY_HAND)
    return tag and json.loads(tag)


def forget(root):
    """What an agent's fresh checkout has not: anything of this one but the registry."""
    shutil.rmtree(root / ".pipeline")


def test_a_rollback_swaps_champion_and_previous_and_no_later_run_undoes_it(project):
    change(project, "classifier", spoil)
    promote_by_hand(project, "classifier")
    change(project, "classifier", spoil)
    promote_the_better(project, RULE, EVALUATE)
    assert aliases(project, "classifier") == {CHAMPION: 1, PREVIOUS: 2}
    assert roll_back(project, "classifier") == (2, 1)
    assert aliases(project, "classifier") == {CHAMPION: 2, PREVIOUS: 1}
    assert version_of(connect(project), "classifier", 2).tags["verdict"] == "champion: by hand"
    assert by_hand(project, "classifier") == {"version": 2, "over": [1]}
    for again in (lambda _: None, forget):  # here, and in another checkout
        again(project)
        kept = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
        assert (kept.version, kept.promoted) == (1, False)
        assert kept.why == "version 2 was chosen by hand"
        assert aliases(project, "classifier") == {CHAMPION: 2, PREVIOUS: 1}
    # and back: the two change places as often as one likes
    assert roll_back(project, "classifier") == (1, 2)
    assert aliases(project, "classifier") == {CHAMPION: 1, PREVIOUS: 2}


def test_a_rollback_where_nothing_was_evaluated_holds_against_what_it_replaced(project):
    change(project, "classifier", spoil)
    promote_by_hand(project, "classifier")
    change(project, "classifier", spoil)
    promote_the_better(project, RULE, EVALUATE)
    lock = (project / "dvc.lock").read_text()
    (project / "dvc.lock").unlink()  # as on a machine that only looks at the registry
    assert roll_back(project, "classifier") == (2, 1)
    (project / "dvc.lock").write_text(lock)
    forget(project)
    assert not decision(promote_the_better(project, RULE, EVALUATE), "classifier").promoted


def test_a_rollback_holds_until_something_new_is_better(project):
    change(project, "classifier", spoil)
    promote_by_hand(project, "classifier")
    change(project, "classifier", spoil)
    promote_the_better(project, RULE, EVALUATE)
    roll_back(project, "classifier")
    change(project, "classifier", lambda weights: weights["score.weight"].mul_(1.5))
    forget(project)
    new = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
    assert (new.version, new.promoted) == (3, True)
    assert aliases(project, "classifier") == {CHAMPION: 3, PREVIOUS: 2}
    assert by_hand(project, "classifier") is None, "what was chosen is past"


def test_without_a_previous_champion_a_rollback_is_refused_and_nothing_moves(project):
    with pytest.raises(InputError) as caught:
        roll_back(project, "classifier")
    assert str(caught.value) == (
        "classifier: no version but 1 was its champion, so there is nothing to go back to; "
        "`gpt-pipeline promote classifier --version N` makes another one the champion"
    )
    assert aliases(project, "classifier") == {CHAMPION: 1}
    assert by_hand(project, "classifier") is None
    with pytest.raises(InputError, match=r"^nothing: no champion is registered; there "):
        roll_back(project, "nothing")


def test_a_choice_that_an_earlier_release_noted_in_its_file_still_holds(project):
    change(project, "classifier", spoil)
    promote_by_hand(project, "classifier")
    change(project, "classifier", spoil)
    promote_the_better(project, RULE, EVALUATE)
    promote_by_hand(project, "classifier", 2)
    connect(project).delete_registered_model_tag("classifier", BY_HAND)
    noted = {"by_hand": {"classifier": {"version": 2, "over": 1}}}
    (project / DECISIONS).write_text(json.dumps(noted))
    kept = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
    assert (kept.promoted, kept.why) == (False, "version 2 was chosen by hand")
    # a newer choice takes its place
    promote_by_hand(project, "classifier", 1)
    assert json.loads((project / DECISIONS).read_text())["by_hand"] == {}
    assert by_hand(project, "classifier") == {"version": 1, "over": [1]}


def test_a_tag_that_no_promotion_wrote_is_named(project):
    change(project, "classifier", keep)
    connect(project).set_registered_model_tag("classifier", BY_HAND, "Anna, in May")
    with pytest.raises(InputError, match=r"classifier: its tag by_hand in MLflow is not [^\n]*$"):
        promote_the_better(project, RULE, EVALUATE)


def test_an_alias_that_a_person_moved_back_stays_there(project):
    change(project, "classifier", spoil)
    promote_by_hand(project, "classifier")
    change(project, "classifier", spoil)
    promote_the_better(project, RULE, EVALUATE)
    connect(project).set_registered_model_alias(
        "classifier", CHAMPION, "2"
    )  # as MLflow's page does
    kept = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
    assert (kept.promoted, kept.why) == (False, "version 2 was chosen again by hand")
    assert aliases(project, "classifier")[CHAMPION] == 2


def test_one_request_that_fails_promotes_nothing(project, monkeypatch):
    change(project, "classifier", spoil)
    before = {name: aliases(project, name) for name in STAGES}

    def fail(*_):
        raise MlflowException("Read timed out")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.get_model_version_by_alias", fail)
        with pytest.raises(RunError, match=r"MLflow at .*promotion: Read timed out; [^\n]*$"):
            promote_the_better(project, RULE, EVALUATE)
    assert {name: aliases(project, name) for name in STAGES} == before
    assert not decision(promote_the_better(project, RULE, EVALUATE), "classifier").promoted


def test_decisions_that_were_carried_out_are_not_lost_when_the_next_one_fails(project, monkeypatch):
    for name in ("base", "classifier"):
        change(project, name, spoil)
    tag = MlflowClient.set_model_version_tag

    def fail(client, name, *arguments):
        if name == "classifier":
            raise MlflowException("gone")
        return tag(client, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.set_model_version_tag", fail)
        with pytest.raises(RunError):
            promote_the_better(project, RULE, EVALUATE)
    (kept,) = read_decisions(project)
    assert (kept.model, kept.version) == ("base", 2)
    assert not is_decided(project, RULE)
    assert decision(promote_the_better(project, RULE, EVALUATE), "base") == kept


def test_other_examples_are_decided_anew_though_the_models_are_the_same(project):
    assert is_decided(project, RULE)
    change(project, "classifier", spoil)
    before = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
    path = project / "dvc.lock"
    locked = yaml.safe_load(path.read_text())
    locked["stages"]["evaluate"]["deps"].append({"path": "data/raw/messages", "md5": "another"})
    path.write_text(yaml.safe_dump(locked))
    assert not is_decided(project, RULE)
    table = project / "reports/evaluation/predictions/classifier.csv"
    rows = pd.read_csv(table, keep_default_na=False)
    rows["predicted"] = rows["actual"]
    rows.to_csv(table, index=False)
    now = decision(promote_the_better(project, RULE, EVALUATE), "classifier")
    assert now.new == 1 != before.new


def test_a_champion_that_learnt_from_another_split_is_not_compared(project):
    """It may have seen the test examples, so what is better than it might look worse."""
    for name in ("classifier", "assistant"):
        path = project / "models" / name / "training.json"
        said = json.loads(path.read_text())
        said["split"]["seed"] = 99
        path.write_text(json.dumps(said))
        enter(project, name)
    evaluate_again(project)
    decisions = promote_the_better(project, RULE, EVALUATE)
    for name in ("classifier", "assistant"):
        found = decision(decisions, name)
        assert not found.promoted
        assert found.why.startswith("the champion learnt from another split")
        assert aliases(project, name) == {CHAMPION: 1}


def test_while_the_evaluation_runs_nothing_is_promoted(project):
    change(project, "classifier", spoil)
    with (
        stage_lock(project, "evaluate"),
        pytest.raises(InputError, match="evaluate"),
    ):
        promote_the_better(project, RULE, EVALUATE)
    (project / "reports/evaluation/predictions/classifier.csv").unlink()
    with pytest.raises(
        InputError, match=r"classifier\.csv: No such file .*; run `gpt-pipeline run`"
    ):
        promote_the_better(project, RULE, EVALUATE)
    assert aliases(project, "classifier") == {CHAMPION: 1}


def test_the_figures_of_a_decision_are_those_of_the_metrics(project):
    old = json.loads((project / "reports/evaluation/metrics.json").read_text())
    for name in STAGES:
        change(project, name, spoil)
    new = json.loads((project / "reports/evaluation/metrics.json").read_text())
    decisions = promote_the_better(project, RULE, EVALUATE)
    for name, score in (("base", "loss"), ("classifier", "accuracy"), ("assistant", "loss")):
        found = decision(decisions, name)
        section = "pretrain" if name == "base" else name
        assert found.score == score
        assert found.new == pytest.approx(new[section][score])
        assert found.old == pytest.approx(old[section][score])
    assert read_decisions(project) == decisions
    # the champion's answers are kept for the report
    kept = pd.read_csv(project / CHAMPION_ANSWERS / "assistant.csv", keep_default_na=False)
    assert kept["example"].tolist() == list(range(decision(decisions, "assistant").examples))
    table = pd.read_csv(project / "reports/evaluation/predictions/assistant.csv")
    assert kept["asked"].tolist() == table["instruction"].tolist()
    assert set(kept["champion"]) == {1}


def test_other_scores_and_other_rules_decide_anew(project):
    change(project, "classifier", spoil)
    change(project, "assistant", spoil)
    for rule in (
        replace(RULE, classifier="f1_macro", assistant="chrf"),
        replace(RULE, classifier="f1_macro", assistant="rouge_l"),
    ):
        decisions = promote_the_better(project, rule, EVALUATE)
        for name in ("classifier", "assistant"):
            found = decision(decisions, name)
            assert found.score == getattr(rule, name)
            assert not found.promoted
    promote_by_hand(project, "classifier")
    change(project, "classifier", spoil)
    # better by all of 1: still not by more than that
    far = replace(RULE, at_least=1.5)
    assert not decision(promote_the_better(project, far, EVALUATE), "classifier").promoted
    assert decision(promote_the_better(project, RULE, EVALUATE), "classifier").promoted


def test_what_was_decided_is_known_without_asking_again(project):
    assert is_decided(project, RULE)
    assert not is_decided(project, replace(RULE, sure=False))
    change(project, "classifier", keep)
    assert not is_decided(project, RULE)
    promote_the_better(project, RULE, EVALUATE)
    assert is_decided(project, RULE)


def crown_second(root, name):
    """A second version is the champion and the first one at hand; the champion's files."""
    change(root, name, spoil)
    promote_by_hand(root, name)
    change(root, name, spoil)
    found = mlflow.artifacts.download_artifacts(f"models:/{name}/2/artifacts")
    (folder,) = Path(found).iterdir()
    return folder


def test_a_champion_whose_files_are_gone_stops_it_and_nothing_is_promoted(project):
    crown_second(project, "base")  # is decided first, and would be promoted
    # where a folder is the store, that is the store's own
    shutil.rmtree(crown_second(project, "classifier").parent)
    before = {name: aliases(project, name) for name in STAGES}
    decided = (project / DECISIONS).read_text()
    with pytest.raises(InputError) as caught:
        promote_the_better(project, RULE, EVALUATE)
    said = str(caught.value)
    assert said.startswith("models:/classifier/2: the champion's files are gone or cannot be")
    assert said.endswith("`gpt-pipeline promote classifier`")
    assert "\n" not in said
    assert {name: aliases(project, name) for name in STAGES} == before
    assert (project / DECISIONS).read_text() == decided
    promote_by_hand(project, "classifier", 1)  # what the line says helps
    assert decision(promote_the_better(project, RULE, EVALUATE), "base").promoted
    assert aliases(project, "classifier") == {CHAMPION: 1, PREVIOUS: 2}


def test_a_champion_of_which_a_file_is_gone_is_named_as_the_registry_does(project):
    (crown_second(project, "classifier") / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        promote_the_better(project, RULE, EVALUATE)
    said = str(caught.value)
    assert said.startswith("models:/classifier/2: the champion's files are damaged (model.safetens")
    assert said.endswith("`gpt-pipeline promote classifier`")
    assert "/tmp" not in said
    assert aliases(project, "classifier") == {CHAMPION: 2, PREVIOUS: 1}


@pytest.mark.parametrize("name", ["base", "assistant"])
def test_a_champion_of_another_vocabulary_is_not_compared_by_its_tokens(project, name):
    """Though there be as many windows and tokens."""
    path = crown_second(project, name) / "vocab.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(vocabulary))
    found = decision(promote_the_better(project, RULE, EVALUATE), name)
    assert not found.promoted
    assert "tokenizer" in found.why
    assert found.difference is None


def test_a_champion_of_another_context_is_not_compared_by_its_windows(project):
    short = replace(CONFIG, context_length=64)
    torch.manual_seed(2)
    shutil.rmtree(project / "models/pretrain")
    save_model(GPT(short), project / "models/pretrain", tokenizer=byte_tokenizer())
    enter(project, "base")
    evaluate_again(project)
    found = decision(promote_the_better(project, RULE, EVALUATE), "base")
    assert not found.promoted
    assert "they read no equal windows" in found.why


def test_a_model_that_is_not_registered_here_is_left_out(project):
    path = project / "models/classifier/model.safetensors"
    weights = load_file(path)
    spoil(weights)
    save_file(weights, path, metadata={"format": "pt"})
    evaluate_again(project)
    decisions = promote_the_better(project, RULE, EVALUATE)
    assert [each.model for each in decisions] == ["base", "assistant"]


def test_errors_are_one_line(project, tmp_path):
    with pytest.raises(InputError, match="classifier: no version 7 is registered; there are"):
        promote_by_hand(project, "classifier", 7)
    with pytest.raises(InputError, match=r"^no-model: no candidate .* there are .*classifier"):
        promote_by_hand(project, "no-model")
    (project / DECISIONS).write_text('{"decisions": [{"model": 3}]}')
    with pytest.raises(InputError, match=r"promotion\.json: decisions\.0\..*; remove it, and run"):
        read_decisions(project)
    (project / "dvc.lock").unlink()
    with pytest.raises(InputError, match=r"dvc\.lock: holds no run of evaluate, so"):
        promote_the_better(project, RULE, EVALUATE)


@pytest.mark.parametrize(
    "wrong", [{"classifier": "loss"}, {"level": 1}, {"at_least": -1}, {"resamples": 0}, {"x": 1}]
)
def test_an_impossible_rule_is_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(PromotionParams).validate_python(wrong)


# --- what cannot be compared ----------------------------------------------------------------------


def test_a_test_part_of_one_class_promotes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pd.DataFrame({"actual": ["ham"] * 3, "predicted": ["ham"] * 3})
    monkeypatch.setattr(SameExamples, "_check_split", lambda _: None)
    monkeypatch.setattr(SameExamples, "_predictions", lambda *_: rows)
    found = (["ham", "spam"], {"test": rows})
    monkeypatch.setattr("pipeline.verdict.same_examples.messages_by_part", lambda *_: found)
    compared = SameExamples(*[tmp_path] * 4, PromotionParams(), EVALUATE)
    why = "messages of one class alone, 'ham', so its scores say nothing"
    with pytest.raises(NotComparableError, match=why):
        compared.classifiers()


def test_a_score_that_is_no_number_is_not_better() -> None:
    nothing = Comparison(math.nan, math.nan, math.nan, better=False, worse=False)
    for sure in (True, False):
        promoted, _ = promotion._judged(nothing, PromotionParams(sure=sure), "accuracy", 1)
        assert not promoted


def test_a_champion_whose_scores_are_not_finite_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fetched(uri: str, dst_path: str) -> str:
        (Path(dst_path) / "artifacts" / "classifier").mkdir(parents=True)
        return dst_path

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fetched)
    version = SimpleNamespace(name="classifier", version="3")
    refused = pytest.raises(InputError, match=r"^models:/classifier/3: the champion's files are")
    with refused as caught, promotion.files_of(version, "the champion's", "; name another") as at:
        raise RunError(f"{at}: {NOT_FINITE}")
    assert str(caught.value).endswith("; name another")
    assert "the model's logits are not finite numbers" in str(caught.value)
