"""Decoding: greedy or sampled, for one prompt or many; each row ends independently.

While prompt and answer fit into the context, every position is computed once and kept in a
key-value cache. Beyond that, the model sees the last `context_length` tokens, which are recomputed
for each token because GPT-2's positions are absolute. This is the sliding window of the book's
`generate_text_simple`; the tokens are the same with and without the cache.

The model computes each token itself, unless an `Engine` is passed (`gpt.engine.decode` has one).
Their results differ by rounding, so they may choose differently between equally likely tokens;
each alone is exactly repeatable. Text that must be the same on every machine, with a compiler or
without, is generated without an engine.

Top-p (nucleus) sampling: Holtzman et al. (2020), "The Curious Case of Neural Text Degeneration".
Repetition penalty: Keskar et al. (2019), "CTRL", as `transformers` computes it.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.base.errors import NOT_FINITE, InputError, RunError, shown
from gpt.model.model import GPT, KVCache
from gpt.tokens.tokenizer import Tokenizer

Step = Callable[[Sequence[int], Sequence[int]], Tensor]
"""Takes row numbers and a token for each; returns the logits (B, V) after these tokens."""
NewStep = Callable[[KVCache, Sequence[int]], Step]
"""Makes a step for a cache and the number of padding positions on the left of each row, (B,)."""
Engine = Callable[[GPT, int], NewStep | None]
"""Takes a model and the number of rows; returns what computes their tokens, or None to use the
model."""

_LIKELY = (1024, 8192)  # numbers of tokens that nearly always reach top_p


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Raises:
        InputError: an impossible setting.
    """

    max_new_tokens: int
    """The most tokens to add."""
    min_new_tokens: int = 0
    """Until this many, no stop token can be chosen and no stop text ends a row."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens that occur in the row (prompt included) are divided by it if positive and
    multiplied by it if negative; 1 has no effect."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: Collection[int] = ()
    """Token ids that end a row."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end a row, for the functions that return text; they are not part of the result."""

    def __post_init__(self) -> None:
        seed, top_k, top_p = self.seed, self.top_k, self.top_p
        rules = (
            (
                self.max_new_tokens >= 0,
                f"max_new_tokens: {self.max_new_tokens} is negative; use 1 or more",
            ),
            (
                0 <= self.min_new_tokens <= max(0, self.max_new_tokens),
                f"min_new_tokens: {self.min_new_tokens} is not between 0 and max_new_tokens "
                f"({self.max_new_tokens})",
            ),
            (
                self.temperature >= 0,
                f"temperature: {self.temperature} is negative; 0 is greedy, 1 is the model's own",
            ),
            (
                seed is None or -(1 << 63) <= seed < 1 << 64,
                f"seed: {shown(seed)} is none; use 0 or more, below 2 ** 64",
            ),
            (
                top_k is None or top_k >= 1,
                f"top_k: {top_k} leaves no token to choose; use 1 or more",
            ),
            (
                top_p is None or 0 < top_p <= 1,
                f"top_p: {top_p} is no share; use a number above 0, at most 1",
            ),
            (
                self.repetition_penalty > 0,
                f"repetition_penalty: {self.repetition_penalty} is not positive; 1 is none, "
                "1.2 is common",
            ),
            (
                all(self.stop_texts),
                "stop: an empty text ends everything; give at least one character",
            ),
        )
        for holds, otherwise in rules:
            if not holds:
                raise InputError(otherwise)


class Token(NamedTuple):
    """A token that was chosen."""

    id: int
    log_prob: float | None
    """Its natural log-probability under the model's own distribution: before penalties,
    temperature and limits. None unless asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What was added to one prompt."""

    tokens: list[int]
    """Without the stop token that ended it."""
    log_probs: list[float]
    """The `Token.log_prob` of each of `tokens`; empty unless asked for."""
    stopped: bool
    """Whether it was ended by a stop token, not by the length limit."""


# --- token ids ------------------------------------------------------------------------------------


def complete(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    engine: Engine | None = None,
) -> list[list[int]]:
    """Only the new tokens of each prompt, without the stop token that ended it.

    Prompts may differ in length; otherwise as `stream`.
    """
    return [each.tokens for each in completions(model, prompts, sampling, engine=engine)]


