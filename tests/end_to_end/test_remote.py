"""A DVC remote, here a folder: what one machine has made, another one pulls and does not run.

The tests build on each other.
"""

from pathlib import Path

import pytest
from conftest import Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODELS = ("pretrain", "gpt2", "classifier", "assistant")


def commit(project: Project, message: str) -> None:
    project.run("git", "commit", "-qam", message)


def weights(project: Project) -> dict[str, bytes]:
    folder = project.root / "models"
    return {name: (folder / name / "model.safetensors").read_bytes() for name in MODELS}


def executed(project: Project) -> list[Path]:
    """A note for each stage whose command was executed here."""
    return sorted((project.root / ".pipeline" / "runs").glob("*.json"))


@pytest.fixture(scope="module")
def first(finished, tmp_path_factory):
    """The first machine: it has run everything, committed `dvc.lock` and pushed."""
    remote = tmp_path_factory.mktemp("remote")
    finished.run("dvc", "remote", "add", "--default", "shared", str(remote))
    commit(finished, "First results")
    finished.run("dvc", "push", "--run-cache")
    return finished


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    """The second machine: a clone in another folder, with nothing but what git brings."""
    root = tmp_path_factory.mktemp("second") / "clone"
    first.run("git", "clone", "-q", str(first.root), str(root))
    return Project(root)


def test_a_second_clone_pulls_and_executes_nothing(first, second):
    second.run("dvc", "pull", "dvc.yaml")
    lock = (second.root / "dvc.lock").read_bytes()
    said = second.run("gpt-pipeline", "run")
    assert "7 of 7 stages are up to date" in said
    assert executed(second) == []
    assert weights(second) == weights(first)
    assert (second.root / "dvc.lock").read_bytes() == lock == (first.root / "dvc.lock").read_bytes()
    assert second.run("git", "status", "--porcelain") == ""
    assert "up to date" in second.run("dvc", "status", "dvc.yaml")


def test_a_change_that_another_machine_has_run_comes_out_of_the_pulled_run_cache(first, second):
    """Whether or not the other one has committed its `dvc.lock`."""
    first.set("finetune_classifier.train.learning_rate", "0.002")
    first.run("gpt-pipeline", "run")
    first.run("gpt-pipeline", "push")
    second.set("finetune_classifier.train.learning_rate", "0.002")
    assert (second.root / "dvc.lock").read_bytes() != (first.root / "dvc.lock").read_bytes()

    second.run("dvc", "pull", "--run-cache", "dvc.yaml")
    said = second.run("gpt-pipeline", "run")
    for stage in ("finetune_classifier", "evaluate"):
        assert f"{stage} | cached: restored from DVC's run cache" in said
    assert executed(second) == []
    assert weights(second) == weights(first)
    assert (second.root / "dvc.lock").read_bytes() == (first.root / "dvc.lock").read_bytes()


def test_what_was_pulled_talks(second):
    answer = second.run("gpt-pipeline", "classify", "You won a prize! Text WIN to 80800")
    assert "ham" in answer or "spam" in answer


def test_what_no_remote_has_is_executed(second):
    second.set("finetune_classifier.train.learning_rate", "0.004")
    said = second.run("gpt-pipeline", "run")
    assert "2 of 7 stages ran" in said
    assert [path.stem for path in executed(second)] == ["evaluate", "finetune_classifier"]
