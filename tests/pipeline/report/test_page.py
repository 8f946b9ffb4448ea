"""The page says what the metrics say, needs nothing but itself, and keeps texts texts."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from data_project import HOSTILE
from markdown_it import MarkdownIt
from report_project import (
    MD5,
    Page,
    add_champion,
    add_judge,
    add_note,
    add_verdicts,
    decision,
    make_report_project,
)

from gpt.base.errors import InputError
from gpt.base.files import write_json
from pipeline.report.facts import report_facts
from pipeline.report.page import REPORT_TEMPLATES, values, write_report
from pipeline.show.documents import fill, html_page
from pipeline.show.markdown import visible
from pipeline.tracking.connection import connect
from pipeline.tracking.run import PEAK_MEMORY


@pytest.fixture(autouse=True)
def _own_mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project with all there can be but MLflow; its figures."""
    root = tmp_path_factory.mktemp("finished")
    figures = make_report_project(root)
    add_judge(root)
    add_champion(root, version=1)
    add_verdicts(
        root,
        decision("classifier"),
        decision(
            "assistant",
            version=2,
            champion=1,
            score="loss",
            new=3.2,
            old=3.1,
            difference=0.1,
            low=-0.05,
            high=0.25,
            examples=72,
            promoted=False,
            why="the interval of the difference holds 0",
        ),
    )
    return root, figures, write_report(root, report_facts(root))


def html_of(root: Path) -> str:
    return (root / "reports" / "report.html").read_text(encoding="utf-8")


