"""A model directory written again, in another precision or for another runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.base.errors import InputError, RunError
from gpt.base.files import read_json
from gpt.batches.data import Batch
from gpt.batches.metrics import mean_loss, perplexity
from gpt.engine.int8 import quantize
from gpt.model.weights import load_base, load_pair, save_model
from gpt.published.gguf import GGUFType, is_ours, read_back, write_gguf
from gpt.text.formats import texts_in
from gpt.tokens.tokenizer import END_OF_TEXT, Tokenizer

DTYPES = ("float32", "float16", "bfloat16")
SAMPLE_TOKENS = 8192
"""Of a text, the most that perplexity is measured on: half a minute for GPT-2 124M on two cores."""
_EXTRA = ("prompt.json", "tokenizer_config.json", "training.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What rounding cost a model, on the same tokens of one text.

    Attributes:
        tokens: how many were predicted.
        before: the perplexity of the model as it was.
        after: of what the file holds.
        int8: of the model with `--precision int8`, our own decoding in 8 bits.
    """

    tokens: int
    before: float
    after: float
    int8: float

    def __str__(self) -> str:
        def against(other: float) -> str:
            return f"{other:.3f} ({other / self.before - 1:+.2%})"

        return (
            f"perplexity on {self.tokens:,} tokens: {self.before:.3f}, of the file "
            f"{against(self.after)}, with --precision int8 {against(self.int8)}"
        )


def export(source: Path, target: Path, dtype: str) -> int:
    """Write the model of `source` to `target` with its tokenizer and its other files.

    Args:
        source: a model directory.
        target: the directory to write; replaced as a whole if it is one that was written here.
        dtype: of the weights: `float32`, `float16` or `bfloat16`.

    Returns:
        The size of the weights, in bytes.

    Raises:
        InputError: `source` is no model directory, or `target` holds something else.
        RunError: `target` cannot be written.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    model, tokenizer = load_pair(source, getattr(torch, dtype))
    extra = {
        name: read_json(source / name, missing="no such file", remedy="fetch or make it again")
        for name in _EXTRA
        if (source / name).is_file()
    }
    with _writing(target):
        save_model(model, target, tokenizer=tokenizer, extra=extra)
    return (target / "model.safetensors").stat().st_size


def export_gguf(
    source: Path, target: Path, type: GGUFType, text: Path | None = None
) -> tuple[int, Loss | None]:
    """Write the language model of `source` with its tokenizer as one GGUF file.

    Args:
        source: a model directory.
        target: the file to write; one that is there is replaced if this function wrote it.
        type: of the matrices.
        text: what the loss is measured on: plain text, documents separated by `<|endoftext|>`.

    Returns:
        The size of the file, in bytes, and what rounding cost; None without a text.

    Raises:
        InputError: `source` holds no language model, `target` something else, `text` no text.
        RunError: `target` cannot be written.
    """
    if target.exists() and not is_ours(target):
        raise InputError(
            f"{target}: is there and no GGUF file that was written here; choose another name, or "
            "move it away"
        )
    model, tokenizer = load_base(source)
    # before anything is written: a text that cannot be read should not cost a wait
    rows = list(_rows(tokenizer, text, model.config.context_length)) if text else []
    with _writing(target):
        write_gguf(model, target, tokenizer=tokenizer, type=type, name=source.resolve().name)
    size = target.stat().st_size
    if not rows:
        return size, None
    before = perplexity(mean_loss(model, rows))
    read_back(target, model)
    after = perplexity(mean_loss(model, rows))
    int8 = perplexity(mean_loss(quantize(load_base(source)[0]), rows))
    tokens = sum(row.n_targets for row in rows)
    return size, Loss(tokens=tokens, before=before, after=after, int8=int8)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{target}: {error.strerror or error}; make room or make it writable, or choose another"
        ) from None


def _rows(tokenizer: Tokenizer, text: Path, context_length: int) -> Iterator[Batch]:
    """The beginning of a text in rows of a context each, the last as long as it comes."""
    ids: list[int] = []
    try:
        for document in texts_in(text, END_OF_TEXT):
            ids += [*tokenizer.encode(document), tokenizer.eot]
            if len(ids) > SAMPLE_TOKENS:
                break
    except OSError as error:
        raise InputError(f"{text}: {error.strerror}; give a text file") from None
    if len(ids) < 2:
        raise InputError(f"{text}: empty; give a text file with something in it")
    tokens = torch.tensor(ids[: SAMPLE_TOKENS + 1])
    for start in range(0, len(tokens) - 1, context_length):
        row = tokens[start : start + context_length + 1][None]  # (1, T + 1)
        yield Batch(inputs=row[:, :-1], targets=row[:, 1:])
