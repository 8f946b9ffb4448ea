"""Zero-shot and few-shot classification by a language model that was not trained to classify.

A text is put into a template, and each class's label is scored as its continuation; the most
likely one is the answer (Brown et al., 2020, "Language Models are Few-Shot Learners", 2.4).
Labelled examples may precede the text. The model's bias towards some labels can be removed (Zhao
et al., 2021, "Calibrate Before Use: Improving Few-Shot Performance of Language Models").

Every row is laid out as

    <|endoftext|> examples, what the template has before the text | text, what is before the label

Left of the bar is the opening, which is the same for all texts with the same number of examples.
The model reads it once, and its keys and values are copied to each row. For each label, only its
tokens but the last are computed, on top of the row's keys and values.

Shapes: B rows, P positions of an opening, C channels, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt.base.errors import InputError
from gpt.model.model import GPT, KVCache
from gpt.text.records import hash_position
from gpt.tokens.tokenizer import Tokenizer

TEMPLATE = "Message: {text}\nLabel: {label}\n\n"
"""The default template: the text, the label, and the separator of two examples."""
CONTENT_FREE = "N/A"
"""A text without information about its class (Zhao et al., 2021, 3)."""

Ids = Sequence[int]


class NoRoomError(InputError):
    """The template and the longest label fill the whole context."""


class Example(NamedTuple):
    """A text whose class is known."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """A language model's label probabilities for n texts.

    Attributes:
        log_probs: of each label, (n, labels) float64, in nats; the probabilities of a text sum
            to 1.
        dropped: the number of examples that were left out before each text, (n,) int64.
        cut: the number of tokens cut from the end of each text, (n,) int64.
    """

    log_probs: np.ndarray
    dropped: np.ndarray
    cut: np.ndarray


def draw_examples(
    rows: Iterable[Example], labels: Sequence[str], per_class: int, seed: int
) -> list[Example]:
    """As many examples of each class, chosen and put in order by the hashes of their texts.

    So the classes are mixed, and the choice does not depend on the order of the rows.

    Args:
        rows: the training part. Duplicates count once; rows with other labels are ignored.
        labels: the classes.
        per_class: the number of examples of each class; 0 draws none.
        seed: changes the choice.

    Raises:
        InputError: a class has too few texts.
    """
    placed = sorted((hash_position(row.text, seed, "examples"), row) for row in set(rows))
    chosen = []
    for label in labels:
        own = [each for each in placed if each[1].label == label][:per_class]
        if len(own) < per_class:
            raise InputError(
                f"{per_class} examples of each class are wanted, but the class {label!r} has "
                f"{len(own)} texts to draw from; use fewer examples or add texts"
            )
        chosen += own
    return [row for _, row in sorted(chosen)]


@torch.no_grad()
def classify_by_likelihood(
    model: GPT,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    template: str = TEMPLATE,
    examples: Sequence[Example] = (),
    by_token: bool = False,
    calibrate: bool = False,
    batch_size: int = 16,
) -> Likelihoods:
    """The likelihood of each label after each text.

    If a text does not fit into the context with all examples, the first examples are left out. If
    it does not fit even without examples, its end is cut. Labels are never cut.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: the model's.
        texts: to be classified, n of them.
        labels: the classes, in the words that the model reads.
        template: contains `{text}` and after it `{label}`. A space before either is encoded
            together with the inserted text, as in GPT-2's vocabulary. The part after the label
            ends an example.
        examples: texts with their labels, in the order in which the model reads them.
        by_token: use the mean over a label's tokens instead of the sum, so that long labels have
            no disadvantage.
        calibrate: divide each label's probability by its probability after `CONTENT_FREE`, with
            the same examples.
        batch_size: texts per batch; batches are made by length.

    Raises:
        InputError: the labels or the template cannot be used, or an example has another label.
        NoRoomError: the context has no room for the template and the labels.
    """
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(map(str.strip, labels)):
        raise InputError(
            f"labels: {', '.join(map(repr, labels)) or 'none'}; name two or more different classes"
        )
    prompt = _Prompt(tokenizer, template)
    answers = [prompt.label(label) for label in labels]
    shots = [prompt.example(each, labels) for each in examples]
    context = model.config.context_length
    # a label's last token is predicted, not read
    room = context - len(prompt.tail) - (max(map(len, answers)) - 1)
    # the tokens of the examples left when the first k are dropped; 0 for all of them
    costs = np.cumsum([0, *map(len, reversed(shots))])[::-1]
    rooms = room - 1 - len(prompt.head) - costs  # for the text, by the number dropped
    if rooms[-1] < 1:
        raise NoRoomError(
            f"template: its words and the longest label leave no room for a text in a context of "
            f"{context} tokens; shorten them or use a model with a longer context"
        )
    queries = prompt.texts(texts)
    (free,) = prompt.texts([CONTENT_FREE])
    lengths = np.array([len(ids) for ids in queries], np.int64)
    dropped = np.minimum(np.searchsorted(rooms, lengths), len(shots))
    log_probs = np.empty((len(texts), len(labels)))
    for number in np.unique(dropped).tolist():
        places = np.flatnonzero(dropped == number)
        chosen = [queries[place] for place in places] + ([free] if calibrate else [])
        rows = [[*ids[: rooms[number]], *prompt.tail] for ids in chosen]
        opening = [tokenizer.eot, *(i for shot in shots[number:] for i in shot), *prompt.head]
        found = _log_likelihoods(model, opening, rows, answers, by_token, batch_size)
        found = found.log_softmax(1)  # (rows, labels)
        if calibrate:
            found = (found[:-1] - found[-1]).log_softmax(1)
        log_probs[places] = found.numpy()
    return Likelihoods(log_probs, dropped, np.maximum(lengths - rooms[dropped], 0))


class _Prompt:
    """The pieces of a template in token ids, each encoded by itself."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        before, text, rest = template.partition("{text}")
        between, label, after = rest.partition("{label}")
        if not text or not label or "{text}" in rest or "{label}" in before + after:
            raise InputError(
                f"template: {template!r} does not hold {{text}} once and then {{label}} once; "
                f"correct it, as in {TEMPLATE!r}"
            )
        self._tokenizer = tokenizer
        head, tail = before.rstrip(" "), between.rstrip(" ")
        self._before_text, self._before_label = before[len(head) :], between[len(tail) :]
        self.head = tokenizer.encode(head)
        self.tail = tokenizer.encode(tail)
        self._after = tokenizer.encode(after)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode_batch([self._before_text + text for text in texts])

    def label(self, label: str) -> list[int]:
        return self._tokenizer.encode(self._before_label + label)

    def example(self, example: Example, labels: Sequence[str]) -> list[int]:
        if example.label not in labels:
            raise InputError(
                f"examples: the class {example.label!r} is none of {', '.join(labels)}; "
                "draw them from texts of these classes"
            )
        (text,) = self.texts([example.text])
        return [*self.head, *text, *self.tail, *self.label(example.label), *self._after]


