"""Train a GPT from nothing on the token files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.config import Architecture, GPTConfig
from gpt.data import WindowDataset, batches, open_tokens, read_manifest, spread
from gpt.device import autocast, prepare
from gpt.errors import InputError
from gpt.events import Log, discard
from gpt.files import write_json
from gpt.generate import Sampling, complete
from gpt.metrics import bits_per_byte, lm_loss_sum, mean_loss, perplexity
from gpt.model import GPT
from gpt.recipe import TrainParams
from gpt.tokenizer import load_tokenizer
from gpt.train import fit
from gpt.weights import save_model


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class PretrainParams:
    """What to train and how."""

    model: Architecture
    stride: Annotated[int, Field(gt=0)] | None = None
    """Tokens from the start of one window to the next; None is the context: no overlap."""
    eval_windows: Annotated[int, Field(gt=0)] | None = None
    """Validation windows that each evaluation during training looks at, spread evenly over the
    split; None is all of them. The final figures are always over all."""
    sample_prompt: Annotated[str, Field(min_length=1)] = "Every effort moves you"
    sample_tokens: Annotated[int, Field(gt=0)] = 40
    train: TrainParams


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
        The final figures.

    Raises:
        InputError: a split is shorter than one context.
        RunError: the loss is no longer finite.
    """
    train = params.train
    device = prepare(train.device, train.threads)
    manifest = read_manifest(tokens)
    tokenizer = load_tokenizer(tokens)
    context = params.model.context_length
    stride = params.stride or context
    splits = {}
    for split, step in (("train", stride), ("validation", context)):
        ids = open_tokens(tokens, split)  # type: ignore[arg-type]
        splits[split] = WindowDataset(ids, context, step)
        if len(splits[split]) == 0:
            raise InputError(
                f"{tokens}: the {split} split has {len(ids)} tokens, fewer than one context and "
                f"its target ({context} + 1); add text, or lower pretrain.model.context_length"
            )
    torch.manual_seed(train.seed)
    model = GPT(GPTConfig(**asdict(params.model), vocab_size=tokenizer.vocab_size)).to(device)
    windows = splits["validation"]
    some = windows if params.eval_windows is None else spread(windows, params.eval_windows)
    prompt = tokenizer.encode(params.sample_prompt)

    def sample(model: GPT) -> str:
        sampling = Sampling(max_new_tokens=params.sample_tokens, stop=(tokenizer.eot,))
        # the plain engine: the same text whether or not there is a compiler
        added = complete(model, [prompt], sampling, engine="plain")[0]
        return tokenizer.decode(prompt + added)

    result = fit(
        model,
        params=train,
        train=splits["train"],
        loss=lm_loss_sum,
        validate=lambda model: {
            "validation_loss": mean_loss(model, batches(some, train.batch_size))
        },
        sample=sample,
        origin=lambda row: (
            f"tokens {row * stride:,} to {row * stride + context:,} of the training split"
        ),
        task="pretrain",
        state=state,
        log=log,
    )
    with autocast(device, train.precision):
        loss = mean_loss(model, batches(windows, train.batch_size))
    validation = manifest.splits["validation"].total
    final = {
        "validation_loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, validation.tokens, validation.bytes),
        "train_loss": result.history[-1]["train_loss"],
        "parameters": float(model.n_params),
        "steps": float(result.steps),
        "tokens": result.history[-1]["tokens"],
    }
    save_model(model, out, tokenizer=tokenizer)
    result.write_history(history)
    write_json(metrics, final)
    return final
