"""Classes by likelihood are those of the plain sum, whatever rows are put together how."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.base.errors import InputError
from gpt.scores.likelihood import (
    CONTENT_FREE,
    TEMPLATE,
    Example,
    classify_by_likelihood,
    draw_examples,
)
from gpt.text.records import hash_position
from gpt.tokens.tokenizer import byte_tokenizer, train_bpe

SAMPLES = Path(__file__).parents[3] / "samples"
BYTES = byte_tokenizer()
SHORT = "T: {text}\nL: {label}\n"
"""A template with room in a small context of bytes."""
TEXTS = ["win", "see you", "", "call now", "prize 1", "ok x", "a", "Ü"]
LABELS = ["ham", "spam", "a"]
SHOTS = [Example("hi", "ham"), Example("buy", "spam"), Example("b", "a")]


@pytest.fixture
def model(make_model):
    return make_model(context_length=128)


def classify(model, texts=TEXTS, labels=LABELS, *, tokenizer=BYTES, template=SHORT, **options):
    return classify_by_likelihood(model, tokenizer, texts, labels, template=template, **options)


def naive(model, text, labels, examples=(), by_token=False, tokenizer=BYTES):
    """log p(label | prompt) normalized over the labels: a row each, whole logits, in double.

    The prompt is that of `SHORT`, with a space before text and label encoded with them.
    """
    encode = tokenizer.encode

    def prompt(text):
        return [*encode("T:"), *encode(f" {text}"), *encode("\nL:")]

    ids = [tokenizer.eot]
    for example in examples:
        ids += [*prompt(example.text), *encode(f" {example.label}"), *encode("\n")]
    ids += prompt(text)
    sums = []
    for label in labels:
        answer = encode(f" {label}")
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer[:-1]]))[0].double().log_softmax(-1)
        each = [logits[len(ids) + i - 1, token] for i, token in enumerate(answer)]
        sums.append(sum(each) / (len(answer) if by_token else 1))
    return torch.stack(sums).log_softmax(0).numpy()


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("examples", [(), SHOTS])
def test_every_text_gets_what_it_gets_alone_from_whole_logits(model, examples, by_token):
    found = classify(model, examples=examples, by_token=by_token, batch_size=3)
    expected = [naive(model, text, LABELS, examples, by_token) for text in TEXTS]
    assert found.log_probs.shape == (len(TEXTS), len(LABELS))
    assert np.abs(found.log_probs - expected).max() < 1e-4
    assert np.allclose(np.exp(found.log_probs).sum(1), 1)
    assert not found.dropped.any()
    assert not found.cut.any()


def test_labels_of_one_token_and_of_several_stand_side_by_side(make_model):
    tokenizer = train_bpe(["spam and ham and spam and eggs, ham"] * 4, 290)
    labels = ["spam", "ham", "spam and eggs", "zzz"]
    lengths = [len(tokenizer.encode(f" {label}")) for label in labels]
    assert lengths[0] == 1
    assert len(set(lengths)) > 2
    model = make_model(vocab_size=tokenizer.vocab_size)
    for examples in ((), [Example("eggs", "ham")]):
        found = classify(model, ["eggs", "and ham"], labels, tokenizer=tokenizer, examples=examples)
        for row, text in zip(found.log_probs, ["eggs", "and ham"], strict=True):
            expected = naive(model, text, labels, examples, tokenizer=tokenizer)
            assert np.abs(row - expected).max() < 1e-4


@pytest.mark.parametrize("examples", [(), SHOTS])
def test_neither_the_batch_size_nor_the_other_texts_change_a_result(model, examples):
    whole = classify(model, examples=examples, batch_size=len(TEXTS)).log_probs
    for size in (1, 2, 5):
        part = classify(model, examples=examples, batch_size=size).log_probs
        assert np.abs(part - whole).max() < 1e-5
    backwards = classify(model, TEXTS[::-1], examples=examples).log_probs
    assert np.abs(backwards[::-1] - whole).max() < 1e-5


def test_a_text_far_longer_than_the_others_pushes_their_examples_over_the_edge(model):
    """Shorter by more than the whole opening, the rows read it anew instead of copying it."""
    texts = ["x" * 90, "y", ""]
    found = classify(model, texts)
    expected = [naive(model, text, LABELS) for text in texts]
    assert np.abs(found.log_probs - expected).max() < 1e-4


def test_the_same_input_gives_the_same_bytes(model):
    once, again = (classify(model, examples=SHOTS, calibrate=True).log_probs for _ in range(2))
    assert once.tobytes() == again.tobytes()


def test_a_template_may_be_nothing_but_text_and_label(model):
    found = classify(model, ["", "ab"], ["c", "de"], template="{text}{label}").log_probs
    for row, prompt in zip(found, ([], [97, 98]), strict=True):
        sums = []
        for answer in ([99], [100, 101]):
            ids = [BYTES.eot, *prompt]
            logits = model(torch.tensor([ids + answer[:-1]]))[0].double().log_softmax(-1)
            sums.append(sum(logits[len(ids) + i - 1, token] for i, token in enumerate(answer)))
        expected = torch.stack(sums).log_softmax(0).detach().numpy()
        assert np.abs(row - expected).max() < 1e-4


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("examples", [(), SHOTS])
def test_calibrated_the_text_without_content_gets_all_labels_alike(model, examples, by_token):
    options = {"examples": examples, "by_token": by_token}
    texts = [*TEXTS, CONTENT_FREE]
    plain = classify(model, texts, **options).log_probs
    found = classify(model, texts, calibrate=True, **options).log_probs
    assert np.allclose(found[-1], -np.log(len(LABELS)), atol=1e-5)
    assert np.ptp(plain[-1]) > 0.1
    # every other text's probabilities are divided by those, and sum to 1 again
    ratio = np.exp(plain - plain[-1])
    assert np.allclose(np.exp(found), ratio / ratio.sum(1, keepdims=True), atol=1e-5)


# --- room -----------------------------------------------------------------------------------------


def test_examples_without_room_are_dropped_from_the_front_text_by_text(model):
    # 128 positions; <|endoftext|>, the template's 6 bytes and all but the last of " spam" are 11;
    # an example is "T: hi\nL: ham\n", of 13, "T: buy\nL: spam\n", of 15, or "T: b\nL: a\n", of 10
    texts = ["x" * n for n in (79, 80, 92, 93, 107, 108, 117)]
    found = classify(model, texts, examples=SHOTS)
    assert found.dropped.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert not found.cut.any()
    for row, text, dropped in zip(found.log_probs, texts, found.dropped, strict=True):
        expected = naive(model, text, LABELS, SHOTS[dropped:])
        assert np.abs(row - expected).max() < 1e-4


def test_calibration_has_the_examples_before_it_that_the_text_has(model):
    texts = ["y", "x" * 100]
    found = classify(model, texts, examples=SHOTS, calibrate=True)
    assert found.dropped.tolist() == [0, 2]
    for row, text, dropped in zip(found.log_probs, texts, found.dropped, strict=True):
        own = naive(model, text, LABELS, SHOTS[dropped:])
        free = naive(model, CONTENT_FREE, LABELS, SHOTS[dropped:])
        expected = torch.tensor(own - free).log_softmax(0).numpy()
        assert np.abs(row - expected).max() < 1e-4


def test_a_text_is_cut_at_its_end_so_that_every_label_is_read_whole(model):
    longest = "x" * 100 + "y" * 17  # all there is room for
    found = classify(model, [longest, longest + "z", longest + "z" * 500], examples=SHOTS)
    assert found.cut.tolist() == [0, 1, 500]
    assert found.dropped.tolist() == [3, 3, 3]
    expected = naive(model, longest, LABELS)
    assert np.abs(found.log_probs - expected).max() < 1e-4


def test_without_room_for_a_text_the_template_is_refused(make_model):
    with pytest.raises(InputError, match="leave no room for a text in a context of 48 tokens"):
        classify(make_model(), template="word " * 10 + "{text} {label}")
    with pytest.raises(InputError, match="leave no room"):
        classify(make_model(), labels=["a", "b" * 50])


@pytest.mark.parametrize(
    "template",
    ["{text}", "{label}", "{label} {text}", "{text} {text} {label}", "{text}{label}{label}"],
)
def test_a_template_without_its_two_places_is_refused(model, template):
    with pytest.raises(InputError, match=r"does not hold \{text\} once and then \{label\} once"):
        classify(model, template=template)


@pytest.mark.parametrize("labels", [[], ["ham"], ["ham", "ham"], ["ham", " "]])
def test_labels_that_are_no_choice_are_refused(model, labels):
    with pytest.raises(InputError, match="two or more different classes"):
        classify(model, labels=labels)


def test_an_example_of_another_class_is_refused(model):
    with pytest.raises(InputError, match="'eggs' is none of ham, spam, a"):
        classify(model, examples=[Example("b", "eggs")])


def test_no_texts_have_no_probabilities(model):
    assert classify(model, []).log_probs.shape == (0, 3)


# --- examples -------------------------------------------------------------------------------------

ROWS = [Example(f"text {i}", "spam" if i % 5 == 0 else "ham") for i in range(60)]


def test_examples_are_as_many_of_each_class_from_the_rows_that_were_given():
    found = draw_examples(ROWS, ["ham", "spam"], 4, seed=1)
    assert set(found) <= set(ROWS)
    assert len(set(found)) == 8
    assert sorted(label for _, label in found) == ["ham"] * 4 + ["spam"] * 4
    assert draw_examples(ROWS, ["ham", "spam"], 0, seed=1) == []
    assert [each.label for each in draw_examples(ROWS, ["spam"], 2, seed=1)] == ["spam"] * 2


def test_examples_depend_on_the_seed_and_not_on_the_order_of_the_rows():
    found = draw_examples(ROWS, ["ham", "spam"], 4, seed=1)
    assert draw_examples(ROWS[::-1], ["spam", "ham"], 4, seed=1) == found
    assert draw_examples(ROWS, ["ham", "spam"], 4, seed=2) != found


def test_the_classes_of_the_examples_come_mixed():
    orders = {
        tuple(label for _, label in draw_examples(ROWS, ["ham", "spam"], 2, seed=seed))
        for seed in range(20)
    }
    assert len(orders) > 3  # there are six
    found = draw_examples(ROWS, ["ham", "spam"], 4, seed=1)
    assert found == sorted(found, key=lambda each: hash_position(each.text, 1, "examples"))


def test_one_text_is_drawn_once_however_often_it_is_there():
    with pytest.raises(InputError, match=r"'spam' has 1 texts to draw from"):
        draw_examples([Example("a", "spam")] * 3 + ROWS[1:3], ["ham", "spam"], 2, seed=0)


# --- real data ------------------------------------------------------------------------------------


def test_a_real_model_and_its_tokenizer_give_what_they_give_text_by_text():
    from gpt.model.weights import load_base

    model, tokenizer = load_base(SAMPLES / "gpt2-nano")
    lines = (SAMPLES / "messages.tsv").read_text("utf-8").splitlines()
    rows = [Example(text, label) for label, text in (line.split("\t") for line in lines)]
    shots = draw_examples(rows[100:], ["ham", "spam"], 2, seed=123)
    texts = [text for text, _ in rows[:24]]
    found = classify_by_likelihood(model, tokenizer, texts, ["ham", "spam"], examples=shots)
    before = [tokenizer.eot]
    head, tail, after = (tokenizer.encode(piece) for piece in ("Message:", "\nLabel:", "\n\n"))
    for text, label in shots:
        before += [*head, *tokenizer.encode(f" {text}"), *tail, *tokenizer.encode(f" {label}")]
        before += after
    assert TEMPLATE == "Message: {text}\nLabel: {label}\n\n"
    assert not found.dropped.any()
    for row, text in zip(found.log_probs, texts, strict=True):
        prompt = [*before, *head, *tokenizer.encode(f" {text}"), *tail]
        sums = []
        for label in ("ham", "spam"):
            answer = tokenizer.encode(f" {label}")
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer[:-1]]))[0].double().log_softmax(-1)
            sums.append(sum(logits[len(prompt) + i - 1, each] for i, each in enumerate(answer)))
        assert np.abs(row - torch.stack(sums).log_softmax(0).numpy()).max() < 1e-4