def markdown_of(root: Path) -> str:
    return (root / "reports" / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def page(finished):
    return Page(html_of(finished[0]))


def rendered(root: Path) -> tuple[Page, str]:
    """Without the plots, which take their time to be drawn."""
    text = fill(REPORT_TEMPLATES / "report.md", plots=[], **values(report_facts(root)))
    return Page(html_page(text, REPORT_TEMPLATES / "report.html", root / "reports")), text


def percent(figures: dict[str, float], name: str) -> str:
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    text = f"{figures[name] * 100:.1f} %"
    return text if low is None else f"{text} ({low * 100:.1f}–{high * 100:.1f})"


def decimal(figures: dict[str, float], name: str, digits: int = 3) -> str:
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    text = f"{figures[name]:.{digits}f}"
    return text if low is None else f"{text} ({low:.{digits}f}–{high:.{digits}f})"


# --- figures --------------------------------------------------------------------------------------


def test_the_bases_are_told_as_they_were_measured(finished, page):
    _, figures, _ = finished
    rows = page.rows("model", "loss")
    parts = page.rows("source of the text")
    for name in ("pretrain", "gpt2"):
        of = figures[name]
        assert rows[name] == [
            decimal(of, "loss"),
            decimal(of, "perplexity", 1),
            decimal(of, "bits_per_byte"),
            decimal(of, "untrained_loss"),
        ]
    for source in ("python-docs", "stories"):
        assert parts[source] == [
            decimal(figures[name], f"{score}/{source}")
            for name in ("pretrain", "gpt2")
            for score in ("loss", "bits_per_byte")
        ]


def test_what_fine_tuning_buys_is_one_table_with_the_majority_as_its_floor(finished, page):
    _, figures, _ = finished
    rows = page.table("model", "accuracy", "F1 (macro)")
    assert rows == [
        [
            "always the most frequent class",
            percent(figures["classifier"], "majority_accuracy"),
            "—",
        ],
        *(
            [
                f"{name}, {words}",
                percent(figures[name], f"{method}_accuracy"),
                percent(figures[name], f"{method}_f1_macro"),
            ]
            for name in ("pretrain", "gpt2")
            for method, words in (
                ("zero_shot", "zero-shot"),
                ("few_shot", "few-shot (3.7 examples)"),
            )
        ),
        [
            "gpt2, fine-tuned",
            percent(figures["classifier"], "accuracy"),
            percent(figures["classifier"], "f1_macro"),
        ],
    ]


def test_every_class_and_every_measure_of_the_assistant_is_told(finished, page):
    _, figures, _ = finished
    classes = page.rows("class", "precision", "recall", "F1")
    assert set(classes) == {"ham", "spam"}, "the mean over the classes is no class"
    for label, row in classes.items():
        scores = ("precision", "recall", "f1")
        assert row == [percent(figures["classifier"], f"{score}_{label}") for score in scores]
    of = figures["assistant"]
    rows = page.rows("", "before fine-tuning", "after")
    for words, name in (
        ("exact match", "exact_match"),
        ("ROUGE-L", "rouge_l"),
        ("chrF", "chrf"),
        ("empty answers", "empty"),
        ("answers cut at the token limit", "at_limit"),
        ("length beside the reference's", "length_ratio"),
    ):
        assert rows[words] == [percent(of, f"base_{name}"), percent(of, name)]
    assert rows["loss (nats a token)"] == [decimal(of, "base_loss"), decimal(of, "loss")]
    assert rows["perplexity"] == [decimal(of, "base_perplexity", 1), decimal(of, "perplexity", 1)]
    assert rows["words an answer"] == [
        decimal(of, "base_length_mean", 1),
        decimal(of, "length_mean", 1),
    ]
    assert "9 records; exact match over the 5 whose reference is short" in page.text


def test_no_figure_of_the_scores_is_anything_but_one_of_the_metrics(finished, page):
    _, figures, _ = finished
    known = {
        shape
        for of in figures.values()
        for value in of.values()
        for shape in (f"{value * 100:.1f}", f"{value:.3f}", f"{value:.1f}")
    }
    told = [
        number
        for columns in (
            ("model", "loss"),
            ("source of the text",),
            ("model", "accuracy"),
            ("class",),
            ("", "before fine-tuning"),
        )
        for row in page.table(*columns)
        for cell in row[1:]
        for number in re.findall(r"[\d.]+", cell)
    ]
    assert len(told) > 80
    assert set(told) <= known


def test_markdown_has_every_figure_that_the_page_has(finished, page):
    text = markdown_of(finished[0])
    for table in page.tables:
        for row in table[1:]:
            assert all(cell in text for cell in row if re.fullmatch(r"[\d.,]+ ?%?.*", cell)), row


# --- verdicts, answers, messages ------------------------------------------------------------------


def test_the_verdict_of_each_model_is_told_with_its_reason(page):
    text = page.text
    assert "Classifier, version 4:\npromoted\n" in text
    assert "The interval of the difference lies above 0." in text
    assert (
        "Champion (version 3): accuracy 96.1 %, this version: 97.4 %, "
        "difference +1.3 points (+0.2 to +2.5) on 260 examples."
    ) in text
    assert "Assistant, version 2:\nnot promoted\n" in text
    assert "loss 3.100, this version: 3.200, difference +0.100 (-0.050 to +0.250)" in text
    assert "Base: not compared yet\n" in text


def test_a_verdict_without_a_comparison_says_why_and_no_more(tmp_path):
    make_report_project(tmp_path)
    nothing = dict.fromkeys(("champion", "new", "old", "difference", "low", "high", "examples"))
    add_verdicts(tmp_path, decision("base", **nothing, version=1, score="", why="by hand"))
    page, markdown = rendered(tmp_path)
    assert "Base, version 1:\npromoted\n" in page.text
    assert "Why: By hand." in page.text
    assert "Champion" not in page.text + markdown


def test_answers_stand_beside_the_reference_the_base_and_the_champion(page):
    text = page.text
    for i in (0, 1, 3, 4, 6, 7):  # six of nine, at equal distances
        assert f"Do task {i}.\nreference\nreference {i}\nbefore fine-tuning\n[base] {i}" in text
        assert f"previous champion, version 1\nchampion says {i}\nthis version\nanswer {i}" in text
    assert "Do task 8." not in text
    assert max(map(len, page.texts)) <= 600


def test_of_a_conversation_what_was_said_before_is_shown(tmp_path):
    make_report_project(tmp_path)
    path = tmp_path / "reports" / "evaluation" / "predictions" / "assistant.csv"
    frame = pd.read_csv(path, keep_default_na=False, dtype=str)
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    frame.insert(0, "earlier", ["", json.dumps(said)] * 4 + [""])
    frame.to_csv(path, index=False)
    answers = report_facts(tmp_path).answers
    assert answers[0]["task"] == "Do task 0."
    assert answers[1]["task"] == "user: Hello\nassistant: Yes?\nDo task 1."


def test_the_most_wrong_messages_are_those_of_the_test_part_in_order(page):
    rows = page.table("message", "labelled")
    assert [row[0] for row in rows] == [f"test message {i}" for i in range(10)]
    assert rows[1][1:] == ["ham", "spam", "2.0 %"]


def test_the_judge_s_mean_is_told_with_all_that_is_not_in_it(page):
    rows = page.rows("answers", "mean")
    assert rows["after"] == ["61.3", "70", "1", "3", "74"]
    assert rows["before fine-tuning"] == ["—", "0", "71", "3", "74"]
    assert "a-judge" in page.text


# --- where it came from ---------------------------------------------------------------------------


def test_checksums_are_those_of_the_data_and_of_dvc_lock(finished, page):
    root, _, _ = finished
    facts = report_facts(root)
    for name, sources in facts.sources.items():
        for source in sources:
            (row,) = [r for r in page.table("for", "source") if r[:2] == [name, source.name]]
            assert row[4] == source.files[0].sha256
            assert row[5] == (source.urls[0] if source.urls else "local or built in")
    rows = page.table("stage", "", "path", "md5")
    assert ["finetune_classifier", "reads", "models/gpt2", f"{MD5}.dir"] in rows
    assert ["finetune_classifier", "writes", "models/classifier", f"{MD5[::-1]}.dir"] in rows
    assert not [row for row in rows if row[2].startswith("gpt/")], "code is the commit's"


def test_the_commit_and_what_differs_from_it_are_told(tmp_path):
    make_report_project(tmp_path)
    assert "Not in a git repository." in rendered(tmp_path)[0].text
    user = ("-c", "user.name=x", "-c", "user.email=x@x")
    for command in (["init", "-q"], ["add", "LICENSE"], [*user, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = report_facts(tmp_path).commit
    assert len(commit) == 40
    assert f"Commit {commit}, without uncommitted changes." in rendered(tmp_path)[0].text
    (tmp_path / "LICENSE").write_text("mine\n")
    assert f"Commit {commit}, with uncommitted changes." in rendered(tmp_path)[0].text


def test_mlflow_tells_the_cost_the_version_and_what_differs_from_the_run_before(
    tmp_path, empty_database
):
    make_report_project(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    client = connect(tmp_path)
    experiment = client.create_experiment("gpt-pipeline/pretrain")
    for i, (rate, status) in enumerate(
        [("0.1", "FINISHED"), ("0.7", "FAILED"), ("0.2", "FINISHED")]
    ):
        tags = {"git.commit": "abcdef1234567890", "git.dirty": "false", "input.data/tokens": MD5}
        run = client.create_run(experiment, 1000 * (i + 1), tags, run_name=f"#{i + 1} |x")
        for key, value in (("rate", rate), ("same", "1"), *([("new", "|`")] if i == 2 else ())):
            client.log_param(run.info.run_id, key, value)
        client.log_metric(run.info.run_id, "throughput/tokens", 614400)  # its former name
        client.log_metric(run.info.run_id, PEAK_MEMORY, 1234.4)
        client.set_terminated(run.info.run_id, status)
    add_note(tmp_path, "pretrain", 83.4, run_id=run.info.run_id)
    client.create_registered_model("base")
    for md5 in ("another", f"{MD5[::-1]}.dir", f"{MD5[::-1]}.dir2"):
        client.create_model_version("base", str(tmp_path), tags={"md5": md5})
    page, markdown = rendered(tmp_path)
    (row,) = [row for row in page.table("stage", "ended") if row[0] == "pretrain"]
    assert row[2:] == ["1 min 23 s", "1,234 MB", "614,400", "abcdef1"]
    assert page.table("stage", "what") == [
        ["pretrain (since #1 |x)", "new", "—", "|`"],
        ["pretrain (since #1 |x)", "rate", "0.1", "0.2"],
    ]
    assert "Base, version 2: not compared yet" in page.text
    gone = "MLflow has no run of finetune_classifier, finetune_instruct any more."
    assert gone in page.text
    assert gone.replace("_", "\\_") in markdown or gone in markdown
    assert page.rows("stage", "ended")["finetune_instruct"][1:4] == ["1 min 23 s", "—", "—"]


# --- what is missing ------------------------------------------------------------------------------


def test_without_promotion_judge_champion_data_and_mlflow_there_is_a_page(tmp_path):
    make_report_project(tmp_path)
    for path in ("dvc.lock", "reports/pretrain/history.csv", "LICENSE"):
        (tmp_path / path).unlink()
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "reports/evaluation/predictions/classifier_most_wrong.csv").unlink()
    (tmp_path / "reports/evaluation/predictions/classifier_confusion.csv").unlink()
    page, markdown = rendered(tmp_path)
    assert page.text.count("not compared yet") == 3
    assert "What a judge says" not in page.text
    assert "champion" not in page.text
    assert page.text.count("\nNone.\n") == 4  # mistakes, sources, dvc.lock, differences
    assert page.text.count("MLflow was not asked: there is no mlflow.db") == 1
    rows = page.rows("stage", "ended")
    assert rows["pretrain"] == ["—", "1 min 23 s", "—", "—", "—"]
    assert rows["all"][1] == "4 min 10 s"
    assert "MLflow was not asked: there is no mlflow.db" in markdown
    assert not (tmp_path / "mlflow.db").exists(), "to report makes no database"


def test_a_server_that_is_gone_is_one_line_and_not_waited_for(tmp_path, monkeypatch):
    make_report_project(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    began = time.monotonic()
    facts = report_facts(tmp_path)
    assert time.monotonic() - began < 15
    assert facts.tracking.startswith("MLflow was not asked: MLflow at http://127.0.0.1:9")
    assert facts.runs["pretrain"].seconds == 83.4
    assert "\n" not in facts.tracking


def test_the_time_of_a_run_that_failed_is_not_given_as_the_stage_s(tmp_path):
    make_report_project(tmp_path)
    add_note(tmp_path, "tokenize", 1.5, status="FAILED")
    assert "tokenize" not in rendered(tmp_path)[0].rows("stage", "ended")


def test_figures_that_were_not_measured_are_dashes_or_left_out(tmp_path):
    figures = make_report_project(tmp_path)
    for name in ("exact_match", "base_exact_match"):
        for end in ("", "_low", "_high"):
            del figures["assistant"][name + end]
    del figures["assistant"]["short_records"]
    del figures["classifier"]["roc_auc"]
    del figures["gpt2"]["untrained_loss"]
    write_json(tmp_path / "reports" / "evaluation" / "metrics.json", figures)
    page, _ = rendered(tmp_path)
    assert page.rows("", "before fine-tuning")["exact match"] == ["—", "—"]
    assert "ROC" not in page.text
    assert page.rows("model", "loss")["gpt2"][-1] == "—"


def test_with_nothing_evaluated_one_line_says_how(tmp_path):
    with pytest.raises(InputError, match="nothing to report yet; run `gpt-pipeline run`"):
        report_facts(tmp_path)


@pytest.mark.parametrize(
    ("path", "content", "what"),
    [
        ("reports/evaluation/metrics.json", '{"gpt2": ', "metrics.json: .*; run"),
        (".pipeline/promotion.json", '{"decisions": [{}]}', r"decisions\.0\.model: .*; remove it"),
        ("reports/judge/summary.json", "[]", "summary.json: .*; remove it"),
        ("reports/pretrain/metrics.json", "{", "run `gpt-pipeline run --force pretrain`"),
        ("dvc.lock", "", "dvc.lock: holds no stages; bring it back"),
        ("dvc.lock", "<<<<<<< HEAD", "dvc.lock: line 1: an unresolved merge conflict"),
        ("dvc.lock", "stages: [", "dvc.lock: line 2, column 1: .*; correct"),
        ("reports/evaluation/predictions/assistant.csv", "", "assistant.csv: cannot be read"),
        ("reports/evaluation/predictions/assistant.csv", "a\n", "has no column instruction; run"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, path, content, what):
    make_report_project(tmp_path)
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(content)
    with pytest.raises(InputError, match=what) as caught:
        report_facts(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("reports/pretrain/history.csv", ""),
        ("reports/evaluation/predictions/classifier_confusion.csv", "part,actual\ntest,ham\n"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_one_line(tmp_path, path, content):
    make_report_project(tmp_path)
    (tmp_path / path).write_text(content)
    with pytest.raises(InputError, match=r"csv: cannot be drawn \(.*\); run the stage again"):
        write_report(tmp_path, report_facts(tmp_path))
    assert not (tmp_path / "reports/report.html").exists()


# --- one file, whole and safe ---------------------------------------------------------------------


def test_every_picture_is_in_the_page_and_nothing_else_is_loaded(finished, page):
    root, _, plots = finished
    assert len(page.pictures) == 5  # accuracies, confusion, and one of each of three trainings
    for picture in page.pictures:
        kind, _, data = picture.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    embedded = {base64.b64decode(picture.partition(",")[2]) for picture in page.pictures}
    assert embedded == {path.read_bytes() for path in plots}
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "url(" not in html_of(root)
    assert "@import" not in html_of(root)


def test_markdown_links_to_the_pictures_that_there_are(finished):
    root, _, plots = finished
    linked = re.findall(r"\]\(report/(\S+)\)", markdown_of(root))
    assert sorted(linked) == [path.name for path in plots]


def test_hostile_labels_sources_and_texts_stay_text(tmp_path, finished):
    hostile = f"{HOSTILE} ](javascript:x) <img src=x onerror=y> {{{{ 7*7 }}}}"
    root = tmp_path / "hostile"
    make_report_project(root, labels=[hostile, "*b*"], sources=[hostile, "s"], text=hostile)
    add_judge(root, hostile)
    add_champion(root, hostile)
    add_verdicts(root, decision("classifier", why=hostile, score=hostile), decision("assistant"))
    write_report(root, report_facts(root))
    page, markdown = Page(html_of(root)), markdown_of(root)
    harmless = Page(html_of(finished[0]))
    assert set(page.tags) <= set(harmless.tags)
    assert len(page.pictures) == len(harmless.pictures)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    readable = visible(hostile, limit=None).partition(" ↵ ")[0]
    assert any(readable in text for text in page.texts), "it can be read as it is"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", page.text + markdown)

    renderer = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = [t for token in renderer.parse(markdown) for t in (token, *(token.children or ()))]
    kinds = {token.type for token in tokens}
    assert kinds.isdisjoint({"html_inline", "html_block", "em_open", "link_open", "code_inline"})
    assert kinds.isdisjoint({"fence", "code_block", "s_open", "hr"})
    pictures = [token.attrs["src"] for token in tokens if token.type == "image"]
    assert len(pictures) == len(page.pictures)
    assert all(re.fullmatch(r"report/\w+\.png", each) for each in pictures)


def test_equal_results_give_equal_bytes_but_for_the_date(tmp_path):
    found = []
    for name, year in (("here", 1999), ("there", 2001)):
        root = tmp_path / name
        make_report_project(root)
        add_judge(root)
        for stage in ("finetune_classifier", "finetune_instruct"):
            (root / "reports" / stage / "history.csv").unlink()
        facts = report_facts(root)
        facts = dataclasses.replace(facts, made=facts.made.replace(year=year))
        plots = write_report(root, facts)
        date = f"{facts.made:%Y-%m-%d %H:%M %Z}"
        files = [html_of(root), markdown_of(root)]
        assert [text.count(date) for text in files] == [1, 1]
        assert str(tmp_path) not in "".join(files)
        found.append(
            [text.replace(date, "") for text in files] + [path.read_bytes() for path in plots]
        )
    assert found[0] == found[1]


def test_plots_of_an_earlier_report_go(tmp_path):
    make_report_project(tmp_path)
    old = tmp_path / "reports" / "report" / "of_an_earlier_day.png"
    old.parent.mkdir()
    old.touch()
    for history in tmp_path.glob("reports/*/history.csv"):
        history.unlink()
    (tmp_path / "reports/evaluation/predictions/classifier_confusion.csv").unlink()
    plots = write_report(tmp_path, report_facts(tmp_path))
    assert [path.name for path in plots] == ["accuracies.png"]
    assert not old.exists()
