"""Scores with the ends of their bootstrap intervals, as they stand in `metrics.json`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from gpt.scores.bootstrap import Interval, Score, accuracy, interval, macro_f1

Bounds = Callable[[Score], Interval]


def bounds(resamples: int, seed: int) -> Bounds:
    """How every interval of an evaluation is drawn: at 95 %."""
    return functools.partial(interval, resamples=resamples, level=0.95, seed=seed)


def figures_of(name: str, found: Interval) -> dict[str, float]:
    """A score under its name, and its interval's ends under `NAME_low` and `NAME_high`."""
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def class_figures(
    actual: Sequence[int], predicted: Sequence[int], n_classes: int, of: Bounds
) -> dict[str, float]:
    """Accuracy and macro F1 of predicted classes, by number."""
    return {
        **figures_of("accuracy", of(accuracy(actual, predicted))),
        **figures_of("f1_macro", of(macro_f1(actual, predicted, n_classes))),
    }
