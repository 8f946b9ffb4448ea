"""A model in use, as the package's public functions: tokens generated, texts classified and scored.

These hand the compiled engine over, which no training depends on: `gpt.generation` does not know
of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpt.base.errors import NOT_FINITE, InputError, RunError
from gpt.batches import metrics
from gpt.batches.data import IGNORED, Batch, ClassificationDataset, batches
from gpt.engine.decode import ENGINES, EngineName
from gpt.generation import Sampling, stream
from gpt.model.model import GPT, GPTClassifier
from gpt.tokens.tokenizer import Tokenizer


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Collection[int] | None = None,
    seed: int | None = None,
    *,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    engine: EngineName = "auto",
) -> Tensor:
    """Continue each row of `idx`.

    >>> model, tokenizer = gpt.load_model(directory), gpt.load_tokenizer(directory)
    >>> prompt = tokenizer.encode("Once upon a time")
    >>> ids = gpt.generate(model, torch.tensor([prompt]), 20, stop=tokenizer.eot)
    >>> text = tokenizer.decode(ids[0].tolist())
    >>> text.startswith("Once upon a time"), len(prompt) < ids.shape[1] <= len(prompt) + 20
    (True, True)

    Args:
        model: a language model; used in evaluation mode, left in the mode it was in.
        idx: token ids (B, T) int64, T at least 1.
        max_new_tokens: as the other settings, a field of `gpt.generation.Sampling`.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together reach this probability.
        stop: token ids that end a row; the one that did is kept.
        seed: makes sampling repeatable.
        repetition_penalty: above 1 makes tokens that a row holds less likely.
        min_new_tokens: before so many, no stop token can be chosen.
        engine: `plain` is PyTorch, `compiled` several times as fast on a CPU; `auto` compiles in
            the background and is plain until that is done.

    Returns:
        (B, T + n) int64 with n <= max_new_tokens: fewer where every row has ended. A row that
        ended before the others is filled up with the token that ended it.

    Raises:
        InputError: an empty prompt or an impossible setting.
        RunError: the compiled engine is asked for and cannot be had, or logits are not finite.
    """
    if engine not in ENGINES:
        raise InputError(f"engine: {engine!r} is not known; use one of {', '.join(ENGINES)}")
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=() if stop is None else (stop,) if isinstance(stop, int) else stop,
    )
    prompts = idx.tolist()
    added = [list[int]() for _ in prompts]
    for step in stream(model, prompts, sampling, engine=ENGINES[engine]):
        for row, token in zip(added, step, strict=True):
            row.append(row[-1] if token is None else token.id)
    return torch.cat(
        (idx, torch.tensor(added, dtype=idx.dtype, device=idx.device).view(len(added), -1)), 1
    )


def classify(
    model: GPTClassifier,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    max_length: int | None = None,
    batch_size: int = 16,
) -> Tensor:
    """The probability of each class for each text.

    >>> tokenizer = gpt.load_tokenizer(directory)
    >>> config = gpt.GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8)
    >>> model = gpt.GPTClassifier(config, ["ham", "spam"]).eval()  # untrained
    >>> probabilities = gpt.classify(model, tokenizer, ["Lunch?", "You won a prize!"])
    >>> probabilities.shape
    torch.Size([2, 2])
    >>> labels = [model.labels[i] for i in probabilities.argmax(1).tolist()]

    Args:
        model: a classifier in evaluation mode, as `load_model` gives it, on any device.
        tokenizer: the model's.
        texts: n of them; of an empty one only `<|endoftext|>` is read.
        max_length: texts are cut to so many tokens: `max_length` in the `training.json` beside the
            model says at how many its training did. None is what the context holds.
        batch_size: texts at once.

    Returns:
        (n, classes) fp32 on the CPU, the classes in the order of `model.labels`.

    Raises:
        InputError: `texts` is a single text.
        RunError: the model's logits are not finite.
    """
    encoded = tokenizer.encode_batch(_many(texts))
    data = ClassificationDataset(
        encoded,
        [0] * len(encoded),  # unknown, and not looked at
        padding=tokenizer.eot,
        max_length=min(max_length or model.config.context_length, model.config.context_length),
    )
    if not encoded:
        return torch.empty(0, len(model.labels))
    return metrics.classify(model, batches(data, batch_size))


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a language model finds a text.

    >>> round(gpt.Score(log_likelihood=-4.0, tokens=2).perplexity, 2)
    7.39
    """

    log_likelihood: float
    """The natural log-probability of all its tokens, from `<|endoftext|>` on."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """As uncertain of each token as of a choice among so many; 1 for a text without any."""
        return metrics.perplexity(-self.log_likelihood / max(1, self.tokens))


def score(
    model: GPT, tokenizer: Tokenizer, texts: Iterable[str], *, batch_size: int = 16
) -> list[Score]:
    """How likely a language model finds each text.

    A text longer than the context is read in windows, each token predicted once.

    >>> model, tokenizer = gpt.load_model(directory), gpt.load_tokenizer(directory)
    >>> known, strange = gpt.score(model, tokenizer, ["Once upon a time", "Qx zvy 9#w"])
    >>> known.perplexity < strange.perplexity
    True

    Args:
        model: a language model in evaluation mode, as `load_model` gives it, on any device.
        tokenizer: the model's.
        texts: any number.
        batch_size: windows at once.

    Raises:
        InputError: `texts` is a single text.
        RunError: the model's logits are not finite.
    """
    encoded = tokenizer.encode_batch(_many(texts))
    windows = [
        (owner, *window)
        for owner, ids in enumerate(encoded)
        for window in _windows([tokenizer.eot, *ids], model.config.context_length)
    ]
    totals = [0.0] * len(encoded)
    for start in range(0, len(windows), batch_size):
        owners, inputs, targets = zip(*windows[start : start + batch_size], strict=True)
        batch = Batch(
            pad_sequence([*inputs], batch_first=True, padding_value=tokenizer.eot),
            pad_sequence([*targets], batch_first=True, padding_value=IGNORED),
        )
        for owner, losses in zip(owners, metrics.target_losses(model, [batch]), strict=True):
            totals[owner] -= losses.sum(dtype=float)
    if not all(map(math.isfinite, totals)):
        raise RunError(NOT_FINITE)
    return [Score(total, len(ids)) for total, ids in zip(totals, encoded, strict=True)]


def _windows(ids: Sequence[int], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (at most `length`,) each, that predict every id but the first once.

    The last window begins as far back as the context reaches; what is predicted already is no
    target there.
    """
    n = len(ids) - 1
    for start in range(0, n, length):
        end = min(start + length, n)
        first = max(0, end - length)
        known = [IGNORED] * (start - first)
        yield torch.tensor(ids[first:end]), torch.tensor([*known, *ids[start + 1 : end + 1]])


def _many(texts: Iterable[str]) -> list[str]:
    """The texts; a single one would be taken for as many texts as it has characters."""
    if isinstance(texts, str):
        raise InputError("texts: a single text; put it into a list")
    return list(texts)
