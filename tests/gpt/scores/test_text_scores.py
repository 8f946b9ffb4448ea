"""Scores of answers: values worked out by hand, in any script, also where there is no answer."""

import math

import numpy as np
import pytest

from gpt.scores.text_scores import (
    chrf,
    exact_match,
    length_statistics,
    rouge_l,
    score_texts,
    words,
)

# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's 2 mats, re-used!", ["the", "cat", "s", "2", "mats", "re", "used"]),
        ("Füße der Ärztin", ["füße", "der", "ärztin"]),
        ("Кот сидит.", ["кот", "сидит"]),
        ("Η γάτα", ["η", "γάτα"]),
        ("القطة هنا؟", ["القطة", "هنا"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),  # vowel signs are part of their word
        ("猫在这里。", ["猫", "在", "这", "里"]),
        ("ไม่ดี", ["ไ", "ม่", "ดี"]),  # a letter with its marks
        ("한국어 문장", ["한국어", "문장"]),
        ("GPT2模型v3", ["gpt2", "模", "型", "v3"]),
        ("e\u0301te\u0301 été", ["été", "été"]),  # one form, however it is written
        ("… !? 🙂", []),
        ("", []),
    ],
)
def test_words_are_found_in_every_script(text, expected):
    assert words(text) == expected


# --- exact match ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The Cat!", "a cat", True),
        ("  forty \n two ", "forty two", True),
        ("it's", "its", True),  # SQuAD's, too
        ("$5.50", "550", True),
        ("«Париж».", "париж", True),
        ("猫。", "猫", True),
        ("e\u0301te\u0301", "été", True),
        ("cat", "cats", False),
        ("two forty", "forty two", False),
        ("another", "other", False),  # an article only where it is a word
        ("", "cat", False),
        ("the", "cat", False),
        ("A", "a.", True),
        ("A", "B", False),
        ("A", "The", False),
        ("<", ">", False),
        ("", "!", False),
        ("", "", True),
    ],
)
def test_an_exact_match_passes_over_case_punctuation_and_articles_alone(answer, reference, same):
    assert exact_match(answer, reference) is same
    assert exact_match(reference, answer) is same


def test_an_exact_match_is_asked_for_where_the_reference_is_short():
    references = [
        "The one, two, three, four, five.",  # the article does not count
        "one two three four five six",
        "一二三四五",
        "一二三四五六",
        "Yes",
    ]
    answers = ["one two three four five", "one two three four five six", "一", "一二三四五六", "No"]
    scores = score_texts(answers, references)
    assert scores.short.tolist() == [True, False, True, False, True]
    assert scores.exact_match[scores.short].tolist() == [1, 0, 0]
    assert np.isnan(scores.exact_match[~scores.short]).all()
    assert scores.means["short_records"] == 3
    assert scores.means["short_exact_match"] == pytest.approx(1 / 3)


def test_without_short_references_there_is_no_exact_match():
    means = score_texts(["a b c d e f g"], ["b c d e f g h"]).means
    assert means["short_records"] == 0
    assert "short_exact_match" not in means


# --- ROUGE-L --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # Lin (2004), 3.1: S1 is the reference; of S2 and S3 the order tells them apart
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # 3 of 6 and 3 of 4: 2 (1/2)(3/4) / (1/2 + 3/4)
        ("a b c x y z", "a b c d", 0.6),
        ("The CAT, sat", "the cat sat!", 1),
        ("кот сидит дома", "Кот лежит дома", 2 / 3),
        ("हिन्दी भाषा", "हिन्दी बोली", 1 / 2),
        ("猫在家", "猫在这里", 4 / 7),  # 2 of 3 and 2 of 4
        ("running", "runs", 0),  # nothing is stemmed
        ("", "cat", 0),
        ("?!", "cat", 0),
    ],
)
def test_rouge_l_is_the_longest_common_subsequence_of_words(answer, reference, expected):
    assert rouge_l([answer], [reference]).tolist() == pytest.approx([expected])


# --- chrF -----------------------------------------------------------------------------------------


