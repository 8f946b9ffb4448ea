"""Where no evaluation kept what two versions answered, both are asked when they are compared."""

import dataclasses
import json
import shutil

import pytest
import torch
from data_project import add_instructions, add_messages

from gpt.base.errors import InputError
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import save_model
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.dag.cache import dvc_md5
from pipeline.history.compare import compare
from pipeline.tracking.connection import connect
from pipeline.tracking.run import StageRun

CONFIG = GPTConfig(vocab_size=257, context_length=128, n_layer=1, n_head=2, n_embd=16)
STAGES = {"classifier": "finetune_classifier", "assistant": "finetune_instruct"}
SPLIT = {"train": 0.5, "validation": 0.1}


@dataclasses.dataclass(frozen=True)
class Params:
    seed: int


def register(root, name, seed, split=None):
    """A version of untrained weights, as a stage registers it; nothing evaluated it."""
    training = {"base": "pretrain", "split": split or SPLIT, "max_length": 100}
    extra = {"training.json": training, "prompt.json": {"template": "phi3"}}
    torch.manual_seed(seed)
    stored = root / "stored" / f"{name}-{seed}"
    directory = stored / "artifacts" / "model"
    if name == "classifier":
        model = GPTClassifier(CONFIG, ["ham", "spam"])
        with torch.no_grad():  # one says ham, the other spam, whatever it reads
            model.score.weight.zero_()
            model.ln_f.bias.fill_(1.0)
            model.score.weight[seed % 2] = 1.0
    else:
        model = GPT(CONFIG)
    save_model(model, directory, tokenizer=byte_tokenizer(), extra=extra)
    md5 = dvc_md5(directory)
    run = StageRun(root, STAGES[name], Params(seed), {})
    run.close("FINISHED", outputs={f"models/{name}": md5})
    if not run.client.search_registered_models(f"name = '{name}'"):
        run.client.create_registered_model(name)
    run.client.create_model_version(name, str(stored), run.id, tags={"md5": md5})
    return run.id


@pytest.fixture(scope="module")
def made(tmp_path_factory, empty_database):
    """Two versions of each."""
    root = tmp_path_factory.mktemp("made")
    shutil.copy(empty_database, root / "mlflow.db")
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "params.yaml").write_text("evaluate: {threads: 1}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in STAGES:
            register(root, name, 0)
            register(root, name, 1)
    return root


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "project"
    shutil.copytree(made, root)
    add_messages(root, [("spam", f"win £{i} now") if i % 2 else ("ham", f"{i}") for i in range(40)])
    add_instructions(
        root, [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(20)]
    )
    return root


def test_classifiers_are_asked_the_test_messages_and_shown_where_they_differ(project):
    found = compare(project, "classifier/1", "classifier/2", answers=3)
    n = int(found["asked"].split()[0])
    assert 5 < n < 30
    assert found["asked"] == f"{n} test messages, asked of both now; they differ on {n}"
    assert len(found["answers"]) == 3
    for each in found["answers"]:
        assert (each["before"], each["after"]) == ("ham (100.0%)", "spam (100.0%)")
        assert each["right"] == ("spam" if each["asked"].startswith("win") else "ham")


def test_assistants_are_asked_as_many_test_instructions_as_are_shown(project):
    found = compare(project, "assistant/1", "assistant/2", answers=2)
    assert found["asked"].startswith("2 of ")
    assert found["asked"].endswith(" test instructions, asked of both now; they differ on 2")
    assert len(found["answers"]) == 2
    assert all(each["asked"].startswith("Say ") for each in found["answers"])
    assert all(each["before"] != each["after"] for each in found["answers"])


def test_no_answers_are_made_where_none_are_to_be_shown(project):
    found = compare(project, "classifier/1", "classifier/2", answers=0)
    said = "none to compare: no run of evaluate asked classifier/1"
    assert (found["answers"], found["asked"]) == ([], said)


def test_a_version_of_another_split_may_know_what_it_is_asked(project):
    register(project, "classifier", 2, split={**SPLIT, "seed": 7})
    found = compare(project, "classifier/2", "classifier/3")
    assert found["asked"].endswith("; classifier/2 learnt from another split and may know them")
    agreed = compare(project, "classifier/1", "classifier/3")
    assert "; they differ on 0; " in agreed["asked"]
    assert agreed["answers"] == []


def test_a_run_is_asked_by_the_version_that_has_its_bytes(project):
    runs = connect(project).search_model_versions("name = 'classifier'")
    ids = {int(each.version): each.run_id for each in runs}
    found = compare(project, ids[1], ids[2])
    assert "asked of both now; they differ" in found["asked"]
    connect(project).delete_model_version("classifier", "1")
    found = compare(project, ids[1], ids[2])
    assert found["asked"].endswith(", and the model of run #1 is not registered")


def test_what_is_missing_is_said_in_one_line_and_the_rest_is_compared(project):
    shutil.rmtree(project / "data/raw/messages")
    found = compare(project, "classifier/1", "classifier/2")
    assert found["asked"] == (
        "none to compare: no run of evaluate asked classifier/1, and data/raw/messages is not "
        "here; `dvc pull` brings it"
    )
    assert found["params"] == [{"what": "seed", "before": "0", "after": "1"}]


def test_files_that_are_gone_or_damaged_are_named_as_the_registry_does(project, made):
    (version,) = connect(project).search_model_versions("name = 'assistant' and version_number = 1")
    stored = project / "elsewhere"
    shutil.copytree(version.source, stored)
    config = stored / "artifacts/model/config.json"
    config.write_text(json.dumps({"n_layer": 1}))
    client = connect(project)
    client.create_model_version("assistant", str(stored), version.run_id, tags={"md5": "x"})
    said = compare(project, "assistant/1", "assistant/3")["asked"]
    assert ", and models:/assistant/3: its files are damaged (config.j" in said
    shutil.rmtree(stored)
    said = compare(project, "assistant/1", "assistant/3")["asked"]
    assert ", and models:/assistant/3: its files are gone or cannot be" in said
    assert "\n" not in said


def test_a_mistake_of_the_user_is_none_of_mlflow(project):
    with pytest.raises(InputError, match=r"^classifier: has no champion to compare with; name two"):
        compare(project, "classifier")
