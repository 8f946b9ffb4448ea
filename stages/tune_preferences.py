"""Tune an assistant towards the better of two answers (DPO)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError
from gpt.base.events import Log, Message, Progress, discard
from gpt.base.files import write_json
from gpt.batches.data import InstructionDataset, batches
from gpt.batches.metrics import mean_loss
from gpt.model.config import GPTConfig, Positive
from gpt.model.device import autocast, prepare_device
from gpt.model.model import GPT
from gpt.model.weights import load_base, read_base, save_model
from gpt.prompts import Template, encode_turns, last_prompt, read_template
from gpt.text.records import (
    Instruction,
    Preference,
    Split,
    read_preferences,
    split_instructions,
    split_preferences,
)
from gpt.tokens.tokenizer import Tokenizer
from gpt.train.loop import fit
from gpt.train.recipe import TrainParams
from gpt.tune.lora import LanguageModelTuning, merge, wrap
from gpt.tune.overlap import count_contaminated
from gpt.tune.preference import PreferenceDataset, PreferenceLoss, preference_scores
from stages.samples import answers
from stages.training_file import TRAINING_FILE, read_training


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class TunePreferencesParams(LanguageModelTuning):
    """How far the assistant may go, what of it is trained, and how.

    The template and the split are the assistant's own.
    """

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How dearly the model pays for leaving the assistant that it was: the larger, the nearer it
    stays."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs that are taken to be the wrong way round (conservative DPO)."""
    by_token: bool = False
    """Compare the answers' mean log-probabilities and not their sums, so that length does not
    count; `beta` is about as many times larger as an answer has tokens."""
    max_length: Positive | None = None
    """Tokens a prompt and its answer are cut to; None is the assistant's context."""
    sample_tokens: Positive = 40
    train: TrainParams


class Prepared(NamedTuple):
    """What the training begins with; what is said of a model is the assistant's."""

    config: GPTConfig
    tokenizer: Tokenizer
    template: Template
    pairs: dict[str, list[Preference]]
    data: dict[str, PreferenceDataset]
    """The pairs of each part that differ once they are cut."""
    told: list[Instruction]
    """The validation part's records, whether or not they hold two answers."""
    answers: InstructionDataset
    """The same as the assistant learnt them."""
    shown: list[list[int]]
    """The token ids of their first prompts, which the samples answer."""


def prepare(
    params: TunePreferencesParams, *, assistant: Path, instructions: Path, log: Log = discard
) -> Prepared:
    """What the stage does before the assistant's weights are read.

    Raises:
        InputError: the pairs cannot be used, the directory is no assistant's, or `max_length` is
            above its context.
    """
    template, split = read_template(assistant), read_training(assistant).split
    config, tokenizer = read_base(assistant, "tune_preferences", params.max_length)
    max_length = params.max_length or config.context_length
    records = read_preferences(instructions)
    pairs = _useful_pairs(instructions, records, split, log)
    data: dict[str, PreferenceDataset] = {}
    for name, part in pairs.items():
        asked = encode_turns(tokenizer, template, part)
        data[name] = PreferenceDataset(
            [last_prompt(each, tokenizer.eot) for each in asked],
            tokenizer.encode_batch([pair.chosen for pair in part]),
            tokenizer.encode_batch([pair.rejected for pair in part]),
            end=tokenizer.eot,
            max_length=max_length,
        )
        if not len(data[name]):
            raise InputError(
                f"{instructions}: the two answers of every pair of the {name} part are the same in "
                f"their first {max_length} tokens, prompt included; use a larger "
                "tune_preferences.max_length, or a base with a larger context"
            )
        if cut := len(part) - len(data[name]):
            text = f"{cut} of {len(part)} {name} pairs are cut before their answers differ"
            log(Message(f"tune_preferences: {text}, and left out", level="warning"))
    told = split_instructions(records, split)["validation"]
    turns = encode_turns(tokenizer, template, told)
    answers = InstructionDataset(turns, end=tokenizer.eot, max_length=max_length)
    shown = [last_prompt(each, tokenizer.eot)[-max_length:] for each in turns[:3]]
    return Prepared(config, tokenizer, template, pairs, data, told, answers, shown)


