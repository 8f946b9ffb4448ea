"""Fine-tune a base model into a text classifier."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.data import ClassificationDataset, batches
from gpt.device import prepare
from gpt.errors import InputError
from gpt.events import Log, Message, discard
from gpt.files import write_json
from gpt.metrics import class_loss_sum, classify, mean_loss
from gpt.model import GPTClassifier
from gpt.text import Balance, Split, read_messages, split_messages
from gpt.train import TrainParams, fit
from gpt.weights import load_base, save_model


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class FinetuneClassifierParams:
    """Which base, which rows, what of the model is trained, and how."""

    base: Literal["pretrain", "gpt2"] = "gpt2"
    """The model to start from; its architecture and tokenizer are kept."""
    split: Split = Split(train=0.7, validation=0.1)
    balance: Balance = "undersample"
    trainable: Literal["all", "last_block", "head"] = "last_block"
    """`last_block` is the last block, the final norm and the head, as in the book."""
    max_length: Annotated[int, Field(gt=0)] | None = None
    """Tokens a text is cut to; None is the longest training text, the context at most."""
    train: TrainParams


def finetune_classifier(
    params: FinetuneClassifierParams,
    *,
    base: Path,
    messages: Path,
    out: Path,
    metrics: Path,
    history: Path,
    state: Path | None = None,
    log: Log = discard,
) -> dict[str, float]:
    """Train on the training part of the messages; the test part is never looked at.

    Args:
        params: what and how.
        base: the model directory of a language model.
        messages: a raw folder of labelled messages.
        out: the model directory to write; `training.json` in it says what was held out.
        metrics: the final figures, written as JSON: accuracies in 0..1, losses in nats.
        history: the curve, written as CSV, a row an evaluation.
        state: the folder of the loop's resume state.
        log: hears what goes on.

    Returns:
        The final figures.

    Raises:
        InputError: the messages cannot be used, or `max_length` is above the base's context.
        RunError: the loss is no longer finite.
    """
    train = params.train
    device = prepare(train.device, train.threads)
    trunk, tokenizer = load_base(base)
    config = trunk.config
    if params.max_length is not None and params.max_length > config.context_length:
        raise InputError(
            f"finetune_classifier.max_length: {params.max_length} tokens are more than the "
            f"context of {base} holds ({config.context_length}); use at most that"
        )
    frame = read_messages(messages)
    labels = sorted(frame["label"].unique())
    parts = split_messages(frame, params.split, params.balance)
    for name, part in parts.items():
        if part.empty:
            raise InputError(
                f"{messages}: the {name} part of {len(frame)} messages is empty; add messages or "
                "change finetune_classifier.split"
            )
    longest = max(len(ids) for ids in tokenizer.encode_batch(parts["train"]["text"].tolist()))
    max_length = params.max_length or min(longest, config.context_length)

    def dataset(part: pd.DataFrame) -> ClassificationDataset:
        return ClassificationDataset(
            tokenizer.encode_batch(part["text"].tolist()),
            [labels.index(label) for label in part["label"]],
            padding=tokenizer.eot,
            max_length=max_length,
        )

    data = {name: dataset(parts[name]) for name in ("train", "validation")}
    torch.manual_seed(train.seed)
    model = GPTClassifier(config, labels)
    model.load_state_dict(
        {name: value for name, value in trunk.state_dict().items() if name != "lm_head.weight"},
        strict=False,  # the head is new
    )
    del trunk
    model.to(device)
    freeze(model, params.trainable)
    log(
        Message(
            f"finetune_classifier: {len(data['train'])} training messages of up to {max_length} "
            f"tokens, {sum(p.numel() for p in model.parameters() if p.requires_grad):,} of "
            f"{model.n_params:,} parameters trained"
        )
    )

    def scores(part: str) -> dict[str, float]:
        rows = list(batches(data[part], train.batch_size))
        probabilities = classify(model, rows)  # (n, classes)
        actual = torch.cat([batch.targets for batch in rows])  # (n,)
        return {
            f"{part}_loss": mean_loss(model, rows, class_loss_sum),
            f"{part}_accuracy": (probabilities.argmax(1) == actual).float().mean().item(),
        }

    result = fit(
        model,
        params=train,
        train=data["train"],
        loss=class_loss_sum,
        validate=lambda: scores("validation"),
        task="finetune_classifier",
        state=state,
        log=log,
    )
    final = {
        **scores("train"),
        **scores("validation"),
        "max_length": float(max_length),
        "rows_train": float(len(parts["train"])),
        "rows_validation": float(len(parts["validation"])),
        "rows_test": float(len(parts["test"])),
        "steps": float(result.steps),
    }
    training = {
        "base": params.base,
        "split": asdict(params.split),
        "balance": params.balance,
        "max_length": max_length,
    }
    save_model(model, out, tokenizer=tokenizer, extra={"training.json": training})
    result.write_history(history)
    write_json(metrics, final)
    return final


def freeze(model: GPTClassifier, trainable: Literal["all", "last_block", "head"]) -> None:
    """Let only the named part of the model be trained."""
    model.requires_grad_(trainable == "all")
    model.score.requires_grad_(True)
    if trainable == "last_block":
        model.h[-1].requires_grad_(True)
        model.ln_f.requires_grad_(True)
