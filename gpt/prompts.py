"""How an instruction or a conversation is put to a model: a table of templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gpt.errors import InputError

if TYPE_CHECKING:
    from gpt.text import Instruction
    from gpt.tokenizer import Tokenizer

TemplateName = Literal["alpaca", "phi3"]


@dataclass(frozen=True, slots=True)
class Template:
    """The pieces of a prompt; the model's response follows directly.

    `<|endoftext|>` ends a response, the next turn's prompt comes behind it.

    Attributes:
        opening: begins a conversation.
        system: holds `{system}`; in the place of the opening where there is one.
        again: begins every further turn.
        instruction: holds `{instruction}`.
        input: holds `{input}`; left out where there is none.
        response: announces the response.
    """

    opening: str
    system: str
    again: str
    instruction: str
    input: str
    response: str


TEMPLATES: dict[str, Template] = {
    # Stanford Alpaca's, as "Build a Large Language Model (From Scratch)" words it (chapter 7).
    "alpaca": Template(
        opening=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
        ),
        system="{system}\n\n",
        again="\n\n",
        instruction="### Instruction:\n{instruction}",
        input="\n\n### Input:\n{input}",
        response="\n\n### Response:\n",
    ),
    # Phi-3's, far shorter.
    "phi3": Template(
        opening="",
        system="<|system|>\n{system}\n",
        again="",
        instruction="<|user|>\n{instruction}",
        input="\n{input}",
        response="\n<|assistant|>\n",
    ),
}


def render_prompt(template: str, instruction: str, input: str = "") -> str:
    """The prompt for an instruction, up to where the response begins.

    Raises:
        InputError: there is no template of that name.
    """
    return render_prompts(template, [instruction], input)[0]


def render_prompts(
    template: str, instructions: Sequence[str], input: str = "", system: str = ""
) -> list[str]:
    """The prompt of every turn of a conversation, each up to where its response begins.

    Args:
        template: the name of one of `TEMPLATES`.
        instructions: what is asked in each turn.
        input: what the last of them is to be done on.
        system: how the assistant is to behave.

    Raises:
        InputError: there is no template of that name.
    """
    if template not in TEMPLATES:
        raise InputError(f"template: no {template!r}; there are {', '.join(TEMPLATES)}")
    pieces = TEMPLATES[template]
    prompts = []
    for turn, instruction in enumerate(instructions, start=1):
        if turn > 1:
            prompt = pieces.again
        else:
            prompt = pieces.system.format(system=system) if system.strip() else pieces.opening
        prompt += pieces.instruction.format(instruction=instruction)
        if input and turn == len(instructions):
            prompt += pieces.input.format(input=input)
        prompts.append(prompt + pieces.response)
    return prompts


def encode_turns(
    tokenizer: Tokenizer, template: str, records: Sequence[Instruction]
) -> list[list[tuple[list[int], list[int]]]]:
    """The token ids of every record's turns: of each prompt as rendered, and of its response.

    Raises:
        InputError: there is no template of that name.
    """
    prompts: list[str] = []
    responses: list[str] = []
    for record in records:
        asked = [*(turn.prompt for turn in record.earlier), record.instruction]
        prompts += render_prompts(template, asked, record.input, record.system)
        responses += [*(turn.response for turn in record.earlier), record.output]
    ids = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(responses), strict=True)
    return [[next(ids) for _ in range(len(record.earlier) + 1)] for record in records]


def last_prompt(turns: Sequence[tuple[Sequence[int], Sequence[int]]], end: int) -> list[int]:
    """The ids up to where the last response begins, with the earlier turns as they were.

    Args:
        turns: the ids of each prompt and its response.
        end: the id of `<|endoftext|>`.
    """
    *earlier, (prompt, _) = turns
    return [*(i for before, response in earlier for i in (*before, *response, end)), *prompt]
