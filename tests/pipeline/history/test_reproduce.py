"""A run is made again in a workspace of its own, every byte compared, and nothing else touched."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo
from lineage_project import SmallProject, first_results
from typer.testing import CliRunner

from gpt.base.errors import InputError
from pipeline.cli import app
from pipeline.history.reproduce import WORKSPACES, reproduce

EDITED, CHANCE, SLOW = "3", "4", "5"
"""Versions of the assistant: with edits of the code, of other bytes each time, slow again."""


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> Iterator[SmallProject]:
    """Built, and then the assistant four times more."""
    root = tmp_path_factory.mktemp("reproduce") / "project"
    words = root / "gpt" / "words.py"
    with first_results(root, empty_database) as project:
        project.set("finetune_instruct", seed=2)
        words.write_text('WORDS = "others"\n')
        project.commit("Other code")
        project.build("finetune_instruct")
        words.write_text('WORDS = "edited"\n')
        project.build("finetune_instruct")
        project.git("checkout", "-q", "pipeline")
        project.set("finetune_instruct", chance=True)
        project.build("finetune_instruct")
        project.set("finetune_instruct", chance=False, seconds_again=30)
        project.build("finetune_instruct")
        project.commit("The last results")
        yield project


@pytest.fixture(autouse=True)
def _here(project: SmallProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(project.root)


def left(project: SmallProject) -> list[str]:
    """What lies in the folder of workspaces."""
    found = [path.name for path in (project.root / WORKSPACES).glob("*")]
    return [name for name in found if not name.endswith(".lock")]


def said(*arguments: str, code: int) -> str:
    done = CliRunner().invoke(app, ["reproduce", *arguments])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def tag(project: SmallProject, version: str = "1", model: str = "assistant") -> str:
    return str(project.client().get_model_version(model, version).tags.get("reproduced", ""))


def test_an_older_version_comes_out_the_same_and_nothing_of_the_project_is_touched(project):
    before = project.state()
    shown = said("models:/assistant/1", code=0)
    assert "models:/assistant/1: the same bytes" in shown
    assert "models/assistant" in shown
    assert "cannot be promised" not in shown
    assert project.state() == before
    assert left(project) == []
    assert tag(project).endswith("the same bytes")
    assert tag(project, "2") == ""


def test_with_whole_every_stage_before_it_is_executed_too(project):
    before = project.executed()
    alone = reproduce(project.root, "assistant/1")
    assert [each.stage for each in alone] == ["finetune_instruct"]
    whole = reproduce(project.root, "assistant/1", whole=True)
    stages = list(dict.fromkeys(each.stage for each in whole))
    assert stages == ["download", "tokenize", "pretrain", "finetune_instruct"]
    assert all(each.same for each in whole)
    assert project.executed() == before, "none of it in the project's folder"


def test_inputs_that_are_kept_nowhere_are_made_by_the_stages_before(project):
    cache = project.root / ".dvc" / "cache"
    with project.without(cache):
        made = reproduce(project.root, "assistant/1")
        assert not (cache / "files").exists(), "nothing is put into the cache"
    assert [each.path for each in made if each.stage == "tokenize"] == ["data/tokens"]
    assert all(each.same for each in made)


def test_inputs_come_from_the_remote(project, tmp_path):
    with Repo() as repo, repo.config.edit("local") as config:
        config["remote"] = {"store": {"url": str(tmp_path / "remote")}}
        config["core"] = {"remote": "store"}
    with Repo() as repo:
        repo.push()
    try:
        with project.without(project.root / ".dvc" / "cache"):
            made = reproduce(project.root, "assistant/1")
    finally:
        (project.root / ".dvc" / "config.local").unlink()
    assert [each.stage for each in made] == ["finetune_instruct"]


def test_other_bytes_are_told_marked_and_exit_code_1(project):
    shown = said(f"assistant/{CHANCE}", code=1)
    line = f"models:/assistant/{CHANCE} does not come out the same: models/assistant differs"
    assert line in shown
    assert tag(project, CHANCE).endswith("differs in models/assistant")
    assert left(project) == []


def test_edits_that_no_commit_has_are_put_in_again(project):
    shown = said(f"assistant/{EDITED}", code=0)
    assert "the edits that were in its tree are put in" in shown
    assert "cannot be promised" not in shown


def test_edits_that_were_not_kept_are_told_before_and_their_bytes_differ(project):
    with project.without(project.artifacts(f"finetune_instruct {EDITED}") / "lineage"):
        shown = said(f"assistant/{EDITED}", code=1)
    assert "cannot be promised: its tree had edits that no commit has" in shown
    assert "its params.yaml was not kept" in shown
    assert shown.index("cannot be promised") < shown.index("finetune_instruct | started")


def test_code_that_is_not_what_ran_is_named(project):
    lineage = project.artifacts(f"finetune_instruct {EDITED}") / "lineage"
    with project.without(lineage / "changes.patch"):
        shown = said(f"assistant/{EDITED}", code=1)
    assert "the code is not what it ran: gpt/words.py" in shown


def test_what_the_machine_and_its_packages_differ_in_is_told_before(project):
    client, run = project.client(), project.runs["finetune_instruct 1"]
    tags = dict(client.get_run(run).data.tags)
    client.set_tag(run, "packages", tags["packages"].replace("torch ", "torch 0.0.1-before-"))
    client.set_tag(run, "python", "3.9.9")
    shown = said("assistant/1", code=0)
    for name in ("packages", "python"):
        client.set_tag(run, name, tags[name])
    assert "cannot be promised: its machine and packages were others: python 3.9.9 → " in shown
    assert ", torch 0.0.1-before-" in shown
    assert shown.index("cannot be promised") < shown.index("finetune_instruct | started")


def test_a_run_is_made_again_too_and_a_stage_that_fails_is_one_line(project):
    run = project.runs["tokenize 1"]
    assert [each.path for each in reproduce(project.root, run[:10])] == ["data/tokens"]
    kept = project.artifacts("tokenize 1") / "lineage" / "params.yaml"
    params = kept.read_text()
    kept.write_text(params.replace("tokenize:\n", "tokenize:\n  fails: true\n"))
    shown = said(run, code=1)
    kept.write_text(params)
    assert "tokenize failed when it was made again: tokenize: no good; mend it" in shown
    assert left(project) == []


def test_keep_leaves_the_workspace_which_is_not_written_over(project):
    shown = said("assistant/1", "--keep", code=0)
    assert "kept: .pipeline/reproduced/assistant-1" in shown
    folder = project.root / WORKSPACES / "assistant-1"
    assert (folder / "models" / "assistant" / "data.txt").is_file()
    assert "is kept from an earlier" in said("assistant/1", code=2)
    shutil.rmtree(folder)


def test_what_a_killed_process_left_is_cleared(project):
    folder = project.root / WORKSPACES / "assistant-1"
    folder.mkdir(parents=True)
    (folder / "half").touch()
    assert "the same bytes" in said("assistant/1", code=0)
    assert left(project) == []


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_nothing_is_left_of_one_that_is_stopped_and_two_of_the_same_do_not_meet(project, number):
    before = project.state()
    program = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parents[3])!r}];"
        f"sys.argv = ['gpt-pipeline', 'reproduce', 'assistant/{SLOW}'];"
        "from pipeline.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    folder = project.root / WORKSPACES / f"assistant-{SLOW}"
    deadline = time.monotonic() + 60
    while not (folder / "ran").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(InputError, match="makes it again right now"):
        reproduce(project.root, f"assistant/{SLOW}")
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert errors.strip() == "error: stopped"
    assert left(project) == []
    assert project.state() == before


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("models/assistant", "is no model version and no run"),
        ("HEAD", "is no model version and no run"),
        ("assistant/9", "its versions are 1, 2"),
    ],
)
def test_what_cannot_be_made_again_is_one_line_and_exit_code_2(project, what, line):
    assert line in said(what, code=2)


def test_a_run_without_a_commit_or_outputs_is_refused_with_the_reason(project):
    client, run = project.client(), project.runs["download 1"]
    commit = client.get_run(run).data.tags["git.commit"]
    client.delete_tag(run, "git.commit")
    assert "no commit is recorded" in said(run, code=2)
    client.set_tag(run, "git.commit", commit)
    client.set_terminated(run, "FAILED")
    assert "its run ended FAILED and recorded no outputs" in said(run, code=2)
    client.set_terminated(run, "FINISHED")
