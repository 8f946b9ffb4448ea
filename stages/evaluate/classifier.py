"""The classifier: its scores on every part of the messages, and its predictions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from gpt.base.errors import InputError, first_few
from gpt.base.labels import in_short, plain_label
from gpt.batches.data import ClassificationDataset, batches
from gpt.batches.metrics import (
    calibration_error,
    check_finite,
    class_logits,
    classification_scores,
    roc_auc,
)
from gpt.model.weights import load_classifier, read_labels
from gpt.text.records import usable_parts
from stages.evaluate.intervals import Bounds, class_figures
from stages.training_file import read_training

_MOST_WRONG = 20
"""Of each part so many messages are listed that a classifier was wrong about."""
_NAMED = 10  # labels in a line
_SQUARE = 50
"""Classes up to which pairs that never occur are listed, too."""


def messages_by_part(directory: Path, messages: Path) -> tuple[list[str], dict[str, pd.DataFrame]]:
    """A classifier's labels, and the messages by part: `train`, `validation` and `test`.

    Args:
        directory: its model directory, which says how they were split.
        messages: the raw folder.

    Raises:
        InputError: the directory or the messages cannot be used, or do not belong together; or
            a part is empty.
    """
    labels = [*map(plain_label, read_labels(directory))]  # an old model has them as they stood
    training = read_training(directory)
    frame, parts = usable_parts(messages, training.split, training.balance)
    unknown = sorted(set(frame["label"]) - set(labels))
    if unknown:
        known = first_few(labels, _NAMED)
        raise InputError(
            f"{messages}: the class {in_short(unknown[:1])} is unknown to {directory} ({known}); "
            "run finetune_classifier on these messages"
        )
    return labels, parts


def predict_classes(
    directory: Path, rows: pd.DataFrame, device: torch.device, batch_size: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """What a classifier makes of messages.

    Args:
        directory: its model directory.
        rows: columns `text` and `label`.
        device: where.
        batch_size: texts at once.

    Returns:
        A table, a row a message: its text, the actual and the predicted class, and the probability
        of each, rounded; and the probabilities as they are, (n, classes).

    Raises:
        InputError: the directory cannot be used, or holds no classifier.
        RunError: its logits are not finite.
    """
    model, tokenizer = load_classifier(directory)
    model.to(device)
    labels = [*map(plain_label, model.labels)]
    data = ClassificationDataset(
        tokenizer.encode_batch(rows["text"].tolist()),
        [0] * len(rows),  # not looked at
        padding=tokenizer.eot,
        max_length=read_training(directory).max_length,
    )
    logits = class_logits(model, batches(data, batch_size, by_length=True))
    check_finite(logits.numpy(), directory)
    found = logits.softmax(1).double().numpy()
    probabilities = np.empty_like(found)  # (n, classes)
    probabilities[np.argsort(-data.lengths, kind="stable")] = found  # as they were, not by length
    table = pd.DataFrame(
        {
            "text": rows["text"],
            "actual": rows["label"],
            "predicted": [labels[i] for i in probabilities.argmax(1).tolist()],
        }
        | {f"probability_{each}": probabilities[:, i].round(6) for i, each in enumerate(labels)}
    )
    return table, probabilities


def measure_classifier(
    directory: Path, messages: Path, device: torch.device, batch_size: int, of: Bounds
) -> tuple[dict[str, float], dict[str, pd.DataFrame]]:
    """Score a classifier on each part of the messages that it was trained on a part of.

    Args:
        directory: its model directory.
        messages: the raw folder.
        device: where.
        batch_size: texts at once.
        of: how the intervals of the test part's accuracy and macro F1 are drawn.

    Returns:
        The scores, those of the training and validation parts under `train_` and `validation_`:
        in 0..1; `majority_accuracy` is that of naming the most frequent class each time,
        `missing_classes` are those of which a part has no message, if it lacks any. And
        tables: `classifier`, a row a test message; `classifier_confusion`, a row a part and pair
        of classes; `classifier_most_wrong`, of each part the messages whose right class got the
        least.

    Raises:
        InputError: as `messages_by_part`, or the directory holds no classifier.
    """
    labels, parts = messages_by_part(directory, messages)
    figures: dict[str, float] = {}
    tables: dict[str, pd.DataFrame] = {}
    for name in ("test", "validation", "train"):
        table, probabilities = predict_classes(directory, parts[name], device, batch_size)
        classes = [labels.index(label) for label in table["actual"]]
        scores = _scores(table, classes, probabilities, labels)
        if name == "test":
            predicted = [labels.index(label) for label in table["predicted"]]
            scores |= class_figures(classes, predicted, len(labels), of)
            scores["majority_accuracy"] = max(Counter(classes).values()) / len(classes)
        if missing := len(labels) - len(set(classes)):
            scores["missing_classes"] = float(missing)
        prefix = "" if name == "test" else f"{name}_"
        figures |= {f"{prefix}{key}": value for key, value in scores.items()}
        tables[name] = table
    confusion = [_confusion(name, table, labels) for name, table in tables.items()]
    wrong = [_most_wrong(name, table) for name, table in tables.items()]
    return figures, {
        "classifier": tables["test"],
        "classifier_confusion": pd.concat(confusion, ignore_index=True),
        "classifier_most_wrong": pd.concat(wrong, ignore_index=True),
    }


def _scores(
    table: pd.DataFrame, classes: list[int], probabilities: np.ndarray, labels: list[str]
) -> dict[str, float]:
    scores = classification_scores(table["actual"].tolist(), table["predicted"].tolist(), labels)
    area = roc_auc(classes, probabilities)
    return {
        **scores,
        **({"roc_auc": area} if area is not None else {}),
        "calibration_error": calibration_error(classes, probabilities),
        "rows": float(len(table)),
    }


def _confusion(part: str, table: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """How many messages of each class were taken for each; of many classes, what occurs alone."""
    pairs = Counter(zip(table["actual"], table["predicted"], strict=True))
    square = ((a, p) for a in labels for p in labels)
    shown = square if len(labels) <= _SQUARE else sorted(pairs)
    rows = [(part, a, p, pairs[a, p]) for a, p in shown]
    return pd.DataFrame(rows, columns=["part", "actual", "predicted", "messages"])


def _most_wrong(part: str, table: pd.DataFrame) -> pd.DataFrame:
    """The wrong ones, the one first whose right class got the smallest probability."""
    wrong = table[table["actual"] != table["predicted"]]
    given: list[Any] = [wrong.at[i, f"probability_{label}"] for i, label in wrong["actual"].items()]
    found = wrong[["text", "actual", "predicted"]].assign(probability_actual=given)
    found.insert(0, "part", part)
    return found.sort_values("probability_actual", kind="stable").head(_MOST_WRONG)
