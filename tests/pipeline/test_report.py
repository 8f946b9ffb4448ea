"""The report says what the metrics say."""

import io
import json

import pandas as pd
import pytest
from rich.console import Console

from gpt.errors import InputError
from pipeline.report import print_report

BASE = {"loss": 4.1664, "perplexity": 64.48, "bits_per_byte": 1.7101, "untrained_loss": 8.3341}
EVALUATION = {
    "pretrain": {**BASE, "loss": 5.7931},
    "gpt2": BASE,
    "classifier": {
        "accuracy": 0.98846,
        "f1_macro": 0.9884,
        "rows": 260.0,
        **{f"{score}_ham": 0.977 for score in ("precision", "recall", "f1")},
        **{f"{score}_spam": 0.999 for score in ("precision", "recall", "f1")},
    },
    "assistant": {
        f"{prefix}{key}": value
        for prefix, value in (("", 3.1552), ("base_", 5.3582))
        for key in ("loss", "perplexity", "exact_match", "word_f1")
    },
}


def _report(root):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    print_report(root, console)
    return console.file.getvalue()


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "reports" / "evaluation"
    (folder / "predictions").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(EVALUATION))
    rows = [[f"Do task {i}.", "", "ref", f"answer {i}", f"[base] {i} " * 40] for i in range(9)]
    columns = ["instruction", "input", "reference", "answer", "base_answer"]
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(folder / "predictions" / "assistant.csv", index=False)
    notes = tmp_path / ".pipeline" / "runs"
    notes.mkdir(parents=True)
    (notes / "pretrain.json").write_text(json.dumps({"seconds": 83.4, "status": "FINISHED"}))
    return tmp_path


def test_every_figure_is_the_one_in_the_metrics(project):
    text = _report(project)
    for figure in ("5.793", "4.166", "64.5", "1.710", "8.334", "98.85%", "260", "3.155", "5.358"):
        assert figure in text
    assert "1 min 23 s" in text


def test_three_answers_from_all_over_the_test_part_are_shown_before_and_after(project):
    text = _report(project)
    for i in (0, 3, 6):
        assert f"answer {i}" in text
    assert "answer 1" not in text
    assert "[base]" in text, "what a model wrote is text, not markup"


def test_it_says_what_to_type_next(project):
    text = _report(project)
    for command in ("gpt-pipeline chat", "gpt-pipeline classify", "make ui"):
        assert command in text


def test_the_time_of_a_run_that_failed_is_not_given_as_the_stage_s(project):
    note = json.dumps({"seconds": 1.5, "status": "FAILED"})
    (project / ".pipeline" / "runs" / "tokenize.json").write_text(note)
    text = _report(project)
    assert "pretrain  " in text
    assert "tokenize" not in text


def test_without_results_it_says_how_to_get_them(tmp_path):
    with pytest.raises(InputError, match="nothing to report yet; run `gpt-pipeline run`"):
        _report(tmp_path)
