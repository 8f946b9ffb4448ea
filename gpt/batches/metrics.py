"""Metrics: losses on data, perplexity, classification scores."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt.base.errors import NOT_FINITE, RunError
from gpt.base.labels import class_key
from gpt.batches.data import IGNORED, Batch
from gpt.model.loss import linear_cross_entropy
from gpt.model.model import GPT, ClassifierTop, GPTClassifier
from gpt.model.parallel import add_up, share_out

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def lm_loss_sum(model: GPT, batch: Batch) -> tuple[Tensor, int]:
    """The summed cross-entropy of the next token, in nats, and the number of targets.

    Logits are computed only for targets that count, so prompts and padding cost nothing here.
    """
    hidden = model.hidden(batch.inputs, documents=batch.documents)  # (B, T, C)
    counts = batch.targets != IGNORED  # (B, T)
    n_targets = batch.n_targets
    if n_targets < counts.numel():
        hidden, targets = hidden[counts], batch.targets[counts]  # (n, C), (n,)
    else:
        hidden, targets = hidden.flatten(0, 1), batch.targets.flatten()
    return linear_cross_entropy(hidden, model.head_weight, targets), n_targets


def class_loss_sum(
    model: GPTClassifier | ClassifierTop, batch: Batch, weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """The summed cross-entropy of the class, in nats, and the number of rows.

    With `weights` (`class_weights`) each text is weighted by its class. The weights have a mean of
    1 over the texts, so dividing the sum by the number of rows gives the weighted mean loss.
    """
    logits = model(batch.inputs, batch.lengths).float()  # (B, classes)
    weights = None if weights is None else weights.to(logits.device)
    loss = F.cross_entropy(logits, batch.targets, weight=weights, reduction="sum")
    return loss, batch.n_targets


def class_weights(classes: Sequence[int], n_classes: int) -> Tensor:
    """The loss weight of each class's texts, so that every class has the same total weight.

    n / (k n_c) for n texts in k classes, n_c of them in the class: a mean of 1 over the texts
    (King & Zeng, 2001, "Logistic Regression in Rare Events Data"). A class without texts is
    treated as if it had one.

    Returns:
        (n_classes,) fp32.
    """
    counts = torch.bincount(torch.tensor(classes), minlength=n_classes).clamp(min=1)
    return len(classes) / (n_classes * counts.float())


@torch.no_grad()
def mean_loss(
    model: Any,
    batches: Iterable[Batch],
    loss: Callable[[Any, Batch], tuple[Tensor, int]] = lm_loss_sum,
) -> float:
    """The mean loss over every target of `batches`, in nats; NaN if there are no targets.

    Processes that train together share the batches, and all get the same mean.
    """
    total, targets = 0.0, 0
    for batch, counts in share_out(batches):
        summed, n = loss(model, batch.to(model.device))
        if counts:
            total += summed.item()
            targets += n
    total, targets = add_up(torch.tensor([total, targets], dtype=torch.float64)).tolist()
    return total / targets if targets else math.nan


@torch.no_grad()
def target_losses(model: GPT, batches: Iterable[Batch]) -> list[np.ndarray]:
    """The cross-entropy of each target of every row, in nats: (targets of the row,) fp32 each.

    Logits are computed for one row at a time, and only for targets that count.
    """
    losses = []
    for batch in batches:
        here = batch.to(model.device)
        for hidden, targets in zip(model.hidden(here.inputs), here.targets, strict=True):
            counts = targets != IGNORED
            logits = hidden[counts] @ model.head_weight.T  # (n, V)
            found = F.cross_entropy(logits.float(), targets[counts], reduction="none")
            losses.append(found.cpu().numpy())
    return losses


@torch.no_grad()
def class_logits(model: GPTClassifier | ClassifierTop, batches: Iterable[Batch]) -> Tensor:
    """The class logits of every row of `batches`, (rows, classes) in fp32 on the CPU."""
    device = next(model.parameters()).device
    logits = []
    for batch in batches:
        here = batch.to(device)
        logits.append(model(here.inputs, here.lengths).float().cpu())
    return torch.cat(logits)


def classify(model: GPTClassifier, batches: Iterable[Batch]) -> Tensor:
    """The probability of each class for every row of `batches`, (rows, classes) on the CPU.

    Raises:
        RunError: the model's logits are not finite.
    """
    logits = class_logits(model, batches)
    if not logits.isfinite().all():
        raise RunError(NOT_FINITE)
    return logits.softmax(dim=1)


def check_finite(scores: np.ndarray, directory: Path) -> None:
    """Check that a model's scores are finite, before anything is computed from them.

    Args:
        scores: losses or probabilities, one row per text.
        directory: the model's.

    Raises:
        RunError: some scores are not finite.
    """
    if not np.isfinite(scores).all():
        raise RunError(f"{directory}: {NOT_FINITE}")


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats: the number of equally likely tokens of the same uncertainty."""
    return math.inf if loss > _LARGEST_EXPONENT else math.exp(loss)


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """A mean loss in nats per token as bits per byte of text, comparable between tokenizers."""
    return loss / math.log(2) * tokens / n_bytes


def classification_scores(
    actual: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of each class and averaged over the classes.

    All in 0..1; those of a class are named by its `class_key`. A class that was never predicted
    has a precision of 0.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        actual, predicted, labels=list(labels), zero_division=0
    )
    scores = {"accuracy": float(accuracy_score(actual, predicted)), "f1_macro": float(f1.mean())}
    for i, key in enumerate(map(class_key, labels)):
        scores[f"precision_{key}"] = float(precision[i])
        scores[f"recall_{key}"] = float(recall[i])
        scores[f"f1_{key}"] = float(f1[i])
    scores["precision_macro"] = float(precision.mean())
    scores["recall_macro"] = float(recall.mean())
    return scores


def roc_auc(classes: Sequence[int], probabilities: np.ndarray) -> float | None:
    """The area under the ROC curve: how often a text of a class is ranked above one of another.

    With more than two classes: one class against the rest, averaged over the classes (Provost &
    Domingos, 2000).

    Args:
        classes: of each text, by number.
        probabilities: of each class, (n, classes).

    Returns:
        0..1; None if no class has both texts in it and texts outside it.
    """
    from sklearn.metrics import roc_auc_score

    actual = np.asarray(classes)
    n_classes = probabilities.shape[1]
    areas = [
        roc_auc_score(actual == i, probabilities[:, i])
        for i in ([1] if n_classes == 2 else range(n_classes))
        if 0 < (actual == i).sum() < len(actual)
    ]
    return float(np.mean(areas)) if areas else None


def calibration_error(classes: Sequence[int], probabilities: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error: how far the predicted probabilities are from the accuracy.

    The texts are put into `bins` equally wide bins by the probability of the predicted class. The
    error is the mean absolute difference between a bin's accuracy and its mean probability,
    weighted by the number of texts (Guo et al., 2017, "On Calibration of Modern Neural Networks",
    2).

    Args:
        classes: of each text, by number.
        probabilities: of each class, (n, classes).
        bins: the number of bins.

    Returns:
        0..1; 0 is perfectly calibrated.
    """
    said = probabilities.max(1)
    right = probabilities.argmax(1) == np.asarray(classes)
    # a bin includes its upper end and not its lower
    at = np.clip(np.ceil(said * bins).astype(int) - 1, 0, bins - 1)
    total = 0.0
    for each in np.unique(at):
        inside = at == each
        total += inside.sum() * abs(right[inside].mean() - said[inside].mean())
    return float(total / len(said))
