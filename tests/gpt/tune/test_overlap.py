"""Which held-out texts count as seen in training."""

import pytest

from gpt.base.events import Message
from gpt.tune.overlap import contaminated, count_contaminated

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
]


@pytest.mark.parametrize(
    ("held_out", "training", "shared"),
    [
        ("Win now!", "Win now!", True),
        ("Win now!", "win \n NOW! ", True),
        ("Call 0800 12", "call 07 123456", True),
        ("STRASSE", "straße", True),
        ("Win now!", "Win now, or never!", False),
        ("Win now!", "Win now?", False),
        ("a b", "ab", False),
        ("", "x", False),
        (" ".join(WORDS), f"Before. {' '.join(WORDS)} After.", True),
        (f"x {' '.join(WORDS)}", f"{' '.join(WORDS)} y", True),
        (f"x {', '.join(WORDS)}!", f"{' - '.join(WORDS).upper()} y", True),
        (" ".join(WORDS[:12]), f"Before. {' '.join(WORDS)} After.", False),
        (f"x {' '.join(WORDS[:12])} x x", f"{' '.join(WORDS[:12])} y y y", False),
        (" ".join([*WORDS[:6], "x", *WORDS[6:]]), " ".join(WORDS), False),
        (" ".join(WORDS), " ".join(reversed(WORDS)), False),
    ],
)
def test_what_is_shared_text(held_out, training, shared):
    assert contaminated([[held_out]], [["another"], [training]]) == shared
    assert contaminated([[training]], [[held_out]]) == shared


def test_every_held_out_example_counts_once():
    held_out = [["a", "b"], ["c"], ["a"], ["d"]]
    assert contaminated(held_out, (texts for texts in [["A", "x"], ["B"], ["d"]])) == 3
    assert contaminated(held_out, []) == contaminated([], [["a"]]) == 0


def test_counts_are_by_part_and_said_only_where_there_are_some():
    heard = []
    parts = {"train": [["a"]], "validation": [["b"]], "test": [["c"], ["A"], ["a "]]}
    assert count_contaminated(parts, "stage", heard.append) == {
        "contaminated_validation": 0,
        "contaminated_test": 2,
    }
    assert heard == [Message("stage: 2 of 3 test examples share text with the training part")]
