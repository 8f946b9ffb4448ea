"""The data report says what the data are, to the figure, and nothing of them gets out of it."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import stand_in
from data_project import (
    HOSTILE,
    add_corpus,
    add_instructions,
    add_messages,
    corpus_facts,
    make_data_project,
)
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from gpt.base.errors import InputError
from pipeline.data.facts import data_facts, lengths_of
from pipeline.data.report import print_data, write_report
from pipeline.run.stage import run_stage
from pipeline.show.markdown import escaped, table, visible
from pipeline.tracking.connection import connect

CLEAN = {
    "min_chars": 10,
    "max_chars": None,
    "languages": [],
    "quality": None,
    "exact_duplicates": True,
    "near_duplicates": None,
}


def page(root: Path) -> str:
    return write_report(root)[0].read_text(encoding="utf-8")


def parsed(text: str) -> list[Any]:
    """All tokens, those within lines too; HTML would be taken as such."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [each for token in renderer.parse(text) for each in (token, *(token.children or ()))]


def cells(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    _, _, below = text.partition(f"# {heading}\n")
    lines = below[below.index("|") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- figures --------------------------------------------------------------------------------------


def test_the_corpus_is_told_to_the_figure(tmp_path):
    make_data_project(tmp_path, ["docs", "stories"])
    text = page(tmp_path)
    assert cells(text, "The data")[2] == [
        "pretraining text (documents)", "2", "63", "300", "286", "300,000",
    ]  # fmt: skip
    assert cells(text, "What was kept")[2:] == [
        ["docs", "100", "93", "93.0%", "432,100", "100,000", "33.3%", "4.32"],
        ["stories", "200", "193", "96.5%", "864,200", "200,000", "66.7%", "4.32"],
        ["all", "300", "286", "95.3%", "1,296,300", "300,000", "100.0%", "4.32"],
    ]
    assert ["exact duplicate", "8", "2.7%", "docs 4, stories 4"] in cells(
        text, "What was removed and changed"
    )
    assert cells(text, "What training and validation get")[-1] == [
        "all", "266", "1,200,000", "270,000", "20", "96,300", "30,000",
    ]  # fmt: skip
    assert cells(text, "Contamination")[2] == ["docs", "10", "2", "20.0%", "40"]
    assert "4 of 20 validation documents (20.0%) share 50 tokens in a row" in text
    assert "| docs   | mojibake | cafÃ©  | café  |" in text


def test_the_mixture_stands_beside_what_was_wanted_and_what_there_is(tmp_path):
    share = {"tokens": 900, "epochs": 1.25, "max_epochs": 4.0}
    mixture = {
        "tokens": 1800,
        "sources": {
            "docs": {"weight": 3, "share": 0.7, **share},
            "stories": {"weight": 1, "share": 0.3, **share},
        },
    }
    make_data_project(tmp_path, ["docs", "stories"], mixture=mixture)
    text = page(tmp_path)
    assert "| docs    |                33.3% |           75.0% |                  70.0% |" in text
    assert "![the mixture](data/mixture.png)" in text


def test_messages_are_counted_by_class_and_compared_with_each_other(tmp_path):
    make_data_project(tmp_path, ["docs"])
    text = page(tmp_path)
    assert cells(text, "Class balance")[2:] == [
        ["ham", "4", "66.7%"],
        ["spam", "2", "33.3%"],
    ]
    # "Yes" twice; it and "yes", and "See you …" in two spellings; "yes" is ham and spam
    assert [row[1] for row in cells(text, "Duplicate messages")[2:]] == ["1", "3", "1"]
    assert cells(text, "How long messages are")[2] == ["ham", "4", "3", "11.5", "11.8", "21", "21"]
    assert "WIN £££ now at www&#46;example.org!!!" in text


def test_instructions_are_counted_with_their_inputs_turns_and_repetitions(tmp_path):
    make_data_project(tmp_path, ["docs"])
    text = page(tmp_path)
    assert cells(text, "Inputs and turns")[2] == ["tasks", "4", "3", "75.0%"]
    assert [row[1] for row in cells(text, "Duplicate instructions")[2:]] == ["1", "2", "1"]


def test_conversations_are_counted_by_their_turns(tmp_path):
    said = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello to you"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye"},
    ]
    add_instructions(tmp_path, [{"messages": said}, {"messages": said[:2]}])
    text = page(tmp_path)
    assert "|     1 |       1 | 50.0% |" in text
    assert "|     2 |       1 | 50.0% |" in text


@given(st.lists(st.integers(0, 5000), min_size=1))
def test_every_length_is_in_its_bar(sizes):
    lengths = lengths_of(sizes)
    edges, counts = lengths["edges"], lengths["counts"]
    assert sum(counts) == len(sizes)
    for low, high, n in zip(edges, edges[1:], counts, strict=False):
        assert n == sum(low <= max(size, 1) < high for size in sizes)
    assert (lengths["min"], lengths["max"]) == (min(sizes), max(sizes))
    assert sum(size <= lengths["p95"] for size in sizes) >= 0.95 * len(sizes)


