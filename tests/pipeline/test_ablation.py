"""A table of trainings: every row is checked before any work, and says what it changes."""

from pathlib import Path

import pytest

from gpt.errors import InputError
from pipeline.ablation import markdown, read_rows

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_shipped_table_has_rows_that_can_be_trained():
    rows = read_rows(ROOT, ROOT / "ablations" / "sms.yaml")
    assert len(rows) >= 8
    assert {row.params.trainable for row in rows} >= {"all", "last_block", "last_blocks", "lora"}
    assert len({repr(row.params) for row in rows}) == len(rows), "no two rows are the same"
    by_name = {row.name: row.params for row in rows}
    assert by_name["lora 4"].lora.rank == 4
    assert by_name["all"].lora is None, "a row changes no other"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rows: []", "must hold `rows`"),
        ("- a", "must hold `rows`"),
        ("rows: [{set: {}}]", "row 1: must hold `name` and `set`"),
        ("rows: [{name: a}, {name: a}]", "row 2: give it a name of its own"),
        ("rows: [{name: a, set: {trainable: some}}]", r"row 'a': .*finetune_classifier\.trainable"),
        ("rows: [{name: a, set: {x: 1}}]", r"row 'a': .*finetune_classifier\.x: unknown parameter"),
        ("rows: [", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, complaint):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        read_rows(ROOT, tmp_path / "t.yaml")
    assert "\n" not in str(caught.value)


def test_the_table_of_scores_leads_to_the_runs():
    scores = {"accuracy": 0.9667, "f1_macro": 0.9, "calibration_error": 0.02}
    text = markdown([{"name": "lora", "run": "0123456789abcdef", "scores": scores}])
    assert text.splitlines()[-1] == "| lora | 0.9667 | 0.9000 |  | 0.0200 | `01234567` |"
