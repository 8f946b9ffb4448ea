"""Decoding: greedy or sampled, one prompt or many, each row with its own end.

While prompt and answer fit into the context, every position is computed once and kept in a
key-value cache. Past it, the model sees the last `context_length` tokens, computed anew for each
token because GPT-2's positions are absolute: the same sliding window as the book's
`generate_text_simple`, and the same tokens with the cache and without.

Top-p (nucleus) sampling: Holtzman et al. (2020), "The Curious Case of Neural Text Degeneration".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from gpt.errors import InputError
from gpt.model import GPT


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Collection[int] | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue each row of `idx`.

    Args:
        model: a language model; used in evaluation mode, left in the mode it was in.
        idx: token ids (B, T) int64, T at least 1.
        max_new_tokens: the most tokens to add.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together reach this probability.
        stop: token ids that end a row; the one that did is kept.
        seed: makes sampling repeatable.

    Returns:
        (B, T + n) int64 with n <= max_new_tokens: fewer where every row has ended. A row that
        ended before the others is filled up with the token that ended it.

    Raises:
        InputError: an empty prompt or an impossible setting.
    """
    prompts = idx.tolist()
    added = [list[int]() for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, temperature, top_k, top_p, stop, seed):
        for row, token in zip(added, step, strict=True):
            row.append(row[-1] if token is None else token)
    return torch.cat(
        (idx, torch.tensor(added, dtype=idx.dtype, device=idx.device).view(len(added), -1)), 1
    )


def complete(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Collection[int] | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Only the new tokens of each prompt, without the one that ended it.

    The arguments are those of `generate`, but prompts may differ in length.
    """
    ends = _stop_tokens(stop)
    added = [list[int]() for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, temperature, top_k, top_p, stop, seed):
        for row, token in zip(added, step, strict=True):
            if token is not None and token not in ends:
                row.append(token)
    return added


@torch.inference_mode()
def _logits_after(model: GPT, rows: list[list[int]], cached: bool) -> Iterator[Tensor]:
    """Logits (B, V) after each row; the caller appends one token to every row between two.

    Rows of different length are padded on the left, so that all end together.
    """
    context = model.config.context_length
    device = model.device
    cache = None
    while True:
        longest = max(len(row) for row in rows)
        fits = longest <= context
        if cache is None or not fits:
            width = min(longest, context)
            windows = [row[-width:] for row in rows]
            idx = torch.tensor([[0] * (width - len(w)) + w for w in windows], device=device)
            missing = [width - len(w) for w in windows]
            padding = torch.tensor(missing, device=device) if any(missing) else None
            cache = None
            if cached and longest < context:
                cache = model.new_cache(len(rows))
        else:
            idx = torch.tensor([[row[-1]] for row in rows], device=device)
        hidden = model.hidden(idx, cache=cache, padding=padding)  # (B, T, C)
        yield model.head(hidden[:, -1])


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Collection[int] | None = None,
    seed: int | None = None,
    cached: bool = True,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the new token of every row; None for a row that has ended.

    The arguments are those of `generate`, but prompts may differ in length. `cached=False`
    computes every position at every step, as a check on the cache.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise InputError("prompt: there is nothing to continue; give at least one token of text")
    if temperature < 0:
        raise InputError(
            f"temperature: {temperature} is negative; 0 is greedy, 1 is the model's own"
        )
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k: {top_k} leaves no token to choose; use 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p: {top_p} is no share; use a number above 0, at most 1")
    ends = _stop_tokens(stop)
    generator = torch.Generator(model.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    rows = [list(prompt) for prompt in prompts]
    ended = [False] * len(rows)
    was_training = model.training
    model.eval()
    try:
        steps = _logits_after(model, rows, cached)
        for _ in range(max_new_tokens):
            if all(ended):
                return
            chosen = choose(next(steps), temperature, top_k, top_p, generator).tolist()
            yield [None if over else token for over, token in zip(ended, chosen, strict=True)]
            for i, token in enumerate(chosen):
                rows[i].append(token)
                ended[i] = ended[i] or token in ends
    finally:
        model.train(was_training)


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """The next token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        # a token stays while those before it have not reached top_p: the first always does
        before = probabilities.cumsum(dim=-1) - probabilities
        logits = logits.scatter(1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def _stop_tokens(stop: int | Collection[int] | None) -> frozenset[int]:
    if stop is None:
        return frozenset()
    return frozenset((stop,)) if isinstance(stop, int) else frozenset(stop)
