"""Models on the command line: a base model continues text, an assistant answers, a classifier
classifies."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from gpt.base.errors import InputError
from gpt.base.files import read_json
from gpt.engine.decode import ENGINES, EngineName
from gpt.engine.int8 import quantize
from gpt.generation import Sampling, stream_text
from gpt.inference import classify
from gpt.model.device import pick_device
from gpt.model.model import GPT
from gpt.model.weights import load_base, load_classifier
from gpt.prompts import Template, encode_turns, last_prompt, read_template
from gpt.text.records import Instruction, Turn
from gpt.tokens.tokenizer import Tokenizer
from pipeline.show.terminal import say, say_json, say_result

NEW_CONVERSATION = "/new"
"""Typed instead of an instruction it ends a conversation and begins another."""


WeightPrecision = Literal["fp32", "bf16", "int8"]
"""bf16 is half the memory to read, so about twice the speed; its answers differ. int8 is half of
that again, on the CPU; only the compiled engine is faster with it."""


def _directory(path: Path, stage: str) -> Path:
    if not path.is_dir():
        raise InputError(f"{path}: no model there; make it with `gpt-pipeline run {stage}`")
    return path


def _load(path: Path, stage: str, precision: WeightPrecision) -> tuple[GPT, Tokenizer]:
    model, tokenizer = load_base(_directory(path, stage))
    if precision == "int8":
        return quantize(model), tokenizer
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return model.to(device=pick_device(), dtype=dtype), tokenizer


def _print_stream(pieces: Iterable[str]) -> None:
    for piece in pieces:
        say_result(piece, end="")
    say()


def generate(
    directory: Path,
    prompt: str,
    sampling: Sampling,
    *,
    precision: WeightPrecision = "fp32",
    engine: EngineName = "auto",
) -> None:
    """Print the prompt and the model's continuation.

    Raises:
        InputError: no model there, or an empty prompt.
        RunError: the compiled engine is asked for and cannot be had.
    """
    model, tokenizer = _load(directory, "pretrain", precision)
    pieces = stream_text(model, tokenizer, prompt, sampling, engine=ENGINES[engine])
    first = next(pieces, "")  # what cannot be continued is refused before anything is printed
    say_result(prompt + first, end="")
    _print_stream(pieces)


def _piped() -> str:
    """Standard input to its end.

    Raises:
        InputError: it cannot be read, or not as text.
    """
    try:
        text = sys.stdin.read()
        text.encode()
    except OSError as error:
        raise InputError(f"standard input: {error.strerror or error}; pipe in text") from None
    except UnicodeEncodeError as error:  # the command line reads other bytes as half characters
        line = text.count("\n", 0, error.start) + 1
        raise InputError(
            f"standard input: line {line} is not {sys.stdin.encoding}; convert it, as "
            "`iconv -f latin1` does"
        ) from None
    return text.removeprefix("\ufeff")


@dataclass(slots=True)
class Conversation:
    """The turns of a conversation, as prompts in the form that the model was trained on.

    Attributes:
        template: the model's own.
        tokenizer: the model's own.
        longest: tokens that a prompt may have.
        earlier: how many turns before the last one a prompt has.
        system: how the assistant is to behave.
        turns: all of them so far.
        dropped: turns that the last prompt had no room for, among the `earlier` ones.
    """

    template: Template
    tokenizer: Tokenizer
    longest: int
    earlier: int = 0
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    dropped: int = 0

    def prompt(self, instruction: str, context: str = "") -> list[int]:
        """The ids of the next prompt: the earlier turns that there is room for, and this one."""
        recent = self.turns[-self.earlier :] if self.earlier else []
        for self.dropped in range(len(recent) + 1):
            record = Instruction(
                instruction, context, "", tuple(recent[self.dropped :]), self.system
            )
            (turns,) = encode_turns(self.tokenizer, self.template, [record])
            ids = last_prompt(turns, self.tokenizer.eot)
            if len(ids) <= self.longest:
                break
        return ids

    def add(self, instruction: str, context: str, response: str) -> None:
        """Add a turn that is complete."""
        asked = f"{instruction}\n{context}" if context else instruction
        self.turns.append(Turn(asked, response))


def chat(
    directory: Path,
    instruction: str | None,
    context: str,
    sampling: Sampling,
    *,
    system: str = "",
    turns: int | None = None,
    precision: WeightPrecision = "fp32",
    engine: EngineName = "auto",
) -> None:
    """Answer one instruction, from the argument or a pipe; or hold a conversation with a person.

    Args:
        directory: the assistant's.
        instruction: what is asked; None reads it from a pipe, or each from the terminal.
        context: what every instruction is about.
        sampling: how tokens are chosen.
        system: how the assistant is to behave.
        turns: how many turns a prompt has at most, the last one among them; None is as many as it
            was trained on: an assistant that has only seen single instructions cannot use more.
        precision: of the weights.
        engine: what computes them.

    Raises:
        InputError: no assistant there, or an empty instruction.
        RunError: the compiled engine is asked for and cannot be had.
    """
    template = read_template(_directory(directory, "finetune_instruct"))
    if instruction is None and not sys.stdin.isatty():
        instruction = _piped().strip()
    model, tokenizer = _load(directory, "finetune_instruct", precision)
    turns = turns or _of_training(directory, "turns", 1)
    room = model.config.context_length - sampling.max_new_tokens
    conversation = Conversation(template, tokenizer, room, earlier=turns - 1, system=system)

    def answer(text: str, context: str) -> Iterator[str]:
        prompt = conversation.prompt(text, context)
        if dropped := conversation.dropped:
            say(f"(no room for the first {dropped} of what was said before)", file=sys.stderr)
        said = ""
        for piece in stream_text(model, tokenizer, prompt, sampling, engine=ENGINES[engine]):
            shown = piece if said else piece.lstrip()
            said += shown
            yield shown
        conversation.add(text, context, said.rstrip())

    if instruction is not None:
        if not instruction.strip():
            raise InputError("instruction: empty; give one as an argument or through a pipe")
        _print_stream(answer(instruction, context))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the arrow keys work in input()
    several = f"The last {turns} are read together; {NEW_CONVERSATION} forgets them."
    context_line = several if turns > 1 else "Each one stands for itself."
    say(f"Type an instruction; an empty line or Ctrl-D ends. {context_line}")
    with contextlib.suppress(EOFError):
        while text := input("\n> ").strip():
            if text == NEW_CONVERSATION:
                conversation.turns.clear()
                continue
            try:
                _print_stream(answer(text, context))
            except KeyboardInterrupt:  # ends the answer, not the conversation
                say(" …")


def classify_texts(directory: Path, texts: Sequence[str], as_json: bool) -> None:
    """Print the class and the probabilities of each text; without texts, of each line piped in.

    A line of output for a line of input, also where that is blank.

    Raises:
        InputError: no classifier there, or nothing to classify.
    """
    if not texts or list(texts) == ["-"]:
        if sys.stdin.isatty():
            raise InputError("text: nothing to classify; give texts, or pipe in one a line")
        piped = _piped()
        texts = piped.removesuffix("\n").split("\n") if piped else []
    model, tokenizer = load_classifier(_directory(directory, "finetune_classifier"))
    model.to(pick_device())
    longest = _of_training(directory, "max_length", model.config.context_length)
    rows = classify(model, tokenizer, texts, max_length=longest).tolist()
    for text, row in zip(texts, rows, strict=True):
        result = dict(sorted(zip(model.labels, row, strict=True), key=lambda item: -item[1]))
        label = next(iter(result))
        if as_json:
            say_json({"text": text, "label": label, "probabilities": result}, indent=None)
        else:
            shares = "  ".join(f"{name} {share:.1%}" for name, share in result.items())
            say_result(f"{label:<8} {shares}  {text}")


def _of_training(directory: Path, name: str, otherwise: int) -> int:
    """A number of `training.json`, where it has that."""
    try:
        value = read_json(directory / "training.json", missing="", remedy="")[name]
    except (InputError, KeyError):
        return otherwise
    return value if type(value) is int and value > 0 else otherwise