def completions(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    log_probs: bool = False,
    engine: Engine | None = None,
) -> list[Completion]:
    """As `complete`, with the log-probability of each token if asked for, and how rows ended."""
    steps = list(stream(model, prompts, sampling, log_probs=log_probs, engine=engine))
    results = []
    for i in range(len(prompts)):
        row = [token for step in steps if (token := step[i]) is not None]
        kept = [token for token in row if token.id not in sampling.stop]  # only the last can be
        results.append(
            Completion(
                tokens=[token.id for token in kept],
                log_probs=[token.log_prob for token in kept if token.log_prob is not None],
                stopped=len(kept) < len(row),
            )
        )
    return results


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    log_probs: bool = False,
    engine: Engine | None = None,
    cached: bool = True,
) -> Iterator[list[Token | None]]:
    """Yield, step by step, the new token of every row; None for a row that has ended.

    Args:
        model: a language model; used in evaluation mode, left in the mode it was in.
        prompts: token ids of each row, at least one; rows may differ in length.
        sampling: the settings; its stop texts need text, and are refused here.
        log_probs: whether each token comes with its log-probability.
        engine: see `Engine`.
        cached: False recomputes every position at every step, to check the cache; no engine is
            used then.

    Raises:
        InputError: an empty prompt, or stop texts.
        RunError: the engine cannot serve this model, or logits are not finite.
    """
    if sampling.stop_texts:
        raise InputError("stop_texts: tokens have no text; use stream_text or complete_texts")
    return _steps(model, prompts, sampling, [False] * len(prompts), log_probs, engine, cached)


def _steps(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ended: list[bool],
    log_probs: bool = False,
    engine: Engine | None = None,
    cached: bool = True,
) -> Iterator[list[Token | None]]:
    """`stream`, for a caller that may end rows itself by setting `ended`."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise InputError("prompt: there is nothing to continue; give at least one token of text")
    generator = torch.Generator(model.device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    rows = [list(prompt) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        new_step = engine(model, len(rows)) if engine else None
        adjust = _Adjustment(sampling, rows, model)
        logits_after = _logits_after(model, rows, ended, sampling.max_new_tokens, new_step, cached)
        for n in range(sampling.max_new_tokens):
            if all(ended):
                return
            logits = next(logits_after)  # (B, V)
            highest = logits.amax(dim=1).tolist()
            if not all(o or math.isfinite(h) for h, o in zip(highest, ended, strict=True)):
                raise RunError(NOT_FINITE)
            chosen = choose(adjust(logits, n), sampling, generator)  # (B,)
            tokens = chosen.tolist()
            known = _log_probs(logits, chosen) if log_probs else [None] * len(rows)
            step = [
                None if over else Token(token, log_prob)
                for over, token, log_prob in zip(ended, tokens, known, strict=True)
            ]
            for i, token in enumerate(tokens):
                rows[i].append(token)
                ended[i] = ended[i] or token in sampling.stop
            yield step
    finally:
        model.train(was_training)


@torch.inference_mode()
def _logits_after(
    model: GPT,
    rows: list[list[int]],
    ended: list[bool],
    room: int,
    new_step: NewStep | None,
    cached: bool,
) -> Iterator[Tensor]:
    """Yield logits (B, V) after each row; the caller appends one token to every row between yields.

    Rows of different length are padded on the left, so that all end at the same position. The
    logits of a row that has ended are meaningless.
    """
    context = model.config.context_length
    device = model.device
    cache: KVCache | None = None
    step: Step | None = None
    while True:
        longest = max(len(row) for row in rows)
        if cache is not None and longest <= context:
            if step is not None:
                going = [i for i, over in enumerate(ended) if not over]
                yield step(going, [rows[i][-1] for i in going])
                continue
            idx = torch.tensor([[row[-1]] for row in rows], device=device)
        else:
            width = min(longest, context)
            windows = [row[-width:] for row in rows]
            idx = torch.tensor([[0] * (width - len(w)) + w for w in windows], device=device)
            missing = [width - len(w) for w in windows]
            padding = torch.tensor(missing, device=device) if any(missing) else None
            cache = step = None
            if cached and longest < context and room > 1:
                cache = model.new_cache(len(rows), min(context, longest + room))
                step = new_step(cache, missing) if new_step else None
        hidden = model.hidden(idx, cache=cache, padding=padding)  # (B, T, C)
        yield model.head(hidden[:, -1])


class _Adjustment:
    """Applies the settings to logits before a token is chosen."""

    def __init__(self, sampling: Sampling, rows: Sequence[Sequence[int]], model: GPT) -> None:
        self._sampling = sampling
        self._rows = rows
        self._stop = torch.tensor(sorted(sampling.stop), dtype=torch.int64, device=model.device)
        self._held: Tensor | None = None  # (B, V): the tokens that each row holds
        if sampling.repetition_penalty != 1:
            shape = (len(rows), model.config.vocab_size)
            self._held = torch.zeros(shape, dtype=torch.bool, device=model.device)
            for held, row in zip(self._held, rows, strict=True):
                held[list(row)] = True

    def __call__(self, logits: Tensor, n: int) -> Tensor:
        """Adjusted logits (B, V) after n new tokens; the given logits are not changed."""
        if self._held is not None:
            if n:
                newest = torch.tensor([[row[-1]] for row in self._rows], device=logits.device)
                self._held.scatter_(1, newest, True)
            penalty = self._sampling.repetition_penalty
            penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._held, penalized, logits)
        if n < self._sampling.min_new_tokens and len(self._stop):
            logits = logits.index_fill(1, self._stop, -torch.inf)
        return logits


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token (B,) from adjusted logits (B, V)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    order = None  # (B, n): the token ids of `logits`, once these are a subset
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, order = logits.topk(sampling.top_k)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        if order is None:
            probabilities, order = _likeliest(probabilities, sampling.top_p)
        # a token is kept while those before it have not reached top_p; the first always is
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    picked = _pick(probabilities, generator)  # (B, 1)
    return (picked if order is None else order.gather(1, picked))[:, 0]


def _likeliest(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in order, enough to reach the share: probabilities and ids (B, n)."""
    for n in _LIKELY:  # sorting all takes as long as computing them
        if n < probabilities.shape[-1]:
            top = probabilities.topk(n)
            if (top.values.sum(dim=-1) > share).all():
                return top.values, top.indices
    ordered = probabilities.sort(descending=True)
    return ordered.values, ordered.indices


