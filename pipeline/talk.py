"""Words in, words out: a base model that goes on, an assistant that answers, a classifier."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from gpt.data import ClassificationDataset, batches
from gpt.device import pick_device
from gpt.errors import InputError
from gpt.generate import Engine, Sampling, stream_text
from gpt.int8 import quantize
from gpt.metrics import classify
from gpt.model import GPT, GPTClassifier
from gpt.prompts import render_prompt
from gpt.tokenizer import Tokenizer
from gpt.weights import load_base, load_classifier

_BATCH = 16


Precision = Literal["fp32", "bf16", "int8"]
"""Of the weights. bf16 is half the memory to read, so about twice the speed; its answers differ.
int8 is half of that again, on the CPU; only the compiled engine gains by it."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _directory(path: Path, stage: str) -> Path:
    if not path.is_dir():
        raise InputError(f"{path}: no model there; make it with `gpt-pipeline run {stage}`")
    return path


def _load_writer(path: Path, stage: str, precision: Precision) -> tuple[GPT, Tokenizer]:
    model, tokenizer = load_base(_directory(path, stage))
    if precision == "int8":
        return quantize(model), tokenizer
    return model.to(device=pick_device(), dtype=_DTYPES[precision]), tokenizer


def _say(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def generate(
    directory: Path,
    prompt: str,
    sampling: Sampling,
    *,
    precision: Precision = "fp32",
    engine: Engine = "auto",
) -> None:
    """Print the prompt and what the model goes on with.

    Raises:
        InputError: no model there, or an empty prompt.
        RunError: the compiled engine is asked for and cannot be had.
    """
    model, tokenizer = _load_writer(directory, "pretrain", precision)
    pieces = stream_text(model, tokenizer, prompt, sampling, engine=engine)
    first = next(pieces, "")  # what cannot be continued is refused before anything is printed
    print(prompt + first, end="", flush=True)
    _say(pieces)


def _template(directory: Path) -> str:
    path = _directory(directory, "finetune_instruct") / "prompt.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["template"])
    except FileNotFoundError:
        raise InputError(
            f"{path}: not there, so this model follows no instructions; take models/assistant, "
            "or `gpt-pipeline generate`"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f'{path}: must be JSON that names the template, as {{"template": "alpaca"}}'
        ) from None


def chat(
    directory: Path,
    instruction: str | None,
    context: str,
    sampling: Sampling,
    *,
    precision: Precision = "fp32",
    engine: Engine = "auto",
) -> None:
    """Answer one instruction, from the argument or a pipe; or each that a person types.

    Every instruction stands for itself: the templates have one turn.

    Raises:
        InputError: no assistant there, or an empty instruction.
        RunError: the compiled engine is asked for and cannot be had.
    """
    template = _template(directory)
    if instruction is None and not sys.stdin.isatty():
        instruction = sys.stdin.read().strip()
    model, tokenizer = _load_writer(directory, "finetune_instruct", precision)

    def answer(text: str, context: str) -> Iterator[str]:
        prompt = render_prompt(template, text, context)
        pieces = stream_text(model, tokenizer, prompt, sampling, engine=engine)
        first = True
        for piece in pieces:
            shown = piece.lstrip() if first else piece
            first = first and not shown
            yield shown

    if instruction is not None:
        if not instruction.strip():
            raise InputError("instruction: empty; give one as an argument or through a pipe")
        _say(answer(instruction, context))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the arrow keys work in input()
    print("Type an instruction; an empty line or Ctrl-D ends. Each one stands for itself.")
    with contextlib.suppress(EOFError):
        while text := input("\n> ").strip():
            try:
                _say(answer(text, context))
            except KeyboardInterrupt:  # ends the answer, not the conversation
                print(" …")


def classify_texts(directory: Path, texts: Sequence[str], as_json: bool) -> None:
    """Print the class and the probabilities of each text; without texts, of each line piped in.

    Raises:
        InputError: no classifier there, or nothing to classify.
    """
    if not texts or list(texts) == ["-"]:
        if sys.stdin.isatty():
            raise InputError("text: nothing to classify; give texts, or pipe in one a line")
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    model, tokenizer = load_classifier(_directory(directory, "finetune_classifier"))
    model.to(pick_device())
    data = ClassificationDataset(
        tokenizer.encode_batch(list(texts)),
        [0] * len(texts),  # unknown, and not looked at
        padding=tokenizer.eot,
        max_length=_longest(directory, model),
    )
    rows = classify(model, batches(data, _BATCH)).tolist() if texts else []
    for text, row in zip(texts, rows, strict=True):
        result = dict(sorted(zip(model.labels, row, strict=True), key=lambda item: -item[1]))
        label = next(iter(result))
        if as_json:
            print(_json({"text": text, "label": label, "probabilities": result}))
        else:
            shares = "  ".join(f"{name} {share:.1%}" for name, share in result.items())
            print(f"{label:<8} {shares}  {text}")


def _longest(directory: Path, model: GPTClassifier) -> int:
    """At how many tokens the training cut a text, where that is known."""
    try:
        training = json.loads((directory / "training.json").read_text(encoding="utf-8"))
        return int(training["max_length"])
    except (OSError, ValueError, KeyError, TypeError):
        return model.config.context_length


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