def tune_preferences(
    params: TunePreferencesParams,
    *,
    assistant: Path,
    instructions: Path,
    out: Path,
    metrics: Path,
    history: Path,
    state: Path | None = None,
    log: Log = discard,
) -> dict[str, float]:
    """Train on the pairs of the training part; those of the test part are only measured at the end.

    Args:
        params: what and how.
        assistant: the model directory that finetune_instruct wrote; its `prompt.json` names the
            template, its `training.json` the split.
        instructions: the raw folder of instruction records that it was made from, some of which
            hold two answers (`gpt.text.records.read_preferences`).
        out: the model directory to write, in the form of `assistant`.
        metrics: the final figures, written as JSON: losses in nats a pair, rewards in nats; the
            assistant's own loss in nats a token, before and after.
        history: the curve, written as CSV, a row an evaluation.
        state: the folder of the loop's resume state.
        log: hears what goes on, and answers to the first validation records.

    Returns:
        The final figures.

    Raises:
        InputError: the pairs cannot be used, the directory is no assistant's, or `max_length` is
            above its context.
        RunError: the loss is no longer finite.
    """
    train = params.train
    device = prepare_device(train.device, train.threads)
    ready = prepare(params, assistant=assistant, instructions=instructions, log=log)
    tokenizer, pairs, data = ready.tokenizer, ready.pairs, ready.data
    model, _ = load_base(assistant)
    model.to(device)
    texts = {name: [(each.task, each.chosen) for each in part] for name, part in pairs.items()}
    shared = count_contaminated(texts, "tune_preferences", log)
    loss = PreferenceLoss(
        beta=params.beta, label_smoothing=params.label_smoothing, by_token=params.by_token
    )

    def scores(model: GPT, part: str) -> dict[str, float]:
        with autocast(device, train.precision):
            rows = batches(data[part], train.batch_size, by_length=True)
            found = preference_scores(model, rows, loss)
        return {f"{part}_{name}": value for name, value in found.items()}

    def instruct_loss(model: GPT) -> float:
        with autocast(device, train.precision):
            return mean_loss(model, batches(ready.answers, train.batch_size, by_length=True))

    torch.manual_seed(train.seed)
    total, done = sum(map(len, data.values())), 0
    with autocast(device, train.precision):
        for dataset in data.values():  # what the model says of all pairs before it learns from them
            for n in dataset.set_references(model, train.batch_size, by_token=loss.by_token):
                log(Progress("tune_preferences: reference", done + n, total, "pair"))
            done += len(dataset)
    before = {**scores(model, "validation"), **scores(model, "test")}
    instruct_before = instruct_loss(model)
    n_params = model.n_params
    if params.adapters:
        wrap(model, params.adapters)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(
        Message(
            f"tune_preferences: {len(data['train'])} training pairs, {n_trained:,} of "
            f"{n_params:,} parameters trained"
        )
    )
    result = fit(
        model,
        params=train,
        train=data["train"],
        loss=loss,
        validate=lambda model: scores(model, "validation"),
        sample=lambda model: answers(
            model, tokenizer, ready.shown, ready.told, params.sample_tokens
        ),
        origin=lambda row: (
            f"the pair of {pairs['train'][data['train'].kept[row]].instruction!r:.60}"
        ),
        task="tune_preferences",
        state=state,
        log=log,
    )
    if params.adapters:
        merge(model)
    final = {
        **scores(model, "validation"),
        **scores(model, "test"),
        **{f"{name}_before": value for name, value in before.items() if name.endswith("_loss")},
        "instruct_loss": instruct_loss(model),
        "instruct_loss_before": instruct_before,
        "train_loss": result.history[-1]["train_loss"],
        **{f"pairs_{name}": float(len(dataset)) for name, dataset in data.items()},
        **shared,
        "parameters_trained": float(n_trained),
        "steps": float(result.steps),
    }
    training = json.loads((assistant / TRAINING_FILE).read_bytes())
    extra = {**ready.template.files, TRAINING_FILE: training}
    save_model(model, out, tokenizer=tokenizer, extra=extra)
    result.write_history(history)
    write_json(metrics, final)
    return final


def _useful_pairs(
    instructions: Path, records: Sequence[Instruction], split: Split, log: Log
) -> dict[str, list[Preference]]:
    """The pairs by part, but those whose two answers are the same.

    Raises:
        InputError: a part has none.
    """
    found = split_preferences(records, split)
    total = sum(map(len, found.values()))
    pairs = {
        name: [pair for pair in part if pair.chosen.strip() != pair.rejected.strip()]
        for name, part in found.items()
    }
    for name, part in pairs.items():
        if not part:
            raise InputError(
                f"{instructions}: the {name} part of {len(records)} records holds no pair of a "
                "better and a worse answer; add the fields chosen and rejected to the records"
            )
    if equal := total - sum(map(len, pairs.values())):
        text = f"{equal} of {total} pairs hold the same answer twice, and are left out"
        log(Message(f"tune_preferences: {text}"))
    return pairs