def _pick(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One index (B, 1) per row, drawn in proportion to weights (B, n).

    Inverse transform sampling: one random number per row, while `torch.multinomial` draws n and
    takes as long as several layers.
    """
    wide = torch.float32 if weights.device.type == "mps" else torch.float64  # MPS has no float64
    sums = weights.cumsum(dim=-1, dtype=wide)
    point = torch.rand((len(sums), 1), dtype=wide, device=sums.device, generator=generator)
    # right: a point is strictly below the cumulative sum, so a weight of 0 is never picked
    picked = torch.searchsorted(sums, point * sums[:, -1:], right=True)
    return picked.clamp_(max=weights.shape[1] - 1)  # NaN weights give n


def _log_probs(logits: Tensor, chosen: Tensor) -> list[float]:
    known = logits.float().log_softmax(dim=-1).gather(1, chosen[:, None])  # (B, 1)
    return known[:, 0].tolist()


# --- text -----------------------------------------------------------------------------------------


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: Sampling,
    *,
    engine: Engine | None = None,
) -> Iterator[str]:
    """Yield the model's continuation of `prompt`, a text or token ids, piece by piece.

    It ends before the first stop text, at `<|endoftext|>` or another stop token, or at the length
    limit. A character that spans several tokens is yielded whole; one that the length limit cuts
    is left out.

    Raises:
        InputError: an empty prompt.
        RunError: the engine cannot serve this model, or logits are not finite.
    """
    text = _Text(tokenizer, sampling)
    sampling = replace(sampling, stop={*sampling.stop, tokenizer.eot})
    ended = [False]
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    for (token,) in _steps(model, [ids], sampling, ended, engine=engine):
        if token is None or token.id in sampling.stop:
            break
        if piece := text.add(token.id):
            yield piece
        if text.ended:
            return
    if rest := text.held:
        yield rest


def complete_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    engine: Engine | None = None,
) -> list[str]:
    """The model's continuation of each prompt; each ends independently, as in `stream_text`.

    An empty prompt stands for the beginning of a text.
    """
    texts = [_Text(tokenizer, sampling) for _ in prompts]
    written = ["" for _ in prompts]
    sampling = replace(sampling, stop={*sampling.stop, tokenizer.eot})
    ended = [False] * len(prompts)
    ids = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts]
    for step in _steps(model, ids, sampling, ended, engine=engine):
        for i, token in enumerate(step):
            if token is not None and token.id not in sampling.stop:
                written[i] += texts[i].add(token.id)
                ended[i] = ended[i] or texts[i].ended
    return [done + text.held for done, text in zip(written, texts, strict=True)]


class _Text:
    """Tokens of one row to text, up to the first stop text."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self._tokenizer = tokenizer
        self._stops = sampling.stop_texts
        self._unstoppable = sampling.min_new_tokens
        # a character may span many tokens; invalid bytes become U+FFFD
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.ended = False
        """Whether a stop text was found."""
        self.held = ""
        """A possible beginning of a stop text, held back until the next token or the end."""

    def add(self, token: int) -> str:
        """The text that this token makes final."""
        text = self.held + self._decoder.decode(self._tokenizer.decode_bytes([token]))
        self.held = ""
        self._unstoppable -= 1
        if self._unstoppable > 0:
            return text
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.ended = True
            return text[: min(ends)]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
