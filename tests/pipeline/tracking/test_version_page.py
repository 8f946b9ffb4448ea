"""What a new version's page says: who made it, and what changed since the version before."""

import dataclasses
import json
import shutil
from hashlib import sha256

import pytest
from data_project import HOSTILE
from markdown_it import MarkdownIt

from pipeline.tracking.connection import connect
from pipeline.tracking.provenance import Provenance
from pipeline.tracking.run import DataSet, StageRun
from pipeline.tracking.version_page import LONGEST, VersionPage, version_page

WHAT = "A GPT fine-tuned to classify short messages."
MESSAGES = "data/raw/messages"


@dataclasses.dataclass(frozen=True)
class TrainParams:
    learning_rate: float = 0.001
    steps: int = 20


@dataclasses.dataclass(frozen=True)
class Params:
    base: str = "pretrain"
    train: TrainParams = TrainParams()
    more: dict[str, str] = dataclasses.field(default_factory=dict)


@pytest.fixture
def project(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def train(root, params=Params(), *, messages="a" * 32, rows=1300, code=("1", "1"), **tags) -> str:
    """A run of the stage, as far as a version's page asks it; its id. Without `code` it did not
    record it."""
    tags = {"git.commit": "a" * 40, "git.dirty": "false", **tags}
    files = {}
    if code:
        paths = ("gpt/train/loop.py", "stages/finetune_classifier.py")
        files["code.json"] = json.dumps(dict(zip(paths, code, strict=True))).encode()
        tags["code"] = sha256(files["code.json"]).hexdigest()
    made_of = Provenance(tags=tags, files=files)
    profile = {"rows": rows, "files": 1}
    data = DataSet(
        name=MESSAGES,
        digest=messages,
        context="training",
        source_type="local",
        source={"uri": MESSAGES},
        profile=profile,
    )
    run = StageRun(
        root,
        "finetune_classifier",
        params,
        {MESSAGES: messages},
        data_sets=[data],
        made_of=made_of,
    )
    run.close("FINISHED")
    return run.id


def registered(root, run_id) -> VersionPage:
    """What its page says; and it is the newest version now."""
    client = connect(root)
    page = version_page(client, client.get_run(run_id), "classifier", WHAT)
    if not client.search_registered_models("name = 'classifier'"):
        client.create_registered_model("classifier")
    client.create_model_version("classifier", str(root), run_id, description=page.description)
    return page


def test_the_first_version_says_which_run_and_commit_made_it(project):
    run_id = train(project, **{"git.dirty": "true"})
    page = registered(project, run_id)
    assert page.description == (
        f"{WHAT}\n\n"
        "- Made by the stage finetune_classifier, "
        f"run [#1 aaaaaaa](#/experiments/1/runs/{run_id})\n"
        f"- Code: commit {'a' * 40}, with uncommitted changes\n\n"
        "The first version."
    )
    assert page.changed == ""


def test_the_next_one_says_what_is_other_in_parameters_data_and_code(project):
    registered(project, train(project))
    page = registered(
        project,
        train(
            project,
            Params(train=TrainParams(learning_rate=0.0005)),
            messages="b" * 32,
            rows=1320,
            code=("1", "2"),
            **{"git.commit": "b" * 40},
        ),
    )
    assert page.description.endswith(
        "**Changed since [version 1](#/models/classifier/versions/1)**\n\n"
        "- train.learning_rate 0.001 → 0.0005\n"
        "- data/raw/messages: rows 1,300 → 1,320, md5 aaaaaaaaaa… → bbbbbbbbbb…\n"
        "- code: stages/finetune_classifier.py (commit aaaaaaa → bbbbbbb)"
    )
    assert page.changed == "train.learning_rate 0.001 → 0.0005, data/raw/messages, code"


def test_it_is_compared_with_the_newest_version_and_not_with_the_last_run(project):
    """A run in between whose bytes were registered already made no version."""
    registered(project, train(project))
    train(project, Params(base="gpt2"))
    page = registered(project, train(project, Params(train=TrainParams(steps=40))))
    assert page.changed == "train.steps 20 → 40"


def test_many_changed_parameters_are_counted_in_the_tag(project):
    registered(project, train(project))
    many = Params(more={f"p{i}": "x" for i in range(5)})
    page = registered(project, train(project, many))
    # the empty mapping itself stood there before
    assert page.changed == "more.p0 none → x, more.p1 none → x, more.p2 none → x, 3 more parameters"


def test_where_nothing_differs_it_says_so(project):
    registered(project, train(project))
    page = registered(project, train(project, **{"git.commit": "b" * 40}))
    assert "Parameters, data and code are those of [version 1]" in page.description
    assert page.changed == "nothing"


@pytest.mark.parametrize(
    ("commit", "dirty", "changed"),
    [("a", "false", "nothing"), ("b", "false", "code"), ("a", "true", "code")],
)
def test_code_that_no_run_recorded_is_told_by_the_commit(project, commit, dirty, changed):
    for each, is_dirty in (("a", "false"), (commit, dirty)):
        tags = {"git.commit": each * 40, "git.dirty": is_dirty}
        page = registered(project, train(project, code=(), **tags))
    assert page.changed == changed


def test_a_version_whose_run_is_gone_is_named(project):
    registered(project, train(project))
    connect(project).create_model_version("classifier", str(project), "0" * 32)
    page = registered(project, train(project))
    assert page.description.endswith("MLflow no longer has the run of version 2.")
    assert page.changed == ""


def test_what_comes_from_outside_stays_text_and_is_no_longer_than_mlflow_keeps(project):
    registered(project, train(project))
    hostile = f"{HOSTILE} ](x) <img src=x>"
    many = Params(base=hostile, more={f"p{i}": f"{hostile}{i}" for i in range(60)})
    page = registered(project, train(project, many))
    assert len(page.description) < LONGEST
    parse = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse
    tokens = [part for each in parse(page.description) for part in (each, *(each.children or ()))]
    kinds = [token.type for token in tokens]
    assert set(kinds).isdisjoint({"html_inline", "html_block", "em_open", "image", "code_inline"})
    assert kinds.count("link_open") == 2
    assert "50 more parameters: see both runs" in page.description  # of 62
