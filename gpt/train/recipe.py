"""The recipe of a training run: its parameters, its learning-rate schedule, its optimizers.

AdamW: Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization". Muon: `gpt.train.muon`.
Warm-up and cosine decay as in GPT-3 (Brown et al., 2020, appendix B); warm-up-stable-decay: Hu et
al. (2024), "MiniCPM".
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pydantic
import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn

from gpt.model.config import Batch, NotNegative, Positive, Seed, Threads
from gpt.model.device import DeviceName, Precision
from gpt.train.muon import Muon

Devices = Literal["auto"] | Annotated[int, Field(gt=0, le=64)]


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid")
)
class TrainParams:
    """The parameters of the training loop.

    Raises:
        pydantic.ValidationError (a ValueError): an impossible value, or not exactly one of
            `steps` and `epochs`.
    """

    seed: Seed = 123
    device: DeviceName = "auto"
    precision: Precision = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    """Let torch.compile translate the blocks; `auto` does on CUDA."""
    threads: Threads = 0
    """CPU threads of a process; 0 is every core, shared among the processes of the machine. Part
    of what makes two runs equal to the byte."""
    devices: Devices = 1
    """Processes, each with a device of its own, that share the rows of every step; `auto` is every
    CUDA device of the machine."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several devices hold the model: each all of it, or each a part (FSDP2)."""
    batch_size: Batch = 8
    """Rows in one pass through the model."""
    accumulation: Batch = 1
    """Passes to one optimizer step: the step sees batch_size x accumulation rows, on however many
    devices."""
    group_by_length: bool = False
    """Make batches of rows of like length, so that little of them is padding. Not for texts whose
    length tells their class."""
    steps: Positive | None = None
    epochs: Positive | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` takes the matrices of the blocks; AdamW keeps embeddings, head, biases and norms."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    muon_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Muon's own peak, on the same schedule; None is `learning_rate`, which suits both since
    Muon's step is scaled to the size of AdamW's."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: half a cosine or a straight line down to `min_learning_rate`, no change,
    or no change and then a straight line over the last `decay_share` of the steps."""
    warmup_steps: NotNegative = 0
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """The largest norm of the gradient; 0 leaves it as it is."""
    eval_interval: Positive = 50
    """Steps between two evaluations; the last step always has one."""
    patience: Positive | None = None
    """Stop after so many evaluations in a row without a lower validation loss."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run ends with: those of the lowest validation loss, or the last ones."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between two saves of the whole state, which wait for the end of a step. This is the
    most work that SIGKILL can lose."""

    @model_validator(mode="after")
    def _possible(self) -> TrainParams:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps, epochs: give exactly one of the two")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: {self.min_learning_rate} is above learning_rate = "
                f"{self.learning_rate}; use at most that"
            )
        return self

    @property
    def rows(self) -> int:
        """Rows in one optimizer step."""
        return self.batch_size * self.accumulation


def learning_rate_at(step: int, params: TrainParams, total_steps: int) -> float:
    """The learning rate of step `step`, counted from 0, of `total_steps`.

    Rises linearly over the warm-up, then follows the schedule; where that falls, the last step
    has `min_learning_rate`.
    """
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    start = params.warmup_steps
    if params.schedule == "wsd":
        falling = max(1, round(total_steps * params.decay_share))
        start = max(start, total_steps - 1 - falling)
    done = (step - start) / max(1, total_steps - 1 - start)
    done = min(1.0, max(0.0, done))
    left = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "wsd": 1 - done,
    }[params.schedule]
    return params.min_learning_rate + left * (params.learning_rate - params.min_learning_rate)


def make_optimizers(model: nn.Module, params: TrainParams) -> list[torch.optim.Optimizer]:
    """The optimizers of what is trainable; every parameter is in exactly one of them.

    Matrices and embeddings decay, biases and norms do not. `set_learning_rate` tells each group
    its rate.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = [
        p
        for name, p in trainable.items()
        if params.optimizer == "muon" and name.startswith("h.") and p.dim() == 2
    ]
    taken = {id(p) for p in muon}
    rest = [p for p in trainable.values() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": params.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{**group, "share": 1.0} for group in groups],
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            fused=True,
        )
    ]
    if muon:
        peak = params.muon_learning_rate or params.learning_rate
        optimizers.append(
            Muon(
                [{"params": muon, "share": peak / params.learning_rate}],
                lr=peak,
                weight_decay=params.weight_decay,
                momentum=params.muon_momentum,
            )
        )
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Give every group its share of `rate` for the coming step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
