import random
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.clean.duplicates import PERMUTATIONS, content_hash, duplicates, near_duplicates, signature

THRESHOLD = 0.8  # what the parameter's description recommends


def shingles(text):
    """The text's set of runs of five words, made the slow way."""
    words = text.lower().split()
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def similarity(one, other):
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def pair(rng, shared, own):
    """Two texts of different words with so many shared shingles, and so many of its own each."""
    start = rng.randrange(10**9)
    words = [f"w{start + n}" for n in range(shared + 4 + 2 * own)]
    beginning, rest = words[: shared + 4], words[shared + 4 :]
    return " ".join(beginning + rest[:own]), " ".join(beginning + rest[own:])


def planted(seed, shared, own, n=500):
    """The texts of n pairs, one pair's behind the other's, and no pair like another."""
    rng = random.Random(seed)
    return [text for _ in range(n) for text in pair(rng, shared, own)]


def signatures_of(texts):
    return np.stack([signature(text) for text in texts])


# --- exact ----------------------------------------------------------------------------------------


def test_equal_texts_have_equal_hashes_of_64_bits_and_others_do_not():
    assert content_hash("a b") == content_hash("a " + "b")
    assert len({content_hash(text) for text in ["", "a b", "a  b", "A b", "a b\n", "\ud800"]}) == 6
    assert 0 <= content_hash("a b") < 1 << 64


@given(st.lists(st.integers(0, 8)))
def test_every_repetition_points_to_the_first_of_its_kind(values):
    repeated = duplicates(np.array(values, np.uint64) + np.uint64((1 << 64) - 10))
    expected = [values.index(value) for value in values]
    assert repeated.tolist() == [-1 if at == n else at for n, at in enumerate(expected)]
    assert repeated.dtype == np.int64


# --- signatures -----------------------------------------------------------------------------------


def test_a_signature_is_the_same_in_another_process():
    code = (
        "from gpt.clean.duplicates import signature; print(signature('The sea, the sea!').tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = signature("The sea, the sea!")
    assert done.stdout.strip() == str(mine.tolist())
    assert (mine.shape, mine.dtype) == ((PERMUTATIONS,), np.uint32)


def test_upper_case_punctuation_and_white_space_make_no_difference():
    assert np.array_equal(signature("One, two - THREE!\nFour"), signature("one two three  four"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("one two three", "one three two"),
        ("one two three", "one two three three"),
        ("one two three four five", "five four three two one"),
        ("!!!", "???"),
        ("", "one"),
    ],
)
def test_short_texts_that_differ_have_nothing_in_common(one, other):
    assert not np.any(signature(one) == signature(other))


def test_a_character_is_a_word_where_words_have_no_spaces():
    text = "我们昨天在河边散步看见很多白色的鸟在水面上飞来飞去孩子们高兴地跑着叫着"
    assert np.mean(signature(text) == signature(text[:-1] + "了")) > 0.8  # 0.89 of 35 runs


@given(st.text(st.characters()))
def test_any_text_has_a_signature_and_a_hash(text):
    signature(text)
    content_hash(text)


@pytest.mark.parametrize(("shared", "own"), [(90, 5), (60, 20), (60, 70), (0, 50)])
def test_signatures_estimate_the_jaccard_similarity_of_runs_of_five_words(shared, own):
    """128 numbers have a standard error of 0.044 at most, of 200 pairs together 0.003."""
    texts = planted(1, shared, own, n=200)
    exact = similarity(*texts[:2])
    rows = signatures_of(texts)
    assert exact == shared / (shared + 2 * own)
    assert np.mean(rows[::2] == rows[1::2]) == pytest.approx(exact, abs=0.012)


def test_a_text_longer_than_is_permuted_at_once_has_one_signature():
    words = [f"w{n}" for n in range(5000)]
    whole = signature(" ".join(words))
    parts = [signature(" ".join(words[at : at + 54])) for at in range(0, 5000, 50)]
    assert np.array_equal(whole, np.min(parts, axis=0))


# --- near -----------------------------------------------------------------------------------------


def test_pairs_of_nine_tenths_are_found_and_pairs_of_three_tenths_are_not():
    near, far = planted(2, 90, 5), planted(3, 60, 70)
    assert {similarity(*near[at : at + 2]) for at in range(0, 1000, 2)} == {0.9}
    assert {similarity(*far[at : at + 2]) for at in range(0, 1000, 2)} == {0.3}
    found = near_duplicates(signatures_of(near + far), THRESHOLD)
    assert np.all(found[::2] == -1)  # the first of a pair stays
    hits = found[1::2] == np.arange(0, 2000, 2)
    assert np.all(hits | (found[1::2] == -1))
    assert np.mean(hits[:500]) >= 0.95
    assert np.mean(hits[500:]) <= 0.01


@pytest.mark.parametrize(
    ("threshold", "shared", "own"), [(0.3, 90, 5), (0.5, 60, 20), (0.7, 80, 10), (0.85, 96, 2)]
)
def test_bands_find_what_the_signatures_call_near_at_every_threshold(threshold, shared, own):
    rows = signatures_of(planted(4, shared, own, n=200))
    near = np.mean(rows[::2] == rows[1::2], axis=1) >= threshold
    found = near_duplicates(rows, threshold)[1::2] >= 0
    assert not np.any(found & ~near)
    assert np.mean(found[near]) >= 0.95


def rows_like(*agreements, permutations=PERMUTATIONS):
    """A row of numbers, and others that agree with it in such a share of them, from the left."""
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 1 << 32, (1 + len(agreements), permutations), dtype=np.uint32)
    for row, agreement in zip(rows[1:], agreements, strict=True):
        row[: round(agreement * permutations)] = rows[0, : round(agreement * permutations)]
    return rows


