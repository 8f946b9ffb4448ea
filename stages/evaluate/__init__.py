"""Measure every model on data that none of them was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.base.events import Log, Message, Progress, discard
from gpt.base.files import whole_directory, write_json
from gpt.model.config import Batch, Positive, Seed, Threads
from gpt.model.device import DeviceName, prepare_device
from stages.evaluate.assistant import measure_assistant
from stages.evaluate.bases import measure_base, measure_untrained_classification
from stages.evaluate.classifier import measure_classifier
from stages.evaluate.intervals import bounds


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class EvaluateParams:
    """Where and how much."""

    device: DeviceName = "auto"
    threads: Threads = 0
    batch_size: Batch = 16
    max_new_tokens: Positive = 60
    """The longest answer the assistant may give."""
    seed: Seed = 123
    """Of the untrained model that the bases are compared with, and of the resamples."""
    shots: Positive = 2
    """With so many training messages of each class before it, a base classifies in the few-shot
    way."""
    resamples: Annotated[int, Field(gt=0, le=1_000_000)] = 2000
    """Bootstrap resamples that an interval comes from."""


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
        predictions: written, a table each: `pretrain.csv` and `gpt2.csv`, a row a window and
            source; `classifier.csv` and `assistant.csv`, a row a test example; of the classifier
            also which classes it took for which, and where it was most wrong; `likelihood.csv`,
            what the bases make of the classifier's test messages.
        metrics: written: what is returned, as JSON.
        log: hears what goes on.

    Returns:
        The figures of `pretrain`, `gpt2`, `classifier` and `assistant`: losses in nats a token,
        bits a byte, scores in 0..1; `NAME_low` and `NAME_high` are the ends of a score's 95 %
        bootstrap interval (`gpt.scores.bootstrap`).

    Raises:
        InputError: a model or data set cannot be used, or does not belong to the others.
    """
    device = prepare_device(params.device, params.threads)
    of = bounds(params.resamples, params.seed)
    bases = {"pretrain": pretrain, "gpt2": gpt2}
    work = [*bases, "classifier", "assistant", "likelihood"]
    figures: dict[str, dict[str, float]] = {}
    with whole_directory(predictions) as folder:
        for done, name in enumerate(work):
            log(Progress("evaluate", done, len(work), "part"))
            log(Message(f"evaluate: {name}"))
            tables: dict[str, pd.DataFrame] = {}
            if name in bases:
                figures[name], tables[name] = measure_base(
                    bases[name], tokens, device, params.batch_size, params.seed, of
                )
            elif name == "classifier":
                figures[name], tables = measure_classifier(
                    classifier, messages, device, params.batch_size, of
                )
            elif name == "assistant":
                figures[name], tables[name] = measure_assistant(
                    assistant,
                    bases,
                    instructions,
                    device,
                    params.batch_size,
                    params.max_new_tokens,
                    of,
                )
            else:
                found, tables[name] = measure_untrained_classification(
                    bases, classifier, messages, device, params.batch_size, params.shots, of, log
                )
                for base, scores in found.items():
                    figures[base] |= scores
            for file, table in tables.items():
                table.to_csv(folder / f"{file}.csv", index=False)
        log(Progress("evaluate", len(work), len(work), "part"))
    write_json(metrics, figures)
    return figures
