"""Words in, words out: a base model that goes on, an assistant that answers, a classifier."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.data import ClassificationDataset, batches
from gpt.device import pick_device
from gpt.errors import InputError
from gpt.generate import stream
from gpt.metrics import classify
from gpt.model import GPT, GPTClassifier
from gpt.prompts import render_prompt
from gpt.tokenizer import Tokenizer
from gpt.weights import load_base, load_classifier

_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen, and when to stop; see `gpt.generate`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer; none of them is part of it."""


def _directory(path: Path, stage: str) -> Path:
    if not path.is_dir():
        raise InputError(f"{path}: no model there; make it with `gpt-pipeline run {stage}`")
    return path


def _load_writer(path: Path, stage: str) -> tuple[GPT, Tokenizer]:
    model, tokenizer = load_base(_directory(path, stage))
    return model.to(pick_device()), tokenizer


def continuation(
    model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling
) -> Iterator[str]:
    """What the model writes after `prompt`, in pieces as they come.

    Raises:
        InputError: an empty prompt or an impossible setting.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be many tokens
    hold = max((len(text) - 1 for text in sampling.stop), default=0)
    held = ""  # what may be the beginning of a stop text
    tokens = stream(
        model,
        [tokenizer.encode(prompt)],
        sampling.max_new_tokens,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        tokenizer.eot,
        sampling.seed,
    )
    for (token,) in tokens:
        if token is None or token == tokenizer.eot:
            break
        held += decoder.decode(tokenizer.decode_bytes([token]))
        ends = [at for text in sampling.stop if (at := held.find(text)) >= 0]
        if ends:
            yield held[: min(ends)]
            return
        if len(held) > hold:
            yield held[: len(held) - hold]
            held = held[len(held) - hold :]
    yield held + decoder.decode(b"", final=True)


def _say(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def generate(directory: Path, prompt: str, sampling: Sampling) -> None:
    """Print the prompt and what the model goes on with.

    Raises:
        InputError: no model there, or an impossible setting.
    """
    model, tokenizer = _load_writer(directory, "pretrain")
    pieces = continuation(model, tokenizer, prompt, sampling)
    first = next(pieces, "")  # an impossible setting is refused before anything is printed
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


def chat(directory: Path, instruction: str | None, context: str, sampling: Sampling) -> None:
    """Answer one instruction, from the argument or a pipe; or each that a person types.

    Every instruction stands for itself: the templates have one turn.

    Raises:
        InputError: no assistant there, or an impossible setting.
    """
    template = _template(directory)
    if instruction is None and not sys.stdin.isatty():
        instruction = sys.stdin.read().strip()
    model, tokenizer = _load_writer(directory, "finetune_instruct")

    def answer(text: str, context: str) -> Iterator[str]:
        pieces = continuation(model, tokenizer, render_prompt(template, text, context), sampling)
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
