"""The registered models load and answer from the registry alone."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter

from gpt import generation
from gpt.base.events import Metrics
from gpt.generation import Sampling, complete
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import load_model, save_model
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.dag.cache import dvc_md5
from pipeline.project.stage_table import STAGES
from pipeline.tracking import registry as models
from pipeline.tracking.connection import connect
from pipeline.tracking.provenance import Provenance
from pipeline.tracking.run import StageRun
from stages.pretrain import PretrainParams

CONFIG = GPTConfig(vocab_size=257, context_length=256, n_layer=1, n_head=2, n_embd=16)
LABELS = ["ham", "spam"]

_ASK = [{"instruction": "Name a colour.", "input": ""}]
_TEXTS = ["Win a prize now", "See you at six", "", "long " * 200]
QUESTIONS: list[Any] = [
    ["models:/classifier@candidate", [{"text": text} for text in _TEXTS], None],
    ["models:/assistant@candidate", _ASK, None],
    ["models:/assistant@candidate", _ASK, None],
    ["models:/assistant@candidate", _ASK, {"temperature": 1.5, "max_new_tokens": 5}],
    ["models:/base@candidate", [{"prompt": "Once"}], {"max_new_tokens": 8}],
    ["models:/preferred@candidate", _ASK, {"max_new_tokens": 8}],
]

# the project is made unfindable: what answers is what the registry holds
ELSEWHERE = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(f)]
import importlib.util
for package in ("gpt", "stages", "pipeline"):
    assert importlib.util.find_spec(package) is None, package
import json, os
import mlflow, pandas as pd
mlflow.set_tracking_uri(os.environ["TRACKED"])
answers = []
for uri, rows, params in json.loads(sys.stdin.read()):
    answer = mlflow.pyfunc.load_model(uri).predict(pd.DataFrame(rows), params=params)
    answers.append(answer.to_dict(orient="records"))
mlflow.set_tracking_uri("sqlite:///nothing-here.db")
exec(os.environ["README"])
print(json.dumps(answers))
import gpt
assert "code" in gpt.__file__, gpt.__file__
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its models registered."""
    root = tmp_path_factory.mktemp("project")
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    save_model(GPT(CONFIG), root / "models/pretrain", tokenizer=tokenizer)
    save_model(GPTClassifier(CONFIG, LABELS), root / "models/classifier", tokenizer=tokenizer)
    for name in ("assistant", "preferred"):
        save_model(
            GPT(CONFIG),
            root / "models" / name,
            tokenizer=tokenizer,
            extra={"prompt.json": {"template": "alpaca"}},
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for stage, spec in STAGES.items():
            if spec.model:
                register(root, stage)
        connect(root).set_registered_model_alias("classifier", "champion", "1")
    return root


def register(root: Path, stage: str) -> int:
    spec = STAGES[stage]
    assert spec.model is not None
    run = StageRun(root, stage, CONFIG, {})
    directory = root / spec.outputs["out"]
    version = run.add_model(spec.model.name, directory, dvc_md5(directory))
    run.close("FINISHED")
    assert version is not None
    return version


@pytest.fixture(scope="module")
def printed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What another process prints elsewhere: by README's lines, and last the `answers`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["TRACKED"] = f"sqlite:///{project / 'mlflow.db'}"
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    lines = readme.partition("```python\nimport mlflow")[2].partition("```")[0]
    assert "/home/me/gpt-pipeline" in lines
    environment["README"] = "import mlflow" + lines.replace("/home/me/gpt-pipeline", str(project))
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
        input=json.dumps(QUESTIONS),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def answers(printed: list[str]) -> list[Any]:
    """What the models say to `QUESTIONS` in another process, elsewhere."""
    return json.loads(printed[-1])


def test_readme_s_lines_answer_in_any_folder(printed: list[str]) -> None:
    heading, row = printed[:2]
    assert heading.split() == ["label", "probability_ham", "probability_spam"]
    assert row.split()[1] in LABELS


def test_a_copied_project_loads_its_own_models_and_leaves_the_original_as_it_was(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    copy = tmp_path / "a copy, 100 % of Jürgen's #1"
    shutil.copytree(project, copy)
    before = dvc_md5(project)
    version = connect(copy).get_model_version_by_alias("classifier", "champion")
    assert version.tags["md5"] == dvc_md5(copy / "models/classifier")
    found = Path(mlflow.artifacts.download_artifacts("models:/classifier@champion"))
    assert found.is_relative_to(copy)
    StageRun(copy, "finetune_classifier", CONFIG, {}).close("FINISHED")
    assert dvc_md5(project) == before


def test_the_classifier_answers_with_label_and_probabilities(answers: list[Any]) -> None:
    assert len(answers[0]) == 4
    for row in answers[0]:
        assert set(row) == {"label", "probability_ham", "probability_spam"}
        assert row["probability_ham"] + row["probability_spam"] == pytest.approx(1, abs=1e-5)
        assert row[f"probability_{row['label']}"] >= 0.5


def test_the_assistant_answers_greedily_unless_told_otherwise(answers: list[Any]) -> None:
    (first,), (again,), (warm,) = answers[1:4]
    assert set(first) == {"response"}
    assert again == first
    assert warm != first
    assert len(warm["response"]) <= 5


def test_a_tuned_assistant_answers_as_an_assistant_does(answers: list[Any]) -> None:
    (row,) = answers[5]
    assert set(row) == {"response"}


def test_the_base_model_continues_a_prompt_as_generate_does(
    project: Path, answers: list[Any]
) -> None:
    (row,) = answers[4]
    model, tokenizer = load_model(project / "models/pretrain"), byte_tokenizer()
    assert isinstance(model, GPT)
    sampling = Sampling(max_new_tokens=8, stop=(tokenizer.eot,))
    (ids,) = complete(model, [tokenizer.encode("Once")], sampling)
    assert row["completion"] == tokenizer.decode(ids)


def test_a_version_leads_back_to_its_run_and_its_bytes(project: Path) -> None:
    client = connect(project)
    version = client.get_model_version_by_alias("classifier", "candidate")
    assert version.tags["md5"] == dvc_md5(project / "models/classifier")
    assert version.tags["dvc.stage"] == "finetune_classifier"
    assert client.get_run(version.run_id).data.tags["dvc.stage"] == "finetune_classifier"
    assert version.description


def test_an_equal_model_is_not_registered_twice(project: Path) -> None:
    client = connect(project)
    before = register(project, "finetune_classifier")
    save_model(
        GPTClassifier(CONFIG, LABELS), project / "models/classifier", tokenizer=byte_tokenizer()
    )
    other = register(project, "finetune_classifier")
    assert other == before + 1
    assert register(project, "finetune_classifier") == other
    assert len(client.search_model_versions("name = 'classifier'")) == 2


def test_requirements_are_pinned_to_what_can_be_installed() -> None:
    pins = models._requirements()
    assert any(pin.startswith("torch==") for pin in pins)
    assert all("+" not in pin for pin in pins)


def test_registering_says_nothing(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model(GPT(CONFIG), project / "models/pretrain", tokenizer=byte_tokenizer())
    register(project, "pretrain")
    assert capfd.readouterr() == ("", "")


def test_the_same_answers_in_this_process(project: Path) -> None:
    import mlflow

    connect(project)
    model = mlflow.pyfunc.load_model("models:/classifier@candidate")
    frame = pd.DataFrame({"text": ["one", "two"]}, index=[7, 9])
    assert list(model.predict(frame).index) == [7, 9]


def test_a_model_beside_another_gpt_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has imported a `gpt` of another version keeps to it."""
    monkeypatch.setitem(sys.modules, generation.__name__, None)
    with pytest.raises(ImportError, match=r"in a process that has not imported another one"):
        runpy.run_path(str(models.SERVED))


def test_a_versions_page_shows_what_its_run_came_to(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    directory = tmp_path / "model"
    save_model(GPT(CONFIG), directory, tokenizer=byte_tokenizer())
    run = StageRun(tmp_path, "pretrain", CONFIG, {})
    for step in (1, 2, 3):
        run(Metrics(step, {"train_loss": 4.0 - step, "tokens": 8 * step, "grad_norm": 1.0}))
    run(Metrics(2, {"validation_loss": 2.5}))
    run.add_model("base", directory, "0")
    run.close("FINISHED", metrics={"validation_loss": 2.25, "perplexity": 9.0})
    (version,) = run.client.search_model_versions("name = 'base'")
    model = run.client.get_logged_model(version.source.removeprefix("models:/"))
    shown = {metric.key: (metric.value, metric.step) for metric in model.metrics}
    # the machine is looked at when the time for it has come, which it may have
    assert {key: shown[key] for key in shown if not key.startswith("system/")} == {
        "train_loss": (1.0, 3),
        "validation_loss": (2.25, 4),
        "tokens": (24.0, 3),
        "perplexity": (9.0, 4),
    }
    assert model.params["n_embd"] == "16"
    # the final value follows the curve and is the one that MLflow shows; the run has each once
    curve = run.client.get_metric_history(run.id, "validation_loss")
    assert [(each.step, each.value) for each in curve] == [(2, 2.5), (4, 2.25)]
    assert run.client.get_run(run.id).data.metrics["validation_loss"] == 2.25
    assert len(run.client.get_metric_history(run.id, "train_loss")) == 3
    assert len(run.client.get_metric_history(run.id, "perplexity")) == 1


def _train(root: Path, rate: float, data: str) -> dict[str, Any]:
    """A version of the base as a run of its stage registers it: its tags and its description."""
    torch.manual_seed(int(rate * 1e6))
    directory = root / "model"
    shutil.rmtree(directory, ignore_errors=True)
    save_model(GPT(CONFIG), directory, tokenizer=byte_tokenizer())
    shape = {"context_length": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    params = TypeAdapter(PretrainParams).validate_python(
        {"model": shape, "train": {"steps": 5, "learning_rate": rate}}
    )
    made_of = Provenance(tags={"git.commit": "c" * 40, "git.dirty": "true", "code": data})
    run = StageRun(root, "pretrain", params, {"data/tokens": data}, made_of=made_of)
    number = run.add_model("base", directory, dvc_md5(directory))
    run.close("FINISHED")
    version = run.client.get_model_version("base", str(number))
    return {"tags": version.tags, "said": version.description, "url": run.url, "name": run.name}


def test_a_versions_page_says_what_it_is_and_what_changed(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any report: as a plain `dvc repro` leaves it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    first = _train(tmp_path, 0.001, "a")
    page = first["url"].partition("?")[0]
    assert first["said"] == (
        "A GPT (GPT-2's architecture) pretrained on raw text: it continues a prompt.\n\n"
        f"- Made by the stage pretrain, run [#1 ccccccc]({page[page.index('#/') :]})\n"
        f"- Code: commit {'c' * 40}, with uncommitted changes\n\nThe first version."
    )
    assert "changed" not in first["tags"]
    second = _train(tmp_path, 0.0005, "b")
    assert second["said"].endswith(
        "**Changed since [version 1](#/models/base/versions/1)**\n\n"
        "- train.learning_rate 0.001 → 0.0005\n- data/tokens: md5 a… → b…\n- code"
    )
    assert second["tags"]["changed"] == ("train.learning_rate 0.001 → 0.0005, data/tokens, code")
    third = _train(tmp_path, 0.0006, "b")
    assert third["tags"]["changed"] == "train.learning_rate 0.0005 → 0.0006"
    assert "Changed since [version 2]" in third["said"]
