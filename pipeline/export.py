"""A model directory written again, in another precision."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gpt.errors import InputError
from gpt.tokenizer import load_tokenizer
from gpt.weights import load_model, save_model

DTYPES = ("float32", "float16", "bfloat16")
_EXTRA = ("prompt.json", "training.json")


def export(source: Path, target: Path, dtype: str) -> int:
    """Write the model of `source` to `target` with its tokenizer and its other files.

    Args:
        source: a model directory.
        target: the directory to write; it is replaced as a whole if it is a model directory.
        dtype: of the weights: `float32`, `float16` or `bfloat16`.

    Returns:
        The size of the weights, in bytes.

    Raises:
        InputError: `source` is no model directory, or `target` holds something else.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if target.exists() and not (target / "config.json").is_file():
        raise InputError(f"{target}: is there and no model directory; choose another target")
    model = load_model(source, dtype=getattr(torch, dtype))
    extra = {
        name: json.loads((source / name).read_text(encoding="utf-8"))
        for name in _EXTRA
        if (source / name).is_file()
    }
    save_model(model, target, tokenizer=load_tokenizer(source), extra=extra)
    return (target / "model.safetensors").stat().st_size
