"""The assistant: its loss on answers that it never saw, and its own answers beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from gpt.base.errors import InputError
from gpt.batches.data import InstructionDataset, batches
from gpt.batches.metrics import check_finite, perplexity, target_losses
from gpt.generation import Completion, Sampling, completions
from gpt.model.weights import load_base
from gpt.prompts import encode_turns, last_prompt, read_template
from gpt.scores.bootstrap import mean, mean_loss
from gpt.scores.text_scores import length_statistics, score_texts
from gpt.text.records import Instruction, read_instructions, split_instructions
from stages.evaluate.intervals import Bounds, figures_of
from stages.training_file import read_training


def records_by_part(directory: Path, instructions: Path) -> dict[str, list[Instruction]]:
    """The records by part, as the assistant's training split them.

    Args:
        directory: its model directory.
        instructions: the raw folder.

    Raises:
        InputError: the directory or the records cannot be used, or there is nothing to test on.
    """
    parts = split_instructions(read_instructions(instructions), read_training(directory).split)
    if not parts["test"]:
        raise InputError(f"{instructions}: no record to test on; add records")
    return parts


def answer_records(
    directory: Path,
    records: Sequence[Instruction],
    device: torch.device,
    batch_size: int,
    max_new_tokens: int,
    *,
    asked_as: Path | None = None,
) -> tuple[pd.DataFrame, list[bool]]:
    """What a language model answers, and how likely it finds the answers that are given.

    Args:
        directory: its model directory.
        records: what is asked; of a conversation the last turn, behind the earlier ones.
        device: where.
        batch_size: records at once.
        max_new_tokens: the longest answer it may give.
        asked_as: the model directory whose template and longest record are held to; by default
            its own.

    Returns:
        A table, a row a record: its `answer`, and the `tokens` of the given answers with their
        summed `loss`, in nats. And of each whether the answer ended because it was too long.

    Raises:
        InputError: a directory cannot be used, or no given answer begins within the length that
            the model was trained with.
    """
    asked_as = asked_as or directory
    training = read_training(asked_as)
    model, tokenizer = load_base(directory)
    model.to(device)
    turns = encode_turns(tokenizer, read_template(asked_as), records)
    data = InstructionDataset(turns, end=tokenizer.eot, max_length=training.max_length)
    losses = target_losses(model, batches(data, batch_size))
    if not any(map(len, losses)):
        raise InputError(
            f"no answer of the test records begins within the {training.max_length} tokens that "
            f"{asked_as} was trained with; use a shorter template or a larger "
            "finetune_instruct.max_length"
        )
    check_finite(np.array([each.sum() for each in losses]), directory)
    prompts = [last_prompt(each, tokenizer.eot) for each in turns]
    sampling = Sampling(max_new_tokens=max_new_tokens, stop=(tokenizer.eot,))
    answers: list[Completion] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        # no engine: what is written must not depend on whether there is a compiler
        answers += completions(model, batch, sampling)
    table = pd.DataFrame(
        {
            "answer": [tokenizer.decode(each.tokens).strip() for each in answers],
            "tokens": [len(each) for each in losses],
            "loss": [float(each.sum(dtype=np.float64)) for each in losses],
        }
    )
    return table, [not each.stopped for each in answers]


def measure_assistant(
    directory: Path,
    bases: dict[str, Path],
    instructions: Path,
    device: torch.device,
    batch_size: int,
    max_new_tokens: int,
    of: Bounds,
) -> tuple[dict[str, float], pd.DataFrame]:
    """Score an assistant, and the base that it was made from, on the records held out of it.

    Args:
        directory: its model directory.
        bases: the bases' model directories by name.
        instructions: the raw folder.
        device: where.
        batch_size: records at once.
        max_new_tokens: the longest answer it may give.
        of: how intervals are drawn: over the records.

    Returns:
        The figures, the base's under `base_`: losses in nats a token of the answers, scores in
        0..1, lengths in words. And a table, a row a record, with the answers and all scores.

    Raises:
        InputError: a directory or the records cannot be used, or do not belong together.
    """
    test = records_by_part(directory, instructions)["test"]
    base = bases[read_training(directory).base]
    references = [record.output.strip() for record in test]
    figures: dict[str, float] = {}
    answers = pd.DataFrame(
        {
            "instruction": [record.instruction for record in test],
            "input": [record.input for record in test],
            "reference": [record.output for record in test],
        }
    )
    if any(record.earlier or record.system for record in test):
        answers.insert(0, "earlier", [_earlier(record) for record in test])
    for prefix, source in (("", directory), ("base_", base)):
        found, at_limit = answer_records(
            source, test, device, batch_size, max_new_tokens, asked_as=directory
        )
        scores = score_texts(found["answer"].tolist(), references)
        held = found[found["tokens"] > 0]  # else it is cut before its answer
        loss = of(mean_loss(held["loss"], held["tokens"]))
        own = figures_of("loss", loss) | {"perplexity": perplexity(loss.value)}
        if scores.short.any():
            own |= figures_of("exact_match", of(mean(scores.exact_match[scores.short])))
        own |= figures_of("rouge_l", of(mean(scores.rouge_l)))
        own |= figures_of("chrf", of(mean(scores.chrf)))
        own |= length_statistics(found["answer"].tolist(), references, at_limit=at_limit)
        figures |= {f"{prefix}{key}": value for key, value in own.items()}
        answers[f"{prefix}answer"] = found["answer"]
        answers[f"{prefix}tokens"] = found["tokens"]
        answers[f"{prefix}loss"] = found["loss"]
        answers[f"{prefix}exact_match"] = pd.Series(scores.exact_match).astype("Int64")
        answers[f"{prefix}rouge_l"] = scores.rouge_l
        answers[f"{prefix}chrf"] = scores.chrf
        answers[f"{prefix}at_limit"] = np.array(at_limit).astype(int)
    figures |= {"records": float(len(test)), "short_records": float(scores.short.sum())}
    return figures, answers


def _earlier(record: Instruction) -> str:
    """What comes before the last turn, as JSON messages; empty where nothing does."""
    said = [("system", record.system)] if record.system else []
    for turn in record.earlier:
        said += [("user", turn.prompt), ("assistant", turn.response)]
    messages = [{"role": role, "content": content} for role, content in said]
    return json.dumps(messages, ensure_ascii=False) if messages else ""
