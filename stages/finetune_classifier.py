"""Fine-tune a base model into a text classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from gpt.base.errors import InputError
from gpt.base.events import Log, Message, Progress, discard
from gpt.base.files import write_json
from gpt.batches.data import ClassificationDataset, Dataset, FeatureDataset, batches, take
from gpt.batches.metrics import class_logits, class_loss_sum, class_weights
from gpt.model.config import GPTConfig, Positive
from gpt.model.device import autocast, prepare_device
from gpt.model.model import ClassifierTop, GPTClassifier, Pooling
from gpt.model.weights import load_base, read_base, save_model
from gpt.text.records import Balance, Split, missing_classes, undersampled, usable_parts
from gpt.tokens.tokenizer import Tokenizer
from gpt.train.loop import fit
from gpt.train.recipe import TrainParams
from gpt.tune.lora import LoraParams, merge, wrap
from gpt.tune.overlap import count_contaminated

Trainable = Literal["all", "last_block", "last_blocks", "head", "lora"]

_KEPT_BYTES = 2 << 30
"""What a frozen trunk makes of the texts is kept up to this size, else made anew at each step."""
_TOKENS_AT_ONCE = 4096
_MORE_MESSAGES = "add messages of them, or try another finetune_classifier.split.seed"
ROWS_AT_ONCE = 16
"""Rows that are scored together; it changes no score."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class FinetuneClassifierParams:
    """Which base, which rows, what of the model is trained, and how."""

    base: Literal["pretrain", "gpt2"] = "gpt2"
    """The model to start from; its architecture and tokenizer are kept."""
    pretrained: bool = True
    """Start from its weights too; without, from new ones, which shows what they are worth."""
    split: Split = Split(train=0.7, validation=0.1)
    balance: Balance = "undersample"
    """Of unlike classes: `undersample` drops rows before the split, `class_weights` weighs the
    loss by the training part's classes."""
    trainable: Trainable = "last_block"
    """`last_block` is the last block, the final norm and the head, as in the book; `last_blocks`
    the last `blocks`; `lora` adapters beside frozen layers."""
    blocks: Positive | None = None
    """With `trainable: last_blocks`, how many."""
    lora: LoraParams | None = None
    """With `trainable: lora`, which adapters; None is `LoraParams`' defaults."""
    pooling: Pooling = "last"
    """What the head sees of a text: its last real token, or the mean over all of them, which
    `transformers`' class does not know."""
    max_length: Positive | None = None
    """Tokens a text is cut to; None is the longest training text, the context at most."""
    train: TrainParams

    @model_validator(mode="after")
    def _belong_together(self) -> FinetuneClassifierParams:
        if (self.trainable == "last_blocks") != (self.blocks is not None):
            raise ValueError(
                "blocks: says how many with trainable: last_blocks, and with nothing else; "
                "give both or neither"
            )
        if self.lora is not None and self.trainable != "lora":
            raise ValueError(f"lora: has no say with trainable: {self.trainable}; set it to lora")
        return self

    @property
    def adapters(self) -> LoraParams | None:
        """The adapters that are trained; None without."""
        return (self.lora or LoraParams()) if self.trainable == "lora" else None

    @property
    def last(self) -> int | None:
        """How many of the last blocks are trained whole; None is all, but where `adapters` are."""
        return {"last_block": 1, "last_blocks": self.blocks, "head": 0}.get(self.trainable)


class Prepared(NamedTuple):
    """What the training begins with; architecture and tokenizer are the base's."""

    config: GPTConfig
    tokenizer: Tokenizer
    labels: list[str]
    parts: dict[str, pd.DataFrame]
    max_length: int
    data: dict[str, ClassificationDataset]
    """Of the parts `train` and `validation`."""
    keeps: bool
    """What frozen blocks make of the texts is little enough to be kept."""


