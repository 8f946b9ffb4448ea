"""A training step: forward, backward, AdamW, the same batch for all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpt.naive import naive_copy
from bench.harness import (
    Comparison,
    Machine,
    Settings,
    compare_in_workers,
    peak_memory_of,
    seconds_of,
)
from bench.worker import Alternative, Job, as_ours
from gpt.batches.data import Batch
from gpt.batches.metrics import lm_loss_sum
from gpt.estimate import Counts, step_flops
from gpt.estimate import Shape as BatchShape
from gpt.model.config import GPT2_SIZES, GPTConfig
from gpt.model.device import Precision, autocast
from gpt.model.model import GPT
from gpt.model.parallel import SharedModel
from gpt.train.loop import Pass, accumulate, update
from gpt.train.recipe import TrainParams, make_optimizers

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

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.batch * self.config.context_length


def large_shape(settings: Settings) -> Shape:
    """GPT-2 124M with a short context, as it is trained where memory is."""
    if settings.quick:
        return shapes(settings)[0]
    return Shape("124M", replace(GPT2_SIZES["124M"], context_length=256), settings.batch)


def shapes(settings: Settings) -> list[Shape]:
    """The models to train; the small one is a usual size for a text of characters."""
    if settings.quick:
        tiny = GPTConfig(vocab_size=257, context_length=64, n_layer=2, n_head=4, n_embd=128)
        return [Shape("tiny", tiny, 4)]
    small = GPTConfig(vocab_size=65, context_length=256, n_layer=6, n_head=6, n_embd=384)
    return [Shape("small", small, 16), large_shape(settings)]


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """Our step against that of `transformers` and a textbook's, each shape in each precision."""
    for shape in shapes(settings):
        for precision in settings.precisions:
            yield _compare(shape, precision, settings, machine)


def _compare(
    shape: Shape, precision: Precision, settings: Settings, machine: Machine
) -> Comparison:
    return compare_steps(
        f"Training step, {shape.title}, {precision}",
        {
            "ours": Alternative(build=our_job, arguments=(shape, precision), setting=as_ours),
            "transformers": Alternative(build=_transformers_job, arguments=(shape, precision)),
            "naive loop": Alternative(build=_naive_job, arguments=(shape, precision)),
        },
        shape,
        precision,
        settings,
        machine,
    )


def compare_steps(
    title: str,
    alternatives: Mapping[str, Alternative],
    shape: Shape,
    precision: Precision,
    settings: Settings,
    machine: Machine,
) -> Comparison:
    """Alternatives of one training step, held against the matmul peak of `precision`."""
    peak = machine.matmul[DTYPES[precision]].of_a_comparison()
    length = shape.config.context_length
    with torch.device("meta"):
        counts = Counts(GPT(shape.config))
    runs = compare_in_workers(
        alternatives,
        settings,
        agree=lambda a, b: math.isclose(a, b, abs_tol=TOLERANCE[precision]),
        peaks=[peak],
    )
    return Comparison(
        title=title,
        work=shape.tokens,
        unit="tokens",
        seconds=seconds_of(runs),
        peak=peak,
        cost=step_flops(counts, BatchShape.full(1, length)) / length,
        columns={"peak memory": peak_memory_of(runs)},
    )


# --- in the workers -------------------------------------------------------------------------------


def start(shape: Shape) -> tuple[GPT, Batch]:
    """The same weights and the same batch in every worker."""
    torch.manual_seed(0)
    model = GPT(shape.config).train()
    length = shape.config.context_length
    windows = torch.randint(shape.config.vocab_size, (shape.batch, length + 1))  # (B, T + 1)
    return model, Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


def our_job(shape: Shape, precision: Precision) -> Job:
    """What `gpt.train.loop.fit` does in a step; a run gives the loss before it."""
    model, batch = start(shape)
    params = TrainParams(steps=1, precision=precision)
    shared, optimizers = SharedModel(model), make_optimizers(model, params)

    def step() -> float:
        loss = accumulate(shared, [Pass(batch)], lm_loss_sum, params)
        update(shared, optimizers, params)
        return loss.item()

    return Job(run=step)


def _transformers_job(shape: Shape, precision: Precision) -> Job:
    """What its Trainer does by default: fused AdamW, gradients clipped."""
    from bench.gpt.peers import transformers_copy  # only here: no other worker should hold it

    model, batch = start(shape)
    peer = transformers_copy(model).train()
    params = TrainParams(steps=1)
    (optimizer,) = make_optimizers(peer, params)

    def step() -> float:
        with autocast(CPU, precision):
            # the targets as they are: by itself it would shift the inputs and lose one a row
            loss: Tensor = peer(
                input_ids=batch.inputs,
                labels=batch.targets,
                shift_labels=batch.targets,
                use_cache=False,
            ).loss
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(peer.parameters(), params.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Job(run=step)


def _naive_job(shape: Shape, precision: Precision) -> Job:
    """The loop of a textbook: AdamW as it comes, nothing clipped."""
    model, batch = start(shape)
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

    return Job(run=step)
