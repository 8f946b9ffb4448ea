"""Measure every model on data that none of them was trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gpt.data import (
    ClassificationDataset,
    InstructionDataset,
    WindowDataset,
    batches,
)
from gpt.device import DeviceName, prepare
from gpt.errors import InputError, first_problem
from gpt.events import Log, Message, Progress, discard
from gpt.files import read_json, whole_directory, write_json
from gpt.generate import Sampling, complete
from gpt.metrics import (
    bits_per_byte,
    calibration_error,
    classification_scores,
    classify,
    mean_loss,
    perplexity,
    roc_auc,
    word_f1,
)
from gpt.model import GPT, Pooling
from gpt.prompts import encode_turns, last_prompt, read_template
from gpt.text import (
    Balance,
    Instruction,
    Split,
    read_instructions,
    read_messages,
    split_instructions,
    split_messages,
)
from gpt.token_files import open_tokens, read_manifest
from gpt.tokenizer import Tokenizer, load_tokenizer
from gpt.weights import load_base, load_classifier

_MOST_WRONG = 20
"""Of each part so many messages are listed that a classifier was wrong about."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class EvaluateParams:
    """Where and how much."""

    device: DeviceName = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(gt=0)] = 16
    max_new_tokens: Annotated[int, Field(gt=0)] = 60
    """The longest answer the assistant may give."""
    seed: Annotated[int, Field(ge=0)] = 123
    """Of the untrained model that the bases are compared with."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Training:
    """`training.json` of a fine-tuned model: its base, and what was held out of its training."""

    base: Literal["pretrain", "gpt2"]
    split: Split
    balance: Balance = "none"
    max_length: Annotated[int, Field(gt=0)]
    pooling: Pooling = "last"
    """Of a classifier; its model says the same."""
    turns: Annotated[int, Field(gt=0)] = 1
    """Of an assistant: those of the longest conversation that it learnt from."""


def evaluate(
    params: EvaluateParams,
    *,
    pretrain: Path,
    gpt2: Path,
    classifier: Path,
    assistant: Path,
    tokens: Path,
    messages: Path,
    instructions: Path,
    predictions: Path,
    metrics: Path,
    log: Log = discard,
) -> dict[str, dict[str, float]]:
    """Measure the bases on the validation text, the fine-tuned models on their test parts.

    Args:
        params: where and how much.
        pretrain: a base, the pipeline's own.
        gpt2: a base, the published one.
        classifier: a fine-tuned classifier.
        assistant: a fine-tuned assistant.
        tokens: the folder of token files; its validation split is the bases' test.
        messages: the raw folder that the classifier was trained on a part of.
        instructions: the raw folder that the assistant was trained on a part of.
        predictions: written: `classifier.csv` and `assistant.csv`, a row a test example; of the
            classifier also which classes it took for which, and where it was most wrong.
        metrics: written: what is returned, as JSON.
        log: hears what goes on.

    Returns:
        The figures of `pretrain`, `gpt2`, `classifier` and `assistant`: losses in nats a token,
        bits a byte, scores in 0..1.

    Raises:
        InputError: a model or data set cannot be used, or does not belong to the others.
    """
    device = prepare(params.device, params.threads)
    bases = {"pretrain": pretrain, "gpt2": gpt2}
    work = [*bases, "classifier", "assistant"]
    figures: dict[str, dict[str, float]] = {}
    with whole_directory(predictions) as folder:
        for done, name in enumerate(work):
            log(Progress("evaluate", done, len(work), "model"))
            log(Message(f"evaluate: {name}"))
            if name in bases:
                figures[name] = _base(params, bases[name], tokens, device)
            elif name == "classifier":
                figures[name], tables = measure_classifier(
                    classifier, messages, device, params.batch_size
                )
                for file, table in tables.items():
                    table.to_csv(folder / f"{file}.csv", index=False)
            else:
                figures[name], table = _assistant(params, assistant, bases, instructions, device)
                table.to_csv(folder / "assistant.csv", index=False)
        log(Progress("evaluate", len(work), len(work), "model"))
    write_json(metrics, figures)
    return figures


def _base(
    params: EvaluateParams, directory: Path, tokens: Path, device: torch.device
) -> dict[str, float]:
    model, tokenizer = load_base(directory)
    ids = torch.from_numpy(open_tokens(tokens, "validation")[:])
    total = read_manifest(tokens).splits["validation"].total
    written_by = load_tokenizer(tokens)
    if written_by.hash != tokenizer.hash:
        ids = _in_other_tokens(ids, written_by, tokenizer)
    context = model.config.context_length
    windows = WindowDataset(ids, context, context)
    if len(windows) == 0:
        raise InputError(
            f"{tokens}: the validation split has {len(ids)} tokens, fewer than one context of "
            f"{directory} and its target ({context} + 1); add text or raise tokenize.validation"
        )
    loss = mean_loss(model.to(device), batches(windows, params.batch_size))
    torch.manual_seed(params.seed)
    untrained = GPT(model.config).to(device).eval()
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, len(ids), total.bytes),
        "untrained_loss": mean_loss(untrained, batches(windows, params.batch_size)),
    }


def _in_other_tokens(ids: torch.Tensor, old: Tokenizer, new: Tokenizer) -> torch.Tensor:
    """The same documents, with the end of text between them, in another vocabulary."""
    ends = (ids == old.eot).nonzero().flatten().tolist()
    result: list[int] = []
    start = 0
    for end in [*ends, len(ids)]:
        result += new.encode(old.decode(ids[start:end].tolist()))
        if end < len(ids):
            result.append(new.eot)
        start = end + 1
    return torch.tensor(result)


def measure_classifier(
    directory: Path, messages: Path, device: torch.device, batch_size: int
) -> tuple[dict[str, float], dict[str, pd.DataFrame]]:
    """Score a classifier on each part of the messages that it was trained on a part of.

    Args:
        directory: its model directory.
        messages: the raw folder.
        device: where.
        batch_size: texts at once.

    Returns:
        The scores, those of the training and validation parts under `train_` and `validation_`:
        in 0..1. And tables: `classifier`, a row a test message; `classifier_confusion`, a row a
        part and pair of classes; `classifier_most_wrong`, of each part the messages whose right
        class got the least.

    Raises:
        InputError: the directory or the messages cannot be used, or do not belong together.
    """
    model, tokenizer = load_classifier(directory)
    model.to(device)
    training = _training(directory)
    frame = read_messages(messages)
    unknown = sorted(set(frame["label"]) - set(model.labels))
    if unknown:
        raise InputError(
            f"{messages}: the class {unknown[0]!r} is unknown to {directory} "
            f"({', '.join(model.labels)}); run finetune_classifier on these messages"
        )
    parts = split_messages(frame, training.split, training.balance)
    figures: dict[str, float] = {}
    tables: dict[str, pd.DataFrame] = {}
    for name in ("test", "validation", "train"):
        part = parts[name]
        classes = [model.labels.index(label) for label in part["label"]]
        data = ClassificationDataset(
            tokenizer.encode_batch(part["text"].tolist()),
            classes,
            padding=tokenizer.eot,
            max_length=training.max_length,
        )
        rows = batches(data, batch_size)
        probabilities = classify(model, rows).double().numpy()  # (n, classes)
        tables[name] = _predictions(part, probabilities, model.labels)
        prefix = "" if name == "test" else f"{name}_"
        scores = _scores(tables[name], classes, probabilities, model.labels)
        figures |= {f"{prefix}{key}": value for key, value in scores.items()}
    confusion = [_confusion(name, table, model.labels) for name, table in tables.items()]
    wrong = [_most_wrong(name, table) for name, table in tables.items()]
    return figures, {
        "classifier": tables["test"],
        "classifier_confusion": pd.concat(confusion, ignore_index=True),
        "classifier_most_wrong": pd.concat(wrong, ignore_index=True),
    }


def _predictions(part: pd.DataFrame, probabilities: np.ndarray, labels: list[str]) -> pd.DataFrame:
    predicted = [labels[i] for i in probabilities.argmax(1).tolist()]
    return pd.DataFrame(
        {"text": part["text"], "actual": part["label"], "predicted": predicted}
        | {f"probability_{each}": probabilities[:, i].round(6) for i, each in enumerate(labels)}
    )


def _scores(
    table: pd.DataFrame, classes: list[int], probabilities: np.ndarray, labels: list[str]
) -> dict[str, float]:
    scores = classification_scores(table["actual"].tolist(), table["predicted"].tolist(), labels)
    area = roc_auc(classes, probabilities)
    return {
        **scores,
        **({"roc_auc": area} if area is not None else {}),
        "calibration_error": calibration_error(classes, probabilities),
        "rows": float(len(table)),
    }


def _confusion(part: str, table: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """How many messages of each class were taken for each."""
    pairs = Counter(zip(table["actual"], table["predicted"], strict=True))
    rows = [(part, a, p, pairs[a, p]) for a in labels for p in labels]
    return pd.DataFrame(rows, columns=["part", "actual", "predicted", "messages"])


def _most_wrong(part: str, table: pd.DataFrame) -> pd.DataFrame:
    """The wrong ones, the one first whose right class got the smallest probability."""
    wrong = table[table["actual"] != table["predicted"]]
    given = [row[f"probability_{row['actual']}"] for _, row in wrong.iterrows()]
    found = wrong[["text", "actual", "predicted"]].assign(probability_actual=given)
    found.insert(0, "part", part)
    return found.sort_values("probability_actual", kind="stable").head(_MOST_WRONG)


def _assistant(
    params: EvaluateParams,
    directory: Path,
    bases: dict[str, Path],
    instructions: Path,
    device: torch.device,
) -> tuple[dict[str, float], pd.DataFrame]:
    training = _training(directory)
    template = read_template(directory)
    test = split_instructions(read_instructions(instructions), training.split)["test"]
    if not test:
        raise InputError(f"{instructions}: no record to test on; add records")
    figures: dict[str, float] = {}
    answers: dict[str, list[str]] = {}
    for name, source in (("", directory), ("base_", bases[training.base])):
        model, tokenizer = load_base(source)
        model.to(device)
        turns = encode_turns(tokenizer, template, test)
        data = InstructionDataset.of_turns(turns, end=tokenizer.eot, max_length=training.max_length)
        if not any(batch.n_targets for batch in batches(data, params.batch_size)):
            raise InputError(
                f"{instructions}: no answer of the test part begins within the "
                f"{training.max_length} tokens that {directory} was trained with; use a shorter "
                "template or a larger finetune_instruct.max_length"
            )
        loss = mean_loss(model, batches(data, params.batch_size, by_length=True))
        figures |= {f"{name}loss": loss, f"{name}perplexity": perplexity(loss)}
        prompts = [last_prompt(each, tokenizer.eot) for each in turns]
        answers[name] = _answers(model, tokenizer, prompts, params)
        figures |= {f"{name}{key}": value for key, value in _overlap(answers[name], test).items()}
    table = pd.DataFrame(
        {
            "instruction": [record.instruction for record in test],
            "input": [record.input for record in test],
            "reference": [record.output for record in test],
            "answer": answers[""],
            "base_answer": answers["base_"],
        }
    )
    if any(record.earlier or record.system for record in test):
        table.insert(0, "earlier", [_earlier(record) for record in test])
    return {**figures, "records": float(len(test))}, table


def _earlier(record: Instruction) -> str:
    """What comes before the last turn, as JSON messages; empty where nothing does."""
    said = [("system", record.system)] if record.system else []
    for turn in record.earlier:
        said += [("user", turn.prompt), ("assistant", turn.response)]
    messages = [{"role": role, "content": content} for role, content in said]
    return json.dumps(messages, ensure_ascii=False) if messages else ""


def _answers(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: EvaluateParams
) -> list[str]:
    answers = []
    sampling = Sampling(max_new_tokens=params.max_new_tokens, stop=(tokenizer.eot,))
    for start in range(0, len(prompts), params.batch_size):
        batch = prompts[start : start + params.batch_size]
        # the plain engine: what is written must not depend on whether there is a compiler
        rows = complete(model, batch, sampling, engine="plain")
        answers += [tokenizer.decode(row).strip() for row in rows]
    return answers


def _overlap(answers: Sequence[str], records: Sequence[Instruction]) -> dict[str, float]:
    pairs = list(zip(answers, (record.output.strip() for record in records), strict=True))
    return {
        "exact_match": sum(answer == reference for answer, reference in pairs) / len(pairs),
        "word_f1": sum(word_f1(answer, reference) for answer, reference in pairs) / len(pairs),
    }


def _training(directory: Path) -> Training:
    path = directory / "training.json"
    remedy = "run the fine-tuning again"
    said = read_json(path, missing="no such file; run the fine-tuning stage again", remedy=remedy)
    try:
        return TypeAdapter(Training).validate_python(said)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; {remedy}") from None