def prepare(
    params: FinetuneClassifierParams, *, base: Path, messages: Path, log: Log = discard
) -> Prepared:
    """What the stage does before the base's weights are read.

    Raises:
        InputError: the messages cannot be used, or `max_length` is above the base's context.
    """
    config, tokenizer = read_base(base, "finetune_classifier", params.max_length)
    frame, parts = usable_parts(messages, params.split, params.balance)
    labels = sorted(frame["label"].unique())
    if few := undersampled(frame, parts):
        log(Message(f"finetune_classifier: {few}", "warning"))
    for name, lacking in missing_classes(parts, labels).items():
        what = (
            "none of them can be learnt" if name == "train" else "its figures say nothing of them"
        )
        log(Message(f"finetune_classifier: {lacking}: {what}; {_MORE_MESSAGES}", "warning"))
    ids = {
        name: tokenizer.encode_batch(parts[name]["text"].tolist())
        for name in ("train", "validation")
    }
    max_length = params.max_length or min(max(map(len, ids["train"])), config.context_length)
    data = {
        name: ClassificationDataset(
            each,
            [labels.index(label) for label in parts[name]["label"]],
            padding=tokenizer.eot,
            max_length=max_length,
        )
        for name, each in ids.items()
    }
    tokens = sum(int(each.lengths.sum()) for each in data.values())
    keeps = tokens * config.n_embd * 4 <= _KEPT_BYTES
    return Prepared(config, tokenizer, labels, parts, max_length, data, keeps)


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
    """Train on the training part of the messages; the test part is compared with it, no more.

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

    What comes before the trained part never changes, and neither does what it makes of a text: so
    it is computed once for each text, without padding and without dropout, and only the rest is
    gone through at each step.

    Adapters (`lora`) are merged into the layers' own matrices when the training is over, so that
    the directory is a plain model however it was trained.

    Raises:
        InputError: the messages cannot be used, `max_length` is above the base's context, or
            more blocks are to be trained than the base has.
        RunError: the loss is no longer finite.
    """
    train = params.train
    device = prepare_device(train.device, train.threads)
    ready = prepare(params, base=base, messages=messages, log=log)
    labels, parts, texts = ready.labels, ready.parts, ready.data
    shared = count_contaminated(
        {name: [(text,) for text in part["text"]] for name, part in parts.items()},
        "finetune_classifier",
        log,
    )
    trunk, _ = load_base(base)
    torch.manual_seed(train.seed)
    model = GPTClassifier(trunk.config, labels, params.pooling)
    if params.pretrained:
        model.load_state_dict(
            {name: value for name, value in trunk.state_dict().items() if name != "lm_head.weight"},
            strict=False,  # the head is new
        )
    del trunk
    model.to(device)
    depth = freeze(model, params.last, params.adapters)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(
        Message(
            f"finetune_classifier: {len(texts['train'])} training messages of up to "
            f"{ready.max_length} tokens, {n_trained:,} of {model.n_params:,} parameters trained"
        )
    )
    trained: GPTClassifier | ClassifierTop = model
    data: dict[str, Dataset] = dict(texts)
    if depth and ready.keeps:
        trained = model.top(depth)
        with autocast(device, train.precision):
            data = trunk_features(model, texts, depth, log)

    weights = None  # of the classes
    if params.balance == "class_weights":
        weights = class_weights(
            [labels.index(each) for each in parts["train"]["label"]], len(labels)
        )

    def scores(model: GPTClassifier | ClassifierTop, part: str) -> dict[str, float]:
        rows = list(batches(data[part], ROWS_AT_ONCE))
        actual = torch.cat([batch.targets for batch in rows])  # (n,)
        with autocast(device, train.precision):
            logits = class_logits(model, rows)  # (n, classes)
        return {
            f"{part}_loss": F.cross_entropy(logits, actual, weights).item(),
            f"{part}_accuracy": (logits.argmax(1) == actual).float().mean().item(),
        }

    result = fit(
        trained,
        params=train,
        train=data["train"],
        loss=partial(class_loss_sum, weights=weights),
        validate=lambda model: scores(model, "validation"),
        origin=lambda row: f"message {parts['train']['text'].iloc[row]!r:.60}",
        task="finetune_classifier",
        state=state,
        log=log,
    )
    model.eval()
    if params.trainable == "lora":
        merge(model)
        if trained is not model:
            trained = model.top(depth)  # of the merged layers
    final = {
        **scores(trained, "train"),
        **scores(trained, "validation"),
        "max_length": float(ready.max_length),
        "rows_train": float(len(parts["train"])),
        "rows_validation": float(len(parts["validation"])),
        "rows_test": float(len(parts["test"])),
        **shared,
        "steps": float(result.steps),
    }
    training = {
        "base": params.base,
        "split": asdict(params.split),
        "balance": params.balance,
        "max_length": ready.max_length,
        **({"pooling": params.pooling} if params.pooling != "last" else {}),
    }
    save_model(model, out, tokenizer=ready.tokenizer, extra={"training.json": training})
    result.write_history(history)
    write_json(metrics, final)
    return final


