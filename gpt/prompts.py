"""How an instruction or a conversation is put to a model: a table of templates.

A model carries the template that it was trained with in its `prompt.json`, and the same in Jinja in
its `tokenizer_config.json`, which `transformers` and other runtimes of that layout read. So
prompts have the same format in use as in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt.base.errors import InputError
from gpt.base.files import read_json

if TYPE_CHECKING:
    from gpt.text.records import Instruction
    from gpt.tokens.tokenizer import Tokenizer

TemplateName = Literal["alpaca", "phi3", "chatml"]

PROMPT_FILE = "prompt.json"
TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The pieces of a prompt; the model's response follows directly.

    `<|endoftext|>` ends a response, the next turn's prompt comes behind it.

    Attributes:
        template: its name.
        opening: begins a conversation.
        system: holds `{system}`; in the place of the opening where there is one.
        again: begins every further turn.
        instruction: holds `{instruction}`.
        input: holds `{input}`; left out where there is none.
        response: announces the response.
    """

    template: str
    opening: str
    system: str
    again: str
    instruction: str
    input: str
    response: str

    @property
    def files(self) -> dict[str, Any]:
        """What a model directory says of it: file name to JSON value."""
        return {PROMPT_FILE: asdict(self), TOKENIZER_FILE: {"chat_template": _jinja(self)}}


TEMPLATES: dict[str, Template] = {
    each.template: each
    for each in (
        # Stanford Alpaca's, as "Build a Large Language Model (From Scratch)" words it (chapter 7).
        Template(
            template="alpaca",
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
        Template(
            template="phi3",
            opening="",
            system="<|system|>\n{system}\n",
            again="",
            instruction="<|user|>\n{instruction}",
            input="\n{input}",
            response="\n<|assistant|>\n",
        ),
        # OpenAI's ChatML. Its marks are text to GPT-2's vocabulary, and what ends the assistant's
        # own turn is the end that the vocabulary has.
        Template(
            template="chatml",
            opening="",
            system="<|im_start|>system\n{system}<|im_end|>\n",
            again="\n",
            instruction="<|im_start|>user\n{instruction}",
            input="\n\n{input}",
            response="<|im_end|>\n<|im_start|>assistant\n",
        ),
    )
}


def find_template(template: str | Template) -> Template:
    """The template of that name, or the one that is given.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise InputError(f"template: no {template!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def read_template(directory: Path) -> Template:
    """The template that a model was trained with, from its `prompt.json`.

    A file that only names one means that of the table here.

    Raises:
        InputError: there is no such file, so the model follows no instructions; or it does not
            hold a template.
    """
    path = directory / PROMPT_FILE
    value = read_json(
        path,
        missing="not there, so this model follows no instructions; take one that the stage "
        "finetune_instruct made",
        remedy="run the fine-tuning again",
    )
    names = [each.name for each in fields(Template)]
    if list(value) == ["template"]:
        try:
            return find_template(str(value["template"]))
        except InputError as error:
            raise InputError(f"{path}: {error}; run the fine-tuning again") from None
    if not all(isinstance(value.get(name), str) for name in names):
        raise InputError(
            f"{path}: must be JSON with the texts {', '.join(names)}, or that names a template, as "
            '{"template": "alpaca"}; run the fine-tuning again'
        )
    template = Template(**{name: value[name] for name in names})
    for name in ("system", "instruction", "input"):
        if not re.fullmatch(rf"[^{{}}]*\{{{name}\}}[^{{}}]*", getattr(template, name)):
            raise InputError(
                f"{path}: {name}: must hold {{{name}}} once and no other braces; "
                "run the fine-tuning again"
            )
    return template


def render_prompt(template: str | Template, instruction: str, input: str = "") -> str:
    """The prompt for an instruction, up to where the response begins.

    Raises:
        InputError: there is no template of that name.
    """
    return render_prompts(template, [instruction], input)[0]


def render_prompts(
    template: str | Template, instructions: Sequence[str], input: str = "", system: str = ""
) -> list[str]:
    """The prompt of every turn of a conversation, each up to where its response begins.

    Args:
        template: one of `TEMPLATES` by name, or one that a model brought along.
        instructions: what is asked in each turn.
        input: what the last of them is to be done on.
        system: how the assistant is to behave.

    Raises:
        InputError: there is no template of that name.
    """
    pieces = find_template(template)
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
    tokenizer: Tokenizer, template: str | Template, records: Sequence[Instruction]
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


def _jinja(template: Template) -> str:
    """The template in Jinja, over messages of a role and a content.

    `transformers`' page "Chat templates" describes the format. An instruction's input is part of
    the content there.
    """
    pieces = {name: json.dumps(value) for name, value in asdict(template).items()}
    around: Mapping[str, tuple[str, str]] = {
        name: tuple(json.dumps(text) for text in getattr(template, name).split(f"{{{name}}}"))  # type: ignore[misc]
        for name in ("system", "instruction")
    }
    return (
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        f"{{{{- {around['system'][0]} + messages[0]['content'] + {around['system'][1]} -}}}}"
        "{%- set turns = messages[1:] -%}"
        "{%- else -%}"
        f"{{{{- {pieces['opening']} -}}}}"
        "{%- set turns = messages -%}"
        "{%- endif -%}"
        "{%- for message in turns -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- {pieces['again']} if not loop.first else '' -}}}}"
        f"{{{{- {around['instruction'][0]} + message['content'] + {around['instruction'][1]} "
        f"+ {pieces['response']} -}}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- message['content'] + '<|endoftext|>' -}}"
        "{%- else -%}"
        "{{- raise_exception('a conversation has the roles user and assistant in turn, and system "
        "at its beginning') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
