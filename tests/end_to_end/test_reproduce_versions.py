"""Registered versions of real trainings, made again to the byte."""

import re
import shutil

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

VERSIONS = ("1", "2", "3")
_CODE = "gpt/prompts.py"


@pytest.fixture(scope="module")
def versions(finished):
    """Three versions of the assistant: two parameters apart, the last with edits of the code."""
    project = finished
    project.run("git", "commit", "-qam", "The first assistant")
    project.set("finetune_instruct.train.learning_rate", "0.002")
    project.run("dvc", "repro", "finetune_instruct")
    file = project.root / _CODE
    code = file.read_text()
    edited = code.replace("<|user|>", "<|person|>")
    assert edited != code
    file.write_text(edited)
    project.set("finetune_instruct.train.seed", "7")
    project.run("dvc", "repro", "finetune_instruct")
    file.write_text(code)
    project.run("git", "commit", "-qam", "The third assistant")
    return project


def _kept(project):
    import mlflow

    uri = f"sqlite:///{project.root}/mlflow.db"
    client = mlflow.MlflowClient(uri, uri)
    runs = {
        run.info.run_id: run.data.to_dictionary()
        for each in client.search_experiments()
        for run in client.search_runs([each.experiment_id])
    }
    aliases = {each.name: dict(each.aliases) for each in client.search_registered_models()}
    files = {
        path: path.read_bytes()
        for folder in ("data", "models", "reports", ".checkpoints")
        for path in (project.root / folder).rglob("*")
        if path.is_file()
    }
    return runs, aliases, files, (project.root / "dvc.lock").read_bytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_each_of_the_last_versions_gives_the_registered_bytes(versions, version):
    before = _kept(versions)
    said = versions.run("gpt-pipeline", "reproduce", f"models:/assistant/{version}")
    assert f"models:/assistant/{version}: the same bytes" in said
    assert re.search(r"models/assistant +\| [0-9a-f]{32}\.dir +\| same", said)
    assert ("the edits that were in its tree are put in" in said) == (version == "3")
    assert "cannot be promised" not in said
    assert _kept(versions) == before
    assert versions.run("git", "status", "--porcelain") == ""
    shown = versions.run("gpt-pipeline", "lineage", f"assistant/{version}", "--up")
    assert re.search(r"reproduced \d{4}-\d\d-\d\d on .*: the same bytes", shown)


def test_the_whole_chain_from_the_raw_data_on_gives_the_recorded_bytes(versions):
    said = versions.run("gpt-pipeline", "reproduce", "assistant/2", "--whole")
    for path in ("data/raw/corpus", "data/tokens", "models/pretrain", "models/assistant"):
        assert re.search(rf"{path} +\| [0-9a-f]{{32}}\.dir +\| same", said)


def test_where_the_cache_is_gone_what_went_in_is_made_too(versions):
    cache = versions.root / ".dvc" / "cache"
    aside = cache.with_name("aside")
    cache.rename(aside)
    try:
        said = versions.run("gpt-pipeline", "reproduce", "assistant/1")
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        aside.rename(cache)
    assert "pretrain | executed" in said
    assert "models:/assistant/1: the same bytes" in said
