"""Greedy generation: one stream, a batch, and how long the first token takes.

One stream also with our matrices in 8 bits, against our own bf16: no peer decodes these on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpt.training import DTYPES
from bench.harness import (
    Comparison,
    Machine,
    Settings,
    compare_in_workers,
    peak_memory_of,
    seconds_of,
)
from bench.worker import Alternative, Job, as_ours
from gpt.engine.int8 import quantize
from gpt.estimate import Counts
from gpt.inference import generate
from gpt.model.config import GPT2_SIZES, GPTConfig
from gpt.model.device import Precision
from gpt.model.model import GPT

# how far below the likeliest, by the fp32 model, a token may be that was chosen in bf16: the logits
# of random weights lie close together, and rounding puts them in another order
CLOSE = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """Which model continues what, and for how long."""

    name: str
    config: GPTConfig
    rows: int
    prompt: int
    new: int

    @property
    def title(self) -> str:
        """What a table says of it."""
        streams = "one stream" if self.rows == 1 else f"batch of {self.rows}"
        if self.new == 1:
            return f"First token, {self.name}, {streams}, prompt of {self.prompt} tokens"
        return f"Greedy generation, {self.name}, {streams}, {self.prompt} + {self.new} tokens"


def shapes(settings: Settings) -> list[Shape]:
    """One stream, a batch of eight, and the first token after a long prompt."""
    if settings.quick:
        tiny = GPTConfig(vocab_size=4096, context_length=64, n_layer=4, n_head=4, n_embd=256)
        return [
            Shape("tiny", tiny, 1, 8, 24),
            Shape("tiny", tiny, 8, 8, 24),
            Shape("tiny", tiny, 1, 48, 1),
        ]
    config = GPT2_SIZES["124M"]
    return [
        Shape("124M", config, 1, 32, 100),
        Shape("124M", config, 8, 32, 100),
        Shape("124M", config, 1, 512, 1),
    ]


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """Our decoding against that of `transformers`, each shape in each precision."""
    for shape in shapes(settings):
        for precision in settings.precisions:
            yield _compare(shape, precision, settings, machine)
        if shape.rows == 1 and shape.new > 1:
            yield _compare_int8(shape, settings)


def _compare_int8(shape: Shape, settings: Settings) -> Comparison:
    runs = compare_in_workers(
        {
            "ours, int8": Alternative(build=_int8_job, arguments=(shape,), setting=as_ours),
            "ours, bf16": Alternative(build=_our_job, arguments=(shape, "bf16"), setting=as_ours),
        },
        settings,
        agree=lambda int8, bf16: _agree(int8, bf16, shape, "bf16"),
    )
    return Comparison(
        title=f"{shape.title}, int8 weights",
        work=shape.rows * shape.new,
        unit="tokens",
        seconds=seconds_of(runs),
        columns={"peak memory": peak_memory_of(runs)},
    )


def _compare(
    shape: Shape, precision: Precision, settings: Settings, machine: Machine
) -> Comparison:
    first_token = shape.new == 1
    limit = machine.matmul[DTYPES[precision]] if first_token else machine.memory
    peak = limit.of_a_comparison()
    runs = compare_in_workers(
        {
            "ours": Alternative(build=_our_job, arguments=(shape, precision), setting=as_ours),
            "transformers": Alternative(build=_transformers_job, arguments=(shape, precision)),
        },
        settings,
        agree=lambda ours, theirs: _agree(ours, theirs, shape, precision),
        peaks=[peak],
    )
    return Comparison(
        title=f"{shape.title}, {precision}",
        # of a first token, what is worked through is the prompt
        work=shape.rows * (shape.prompt if first_token else shape.new),
        unit="prompt tokens" if first_token else "tokens",
        seconds=seconds_of(runs),
        peak=peak,
        cost=(
            flops_per_prompt_token(shape.config, shape.prompt)
            if first_token
            else bytes_per_token(shape, precision)
        ),
        columns={"peak memory": peak_memory_of(runs)},
    )


def bytes_per_token(shape: Shape, precision: Precision) -> float:
    """What must be read for a token of a row, half of the new ones being there already.

    Every weight but the position embeddings (the head being the token embeddings), once for all
    rows, and the keys and values of each layer.
    """
    config, length = shape.config, shape.prompt + shape.new / 2
    n_weights = _multiplied(config) / shape.rows
    return DTYPES[precision].itemsize * (n_weights + 2 * config.n_layer * config.n_embd * length)


def _multiplied(config: GPTConfig) -> int:
    with torch.device("meta"):
        return Counts(GPT(config)).multiplied


def flops_per_prompt_token(config: GPTConfig, length: int) -> float:
    """What must be computed for a token of a prompt: 2 a parameter but those of the head.

    The head is needed for the last position only; attention as if every position saw all others.
    """
    n_params = _multiplied(config) - config.vocab_size * config.n_embd
    return 2 * n_params + 4 * config.n_layer * config.n_embd * length


def _agree(
    ours: list[list[int]], theirs: list[list[int]], shape: Shape, precision: Precision
) -> bool:
    """In fp32 the same tokens; in bf16 as many, each the likeliest but for rounding."""
    if precision == "fp32":
        return ours == theirs
    model, idx = _start(shape)
    return len(ours[0]) == len(theirs[0]) == shape.prompt + shape.new and all(
        _likeliest(model, idx, torch.tensor(tokens)) for tokens in (ours, theirs)
    )


@torch.no_grad()
def _likeliest(model: GPT, idx: Tensor, tokens: Tensor) -> bool:
    """Whether each of `tokens` (B, T + n) behind `idx` (B, T) is the likeliest, or close to it."""
    rows, length = idx.shape
    if tokens.shape[0] != rows or not torch.equal(tokens[:, :length], idx):
        return False
    logits = model.head(model.hidden(tokens[:, :-1])[:, length - 1 :])  # (B, n, V)
    chosen = logits.gather(2, tokens[:, length:, None])[..., 0]  # (B, n)
    return bool((logits.amax(2) - chosen <= CLOSE).all())


# --- in the workers -------------------------------------------------------------------------------


def _start(shape: Shape) -> tuple[GPT, Tensor]:
    """The same weights and the same prompts (B, T) in every worker."""
    torch.manual_seed(0)
    model = GPT(shape.config).eval()
    return model, torch.randint(shape.config.vocab_size, (shape.rows, shape.prompt))


def _our_job(shape: Shape, precision: Precision) -> Job:
    model, idx = _start(shape)
    model = model.to(DTYPES[precision])
    return Job(
        # waits for the compiler in the run that does not count, if it has to
        run=lambda: generate(model, idx, shape.new, engine="compiled"),
        report=Tensor.tolist,
    )


def _int8_job(shape: Shape) -> Job:
    model, idx = _start(shape)
    small = quantize(model)
    return Job(
        run=lambda: generate(small, idx, shape.new, engine="compiled"),
        report=Tensor.tolist,
    )


def _transformers_job(shape: Shape, precision: Precision) -> Job:
    from bench.gpt.peers import transformers_copy  # only here: no other worker should hold it

    model, idx = _start(shape)
    peer = transformers_copy(model).eval().to(DTYPES[precision])  # type: ignore[no-untyped-call]
    mask = torch.ones_like(idx)

    def run() -> Tensor:
        tokens: Tensor = peer.generate(
            idx, attention_mask=mask, max_new_tokens=shape.new, do_sample=False
        )
        return tokens

    return Job(run=run, report=Tensor.tolist)
