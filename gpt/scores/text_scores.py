"""Scores of answers against references, a value a record: exact match, ROUGE-L, chrF, lengths.

They measure different things: exact match whether a short answer is right, ROUGE-L whether the
words occur in the reference's order, chrF how many character n-grams are shared, which suits
inflected words and scripts without spaces. Bootstrap intervals are computed from the values of the
records (`gpt.scores.bootstrap.mean`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import punctuation

import numpy as np
import regex

from gpt.clean.cleaning import normalize

SHORT = 5
"""A reference of at most so many words can be asked for to the word."""

# Scripts that put no space between words: each of their letters counts as one, with its marks.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"(?V1)[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+"
)
_ARTICLES = regex.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True)
class TextScores:
    """The scores of n answers, all in 0..1.

    Attributes:
        short: whether the reference has at most `SHORT` words, (n,) bool.
        exact_match: 1 where the answer is the reference but for case, punctuation and articles,
            else 0; NaN where the reference is not short. (n,) float64.
        rouge_l: (n,) float64.
        chrf: (n,) float64.
    """

    short: np.ndarray
    exact_match: np.ndarray
    rouge_l: np.ndarray
    chrf: np.ndarray

    @property
    def means(self) -> dict[str, float]:
        """Over all records, the exact match over those with a short reference, if there are any.

        `short_records` says how many these are.
        """
        short = self.exact_match[self.short]
        return {
            **({"short_exact_match": float(short.mean())} if len(short) else {}),
            "short_records": float(len(short)),
            "rouge_l": float(self.rouge_l.mean()),
            "chrf": float(self.chrf.mean()),
        }


def score_texts(answers: Sequence[str], references: Sequence[str]) -> TextScores:
    """Every score of every answer.

    Raises:
        ValueError: there is no answer, or not a reference for each.
    """
    _check(answers, references)
    short = np.array([len(words(_bare(reference))) <= SHORT for reference in references])
    exact = [exact_match(*pair) for pair in zip(answers, references, strict=True)]
    return TextScores(
        short,
        np.where(short, exact, np.nan),
        rouge_l(answers, references),
        chrf(answers, references),
    )


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are the same but for case, punctuation, articles and spaces.

    That is SQuAD's measure (Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine
    Comprehension of Text", 6.1) for punctuation of any script. What would leave nothing of a text
    is not taken away, so that "A" can be an answer, and "<" another one than ">".
    """
    return _bare(answer) == _bare(reference)


def _bare(text: str) -> str:
    text = " ".join(normalize("NFC", text.lower()).split())
    plain = "".join(char for char in text if not _is_punctuation(char)).strip() or text
    return " ".join((_ARTICLES.sub(" ", plain).strip() or plain).split())


def _is_punctuation(char: str) -> bool:
    return char in punctuation or unicodedata.category(char)[0] == "P"


def words(text: str) -> list[str]:
    """The words of a text in any script, in lower case, without what stands between them.

    A word is a run of letters, marks and digits; where a script writes no spaces, a single letter.
    """
    return _WORD.findall(normalize("NFC", text.lower()))  # type: ignore[no-any-return]


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The F-measure of the longest common subsequence of words, (n,) float64 in 0..1.

    Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", 3, precision and recall
    weighing the same: twice the subsequence's length over that of both texts. On `words`; nothing
    is stemmed. The subsequence is RapidFuzz's: Google's `rouge-score` gives the same values, but
    knows no letters but a to z and brings a library of language processing along.

    Raises:
        ValueError: there is no answer, or not a reference for each.
    """
    from rapidfuzz.distance import LCSseq

    _check(answers, references)
    pairs = [(words(a), words(r)) for a, r in zip(answers, references, strict=True)]
    return np.array(
        [2 * LCSseq.similarity(a, r) / (len(a) + len(r)) if a and r else 0.0 for a, r in pairs],
        np.float64,
    )


def chrf(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The F2-measure of shared character n-grams up to 6, (n,) float64 in 0..1.

    Popović (2015), "chrF: character n-gram F-score for automatic MT evaluation", as `sacrebleu`
    computes it for a sentence: without spaces, with case.

    Raises:
        ValueError: there is no answer, or not a reference for each.
    """
    from sacrebleu.metrics.chrf import CHRF

    _check(answers, references)
    scorer = CHRF()
    pairs = zip(answers, references, strict=True)
    scores = [scorer.sentence_score(answer, [reference]).score for answer, reference in pairs]
    return np.array(scores, np.float64) / 100


# --- lengths --------------------------------------------------------------------------------------


def length_statistics(
    answers: Sequence[str],
    references: Sequence[str],
    *,
    count: Callable[[str], int] = lambda text: len(words(text)),
    at_limit: Sequence[bool] | None = None,
) -> dict[str, float]:
    """How long answers are, alone and beside their references.

    Args:
        answers: n of them.
        references: one for each.
        count: the length of a text, in words or in whatever else.
        at_limit: of each answer, whether it ended because no more tokens were allowed.

    Returns:
        `length_mean`, `length_median` and `length_p90`, the 90th percentile, in what `count`
        counts; `length_ratio`, all answers' length over all references', where these have any;
        `empty`, the share of answers with nothing in them; and `at_limit`, the share that the
        limit ended, where that is known.

    Raises:
        ValueError: there is no answer, or not a reference or flag for each.
    """
    _check(answers, references)
    if at_limit is not None and len(at_limit) != len(answers):
        raise ValueError(f"{len(answers)} answers but {len(at_limit)} flags")
    lengths = np.array([count(answer) for answer in answers])
    expected = sum(map(count, references))
    return {
        "length_mean": float(lengths.mean()),
        "length_median": float(np.median(lengths)),
        "length_p90": float(np.quantile(lengths, 0.9)),
        **({"length_ratio": float(lengths.sum() / expected)} if expected else {}),
        "empty": sum(not answer.strip() for answer in answers) / len(answers),
        **({"at_limit": sum(at_limit) / len(answers)} if at_limit is not None else {}),
    }


def _check(answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers but {len(references)} references")
    if not answers:
        raise ValueError("no answer to score")
