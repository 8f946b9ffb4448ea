"""What differs between two versions is said whole, in words and for a program, and nothing else.

Real runs in a real MLflow with registered tiny models, of commits of a real git repository.
"""

import io
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gpt.base.errors import InputError
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import save_model
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.dag.cache import dvc_md5
from pipeline.history.compare import compare, print_comparison
from pipeline.tracking.connection import connect
from pipeline.tracking.provenance import MadeOf
from pipeline.tracking.registry import CHAMPION
from pipeline.tracking.run import DataSet, StageRun

CONFIG = GPTConfig(vocab_size=257, context_length=32, n_layer=1, n_head=2, n_embd=16)
DVC_YAML = """\
stages:
  finetune_classifier:
    deps: [code.py, other.py, data/raw/messages]
    outs: [models/classifier]
  finetune_instruct:
    deps: [code.py]
    outs: [models/assistant]
  pretrain:
    deps: [code.py]
    outs: [models/pretrain]
  evaluate:
    deps: [code.py]
    outs: [reports/evaluation/predictions]
  download:
    deps: [code.py]
    outs: [data/raw/messages]
"""
MESSAGES = ("text,actual,predicted,probability_ham,probability_spam\n", "win now", "see you", "hi")
SIDES = ("before", "after")
TEXTS = "instruction,input,reference,answer\n"


@dataclass
class Params:
    """A stage's."""

    train: dict
    base: str = "gpt2"