def test_many_classes_stay_a_table_that_can_be_read(tmp_path):
    add_messages(tmp_path, [(f"class {i:02d}", f"text {i}") for i in range(77)])
    text = page(tmp_path)
    rows = cells(text, "Class balance")[2:]
    assert len(rows) == 21
    assert rows[-1] == ["other classes", "57", "74.0%"]


# --- what was not looked at -----------------------------------------------------------------------


def test_before_anything_was_downloaded_one_line_says_how(tmp_path):
    with pytest.raises(InputError, match=r"nothing was downloaded yet; run `gpt-pipeline run"):
        write_report(tmp_path)
    assert not (tmp_path / "reports").exists()


def test_after_the_download_alone_it_says_that_the_text_was_not_looked_at(tmp_path):
    make_data_project(tmp_path, ["docs"])
    shutil.rmtree(tmp_path / "reports")
    shutil.rmtree(tmp_path / "data" / "tokens")
    text = page(tmp_path)
    assert "Pretraining text: not looked at yet" in text
    assert "Tokens were not counted: there is no tokenizer yet." in text
    assert "What was kept" not in text
    assert "The oddest rows have the smallest share of letters." in text
    assert not (tmp_path / "reports" / "data" / "tokens.png").exists()


def test_the_figures_of_another_corpus_are_not_shown_for_this_one(tmp_path):
    make_data_project(tmp_path, ["docs", "stories"])
    assert "What was kept" in page(tmp_path)
    shutil.rmtree(tmp_path / "data" / "raw" / "corpus")
    add_corpus(tmp_path, ["stories", "docs"])
    text = page(tmp_path)
    assert "downloaded again since it was tokenized" in text
    assert "What was kept" not in text
    assert data_facts(tmp_path).outdated


def test_what_was_not_asked_for_is_named(tmp_path):
    make_data_project(tmp_path, ["docs"], clean=CLEAN, contamination=None)
    text = page(tmp_path)
    assert "Not asked for: a greatest length, the language, quality rules, near duplicates." in text
    assert "4 exact ones removed, near ones not looked for" in text
    assert "Contamination: not looked for." in text
    _, _, unseen = text.partition("## Not looked at\n")
    assert "- near duplicates of the pretraining text" in unseen
    assert "exact duplicates of" not in unseen


def test_facts_that_cannot_be_read_are_one_line(tmp_path):
    make_data_project(tmp_path, ["docs"])
    path = tmp_path / "reports" / "tokenize" / "corpus.json"
    broken = json.loads(path.read_text())
    del broken["sources"][0]["tokens"]
    path.write_text(json.dumps(broken))
    with pytest.raises(InputError, match=r"corpus\.json: .*'tokens'; run the stage tokenize again"):
        write_report(tmp_path)


# --- text from outside ----------------------------------------------------------------------------


def test_hostile_names_and_texts_stay_text(tmp_path):
    add_corpus(tmp_path, [HOSTILE, f"{HOSTILE} 2"])
    add_messages(
        tmp_path, [("ham|`<b>", "x | <script>`y`</script>"), ("*s*", "![a](b) " * 9)], HOSTILE
    )
    add_instructions(
        tmp_path, [{"instruction": HOSTILE, "input": "", "output": HOSTILE}] * 2, HOSTILE
    )
    example = {"source": HOSTILE, "text": HOSTILE, "filter": HOSTILE, "step": HOSTILE}
    example |= {"before": HOSTILE, "after": HOSTILE, "tokens": 1, "bytes": 1, "bytes_per_token": 1}
    facts = corpus_facts(
        tmp_path,
        [HOSTILE, f"{HOSTILE} 2"],
        tokenizer=HOSTILE,
        examples={"changed": [example], "removed": [example]},
        longest=[example],
        oddest=[example],
    )
    facts["sources"][0]["removed"] = {HOSTILE: 3}
    facts["sources"][0]["url"] = "https://example.org/|<script>"
    (tmp_path / "reports" / "tokenize").mkdir(parents=True)
    (tmp_path / "reports" / "tokenize" / "corpus.json").write_text(json.dumps(facts))
    text = page(tmp_path)
    kinds = {token.type for token in parsed(text)}
    assert kinds.isdisjoint({"html_inline", "html_block", "em_open", "strong_open", "link_open"})
    assert kinds.isdisjoint({"fence", "code_block", "s_open", "hr"})
    pictures = [token.attrs["src"] for token in parsed(text) if token.type == "image"]
    assert pictures
    assert all(re.fullmatch(r"data/\w+\.png", each) for each in pictures)
    code = {token.content for token in parsed(text) if token.type == "code_inline"}
    assert code <= {"data/", "data/tokens", "gpt-pipeline data"}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_is_one_cell_and_reads_as_it_was(text):
    tokens = parsed(table(["a", "b"], [[text, 1]]))
    rows = [token for token in tokens if token.type == "tr_open"]
    content = [token.children for token in tokens if token.type == "inline"]
    assert len(rows) == 2
    assert len(content) == 4
    kinds = {each.type for children in content for each in children}
    assert kinds <= {"text", "text_special"}
    assert "".join(each.content for each in content[2]) == visible(text)


