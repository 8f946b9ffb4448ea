"""How sure a score is: percentile bootstrap intervals, of one model and of two on the same data.

Efron & Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3: the examples are drawn
again with replacement, as many as there are; the score of each such resample is taken, and the
interval is what holds the middle `level` of these scores. Two models are compared on the same
resamples (Koehn, 2004, "Statistical Significance Tests for Machine Translation Evaluation"): what
is hard for both then cancels out, and the interval of the difference is narrower than that of
either score.

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
"""So many places are drawn at a time (8 MB), however many examples there are."""


@dataclass(frozen=True, slots=True)
class Score:
    """A score that can be computed on any choice of the examples.

    Attributes:
        n: how many examples there are, 1 or more.
        of: places of examples, (R, n) int64, to the score of each choice, (R,).
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
    """The new score less the old one; `better` and `worse` where the interval leaves 0 out."""

    better: bool
    worse: bool


# --- scores ---------------------------------------------------------------------------------------


def mean(values: ArrayLike) -> Score:
    """The mean of a value an example, (n,).

    Raises:
        ValueError: there is no example.
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

    A class that a resample neither holds nor has predicted has an F1 of 0 in it.

    Args:
        truths: the class of each example, 0 … n_classes - 1, (n,).
        predicted: the one that was predicted, likewise, or of the `others`.
        n_classes: how many there are.
        others: so many more may be predicted, wrongly, and do not count in the mean.

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
    """The mean loss over all tokens, each example drawn with all of its own.

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
    """How many examples there are, after a look at whether every array says so."""
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
        score: what is in question.
        resamples: how many are drawn; the ends are as unsteady as there are few of them.
        level: the share of the resamples' scores between the ends, within 0 … 1.
        seed: picks the resamples, which depend on nothing else but the number of examples.

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
    """The new score less the old one, both on the same resamples of the same examples.

    Args:
        new: of the one model.
        old: of the other, on the same examples in the same order.
        smaller_is_better: of a loss, say; turns round what `better` and `worse` mean.
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