def freeze(model: GPTClassifier, last: int | None, adapters: LoraParams | None) -> int:
    """Let only a part of the model be trained; return how many blocks come before it.

    Args:
        model: on its device. With `adapters` its layers are wrapped; a head without an adapter is
            trained whole, since it is new.
        last: how many of the last blocks are trained with the final norm and the head; 0 is the
            head alone, None everything.
        adapters: trained instead.

    Raises:
        InputError: more blocks than the model has.
    """
    if adapters:
        depth = wrap(model, adapters)
        if "head" not in adapters.layers:
            model.score.requires_grad_(True)
        return depth
    own, n_blocks = len(model.h) if last is None else last, len(model.h)
    if own > n_blocks:
        raise InputError(
            f"finetune_classifier.blocks: {own} blocks are to be trained, the base has {n_blocks}; "
            "use at most that"
        )
    model.requires_grad_(last is None)
    model.score.requires_grad_(True)
    if own:
        model.h[n_blocks - own :].requires_grad_(True)
        model.ln_f.requires_grad_(True)
    return n_blocks - own


@torch.no_grad()
def trunk_features(
    model: GPTClassifier, texts: Mapping[str, ClassificationDataset], depth: int, log: Log
) -> dict[str, Dataset]:
    """What the first `depth` blocks make of every text; see `GPTClassifier.trunk`.

    Args:
        model: on its device, in any mode; left in evaluation mode.
        texts: by part.
        depth: blocks that are not trained.
        log: hears the progress, in texts.

    Returns:
        The same parts with vectors in place of ids, on the CPU; in bf16 under its autocast.
    """
    model.eval()
    result: dict[str, Dataset] = {}
    done, total = 0, sum(map(len, texts.values()))
    for name, dataset in texts.items():
        features: list[Tensor] = [torch.empty(0)] * len(dataset)
        labels = [0] * len(dataset)
        for indices in _of_like_length(dataset.lengths):
            batch = take(dataset, indices)
            here = batch.to(model.device)
            assert here.lengths is not None
            vectors = model.trunk(here.inputs, here.lengths, depth)
            if torch.is_autocast_enabled(model.device.type):
                vectors = vectors.to(torch.get_autocast_dtype(model.device.type))
            lengths = here.lengths
            if depth == len(model.h) and model.pooling == "last":
                lengths = torch.ones_like(lengths)  # behind the last block a text has one vector
            split = torch.split(vectors.cpu(), lengths.tolist())
            for index, own, label in zip(indices, split, batch.targets.tolist(), strict=True):
                features[index], labels[index] = own.clone(), label
            done += len(indices)
            log(Progress("finetune_classifier: frozen blocks", done, total, "text"))
        result[name] = FeatureDataset(features, labels)
    return result


def _of_like_length(lengths: np.ndarray) -> Iterator[list[int]]:
    """Indices sorted by length, in groups of about `_TOKENS_AT_ONCE` tokens."""
    group: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        group.append(index)
        if len(group) * lengths[group[0]] >= _TOKENS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group