def chrf_by_hand(answer, reference):
    """The F2 of the mean precision and recall over the orders that both have n-grams of."""
    answer, reference = ("".join(text.split()) for text in (answer, reference))
    precisions, recalls = [], []
    for n in range(1, 7):
        ours, theirs = (
            [text[i : i + n] for i in range(len(text) - n + 1)] for text in (answer, reference)
        )
        if not ours or not theirs:
            continue
        shared = sum(min(ours.count(each), theirs.count(each)) for each in set(ours))
        precisions.append(shared / len(ours))
        recalls.append(shared / len(theirs))
    if not sum(precisions):
        return 0.0
    P, R = np.mean(precisions), np.mean(recalls)
    return 5 * P * R / (4 * P + R)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # 2 of 3 letters of each, 1 of 2 pairs, no triple: the mean is 7/18 in both
        ("abd", "abc", 7 / 18),
        # 2 of 2 and 1 of 1 are right; 2 of 4 and 1 of 3 were found: P = 1, R = 5/12
        ("ab", "abcd", 5 * 5 / 12 / (4 + 5 / 12)),
        ("the cat", "the cat", 1),
        ("thecat", "the cat", 1),
        ("кот", "код", 7 / 18),
        ("猫在家", "猫在屋", 7 / 18),
        ("xyz", "abc", 0),
        ("", "abc", 0),
        ("ABC", "abc", 0),  # case counts
    ],
)
def test_chrf_is_the_f2_of_shared_character_n_grams(answer, reference, expected):
    assert chrf([answer], [reference]).tolist() == pytest.approx([expected])
    assert chrf_by_hand(answer, reference) == pytest.approx(expected)


def test_chrf_of_sentences_is_that_of_the_paper():
    answers = ["The cat sat on a mat.", "Er sah die grösseren Häuser", "nothing like it at all"]
    references = ["A cat is sitting on the mat.", "Er sieht größere Häuser", "quite another thing"]
    expected = [chrf_by_hand(*pair) for pair in zip(answers, references, strict=True)]
    assert chrf(answers, references) == pytest.approx(expected)
    assert 0 < min(expected) < max(expected) < 1


# --- all of them ----------------------------------------------------------------------------------

ANSWERS = ["The cat sat on the mat.", "", "猫在家", "yes"]
REFERENCES = ["A cat sat upon a mat over there.", "cat", "猫在屋", "Yes."]


def test_every_record_has_its_own_values_and_the_means_are_over_them():
    scores = score_texts(ANSWERS, REFERENCES)
    for i, pair in enumerate(zip(ANSWERS, REFERENCES, strict=True)):
        alone = score_texts(*([text] for text in pair))
        assert alone.rouge_l[0] == scores.rouge_l[i]
        assert alone.chrf[0] == scores.chrf[i]
        assert alone.short[0] == scores.short[i]
    assert scores.rouge_l[1] == scores.chrf[1] == scores.exact_match[1] == 0
    assert scores.rouge_l[3] == scores.exact_match[3] == 1
    assert scores.means == pytest.approx(
        {
            "short_exact_match": 1 / 3,
            "short_records": 3,
            "rouge_l": scores.rouge_l.mean(),
            "chrf": scores.chrf.mean(),
        }
    )


def test_the_same_texts_give_the_same_bytes():
    once, again = (score_texts(ANSWERS, REFERENCES) for _ in range(2))
    for name in ("short", "exact_match", "rouge_l", "chrf"):
        assert getattr(once, name).tobytes() == getattr(again, name).tobytes()


@pytest.mark.parametrize("score", [score_texts, rouge_l, chrf, length_statistics])
def test_answers_without_references_are_refused(score):
    with pytest.raises(ValueError, match="2 answers but 1 references"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no answer to score"):
        score([], [])


# --- lengths --------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_words_beside_the_references():
    answers = ["a", "a b", "a, b; c", "one two three four five six seven eight nine ten", " "]
    references = ["a b c d", "a b c d", "a b", "a b c d e f g h i j", "!"]
    found = length_statistics(answers, references, at_limit=[False, True, False, True, False])
    assert found == pytest.approx(
        {
            "length_mean": 16 / 5,
            "length_median": 2,
            "length_p90": 3 + 0.6 * 7,  # of 0 1 2 3 10, at 0.9 x 4 = 3.6
            "length_ratio": 16 / 20,
            "empty": 1 / 5,
            "at_limit": 2 / 5,
        }
    )


def test_lengths_may_be_counted_in_anything():
    found = length_statistics(["abc", "d"], ["ab", "cd"], count=len)
    assert (found["length_mean"], found["length_ratio"]) == (2, 1)
    assert "at_limit" not in found


def test_references_without_length_have_no_ratio():
    found = length_statistics(["a b"], ["…"])
    assert "length_ratio" not in found
    assert all(map(math.isfinite, found.values()))


def test_a_flag_for_each_answer_is_asked_for():
    with pytest.raises(ValueError, match="2 answers but 1 flags"):
        length_statistics(["a", "b"], ["a", "b"], at_limit=[True])
