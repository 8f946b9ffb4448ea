"""Words in, words out: a base model that goes on, an assistant that answers, a classifier."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
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
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import load_base, load_classifier
from gpt.prompts import Template, encode_turns, last_prompt, read_template
from gpt.text.records import Instruction, Turn
from gpt.tokens.tokenizer import Tokenizer
from pipeline.show.terminal import say, say_json, say_result

BEGIN_ANEW = "/new"
"""Typed in place of an instruction it ends a conversation and begins another."""


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
        say_result(piece, end="")
    say()


def generate(
    directory: Path,
    prompt: str,
    sampling: Sampling,
    *,
    precision: Precision = "fp32",
    engine: EngineName = "auto",
) -> None:
    """Print the prompt and what the model goes on with.

    Raises:
        InputError: no model there, or an empty prompt.
        RunError: the compiled engine is asked for and cannot be had.
    """
    model, tokenizer = _load_writer(directory, "pretrain", precision)
    pieces = stream_text(model, tokenizer, prompt, sampling, engine=ENGINES[engine])
    first = next(pieces, "")  # what cannot be continued is refused before anything is printed
    say_result(prompt + first, end="")
    _say(pieces)


def _piped() -> str:
    """What standard input holds to its end.

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


class Conversation:
    """What was said so far, as the model was taught to read it.

    Args:
        template: the model's own.
        tokenizer: the model's own.
        longest: tokens that a prompt may have.
        earlier: how many turns before the last one the model is reminded of.
        system: how the assistant is to behave.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        longest: int,
        *,
        earlier: int = 0,
        system: str = "",
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._longest = longest
        self._earlier = earlier
        self._system = system
        self._said: list[Turn] = []
        self.forgotten = 0
        """Turns that the last prompt had no room for, of those that it was to be reminded of."""

    def prompt(self, instruction: str, context: str = "") -> list[int]:
        """The ids of the next prompt: the earlier turns that there is room for, and this one."""
        remembered = self._said[-self._earlier :] if self._earlier else []
        for self.forgotten in range(len(remembered) + 1):
            record = Instruction(
                instruction, context, "", tuple(remembered[self.forgotten :]), self._system
            )
            (turns,) = encode_turns(self._tokenizer, self._template, [record])
            ids = last_prompt(turns, self._tokenizer.eot)
            if len(ids) <= self._longest:
                break
        return ids

    def heard(self, instruction: str, context: str, response: str) -> None:
        """Remember a turn."""
        asked = f"{instruction}\n{context}" if context else instruction
        self._said.append(Turn(asked, response))

    def begin_anew(self) -> None:
        """Forget all turns."""
        self._said.clear()


def turns_learnt(directory: Path) -> int:
    """How many turns the longest conversation had that an assistant was trained on."""
    return _training(directory, "turns", 1)


def chat(
    directory: Path,
    instruction: str | None,
    context: str,
    sampling: Sampling,
    *,
    system: str = "",
    turns: int | None = None,
    precision: Precision = "fp32",
    engine: EngineName = "auto",
) -> None:
    """Answer one instruction, from the argument or a pipe; or hold a conversation with a person.

    Args:
        directory: the assistant's.
        instruction: what is asked; None reads it from a pipe, or each from the terminal.
        context: what every instruction is about.
        sampling: how tokens are chosen.
        system: how the assistant is to behave.
        turns: how many turns it reads at most, the last one among them; None is as many as it was
            trained on: an assistant that has only seen single instructions makes nothing of more.
        precision: of the weights.
        engine: what computes them.

    Raises:
        InputError: no assistant there, or an empty instruction.
        RunError: the compiled engine is asked for and cannot be had.
    """
    template = read_template(_directory(directory, "finetune_instruct"))
    if instruction is None and not sys.stdin.isatty():
        instruction = _piped().strip()
    model, tokenizer = _load_writer(directory, "finetune_instruct", precision)
    turns = turns_learnt(directory) if turns is None else turns
    room = model.config.context_length - sampling.max_new_tokens
    conversation = Conversation(template, tokenizer, room, earlier=turns - 1, system=system)

    def answer(text: str, context: str) -> Iterator[str]:
        prompt = conversation.prompt(text, context)
        if conversation.forgotten:
            note = f"(no room for the first {conversation.forgotten} of what was said before)"
            say(note, file=sys.stderr)
        said = ""
        for piece in stream_text(model, tokenizer, prompt, sampling, engine=ENGINES[engine]):
            shown = piece if said else piece.lstrip()
            said += shown
            yield shown
        conversation.heard(text, context, said.rstrip())

    if instruction is not None:
        if not instruction.strip():
            raise InputError("instruction: empty; give one as an argument or through a pipe")
        _say(answer(instruction, context))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the arrow keys work in input()
    say(f"Type an instruction; an empty line or Ctrl-D ends. {_remembers(turns)}")
    with contextlib.suppress(EOFError):
        while text := input("\n> ").strip():
            if text == BEGIN_ANEW:
                conversation.begin_anew()
                continue
            try:
                _say(answer(text, context))
            except KeyboardInterrupt:  # ends the answer, not the conversation
                say(" …")


def _remembers(turns: int) -> str:
    if turns == 1:
        return "Each one stands for itself."
    return f"The last {turns} are read together; {BEGIN_ANEW} forgets them."


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
    rows = classify(model, tokenizer, texts, max_length=_longest(directory, model)).tolist()
    for text, row in zip(texts, rows, strict=True):
        result = dict(sorted(zip(model.labels, row, strict=True), key=lambda item: -item[1]))
        label = next(iter(result))
        if as_json:
            say_json({"text": text, "label": label, "probabilities": result}, indent=None)
        else:
            shares = "  ".join(f"{name} {share:.1%}" for name, share in result.items())
            say_result(f"{label:<8} {shares}  {text}")


def _longest(directory: Path, model: GPTClassifier) -> int:
    """At how many tokens the training cut a text, where that is known."""
    return _training(directory, "max_length", model.config.context_length)


def _training(directory: Path, name: str, otherwise: int) -> int:
    """A number of `training.json`, where it is known."""
    try:
        value = read_json(directory / "training.json", missing="", remedy="")[name]
    except (InputError, KeyError):
        return otherwise
    return value if type(value) is int and value > 0 else otherwise
