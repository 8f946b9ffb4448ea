"""Train a GPT from nothing on the token files."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError
from gpt.base.events import Log, discard
from gpt.base.files import write_json
from gpt.batches.data import Dataset, RandomWindowDataset, WindowDataset, batches, spread
from gpt.batches.metrics import bits_per_byte, lm_loss_sum, mean_loss, perplexity
from gpt.model.config import Architecture, GPTConfig, Positive
from gpt.model.device import autocast, prepare_device
from gpt.model.model import GPT
from gpt.model.weights import save_model
from gpt.tokens.token_files import Manifest, SplitName, open_tokens, read_manifest
from gpt.tokens.tokenizer import Tokenizer, load_tokenizer
from gpt.train.loop import fit
from gpt.train.recipe import TrainParams
from stages.samples import continuation

SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class PretrainParams:
    """What to train and how."""

    model: Architecture
    windows: Literal["sliding", "random"] = "sliding"
    """Where the training windows start: every `stride` tokens, each epoch in a new order; or
    anywhere, each drawn by itself, an epoch being as many tokens as the split has."""
    stride: Positive | None = None
    """Tokens from the start of one window to the next; None is the context: no overlap."""
    separate_documents: bool = False
    """A token sees no other document in its window, in training and in validation, and positions
    are counted from where the document begins there."""
    eval_windows: Positive | None = None
    """Validation windows that each evaluation during training looks at, spread evenly over the
    split; None is all of them. The final figures are always over all."""
    sample_prompt: Annotated[str, Field(min_length=1)] = "Every effort moves you"
    sample_tokens: Positive = 40
    train: TrainParams

    @model_validator(mode="after")
    def _possible(self) -> PretrainParams:
        if self.windows == "random" and self.stride is not None:
            raise ValueError(
                "stride: random windows start anywhere; leave it out, or set windows: sliding"
            )
        return self

    @property
    def recipe(self) -> TrainParams:
        """What the loop is told: to it the windows drawn for all epochs are one epoch."""
        train = self.train
        return replace(train, epochs=1) if self.windows == "random" and train.epochs else train


def open_windows(
    params: PretrainParams, tokens: Path, end: int | None
) -> dict[SplitName, WindowDataset]:
    """The windows of training and of validation.

    Args:
        params: which windows.
        tokens: the folder of tokens.
        end: the id of `<|endoftext|>` if documents are kept apart, else None.

    Raises:
        InputError: a split is shorter than one context.
    """
    context, train = params.model.context_length, params.train
    ids = {split: open_tokens(tokens, split) for split in SPLITS}
    windows = {split: WindowDataset(ids[split], context, context, end=end) for split in SPLITS}
    if params.windows == "random":
        every = (train.epochs or 0) * len(windows["train"])
        windows["train"] = RandomWindowDataset(
            ids["train"],
            context,
            length=train.steps * train.rows if train.steps else every,
            seed=train.seed,
            end=end,
        )
    elif params.stride is not None:
        windows["train"] = WindowDataset(ids["train"], context, params.stride, end=end)
    for split in SPLITS:
        if len(windows[split]) == 0:
            raise InputError(
                f"{tokens}: the {split} split has {len(ids[split])} tokens, fewer than one context "
                f"and its target ({context} + 1); add text, or lower pretrain.model.context_length"
            )
    return windows


def open_sources(params: PretrainParams, tokens: Path, end: int | None) -> dict[str, WindowDataset]:
    """The validation windows of each source, if there are several.

    The arguments are those of `open_windows`. A source with less than one window is left out.
    """
    context = params.model.context_length
    sources = read_manifest(tokens).splits["validation"].sources
    if len(sources) < 2:
        return {}
    windows = {
        source: WindowDataset(open_tokens(tokens, "validation", source), context, context, end=end)
        for source in sources
    }
    return {source: each for source, each in windows.items() if len(each)}


class Prepared(NamedTuple):
    """What the training begins with."""

    manifest: Manifest
    tokenizer: Tokenizer
    config: GPTConfig
    data: dict[SplitName, WindowDataset]
    some: Dataset
    """Of the validation windows those that an evaluation during training looks at."""
    sources: dict[str, WindowDataset]
    shown: list[list[int]]
    """The token ids that the samples go on from."""


def prepare(params: PretrainParams, *, tokens: Path) -> Prepared:
    """What the stage does before the model is made; of the token files only the sizes are read.

    Raises:
        InputError: a split is shorter than one context.
    """
    manifest, tokenizer = read_manifest(tokens), load_tokenizer(tokens)
    config = GPTConfig(**asdict(params.model), vocab_size=tokenizer.vocab_size)
    end = tokenizer.eot if params.separate_documents else None
    data = open_windows(params, tokens, end)
    some = spread(data["validation"], params.eval_windows or len(data["validation"]))
    sources = open_sources(params, tokens, end)
    shown = [tokenizer.encode(params.sample_prompt)]
    return Prepared(manifest, tokenizer, config, data, some, sources, shown)


def pretrain(
    params: PretrainParams,
    *,
    tokens: Path,
    out: Path,
    metrics: Path,
    history: Path,
    state: Path | None = None,
    log: Log = discard,
) -> dict[str, float]:
    """Train on the training tokens, keep what validates best.

    Args:
        params: what to train and how.
        tokens: the folder of token files that the stage `tokenize` wrote.
        out: the model directory to write.
        metrics: the final figures, written as JSON: losses in nats a token.
        history: the curve, written as CSV, a row an evaluation.
        state: the folder of the loop's resume state.
        log: hears what goes on.

    Returns:
        The final figures; with several sources also each one's `validation_loss/<source>`, where
        its validation part fills a window.

    Raises:
        InputError: a split is shorter than one context.
        RunError: the loss is no longer finite.
    """
    train = params.train
    device = prepare_device(train.device, train.threads)
    ready = prepare(params, tokens=tokens)
    tokenizer, training, [prompt] = ready.tokenizer, ready.data["train"], ready.shown

    def origin(row: int) -> str:
        start = training.start(row)
        return f"tokens {start:,} to {start + ready.config.context_length:,} of the training split"

    torch.manual_seed(train.seed)
    model = GPT(ready.config).to(device)

    result = fit(
        model,
        params=params.recipe,
        train=training,
        loss=lm_loss_sum,
        validate=lambda model: {
            "validation_loss": mean_loss(model, batches(ready.some, train.batch_size))
        },
        sample=lambda model: continuation(model, tokenizer, prompt, params.sample_tokens),
        origin=origin,
        task="pretrain",
        state=state,
        log=log,
    )
    with autocast(device, train.precision):
        loss, *losses = (
            mean_loss(model, batches(each, train.batch_size))
            for each in (ready.data["validation"], *ready.sources.values())
        )
    validation = ready.manifest.splits["validation"].total
    final = {
        "validation_loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, validation.tokens, validation.bytes),
        "train_loss": result.history[-1]["train_loss"],
        "parameters": float(model.n_params),
        "steps": float(result.steps),
        "tokens": result.history[-1]["tokens"],
    }
    final |= zip((f"validation_loss/{name}" for name in ready.sources), losses, strict=True)
    save_model(model, out, tokenizer=tokenizer)
    result.write_history(history)
    write_json(metrics, final)
    return final