def test_a_line_break_and_what_cannot_be_seen_are_shown():
    assert escaped("a\r\n\r\n b\u200b\u202e") == "a ↵ b⟨U+200B⟩⟨U+202E⟩"
    assert escaped("python_docs _x_ 12:30") == "python_docs \\_x\\_ 12:30"


# --- files ----------------------------------------------------------------------------------------


def test_equal_data_give_equal_bytes_wherever_they_lie(tmp_path):
    found = []
    for name in ("here", "there"):
        root = tmp_path / name
        make_data_project(root, ["docs", "stories"])
        write_report(root)
        report, plots = write_report(root)  # again
        assert str(tmp_path) not in report.read_text()
        found.append([path.read_bytes() for path in (report, *plots)])
    assert found[0] == found[1]


def test_the_page_links_to_the_pictures_that_there_are_and_to_no_others(tmp_path):
    make_data_project(tmp_path, ["docs"])
    folder = tmp_path / "reports" / "data"
    folder.mkdir(parents=True)
    (folder / "of_an_earlier_day.png").touch()
    linked = re.findall(r"\]\(data/(\S+)\)", page(tmp_path))
    assert sorted(linked) == sorted(path.name for path in folder.iterdir())
    assert len(linked) == 5


def test_pictures_are_drawn_of_one_source_and_of_many_with_strange_names(tmp_path, recwarn):
    names = [f"source {i} with a name that goes on and on" for i in range(11)] + ["$x_1$ 数据 \n"]
    make_data_project(tmp_path, names)
    assert all(path.stat().st_size > 5000 for path in write_report(tmp_path)[1])
    assert [str(each.message) for each in recwarn] == []


def test_the_terminal_gets_the_summary_and_the_place(tmp_path):
    make_data_project(tmp_path, ["[bold]docs"])
    console = Console(file=io.StringIO(), width=120, highlight=False)
    print_data(tmp_path, console)
    shown = console.file.getvalue()
    assert re.search(r"pretraining text \(documents\) +1 +21 +100 +93 +100,000", shown)
    assert "Contamination: 2 of 10 validation documents" in shown
    assert shown.rstrip().endswith("reports/data.md: the whole report, with plots")


# --- in MLflow ------------------------------------------------------------------------------------


def test_a_stage_that_makes_data_keeps_the_report_and_names_its_data_sets(
    tmp_path, monkeypatch, empty_database
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stand_in.install(monkeypatch)
    root = stand_in.make_project(tmp_path)
    shutil.copy(empty_database, root / "mlflow.db")
    make_data_project(root, ["docs", "stories"])
    spec = dataclasses.replace(
        stand_in.STAGES["prepare"],
        inputs={"source": "source.txt"},
        outputs={"out": "data/raw/corpus", "metrics": "reports/prepare/metrics.json"},
        makes_data=True,
    )

    def prepare(params, *, source, out, metrics, log):
        return {"documents": 300}

    metrics = root / "reports" / "prepare" / "metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("{}")
    monkeypatch.setattr(stand_in, "prepare", prepare)
    monkeypatch.setattr("pipeline.run.stage.STAGES", {**stand_in.STAGES, "prepare": spec})
    assert run_stage("prepare", root) == 0

    note = json.loads((root / ".pipeline" / "runs" / "prepare.json").read_text())
    client = connect(root)
    sets = {
        given.dataset.name: (given.dataset, given.tags[0].value)
        for given in client.get_run(note["run_id"]).inputs.dataset_inputs
    }
    assert set(sets) == {"source.txt", "docs", "stories"}
    stories, context = sets["stories"]
    assert context == "raw"
    assert stories.source_type == "http"
    assert json.loads(stories.source)["url"] == "https://example.org/1.txt"
    assert json.loads(stories.profile) == {"documents": 200, "files": 1, "bytes": 42}
    assert [file.path for file in client.list_artifacts(note["run_id"], "data")] == [
        "data/data",
        "data/data.md",
    ]
    assert "data/data/tokens.png" in [
        file.path for file in client.list_artifacts(note["run_id"], "data/data")
    ]


def test_data_that_came_out_of_a_cache_are_reported_too(tmp_path):
    from pipeline.flow.flow import _renew_data_report

    make_data_project(tmp_path, ["a"])
    for stage in ("pretrain", "another"):
        _renew_data_report(tmp_path, stage)
        assert not (tmp_path / "reports" / "data.md").exists()
    _renew_data_report(tmp_path, "tokenize")
    assert (tmp_path / "reports" / "data.md").is_file()
    _renew_data_report(tmp_path / "without data", "tokenize")  # nothing to say is no failure
