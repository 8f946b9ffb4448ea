"""From an answer back to the address of the source and on again, with the book's published data."""

import re

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = (
    "tokenize",
    "pretrain",
    "load_gpt2",
    "finetune_classifier",
    "finetune_instruct",
    "evaluate",
)


@pytest.fixture(scope="module")
def sources(project, mirror):
    """The book's data through the mirror, under models so small that it takes a minute.

    Returns:
        The data set -> the source, as the preset `book` has it.
    """
    book, smoke = (
        yaml.safe_load((project.root / "presets" / f"{name}.yaml").read_text())
        for name in ("book", "smoke")
    )
    params = {**book, **{name: smoke[name] for name in SMALL}}
    params["tokenize"] = {**params["tokenize"], "split": book["tokenize"]["split"]}  # one document
    # the published weights are 550 MB, and no assistant here begins with them
    params["download"]["gpt2"] = smoke["download"]["gpt2"]
    (project.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for stage in ("download", *SMALL):  # one by one: each has its own limit of time
        project.run("dvc", "repro", stage, GPT_PIPELINE_MIRROR=str(mirror))
    return {name: book["download"][name][0] for name in ("corpus", "messages", "instructions")}


def test_an_answer_leads_back_to_the_address_and_sha256_of_every_source(project, sources, mirror):
    shown = project.run("gpt-pipeline", "lineage", "reports/evaluation/predictions/assistant.csv")
    for source in sources.values():
        assert re.search(rf"{re.escape(source['urls'][0])} .*sha256 {source['sha256']}", shown)
    assert str(mirror) not in shown, "a mirror is a place, and no source"
    for model in ("models:/assistant/1", "assistant@candidate"):
        back = project.run("gpt-pipeline", "lineage", model, "--up")
        assert sources["corpus"]["urls"][0] in back, "what it was pretrained on"
        assert sources["instructions"]["urls"][0] in back
        assert sources["messages"]["urls"][0] not in back, "no assistant has learnt from them"


def test_the_source_leads_on_to_the_model_and_its_answers(project, sources):
    shown = project.run("gpt-pipeline", "lineage", "data/raw/instructions/instruction-data.json")
    assert sources["instructions"]["urls"][0] in shown
    forth = shown.partition("what was made of it")[2]
    assert "models:/assistant/1" in forth
    assert "models:/classifier/1" not in forth
    assert "reports/evaluation/predictions" in forth
    assert "assistant.csv" in forth


def test_the_model_comes_out_the_same_from_the_published_data_on(project, sources, mirror):
    said = project.run(
        *("gpt-pipeline", "reproduce", "assistant/1", "--whole"), GPT_PIPELINE_MIRROR=str(mirror)
    )
    assert re.search(r"data/raw/instructions +\| [0-9a-f]{32}\.dir +\| same", said)
    assert "models:/assistant/1: the same bytes" in said
