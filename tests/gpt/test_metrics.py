"""Every figure that a report shows, computed a second time by other means."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report
from torch.nn import functional as F

from gpt.data import IGNORED, Batch
from gpt.metrics import (
    bits_per_byte,
    class_loss_sum,
    classification_scores,
    classify,
    lm_loss_sum,
    mean_loss,
    perplexity,
    word_f1,
)
from gpt.model import GPTClassifier

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
    assert scores["f1_macro"] == pytest.approx(report["macro avg"]["f1-score"])
    assert len(scores) == 2 + 3 * 3


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


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "the cat, sat", 1.0),
        ("sat cat the", "the cat sat", 1.0),
        ("a a b", "a b b", 2 / 3),
        ("one two three four", "one", 2 / 5),
        ("nothing", "shared", 0.0),
        ("", "words", 0.0),
        ("...", "!", 0.0),
        ("It's 5.5", "it's 5.5!", 1.0),
    ],
)
def test_word_f1_counts_shared_words_once_each(answer, reference, expected):
    assert word_f1(answer, reference) == pytest.approx(expected)
    assert word_f1(reference, answer) == pytest.approx(expected)
