"""From any thing of the pipeline back to its sources and on to its use, by the bytes' checksums."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from lineage_project import SHA256, URL, SmallProject, first_results
from typer.testing import CliRunner

from gpt.base.errors import InputError
from pipeline.cli import app
from pipeline.history.lineage import Lineage, lineage


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> SmallProject:
    """Built, then again with other seeds: the assistant, then the base, then the assistant of the
    first base."""
    root = tmp_path_factory.mktemp("lineage") / "project"
    with first_results(root, empty_database) as project:
        project.set("finetune_instruct", seed=2)
        project.build("finetune_instruct", "evaluate")
        project.commit("Another assistant")
        project.set("pretrain", seed=2)
        with project.without(root / "models" / "pretrain"):
            project.build("pretrain")
        # the first base is back, as DVC brings it back when its parameters are put back
        project.set("pretrain", seed=1)
        project.set("finetune_instruct", seed=3)
        project.build("finetune_instruct")
    return project


@pytest.fixture(autouse=True)
def _here(built: SmallProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(built.root)


def said(*arguments: str, code: int = 0) -> str:
    """What the command prints."""
    done = CliRunner().invoke(app, ["lineage", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def paths(chain: Lineage, links: dict[str, list[str]]) -> set[str]:
    """All that is reached from the thing asked for, by its title."""
    found, waiting = set(), [chain.asked]
    while waiting:
        for key in links.get(waiting.pop(), ()):
            if key not in found:
                found.add(key)
                waiting.append(key)
    return {chain.nodes[key].title for key in found}


def test_a_version_leads_back_through_every_run_to_the_url_of_its_source(built):
    shown = said("models:/assistant/1", "--up")
    order = ["models:/assistant/1", "finetune_instruct #1", "models/pretrain", "pretrain #1"]
    order += ["data/tokens", "tokenize #1", "data/raw/corpus", "download #1", URL, SHA256]
    places = [shown.index(each) for each in order]
    assert places == sorted(places)
    assert built.runs["pretrain 1"] in shown
    assert re.search(r"commit [0-9a-f]{10}, clean", shown)
    assert "what was made of it" not in shown


def test_a_source_leads_on_to_the_versions_and_to_the_answers(built):
    chain = lineage(built.root, "data/raw/corpus", up=False)
    found = paths(chain, chain.down)
    assert {"models:/base/1", "models:/assistant/1", "models:/assistant/2"} <= found
    assert "reports/evaluation/predictions" in found
    assert "with assistant.csv" in said("samples/stories.txt", "--down")


def test_an_answer_leads_back_to_the_source_and_its_source_to_the_answer(built):
    answer = "reports/evaluation/predictions/assistant.csv"
    chain = lineage(built.root, answer)
    assert f"the-verdict: {URL}" in paths(chain, chain.up)
    forth = lineage(built.root, "data/raw/corpus/data.txt")
    assert answer.rpartition("/")[0] in paths(forth, forth.down)


def test_runs_are_joined_by_the_bytes_and_not_by_time(built):
    """The third assistant came after the second base, and was made of the first."""
    chain = lineage(built.root, "assistant/3")
    came_from = " ".join(paths(chain, chain.up))
    assert "pretrain #1" in came_from
    assert "pretrain #2" not in came_from
    second = lineage(built.root, built.runs["pretrain 2"])
    assert not any(title.startswith("finetune") for title in paths(second, second.down))


def test_a_shared_node_is_shown_once(built):
    shown = said("assistant/1", "--up")
    assert shown.count(f"run {built.runs['download 1']}") == 1
    assert re.search(r"download #1.* \(shown above\)", shown)


def test_a_model_is_named_by_number_alias_or_alone(built):
    by = {lineage(built.root, what).asked for what in ("assistant", "assistant@candidate")}
    assert by == {"models:/assistant/3"}
    assert lineage(built.root, "models:/assistant/1").asked == "models:/assistant/1"


def test_a_run_is_named_by_the_beginning_of_its_id(built):
    run = built.runs["tokenize 1"]
    chain = lineage(built.root, run[:12])
    assert chain.asked == f"run:{run}"
    assert "data/raw/corpus" in paths(chain, chain.up)
    assert "models/pretrain" in paths(chain, chain.down)


def test_a_commit_shows_its_runs_and_what_its_lock_records(built):
    first = built.git("rev-list", "--max-parents=0", "HEAD")
    chain = lineage(built.root, "HEAD~1")
    titles = paths(chain, chain.down)
    assert any(title.startswith("finetune_instruct #2") for title in titles)
    assert "models:/assistant/2" in titles
    recorded = paths(chain, chain.up)
    assert any(title.startswith("finetune_instruct #1") for title in recorded)
    assert "it has no dvc.lock" in said(first)


def test_code_leads_to_the_runs_that_ran_it(built):
    chain = lineage(built.root, "gpt/words.py")
    runs = paths(chain, chain.down)
    assert any(title.startswith("pretrain #2") for title in runs)
    assert "models:/assistant/2" in runs


def test_json_has_the_same_links(built):
    told = json.loads(said("assistant/1", "--json"))
    nodes = {each["key"]: each for each in told["nodes"]}
    source = next(each for each in told["nodes"] if each["kind"] == "source")
    assert (source["url"], source["sha256"]) == (URL, SHA256)
    run = nodes[f"run:{built.runs['finetune_instruct 1']}"]
    assert run["commit"] == built.git("rev-list", "--max-parents=0", "HEAD")
    assert [told["asked"], run["key"]] in told["came_from"]


def test_a_fresh_clone_without_mlflow_leads_back_to_the_source_and_says_that_no_run_is_known(
    built, tmp_path, monkeypatch
):
    subprocess.run(["git", "clone", "-q", str(built.root), str(tmp_path / "clone")], check=True)
    monkeypatch.chdir(tmp_path / "clone")
    shown = said("models/assistant")
    assert URL in shown
    assert SHA256 in shown
    assert "no run and no registered model is known" in shown
    assert "its run is not known here" in shown
    assert "these bytes are neither here nor in DVC's cache" in shown
    assert "assistant: not found: there is no mlflow.db here" in said("assistant", code=2)
    assert not (tmp_path / "clone" / "mlflow.db").exists(), "asking makes no database"


@pytest.mark.parametrize("what", ["assistant@champion", "models:/assistant/1", "0123abcd"])
def test_mlflow_that_cannot_be_asked_is_the_reason_and_not_that_nothing_is_there(
    built, what, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    shown = said(what, code=1)
    assert f"error: {what}: not found: " in shown
    assert "MLflow at http://127.0.0.1:9 does not answer: Connection refused" in shown
    assert "none is registered" not in shown


def test_a_deleted_run_is_told_in_its_place(built):
    client = built.client()
    client.delete_run(built.runs["tokenize 1"])
    try:
        shown = said("assistant/1", "--up")
    finally:
        client.restore_run(built.runs["tokenize 1"])
    (line,) = [line for line in shown.splitlines() if "tokenize #1" in line]
    assert "the run is deleted in MLflow" in line
    assert URL in shown


def test_bytes_that_are_gone_are_told_in_their_place(built):
    with built.without(built.root / ".dvc" / "cache"):
        shown = said(built.runs["evaluate 1"], "--up")
    (line,) = [line for line in shown.splitlines() if "models/assistant" in line]
    assert "neither here nor in DVC's cache" in line
    assert URL in shown


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("assistant/7", "assistant has no such version; its versions are 1, 2, 3"),
        ("assistant@champion", "its aliases are candidate"),
        ("models:/nobody/1", "no such model; registered are assistant, base"),
        ("assistent", "did you mean assistant?"),
        ("params.yaml", "no stage that ran reads it"),
    ],
)
def test_what_is_not_known_is_one_line_that_says_what_is(built, what, line):
    with pytest.raises(InputError, match=re.escape(line)) as error:
        lineage(built.root, what)
    assert "\n" not in str(error.value)


def test_a_beginning_that_several_runs_share_is_refused_with_their_ids(built):
    client = built.client()
    experiment = client.get_experiment_by_name("gpt-pipeline/tokenize").experiment_id
    ids, extra = list(built.runs.values()), []
    try:
        while len({each[0] for each in ids}) == len(ids):  # at most 17 ids
            extra.append(client.create_run(experiment, tags={"dvc.stage": "tokenize"}).info.run_id)
            ids.append(extra[-1])
        firsts = [each[0] for each in ids]
        common = next(each for each in firsts if firsts.count(each) > 1)
        with pytest.raises(InputError, match="give more of its digits") as error:
            lineage(built.root, common)
        assert all(each in str(error.value) for each in ids if each[0] == common)
    finally:
        for each in extra:
            client.delete_run(each)
