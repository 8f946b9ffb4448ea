"""Load published GPT-2 weights as a base model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError, first_few
from gpt.base.events import Log, Message, Text, discard
from gpt.base.files import write_json
from gpt.model.config import GPT2_SIZES, GPTConfig, Positive
from gpt.model.loss import linear_cross_entropy
from gpt.model.model import GPT
from gpt.model.weights import cut_vocabulary, load_tokenizer_of, save_model
from gpt.published.load import open_published
from stages.samples import continuation

HELD_OUT = """\
The ferry to the island leaves twice a day, at eight in the morning and again at half past four. \
Nobody who lives there is ever in a hurry to catch it. On the first Monday of every month the \
captain carries the post across in a blue canvas bag, and while the crates are being unloaded he \
drinks a cup of coffee with the woman who keeps the shop. They talk about the weather, the price \
of diesel and the new teacher, who came from the city last autumn and has already learned to mend \
a fishing net. In winter, when the wind blows from the north for days, the boat stays in the \
harbour and the island has to wait. People then bake their own bread, read old newspapers and \
visit each other in the evening. "You can get used to almost anything," the captain likes to say, \
"except to a house without windows towards the sea." Most of the children will move away when \
they are grown up. Some of them come back after a few years, with a degree, a family or a dog, \
and ask at the shop whether one of the empty houses is for sale.
"""
"""English that was written for this stage: no model was trained on it."""
_SEED = 123
_ROWS_AT_ONCE = 8
"""Positions whose logits are held at a time, 201 kB each for GPT-2's vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class LoadGPT2Params:
    """What is expected of the files, and the sample that shows that they work."""

    size: Literal["any", "124M", "355M", "774M", "1558M"] = "any"
    """Refuse files of another size; `any` takes what their configuration says."""
    sample_prompt: Annotated[str, Field(min_length=1)] = "Every effort moves you"
    sample_tokens: Positive = 40


def load_gpt2(
    params: LoadGPT2Params, *, weights: Path, out: Path, metrics: Path, log: Log = discard
) -> dict[str, float]:
    """Check published files tensor by tensor and write them as a model directory in fp32.

    What was loaded is proved on a text that no model has seen: a perplexity far below that of the
    same architecture with random weights, and a continuation that can be read.

    Args:
        params: what is expected.
        weights: a folder with the weights in one of the forms of `gpt.published.load`, and with
            GPT-2's vocabulary files.
        out: the model directory to write.
        metrics: the figures, written as JSON.
        log: hears what goes on, and a greedy continuation of `sample_prompt`.

    Returns:
        The figures: parameters, layers, width, context length, vocabulary size, and the
        perplexities on `HELD_OUT`.

    Raises:
        InputError: a file is missing or damaged, a tensor is missing, unknown, of another shape
            or not a finite number, or the model is of another size than `params.size`.
    """
    # no `prepare`: the process would keep what it frees, and here it is memory that counts
    published = open_published(weights)
    config = published.config
    _check_size(params, weights, config)
    tokenizer = load_tokenizer_of(weights, config)
    config = replace(config, vocab_size=tokenizer.vocab_size)  # without rows that pad it
    log(Message(f"load_gpt2: {config.n_layer} layers of width {config.n_embd}: {published.form}"))
    if published.skipped:
        skipped = first_few(published.skipped)
        log(Message(f"load_gpt2: skipped, as the model does not need it: {skipped}"))

    held_out = [tokenizer.eot, *tokenizer.encode(HELD_OUT)]
    # before the other is loaded: there is never more than one model in memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        at_random = _perplexity(GPT(config).eval(), held_out)
    model = published.load()
    cut_vocabulary(model, config.vocab_size)
    perplexity = _perplexity(model, held_out)
    if not math.isfinite(perplexity):
        raise InputError(
            f"{published.path}: the weights give no finite loss; fetch or make them again"
        )
    log(
        Message(
            f"load_gpt2: perplexity {perplexity:,.2f} on a held-out text; "
            f"{at_random:,.2f} with random weights"
        )
    )
    if perplexity >= at_random:
        log(
            Message(
                "load_gpt2: no better than random weights; the weights, their configuration and "
                "the vocabulary may not belong together",
                "warning",
            )
        )

    prompt = tokenizer.encode(params.sample_prompt)
    sample = continuation(model, tokenizer, prompt, params.sample_tokens)
    log(Text("samples/greedy.txt", sample))
    final = {
        "parameters": float(model.n_params),
        "n_layer": float(config.n_layer),
        "n_embd": float(config.n_embd),
        "context_length": float(config.context_length),
        "vocab_size": float(config.vocab_size),
        "perplexity": perplexity,
        "perplexity_random": at_random,
    }
    save_model(model, out, tokenizer=tokenizer)
    write_json(metrics, final)
    return final


def _check_size(params: LoadGPT2Params, weights: Path, config: GPTConfig) -> None:
    if params.size == "any":
        return
    wanted = GPT2_SIZES[params.size]
    if (config.n_layer, config.n_embd) != (wanted.n_layer, wanted.n_embd):
        raise InputError(
            f"{weights}: {config.n_layer} layers of width {config.n_embd}, but "
            f"load_gpt2.size is {params.size} ({wanted.n_layer} of {wanted.n_embd}); "
            "correct download.gpt2 or load_gpt2.size"
        )


@torch.no_grad()
def _perplexity(model: GPT, ids: Sequence[int]) -> float:
    """exp of the mean loss on `ids`, each window of the context by itself; NaN if that is not a
    number. Rounded, so that another machine's order of sums does not show.
    """
    total, length = 0.0, model.config.context_length
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor(ids[start : start + length + 1])  # (T + 1,)
        hidden = model.hidden(window[None, :-1])[0]  # (T, C)
        for rows, targets in zip(
            torch.split(hidden, _ROWS_AT_ONCE),
            torch.split(window[1:], _ROWS_AT_ONCE),
            strict=True,
        ):
            total += linear_cross_entropy(rows, model.head_weight, targets).item()
    loss = total / (len(ids) - 1)
    return round(math.exp(min(loss, 100.0)), 2) if math.isfinite(loss) else math.nan
