"""`training.json` of a fine-tuned model: its base, and what was held out of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError, first_problem
from gpt.base.files import read_json
from gpt.model.config import Positive
from gpt.model.model import Pooling
from gpt.text.records import Balance, Split

TRAINING_FILE = "training.json"


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Training:
    """`training.json` of a fine-tuned model."""

    base: Literal["pretrain", "gpt2"]
    split: Split
    balance: Balance = "none"
    max_length: Positive
    pooling: Pooling = "last"
    """Of a classifier; its model says the same."""
    turns: Positive = 1
    """Of an assistant: those of the longest conversation that it learnt from."""


def read_training(directory: Path) -> Training:
    """`training.json` of a model directory.

    Raises:
        InputError: it is missing, or not such a file.
    """
    path = directory / TRAINING_FILE
    remedy = "run the fine-tuning again"
    said = read_json(path, missing="no such file; run the fine-tuning stage again", remedy=remedy)
    try:
        return TypeAdapter(Training).validate_python(said)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; {remedy}") from None