def test_a_document_is_near_at_exactly_the_threshold():
    rows = rows_like(0.7, 0.7, permutations=100)
    rows[2, 69] += 1
    assert near_duplicates(rows, 0.7).tolist() == [-1, 0, -1]


def test_the_earliest_of_several_near_ones_is_named():
    rows = rows_like(0.9, 0.9, 0.95)
    assert near_duplicates(rows, THRESHOLD).tolist() == [-1, 0, 0, 0]
    assert near_duplicates(rows[::-1], THRESHOLD).tolist() == [-1, 0, 0, 0]


def test_what_is_near_only_to_a_removed_document_stays():
    """Else a chain of small changes would end in the loss of a text like no other."""
    first, second = rows_like(0.85)
    third = second.copy()
    third[:20] = np.arange(20)  # 0.84 like the second, 0.7 like the first
    assert near_duplicates(np.stack([first, second, third]), THRESHOLD).tolist() == [-1, 0, -1]
    assert near_duplicates(np.stack([second, third]), THRESHOLD).tolist() == [-1, 0]


@pytest.mark.parametrize("n", [0, 1])
def test_no_document_and_a_single_one_are_near_to_none(n):
    found = near_duplicates(np.zeros((n, PERMUTATIONS), np.uint32), THRESHOLD)
    assert found.tolist() == [-1] * n
    assert duplicates(np.zeros(n, np.uint64)).tolist() == [-1] * n


def test_half_of_a_hundred_thousand_documents_alike_take_seconds():
    """Were all copies compared with each other, these would be 10**9 comparisons."""
    rng = np.random.default_rng(6)
    rows = rng.integers(0, 1 << 32, (100_000, PERMUTATIONS), dtype=np.uint32)
    alike = np.sort(rng.choice(100_000, 50_000, replace=False))
    rows[alike] = rows[alike[0]]
    began = time.process_time()
    found = near_duplicates(rows, THRESHOLD)
    assert time.process_time() - began < 20
    assert np.all(found[alike[1:]] == alike[0])
    assert np.sum(found >= 0) == 49_999


def test_documents_from_one_form_do_not_cost_quadratic_time():
    """Each shares bands with thousands of others, and is near to few of them."""
    rng = np.random.default_rng(7)
    rows = rng.integers(0, 1 << 32, (20_000, PERMUTATIONS), dtype=np.uint32)
    rows = np.where(rng.random(rows.shape) < 0.83, rows[0], rows)  # 0.69 like each other

    def seconds(n: int) -> float:
        began = time.process_time()
        near_duplicates(rows[:n], 0.8)
        return time.process_time() - began

    assert seconds(20_000) < 8 * seconds(5_000)  # 16 times were quadratic
