"""Every figure that a report shows, computed a second time by other means."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report
from torch.nn import functional as F

from gpt.base.errors import RunError
from gpt.base.labels import class_key, class_of
from gpt.batches.data import IGNORED, Batch
from gpt.batches.metrics import (
    bits_per_byte,
    calibration_error,
    class_loss_sum,
    class_weights,
    classification_scores,
    classify,
    lm_loss_sum,
    mean_loss,
    perplexity,
    roc_auc,
    target_losses,
)
from gpt.model.model import GPTClassifier

LABELS = ["a", "b", "c"]


def ids(*shape):
    return torch.randint(0, 256, shape)


def lm_batch(rows, length, learnt):
    """A batch in which only the last `learnt` targets of each row count."""
    targets = ids(rows, length)
    targets[:, : length - learnt] = IGNORED
    return Batch(ids(rows, length), targets)


@pytest.mark.parametrize("learnt", [12, 5])
def test_the_loss_is_the_cross_entropy_of_the_targets_that_count(make_model, learnt):
    model = make_model()
    batch = lm_batch(3, 12, learnt)
    summed, n = lm_loss_sum(model, batch)
    expected = F.cross_entropy(
        model(batch.inputs).transpose(1, 2),
        batch.targets,
        ignore_index=IGNORED,
        reduction="sum",
    )
    assert n == 3 * learnt
    assert torch.allclose(summed, expected, rtol=1e-5)


def test_a_mean_weighs_every_target_the_same_whatever_batch_it_is_in(make_model):
    model = make_model()
    uneven = [lm_batch(4, 20, 20), lm_batch(1, 9, 1), lm_batch(2, 30, 0)]
    losses = [lm_loss_sum(model, batch)[0].item() for batch in uneven]
    assert mean_loss(model, uneven) == pytest.approx(sum(losses) / 81, rel=1e-6)
    assert losses[2] == 0


def test_without_targets_there_is_no_mean(make_model):
    assert math.isnan(mean_loss(make_model(), []))
    assert math.isnan(mean_loss(make_model(), [lm_batch(2, 8, 0)]))


def test_a_classifier_answers_each_row_as_if_it_were_alone(make_model):
    torch.manual_seed(3)
    model = GPTClassifier(make_model().config, LABELS).eval()
    lengths = torch.tensor([9, 4, 1])
    batch = Batch(ids(3, 9), torch.tensor([0, 2, 1]), lengths)
    probabilities = classify(model, [batch, batch])
    assert probabilities.shape == (6, 3)
    assert torch.allclose(probabilities.sum(1), torch.ones(6))
    for row, length in enumerate(lengths):
        alone = model(batch.inputs[row : row + 1, :length]).softmax(1)[0]
        assert torch.allclose(probabilities[row], alone, atol=1e-6)
        assert torch.allclose(probabilities[row + 3], alone, atol=1e-6)
    chosen = probabilities[range(3), batch.targets]
    assert mean_loss(model, [batch], class_loss_sum) == pytest.approx(
        -chosen.log().mean().item(), rel=1e-5
    )


def test_a_classifier_whose_logits_are_not_finite_gives_no_probabilities(make_model):
    model = GPTClassifier(make_model().config, LABELS).eval()
    with torch.no_grad():
        model.score.weight[0] = torch.nan
    batch = Batch(ids(2, 8), torch.tensor([0, 1]), torch.tensor([8, 3]))
    with pytest.raises(RunError, match="not finite numbers"):
        classify(model, [batch])


def test_scores_are_those_of_the_confusion_matrix():
    generator = np.random.default_rng(0)
    actual = generator.choice(LABELS, 200, p=[0.6, 0.3, 0.1])
    predicted = np.where(generator.random(200) < 0.6, actual, generator.choice(LABELS, 200))
    scores = classification_scores(actual.tolist(), predicted.tolist(), LABELS)
    matrix = np.array([[np.sum((actual == a) & (predicted == p)) for p in LABELS] for a in LABELS])
    assert scores["accuracy"] == pytest.approx(matrix.trace() / 200)
    f1 = []
    for i, label in enumerate(LABELS):
        precision = matrix[i, i] / matrix[:, i].sum()
        recall = matrix[i, i] / matrix[i].sum()
        f1.append(2 * precision * recall / (precision + recall))
        assert scores[f"precision_{label}"] == pytest.approx(precision)
        assert scores[f"recall_{label}"] == pytest.approx(recall)
        assert scores[f"f1_{label}"] == pytest.approx(f1[-1])
    assert scores["f1_macro"] == pytest.approx(sum(f1) / 3)
    report = classification_report(actual, predicted, output_dict=True)
    for ours, theirs in (("f1", "f1-score"), ("precision", "precision"), ("recall", "recall")):
        assert scores[f"{ours}_macro"] == pytest.approx(report["macro avg"][theirs])
    assert len(scores) == 1 + 3 + 3 * 3


def test_the_area_under_the_roc_curve_is_how_often_the_right_one_comes_first():
    generator = np.random.default_rng(0)
    for n_classes in (2, 3):
        classes = generator.integers(0, n_classes, 60)
        probabilities = generator.dirichlet([1] * n_classes, 60).round(1)  # with equal ones
        areas = []
        for i in range(n_classes):
            inside, outside = probabilities[classes == i, i], probabilities[classes != i, i]
            pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
            areas.append(sum(pairs) / len(pairs))
        expected = areas[1] if n_classes == 2 else sum(areas) / 3
        assert roc_auc(classes.tolist(), probabilities) == pytest.approx(expected)
    # of a class that is not there nothing can be said, and of one alone neither
    assert roc_auc([0, 1, 1], np.eye(3)[[0, 1, 1]]) == 1
    assert roc_auc([1, 1], np.eye(2)) is None


def test_the_calibration_error_is_what_is_said_beside_what_is_right():
    # three say 0.9 and two of them are right; one says 0.6 and is right
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    error = calibration_error([0, 0, 0, 0], probabilities, bins=10)
    assert error == pytest.approx(3 / 4 * abs(2 / 3 - 0.9) + 1 / 4 * abs(1 - 0.6))
    assert calibration_error([0, 1], np.eye(2)) == 0
    assert calibration_error([1, 0], np.eye(2)) == 1
    # at the border of two bins it lies in the lower one: 0.5 and 0.45 are one bin of ten
    two = np.array([[0.5, 0.3, 0.2], [0.45, 0.3, 0.25]])
    assert calibration_error([0, 1], two, bins=10) == pytest.approx(abs(0.5 - 0.475))


def test_the_weights_of_classes_are_one_in_the_mean_and_make_classes_equal(make_model):
    classes = [0] * 6 + [1] * 2
    weights = class_weights(classes, 3)
    assert weights[:2].tolist() == pytest.approx([8 / 18, 8 / 6])
    assert class_weights([0, 0, 1, 1], 2).tolist() == [1, 1]
    torch.manual_seed(3)
    model = GPTClassifier(make_model().config, LABELS).eval()
    batch = Batch(ids(4, 9), torch.tensor([0, 1, 1, 0]), torch.tensor([9, 4, 1, 7]))
    summed, n = class_loss_sum(model, batch, weights)
    each = F.cross_entropy(model(batch.inputs, batch.lengths), batch.targets, reduction="none")
    assert n == 4
    assert summed.item() == pytest.approx((each * weights[batch.targets]).sum().item(), rel=1e-6)
    equal, _ = class_loss_sum(model, batch, torch.ones(3))
    assert equal.item() == pytest.approx(class_loss_sum(model, batch)[0].item())


def test_a_class_that_is_never_predicted_scores_zero_and_counts_in_the_mean():
    scores = classification_scores(["a", "b", "c"], ["a", "b", "b"], LABELS)
    assert scores["precision_c"] == scores["recall_c"] == scores["f1_c"] == 0
    assert scores["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    # a class that is not even there: the scores keep their names
    assert classification_scores(["a", "b"], ["a", "b"], LABELS)["f1_c"] == 0


def test_perplexity_is_the_number_of_equal_choices():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(0) == 1


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    # 100 bytes, each one of 256 equally likely: 8 bits a byte, as single bytes or in pairs
    assert bits_per_byte(math.log(256), 100, 100) == pytest.approx(8)
    assert bits_per_byte(2 * math.log(256), 50, 100) == pytest.approx(8)


def test_the_losses_of_the_targets_make_up_the_mean(make_model):
    """A row has as many as it has targets that count, in their order."""
    model = make_model()
    rows = [lm_batch(2, 9, 4), lm_batch(1, 5, 5)]
    found = target_losses(model, rows)
    assert [len(each) for each in found] == [4, 4, 5]
    assert np.concatenate(found).mean() == pytest.approx(mean_loss(model, rows), abs=1e-5)
    with torch.no_grad():
        logits = model(rows[0].inputs)
    last = F.cross_entropy(logits[1, -1], rows[0].targets[1, -1]).item()
    assert found[1][-1] == pytest.approx(last, abs=1e-5)


def test_a_class_named_as_a_mean_is_told_from_it():
    labels = ["macro", "class macro", "macro_low", "accuracy"]
    scores = classification_scores(["macro", "accuracy"], ["macro", "macro_low"], labels)
    own = [scores[f"f1_{class_key(label)}"] for label in labels]
    assert scores["f1_macro"] == pytest.approx(sum(own) / 4)
    keys = [key.removeprefix("recall_") for key in scores if key.startswith("recall_")]
    assert [each for each in map(class_of, keys) if each is not None] == labels
    assert scores["recall_class macro"] == 1
    assert class_key("ham") == "ham"


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity():
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
