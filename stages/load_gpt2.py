"""Load published GPT-2 weights as a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.config import GPT2_SIZES
from gpt.device import prepare
from gpt.errors import InputError
from gpt.events import Log, Message, Text, discard
from gpt.files import write_json
from gpt.generate import Sampling, complete
from gpt.weights import load_base, save_model


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class LoadGPT2Params:
    """What is expected of the files, and the sample that shows that they work."""

    size: Literal["any", "124M", "355M", "774M", "1558M"] = "any"
    """Refuse files of another size; `any` takes what config.json says."""
    sample_prompt: Annotated[str, Field(min_length=1)] = "Every effort moves you"
    sample_tokens: Annotated[int, Field(gt=0)] = 40


def load_gpt2(
    params: LoadGPT2Params, *, weights: Path, out: Path, metrics: Path, log: Log = discard
) -> dict[str, float]:
    """Check published files tensor by tensor and write them as a model directory in fp32.

    Args:
        params: what is expected.
        weights: a folder in Hugging Face's GPT-2 layout, with its vocabulary files.
        out: the model directory to write.
        metrics: the figures, written as JSON.
        log: hears what goes on, and a greedy continuation of `sample_prompt`.

    Returns:
        The figures: parameters, layers, width, context length, vocabulary size.

    Raises:
        InputError: a file is missing or damaged, a tensor is missing, unknown or of another
            shape, or the model is of another size than `params.size`.
    """
    prepare("cpu")
    model, tokenizer = load_base(weights)
    config = model.config
    if params.size != "any":
        wanted = GPT2_SIZES[params.size]
        if (config.n_layer, config.n_embd) != (wanted.n_layer, wanted.n_embd):
            raise InputError(
                f"{weights}: {config.n_layer} layers of width {config.n_embd}, but "
                f"load_gpt2.size is {params.size} ({wanted.n_layer} of {wanted.n_embd}); "
                "correct download.gpt2 or load_gpt2.size"
            )
    prompt = tokenizer.encode(params.sample_prompt)
    sampling = Sampling(max_new_tokens=params.sample_tokens, stop=(tokenizer.eot,))
    # the plain engine: the same text whether or not there is a compiler
    added = complete(model, [prompt], sampling, engine="plain")[0]
    log(Message(f"load_gpt2: {model.n_params:,} parameters in {config.n_layer} layers"))
    log(Text("samples/greedy.txt", tokenizer.decode(prompt + added)))
    final = {
        "parameters": float(model.n_params),
        "n_layer": float(config.n_layer),
        "n_embd": float(config.n_embd),
        "context_length": float(config.context_length),
        "vocab_size": float(config.vocab_size),
    }
    save_model(model, out, tokenizer=tokenizer)
    write_json(metrics, final)
    return final
