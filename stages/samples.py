"""Texts that a model writes while it is trained, for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt.generation import Sampling, complete
from gpt.model.model import GPT
from gpt.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:  # not every stage that takes samples reads records
    from gpt.text.records import Instruction

# Without the decoding engine, so that a sample does not depend on whether there is a compiler.


def continuation(model: GPT, tokenizer: Tokenizer, prompt: Sequence[int], n_tokens: int) -> str:
    """A prompt, given as token ids, with what the model adds to it."""
    sampling = Sampling(max_new_tokens=n_tokens, stop=(tokenizer.eot,))
    return tokenizer.decode([*prompt, *complete(model, [prompt], sampling)[0]])


def answers(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    records: Sequence[Instruction],
    n_tokens: int,
) -> str:
    """The last turns of the first records, whose prompts are given, and the model's answers."""
    sampling = Sampling(max_new_tokens=n_tokens, stop=(tokenizer.eot,))
    return "\n\n".join(
        f"{record.instruction}\n{record.input}".strip() + f"\n-> {tokenizer.decode(ids)}"
        for record, ids in zip(records, complete(model, prompts, sampling), strict=False)
    )