def _log_likelihoods(
    model: GPT,
    opening: Ids,
    rows: Sequence[Ids],
    answers: Sequence[Ids],
    by_token: bool,
    batch_size: int,
) -> Tensor:
    """log p(answer | opening, row) of every answer, (rows, answers) float64 on the CPU, in nats."""
    # its last token is read again with each row, so that no row is empty
    *shared, last = opening
    read = model.new_cache(1, len(shared))
    if shared:
        model.hidden(torch.tensor([shared], device=model.device), cache=read)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # the longest first
    result = torch.empty(len(rows), len(answers), dtype=torch.float64)
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        batch = [[last, *rows[place]] for place in places]
        result[places] = _of_batch(model, shared, read, batch, answers, by_token).double().cpu()
    return result


def _of_batch(
    model: GPT,
    shared: Ids,
    read: KVCache,
    rows: Sequence[Ids],
    answers: Sequence[Ids],
    by_token: bool,
) -> Tensor:
    """The same for some rows, the longest first: (B, answers) in fp32.

    All rows end at the same position, so shorter ones begin further to the right. The opening's
    keys and values are shifted by the same amount in the row's copy. The opening's last positions,
    which are shifted out of the copy, are computed again.
    """
    B, P, T = len(rows), len(shared), len(rows[0])
    padding = [T - len(row) for row in rows]
    cache = model.new_cache(B, P + T + max(map(len, answers)) - 1)
    for row, left in enumerate(padding):
        # what `roll` wraps to the left is masked, but must be finite
        cache.keys[:, row, :, :P] = read.keys[:, 0, :, :P].roll(left, 2)
        cache.values[:, row, :, :P] = read.values[:, 0, :, :P].roll(left, 2)
    cache.used = P
    filled = [[*[0] * T, *shared, *row][-T:] for row in rows]
    idx = torch.tensor(filled, device=model.device)  # (B, T)
    unseen = torch.tensor(padding, device=model.device)  # (B,)
    hidden = model.hidden(idx, cache=cache, padding=unseen)[:, -1]  # (B, C)
    first = model.head(hidden).float().log_softmax(-1)  # (B, V)
    end = cache.used
    found = []
    for answer in answers:
        total = first[:, answer[0]]  # (B,)
        if len(answer) > 1:
            cache.used = end  # after the row, not after the previous answer
            ids = torch.tensor(answer, device=model.device)  # (n,)
            hidden = model.hidden(ids[:-1].expand(B, -1), cache=cache, padding=unseen)
            later = model.head(hidden).float().log_softmax(-1)  # (B, n - 1, V)
            total = total + later[:, range(len(answer) - 1), ids[1:]].sum(1)
        found.append(total / len(answer) if by_token else total)
    return torch.stack(found, 1)
