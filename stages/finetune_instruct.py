"""Fine-tune a base model into an assistant that follows instructions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError
from gpt.base.events import Log, Message, discard
from gpt.base.files import write_json
from gpt.batches.data import InstructionDataset, batches
from gpt.batches.metrics import lm_loss_sum, mean_loss, perplexity
from gpt.model.config import GPTConfig, Positive
from gpt.model.device import autocast, prepare_device
from gpt.model.model import GPT
from gpt.model.weights import load_base, read_base, save_model
from gpt.prompts import TEMPLATES, TemplateName, encode_turns, last_prompt
from gpt.text.records import Instruction, Split, read_instructions, split_instructions
from gpt.tokens.tokenizer import Tokenizer
from gpt.train.loop import fit
from gpt.train.recipe import TrainParams
from gpt.tune.lora import LanguageModelTuning, merge, wrap
from gpt.tune.overlap import count_contaminated
from stages.samples import answers


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class FinetuneInstructParams(LanguageModelTuning):
    """Which base, which records, in which form, and how."""

    base: Literal["pretrain", "gpt2"] = "gpt2"
    """The model to start from; its architecture and tokenizer are kept."""
    split: Split = Split(train=0.85, validation=0.05)
    template: TemplateName = "alpaca"
    mask_prompt: bool = True
    """Learn the response only; otherwise the prompt's tokens count as well."""
    rows: Literal["packed", "padded"] = "packed"
    """How the records of a pass lie: one behind the other in rows as long as the base's context,
    none of which sees another, or each in a row of its own, padded to the longest. The losses are
    the same; of packed ones nothing is computed in vain (docs/assistant.md: what that gains)."""
    max_length: Positive | None = None
    """Tokens a record is cut to; None is the base's context."""
    sample_tokens: Positive = 40
    train: TrainParams


class Prepared(NamedTuple):
    """What the training begins with; architecture and tokenizer are the base's."""

    config: GPTConfig
    tokenizer: Tokenizer
    max_length: int
    parts: dict[str, list[Instruction]]
    turns: int
    """The most that a training record has."""
    data: dict[str, InstructionDataset]
    """Of the parts `train` and `validation`."""
    shown: list[list[int]]
    """The token ids of the first validation records' prompts, which the samples answer."""


def prepare(params: FinetuneInstructParams, *, base: Path, instructions: Path) -> Prepared:
    """What the stage does before the base's weights are read.

    Raises:
        InputError: the records cannot be used, or `max_length` is above the base's context.
    """
    config, tokenizer = read_base(base, "finetune_instruct", params.max_length)
    max_length = params.max_length or config.context_length
    records = read_instructions(instructions)
    parts = split_instructions(records, params.split)
    for name, part in parts.items():
        if not part:
            raise InputError(
                f"{instructions}: the {name} part of {len(records)} records is empty; add records "
                "or change finetune_instruct.split"
            )
    turns = {
        name: encode_turns(tokenizer, params.template, parts[name])
        for name in ("train", "validation")
    }
    data = {
        name: InstructionDataset(
            records,
            end=tokenizer.eot,
            mask_prompt=params.mask_prompt,
            max_length=max_length,
            row_length=config.context_length if params.rows == "packed" else None,
        )
        for name, records in turns.items()
    }
    shown = [last_prompt(each, tokenizer.eot)[-max_length:] for each in turns["validation"][:3]]
    most = max(map(len, turns["train"]))
    return Prepared(config, tokenizer, max_length, parts, most, data, shown)


def finetune_instruct(
    params: FinetuneInstructParams,
    *,
    base: Path,
    instructions: Path,
    out: Path,
    metrics: Path,
    history: Path,
    state: Path | None = None,
    log: Log = discard,
) -> dict[str, float]:
    """Train on the training part of the records; the test part is compared with it, no more.

    Args:
        params: what and how.
        base: the model directory of a language model.
        instructions: a raw folder of instruction records.
        out: the model directory to write; `prompt.json` in it holds the template, which
            `tokenizer_config.json` says again for `transformers`; `training.json` says what was
            held out.
        metrics: the final figures, written as JSON: losses in nats a token.
        history: the curve, written as CSV, a row an evaluation.
        state: the folder of the loop's resume state.
        log: hears what goes on, and answers to the first validation records.

    Returns:
        The final figures.

    Raises:
        InputError: the records cannot be used, `max_length` is above the base's context, or it
            cuts every record before its answer; adapters that the base has no place for.
        RunError: the loss is no longer finite.
    """
    train = params.train
    device = prepare_device(train.device, train.threads)
    ready = prepare(params, base=base, instructions=instructions)
    tokenizer, parts, data = ready.tokenizer, ready.parts, ready.data
    model, _ = load_base(base)
    model.to(device)
    texts = {name: [(each.task, each.text) for each in part] for name, part in parts.items()}
    shared = count_contaminated(texts, "finetune_instruct", log)
    for name, dataset in data.items():
        cut = sum(batch.n_targets == 0 for batch in batches(dataset, 1))
        if cut == len(dataset):
            raise InputError(
                f"{instructions}: no answer of the {name} part begins within {ready.max_length} "
                "tokens; use a shorter template, a larger finetune_instruct.max_length or another "
                "base"
            )
        if cut:
            text = f"{cut} of {len(dataset)} {name} records are cut before their answer"
            log(Message(f"finetune_instruct: {text}", level="warning"))

    def validation_loss(model: GPT) -> float:
        with autocast(device, train.precision):
            return mean_loss(model, batches(data["validation"], train.batch_size, by_length=True))

    torch.manual_seed(train.seed)
    before = validation_loss(model)
    n_params = model.n_params
    if params.adapters:
        wrap(model, params.adapters)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(
        Message(
            f"finetune_instruct: {len(data['train'])} training records, {n_trained:,} of "
            f"{n_params:,} parameters trained"
        )
    )
    result = fit(
        model,
        params=train,
        train=data["train"],
        loss=lm_loss_sum,
        validate=lambda model: {"validation_loss": validation_loss(model)},
        sample=lambda model: answers(
            model, tokenizer, ready.shown, parts["validation"], params.sample_tokens
        ),
        origin=lambda row: f"record {parts['train'][row].instruction!r:.60}",
        task="finetune_instruct",
        state=state,
        log=log,
    )
    if params.trainable == "lora":
        merge(model)
    loss = validation_loss(model)
    final = {
        "validation_loss": loss,
        "validation_loss_before": before,
        "perplexity": perplexity(loss),
        "train_loss": result.history[-1]["train_loss"],
        "records_train": float(len(parts["train"])),
        "records_validation": float(len(parts["validation"])),
        "records_test": float(len(parts["test"])),
        **shared,
        "parameters_trained": float(n_trained),
        "steps": float(result.steps),
    }
    save_model(
        model,
        out,
        tokenizer=tokenizer,
        extra={
            **TEMPLATES[params.template].files,
            "training.json": {
                "base": params.base,
                "split": asdict(params.split),
                "max_length": ready.max_length,
                "turns": ready.turns,
            },
        },
    )
    result.write_history(history)
    write_json(metrics, final)
    return final
