"""A training step: forward, backward, AdamW, the same batch for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import Comparison, Machine, Settings, alternate
from bench.naive import naive_copy
from bench.peers import transformers_copy
from gpt.config import GPT2_SIZES, GPTConfig
from gpt.data import Batch
from gpt.device import Precision, autocast
from gpt.metrics import lm_loss_sum
from gpt.model import GPT
from gpt.train import TrainParams, make_optimizer

CPU = torch.device("cpu")
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
# how far first losses may be apart: rounding, and in bf16 that layers round at different places
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 2e-2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and how many rows, each as long as its context, it is trained on."""

    name: str
    config: GPTConfig
    batch: int

    @property
    def title(self) -> str:
        """What a table says of it."""
        config = self.config
        return (
            f"{self.name} ({config.n_layer} layers, width {config.n_embd}, vocabulary "
            f"{config.vocab_size:,}), {self.batch} x {config.context_length} tokens"
        )


def shapes(settings: Settings) -> list[Shape]:
    """The models to train; the small one is a usual size for a text of characters."""
    if settings.quick:
        tiny = GPTConfig(vocab_size=257, context_length=64, n_layer=2, n_head=4, n_embd=128)
        return [Shape("tiny", tiny, 4)]
    small = GPTConfig(vocab_size=65, context_length=256, n_layer=6, n_head=6, n_embd=384)
    return [
        Shape("small", small, 16),
        Shape("124M", replace(GPT2_SIZES["124M"], context_length=256), settings.batch),
    ]


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """Our step against that of `transformers` and a textbook's, each shape in each precision."""
    for shape in shapes(settings):
        for precision in ("fp32", "bf16"):
            yield _compare(shape, precision, settings, machine)


def flops_per_token(model: GPT, length: int) -> float:
    """What a step computes for a token: 6 a parameter, and attention over `length` positions.

    Forward 2 and backward 4 for each parameter in a matrix product, all but the position
    embeddings in a model whose head is tied; attention's two products as if every position saw
    all others, as is usual (Chowdhery et al., 2022, "PaLM", appendix B).
    """
    config = model.config
    n_params = model.n_params - model.wpe.weight.numel()
    return 6 * n_params + 12 * config.n_layer * config.n_embd * length


def _compare(
    shape: Shape, precision: Precision, settings: Settings, machine: Machine
) -> Comparison:
    torch.manual_seed(0)
    model = GPT(shape.config).train()
    length = shape.config.context_length
    windows = torch.randint(shape.config.vocab_size, (shape.batch, length + 1))  # (B, T + 1)
    batch = Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
    peak = machine.matmul[DTYPES[precision]]
    seconds = alternate(
        {
            "ours": _our_step(model, batch, precision),
            "transformers": _transformers_step(model, batch, precision),
            "naive loop": _naive_step(model, batch, precision),
        },
        settings.rounds,
        agree=lambda a, b: math.isclose(a, b, abs_tol=TOLERANCE[precision]),
        peak=peak,
    )
    return Comparison(
        title=f"Training step, {shape.title}, {precision}",
        work=batch.inputs.numel(),
        unit="tokens",
        seconds=seconds,
        peak=peak,
        cost=flops_per_token(model, length),
    )


def _our_step(model: GPT, batch: Batch, precision: Precision) -> Callable[[], float]:
    def mean_loss() -> Tensor:
        summed, targets = lm_loss_sum(model, batch)
        return summed / targets

    return _step(model, mean_loss, precision)


def _transformers_step(model: GPT, batch: Batch, precision: Precision) -> Callable[[], float]:
    """What its Trainer does by default: fused AdamW, gradients clipped."""
    peer = transformers_copy(model).train()

    def mean_loss() -> Tensor:
        # the targets as they are: by itself it would shift the inputs and lose one a row
        out = peer(
            input_ids=batch.inputs,
            labels=batch.targets,
            shift_labels=batch.targets,
            use_cache=False,
        )
        loss: Tensor = out.loss
        return loss

    return _step(peer, mean_loss, precision)


def _step(
    model: nn.Module, mean_loss: Callable[[], Tensor], precision: Precision
) -> Callable[[], float]:
    """A step as `gpt.train.fit` takes it; the call returns the loss before it."""
    params = TrainParams(steps=1)
    optimizer = make_optimizer(model, params)
    trainable = list(model.parameters())

    def step() -> float:
        with autocast(CPU, precision):
            mean = mean_loss()
        mean.backward()  # type: ignore[no-untyped-call]
        loss = mean.item()
        nn.utils.clip_grad_norm_(trainable, params.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def _naive_step(model: GPT, batch: Batch, precision: Precision) -> Callable[[], float]:
    """The loop of a textbook: AdamW as it comes, nothing clipped."""
    peer = naive_copy(model).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=5e-4, weight_decay=0.1)

    def step() -> float:
        optimizer.zero_grad()
        with autocast(CPU, precision):
            logits = peer(batch.inputs)  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step
