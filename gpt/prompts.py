"""How an instruction is put to a model: a table of templates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpt.errors import InputError

TemplateName = Literal["alpaca", "phi3"]


@dataclass(frozen=True, slots=True)
class Template:
    """The pieces of a prompt; the model's response follows directly.

    Attributes:
        instruction: holds `{instruction}`.
        input: holds `{input}`; left out where there is none.
        response: announces the response.
    """

    instruction: str
    input: str
    response: str


TEMPLATES: dict[str, Template] = {
    # Stanford Alpaca's, as "Build a Large Language Model (From Scratch)" words it (chapter 7).
    "alpaca": Template(
        instruction=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
            "\n\n### Instruction:\n{instruction}"
        ),
        input="\n\n### Input:\n{input}",
        response="\n\n### Response:\n",
    ),
    # Phi-3's, far shorter.
    "phi3": Template(
        instruction="<|user|>\n{instruction}", input="\n{input}", response="\n<|assistant|>\n"
    ),
}


def render_prompt(template: str, instruction: str, input: str = "") -> str:
    """The prompt for an instruction, up to where the response begins.

    Raises:
        InputError: there is no template of that name.
    """
    if template not in TEMPLATES:
        raise InputError(f"template: no {template!r}; there are {', '.join(TEMPLATES)}")
    pieces = TEMPLATES[template]
    prompt = pieces.instruction.format(instruction=instruction)
    if input:
        prompt += pieces.input.format(input=input)
    return prompt + pieces.response
