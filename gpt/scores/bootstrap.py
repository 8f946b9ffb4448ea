"""Percentile bootstrap intervals of one model's score, and of the difference of two models' scores.

Efron & Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3: n examples are
resampled with replacement many times, and the score of each resample is computed. The interval
contains the middle `level` of these scores. Two models are compared on the same resamples (Koehn,
2004, "Statistical Significance Tests for Machine Translation Evaluation"): the difficulty of the
examples then cancels out, and the interval of the difference is narrower than that of either
score.

Shapes: R resamples of n examples each, drawn as places of examples, (R, n).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
"""Enough for a 95 % interval: 50 of the scores lie on either side of it."""

_AT_ONCE = 1 << 20
"""The number of indices drawn at a time (8 MB), whatever the number of examples."""


@dataclass(frozen=True, slots=True)
class Score:
    """A score that can be computed on any resample of the examples.

    Attributes:
        n: the number of examples, 1 or more.
        of: maps indices of examples, (R, n) int64, to the score of each resample, (R,).
    """

    n: int
    of: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """On the examples as they are."""
        return float(self.of(np.arange(self.n)[None])[0])


@dataclass(frozen=True, slots=True)
class Interval:
    """A score on the examples as they are, and the ends of its interval; in the score's unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison(Interval):
    """The new score minus the old; `better` or `worse` if the interval does not contain 0."""

    better: bool
    worse: bool


# --- scores ---------------------------------------------------------------------------------------


def mean(values: ArrayLike) -> Score:
    """The mean of one value per example, (n,).

    Raises:
        ValueError: there are no examples.
    """
    numbers = np.asarray(values, np.float64)
    return Score(_examples(numbers), lambda places: numbers[places].mean(1))


def accuracy(truths: ArrayLike, predicted: ArrayLike) -> Score:
    """The share of examples whose class was predicted; classes by number, (n,) each.

    Raises:
        ValueError: there is no example, or not a prediction for each.
    """
    actual, found = np.asarray(truths), np.asarray(predicted)
    _examples(actual, found)
    return mean(actual == found)


def macro_f1(truths: ArrayLike, predicted: ArrayLike, n_classes: int, *, others: int = 0) -> Score:
    """The mean over the classes of each one's F1, as in `gpt.batches.metrics`.

    A class that occurs neither in a resample's truths nor in its predictions has an F1 of 0.

    Args:
        truths: the class of each example, 0 … n_classes - 1, (n,).
        predicted: the predicted class of each example, or one of the `others`, (n,).
        n_classes: the number of classes.
        others: the number of further classes that may be predicted, always wrongly; they do not
            count in the mean.

    Raises:
        ValueError: there is no example, not a prediction for each, or a number of no class.
    """
    actual, found = np.asarray(truths), np.asarray(predicted)
    n = _examples(actual, found)
    for classes, known in ((actual, n_classes), (found, n_classes + others)):
        if classes.min() < 0 or classes.max() >= known:
            raise ValueError(f"the classes are not all in 0 … {known - 1}")
    right = np.where(actual == found, actual, n_classes)  # n_classes: of none

    def of(places: np.ndarray) -> np.ndarray:
        hits = _counts(right[places], n_classes + 1)[:, :-1]  # (R, n_classes)
        # F1 = 2 TP / (actual + predicted)
        said = _counts(found[places], n_classes + others)[:, :n_classes]
        both = _counts(actual[places], n_classes) + said
        return (2 * hits / np.maximum(both, 1)).mean(1)  # type: ignore[no-any-return]

    return Score(n, of)


def mean_loss(loss_sums: ArrayLike, token_counts: ArrayLike) -> Score:
    """The mean loss over all tokens; examples are resampled as a whole.

    Args:
        loss_sums: the loss of each example summed over its tokens, (n,), in nats.
        token_counts: how many each has, 1 or more, (n,).

    Raises:
        ValueError: there is no example, not a count for each, or an example without tokens.
    """
    sums, counts = np.asarray(loss_sums, np.float64), np.asarray(token_counts)
    n = _examples(sums, counts)
    if counts.min() < 1:
        raise ValueError("an example without tokens has no loss; leave it out")
    return Score(n, lambda places: sums[places].sum(1) / counts[places].sum(1))


def _examples(*arrays: np.ndarray) -> int:
    """The number of examples, after a check that all arrays have the same length."""
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0] == (0,):
        raise ValueError(f"one value for each of n examples is needed, (n,), not {shapes}")
    return len(arrays[0])


def _counts(classes: np.ndarray, n_classes: int) -> np.ndarray:
    """How often each class is in each row: (R, n) to (R, n_classes)."""
    R = len(classes)
    rows = np.arange(0, R * n_classes, n_classes)[:, None]
    return np.bincount((classes + rows).ravel(), minlength=R * n_classes).reshape(R, n_classes)


# --- intervals ------------------------------------------------------------------------------------


def interval(
    score: Score, *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> Interval:
    """The score and its percentile interval.

    Args:
        score: the score.
        resamples: the number of resamples; with few of them the ends vary more.
        level: the share of the resamples' scores between the ends, within 0 … 1.
        seed: of the resamples, which depend only on it and on the number of examples.

    Raises:
        ValueError: `resamples` or `level` is impossible.
    """
    value, drawn = _scores(score.n, score.of, resamples, seed)
    return Interval(value, *_ends(drawn, level))


def compare(
    new: Score,
    old: Score,
    *,
    smaller_is_better: bool = False,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """The new score minus the old one, both on the same resamples of the same examples.

    Args:
        new: the new model's score.
        old: the old model's, on the same examples in the same order.
        smaller_is_better: True for a loss, for example; reverses `better` and `worse`.
        resamples: as for `interval`.
        level: as for `interval`.
        seed: as for `interval`.

    Raises:
        ValueError: the numbers of examples differ, or as `interval`.
    """
    if new.n != old.n:
        raise ValueError(
            f"{new.n} examples but {old.n} in the score to compare with; score the same ones"
        )
    value, drawn = _scores(new.n, lambda places: new.of(places) - old.of(places), resamples, seed)
    low, high = _ends(drawn, level)
    least, most = (-high, -low) if smaller_is_better else (low, high)  # of what is gained
    return Comparison(value, low, high, better=least > 0, worse=most < 0)


def _scores(
    n: int, of: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> tuple[float, np.ndarray]:
    """The score on the examples as they are, and on each resample, (resamples,)."""
    if resamples < 1:
        raise ValueError(f"resamples: {resamples} is too few; draw 1 or more")
    random = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, _AT_ONCE // n)
    drawn = [
        of(random.integers(0, n, (min(rows, resamples - start), n)))
        for start in range(0, resamples, rows)
    ]
    return float(of(np.arange(n)[None])[0]), np.concatenate(drawn)


def _ends(drawn: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is not between 0 and 1; 0.95 is usual")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