def git(root, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(root), *who, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(root, text, **files):
    for name, content in files.items():
        (root / f"{name}.py").write_text(content)
    git(root, "add", "-A")
    git(root, "commit", "-qm", text)
    return git(root, "rev-parse", "HEAD")


def ran(root, stage, params=None, *, inputs=None, outputs=None, metrics=None, sets=(), **more):
    """A stage's run as `pipeline.run.stage` makes it; the run's id."""
    made_of = MadeOf.now(root, stage, None).kept() if more.get("recorded", True) else None
    run = StageRun(root, stage, params or Params({}), inputs or {}, data_sets=sets, made_of=made_of)
    if more.get("tables"):
        for name, text in more["tables"].items():
            (root / "tables").mkdir(exist_ok=True)
            (root / "tables" / f"{name}.csv").write_text(text)
        run.add_file(root / "tables", "predictions")
    outputs = dict(outputs or {})
    if more.get("model"):
        directory = root / "models" / {"base": "pretrain"}.get(more["model"], more["model"])
        outputs[f"models/{directory.name}"] = dvc_md5(directory)
        run.add_model(more["model"], directory, dvc_md5(directory))
    run.close("FINISHED", metrics=metrics, outputs=outputs)
    return run.id


def classified(*predicted):
    """A table of predictions: of three messages, the first is spam."""
    rows = [
        f"{text},{'spam' if text == 'win now' else 'ham'},{label},{p},{1 - p}"
        for text, label in zip(MESSAGES[1:], predicted, strict=True)
        for p in [0.875 if label == "ham" else 0.25]
    ]
    return MESSAGES[0] + "\n".join(rows) + "\n"


def messages(rows, sha256):
    profile = {"rows": rows, "bytes": rows * 100}
    uri = {"uri": "data/raw/messages"}
    whole = DataSet(
        name="data/raw/messages",
        digest=f"{sha256}.dir",
        context="training",
        source_type="local",
        source=uri,
        profile=profile,
    )
    source = DataSet(
        name="sms",
        digest=f"{sha256}-{rows}",
        context="raw",
        source_type="local",
        source={**uri, "sha256": sha256 * 8},
    )
    return whole, source


def train(root, number, *, rate, rows=10, sha256="aaaaaaaa", accuracy=0.5, **more):
    """A version of the classifier; the first as earlier releases named its metrics."""
    result = {"validation_accuracy": accuracy, "steps": 20}
    whole, _ = messages(rows, sha256)
    torch.manual_seed(number)
    shutil.rmtree(root / "models/classifier", ignore_errors=True)
    save_model(
        GPTClassifier(CONFIG, ["ham", "spam"]),
        root / "models/classifier",
        tokenizer=byte_tokenizer(),
    )
    return ran(
        root,
        "finetune_classifier",
        Params({"learning_rate": rate, "epochs": 3}),
        inputs={"data/raw/messages": whole.digest},
        metrics={"result": result} if number == 1 else result,
        sets=[whole],
        model="classifier",
        **more,
    )


def evaluated(root, accuracy, table=None, data="aaaaaaaa.dir"):
    here = dvc_md5(root / "models/classifier")
    ran(
        root,
        "evaluate",
        inputs={"models/classifier": here, "data/raw/messages": data},
        outputs={"reports/evaluation/predictions": "x"},
        metrics={"classifier": {"accuracy": accuracy, "accuracy_low": 0.1, "accuracy_high": 0.9}},
        tables={"classifier": table} if table else None,
    )


def start(root, empty_database):
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    (root / ".gitignore").write_text("/models\n/tables\n/mlflow.db\n/mlartifacts\n/.pipeline\n")
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "params.yaml").write_text("{}\n")
    git(root, "init", "-q")
    commit(root, "The beginning", code="a = 1\n", other="b = 1\n")
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory, empty_database):
    """A project with two versions of the classifier: other rate, other data, other code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = start(tmp_path_factory.mktemp("two") / "project", empty_database)
        _, source = messages(10, "aaaaaaaa")
        ran(root, "download", outputs={"data/raw/messages": "aaaaaaaa.dir"}, sets=[source])
        train(root, 1, rate=0.001)
        evaluated(root, 0.6, classified("spam", "ham", "spam"))
        connect(root).set_registered_model_alias("classifier", CHAMPION, "1")
        commit(root, "A constant is larger", code="a = 2\n")
        _, source = messages(12, "bbbbbbbb")
        ran(root, "download", outputs={"data/raw/messages": "bbbbbbbb.dir"}, sets=[source])
        (root / "other.py").write_text("b = 1  # an edit\n")
        train(root, 2, rate=0.0005, rows=12, sha256="bbbbbbbb", accuracy=0.75)
        evaluated(root, 0.8, classified("spam", "spam", "ham"), data="bbbbbbbb.dir")
    return root


@pytest.fixture(autouse=True)
def _own_mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def printed(root, *asked, **options):
    console = Console(highlight=False, record=True, width=200, file=io.StringIO())
    print_comparison(root, *asked, console=console, **options)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def test_all_that_differs_is_said(two):
    text = printed(two, "classifier/1", "models:/classifier/2")
    first, second = (git(two, "rev-parse", each)[:10] for each in ("HEAD^", "HEAD"))
    for line in (
        "classifier/1 (champion)  finetune_classifier #1 ",
        "classifier/2 (candidate)  finetune_classifier #2 train.learning_rate=0.0005, ",
        "\nParameters\n  train.learning_rate 0.001 → 0.0005\n\n",
        "\nData\n  data/raw/messages: md5 aaaaaaaa.d… → bbbbbbbb.d…\n    rows 10 → 12\n"
        "    bytes 1,000 → 1,200\n    sha256 of the source sms aaaaaaaaaa → bbbbbbbbbb\n"
        "    made by download #1 → #2\n\n",
        f"\nCode\n  commits {first} → {second}\n  1 commit only in the second:\n    ",
        "A constant is larger\n  files that the stage runs and that differ: code.py, other.py\n"
        "  classifier/2 ran with uncommitted changes, kept with its run as lineage/changes.patch\n",
        "\nMachine and packages: the same\n",
        "\nMetrics of the runs: 1 more is equal\n",
        "| validation_accuracy |          0.5 |         0.75 |      +0.25 |\n",
        "| accuracy | 0.6 (0.1 to 0.9) | 0.8 (0.1 to 0.9) |       +0.2 |\n",
        "\nAnswers: 3 test messages that both were asked; they differ on 2\n"
        "  see you\n    right         ham\n    classifier/1  ham (87.5%)\n"
        "    classifier/2  spam (75.0%)\n  hi\n",
    ):
        assert line in text
    assert "epochs" not in text


def test_the_last_lines_are_the_pages_of_mlflow(two):
    lines = printed(two, "classifier/1", "classifier/2").splitlines()[-3:]
    found = compare(two, "classifier/1", "classifier/2")
    runs = [found[side]["run_id"] for side in SIDES]
    assert lines[0].startswith(
        f"comparison: http://127.0.0.1:5000/#/compare-runs?runs=%5B%22{runs[0]}%22%2C%22{runs[1]}"
    )
    assert [line.partition("?")[0] for line in lines[1:]] == [
        f"classifier/{i}: http://127.0.0.1:5000/#/models/classifier/versions/{i}" for i in (1, 2)
    ]


def test_one_model_is_the_champion_beside_the_candidate(two):
    for what in ("classifier", "classifier/2"):
        found = compare(two, what)
        assert [found[side]["name"] for side in SIDES] == ["classifier/1", "classifier/2"]


def test_runs_are_compared_by_the_beginning_of_their_ids(two):
    versions = compare(two, "classifier")
    found = compare(two, *(versions[side]["run_id"][:12] for side in SIDES))
    assert [found[side]["name"] for side in SIDES] == ["run #1", "run #2"]
    assert all(found[key] == versions[key] for key in ("params", "scores"))
    assert all("/runs/" in found["links"][side] for side in SIDES)


def test_a_program_gets_the_same(two, capsys):
    print_comparison(two, "classifier", as_json=True, answers=1)
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] is False
    change = {"what": "train.learning_rate", "before": "0.001", "after": "0.0005"}
    assert told["params"] == [change]
    assert [each["path"] for each in told["data"]] == ["data/raw/messages"]
    assert told["code"]["files"] == ["code.py", "other.py"]
    assert told["code"]["dirty"] == [False, True]
    (accuracy,) = [each for each in told["scores"] if each["name"] == "accuracy"]
    assert accuracy["difference"] == pytest.approx(0.2)
    assert len(told["answers"]) == 1
    assert (told["before"]["version"], told["after"]["aliases"]) == (1, ["candidate"])


def test_what_is_equal_is_said_to_be(two):
    text = printed(two, "classifier/2", "classifier@candidate")
    assert "\nNothing differs: both are the same run.\n" in text
    assert "Parameters" not in text
    assert compare(two, "classifier/2", "classifier/2")["equal"]


def test_runs_that_recorded_no_code_are_compared_by_git(tmp_path, empty_database):
    root = start(tmp_path / "project", empty_database)
    train(root, 1, rate=0.001, recorded=False)
    commit(root, "Another file", code="a = 3\n", unrelated="c = 1\n")
    train(root, 2, rate=0.001, recorded=False)
    code = compare(root, "classifier/1", "classifier/2")["code"]
    assert (code["files"], code["known_by"]) == (["code.py"], "git")
    text = printed(root, "classifier/1", "classifier/2")
    assert (
        "Answers: none to compare: no run of evaluate asked classifier/1, and data/raw/messages is "
        "not here; `dvc pull` brings it\n"
    ) in text
    assert "Scores" not in text
    # a history that is not here: everything else is said
    shutil.rmtree(root / ".git")
    code = compare(root, "classifier/1", "classifier/2")["code"]
    assert code["files"] is None
    assert len(code["notes"]) == 2
    assert code["differs"]


def test_evaluations_on_the_same_data_go_before_newer_ones(tmp_path, empty_database):
    root = start(tmp_path / "project", empty_database)
    train(root, 1, rate=0.001)
    evaluated(root, 0.6)
    evaluated(root, 0.1, data="cccccccc.dir")
    train(root, 2, rate=0.002)
    evaluated(root, 0.7)
    found = compare(root, "classifier/1", "classifier/2")
    (accuracy,) = [each for each in found["scores"] if each["name"] == "accuracy"]
    assert (accuracy["before"], accuracy["after"]) == (0.6, 0.7)
    assert "MLflow keeps none of classifier/1's evaluation, and data/raw/messages" in found["asked"]


def test_assistants_and_bases_are_compared_by_what_they_wrote(tmp_path, empty_database):
    root = start(tmp_path / "project", empty_database)
    for number, said, alone in ((1, "Red.", ""), (2, "Blue.", "Subtract.,,0,0\n")):
        for name in ("assistant", "pretrain"):
            torch.manual_seed(number)
            shutil.rmtree(root / "models" / name, ignore_errors=True)
            extra = {"prompt.json": {"template": "alpaca"}} if name == "assistant" else {}
            save_model(GPT(CONFIG), root / "models" / name, tokenizer=byte_tokenizer(), extra=extra)
        ran(root, "finetune_instruct", model="assistant")
        base = ran(root, "pretrain", model="base")
        connect(root).log_text(base, f"Once {said}", "samples/step-000010.txt")
        connect(root).log_text(base, "Once", "samples/step-000005.txt")
        ran(
            root,
            "evaluate",
            inputs={"models/assistant": dvc_md5(root / "models/assistant")},
            outputs={"reports/evaluation/predictions": "x"},
            tables={
                "assistant": f"{TEXTS}Name a colour.,A bright one.,Green.,{said}\nAdd.,,2,2\n"
                + alone
            },
        )
    found = compare(root, "assistant/1", "assistant/2")
    assert found["asked"] == ("2 test instructions that both were asked; they differ on 1")
    (answer,) = found["answers"]
    assert (answer["asked"], answer["right"]) == ("Name a colour.\nA bright one.", "Green.")
    assert (answer["before"], answer["after"]) == ("Red.", "Blue.")
    (answer,) = compare(root, "base/1", "base/2")["answers"]
    assert (answer["before"], answer["after"]) == ("Once Red.", "Once Blue.")
    with pytest.raises(InputError, match=r"base/1 is made by pretrain and assistant/1 by f[^\n]*$"):
        compare(root, "base/1", "assistant/1")
    with pytest.raises(InputError, match=r"base: has no champion to compare with; name two [^\n]*"):
        compare(root, "base")


def test_errors_are_one_line(two, tmp_path):
    for what, said in (
        ("classifier/7", "classifier/7: classifier has no such version; its versions are 1, 2"),
        ("HEAD", "HEAD: is no model version and no run; name one, such as classifier/2"),
        ("models/classifier", "models/classifier: is no model version and no run"),
        (compare(two, "classifier")["before"]["run_id"], "with which run"),
    ):
        with pytest.raises(InputError) as caught:
            compare(two, what)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"nothing can be compared: there is no mlflow\.db here"):
        compare(tmp_path, "classifier/1", "classifier/2")


def test_what_others_wrote_is_shown_as_text(tmp_path, empty_database):
    root = start(tmp_path / "project", empty_database)
    hostile = "[bold]win\x1b[31m now"
    for number, label in ((1, "ham"), (2, "spam")):
        train(root, number, rate=number)
        evaluated(root, 0.5, f"{MESSAGES[0]}{hostile},spam,{label},0.5,0.5\n")
    text = printed(root, "classifier/1", "classifier/2")
    assert "[bold]win⟨U+001B⟩[31m now" in text
    assert "\x1b" not in text


def test_reading_changes_nothing(two):
    def state():
        return git(two, "status", "--porcelain"), Path(two / "mlflow.db").read_bytes()

    before = state()
    compare(two, "classifier")
    assert state() == before
