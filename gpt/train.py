"""THE training loop: one `fit` for pretraining, classification and instruction tuning.

A step is a pure function of the state before it and of its number: which rows it sees comes from
(seed, step), its dropout from a generator seeded with (seed, step), its learning rate from the
step alone. So a run that was stopped and continued is the run that never stopped, byte for byte.

AdamW: Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization"; warm-up and cosine
decay as in GPT-3 (Brown et al., 2020, appendix B).
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import pandas as pd
import pydantic
import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from gpt.checkpoint import load_state, save_state
from gpt.data import Batch, Dataset, batch_indices, take
from gpt.device import DeviceName, Precision, autocast
from gpt.errors import InputError, RunError
from gpt.events import Log, Message, Metrics, Progress, Text, discard
from gpt.files import whole_file

LossSum = Callable[[Any, Batch], tuple[Tensor, int]]
"""Model and batch to the summed loss in nats (a scalar) and the number of targets in it."""


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid")
)
class TrainParams:
    """Everything the loop can be told.

    Raises:
        pydantic.ValidationError (a ValueError): an impossible value, or not exactly one of
            `steps` and `epochs`.
    """

    seed: Annotated[int, Field(ge=0)] = 123
    device: DeviceName = "auto"
    precision: Precision = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 is every core. Part of what makes two runs equal to the byte."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Rows in one pass through the model."""
    accumulation: Annotated[int, Field(gt=0)] = 1
    """Passes to one optimizer step: the step sees batch_size x accumulation rows."""
    group_by_length: bool = False
    """Make batches of rows of like length, so that little of them is padding. Not for texts whose
    length tells their class."""
    steps: Annotated[int, Field(gt=0)] | None = None
    epochs: Annotated[int, Field(gt=0)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """The largest norm of the gradient; 0 leaves it as it is."""
    eval_interval: Annotated[int, Field(gt=0)] = 50
    """Steps between two evaluations; the last step always has one."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run ends with: those of the lowest validation loss, or the last ones."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0

    @model_validator(mode="after")
    def _one_length(self) -> TrainParams:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps, epochs: give exactly one of the two")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: {self.min_learning_rate} is above learning_rate = "
                f"{self.learning_rate}; use at most that"
            )
        return self


@dataclass(slots=True)
class FitResult:
    """How a training run went."""

    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    """One row an evaluation: step, train_loss (mean since the last), what was measured, …"""

    def write_history(self, path: Path) -> None:
        """Write the history as CSV, a column a quantity."""
        with whole_file(path) as partial:
            pd.DataFrame(self.history).to_csv(partial, index=False)

    @property
    def best(self) -> dict[str, float]:
        """The row of the lowest validation loss."""
        return min(self.history, key=lambda row: row["validation_loss"])


class Interrupted(KeyboardInterrupt):
    """A signal stopped the training; its step was finished, its state saved.

    `signal` is the signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def learning_rate_at(step: int, params: TrainParams, total_steps: int) -> float:
    """The learning rate of step `step`, counted from 0, of `total_steps`.

    Rises linearly over the warm-up, then falls along half a cosine to `min_learning_rate`,
    which the last step reaches; or stays.
    """
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    if params.schedule == "constant":
        return params.learning_rate
    done = (step - params.warmup_steps) / max(1, total_steps - 1 - params.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return params.min_learning_rate + cosine * (params.learning_rate - params.min_learning_rate)


def make_optimizer(model: nn.Module, params: TrainParams) -> torch.optim.AdamW:
    """AdamW over what is trainable: matrices and embeddings decay, biases and norms do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {
                "params": [p for p in trainable if p.dim() >= 2],
                "weight_decay": params.weight_decay,
            },
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        fused=True,
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    loss: LossSum,
    params: TrainParams,
) -> Tensor:
    """One optimizer step on the mean loss over all targets of `batches`.

    Many small batches give the step of one big one. Nothing here waits for the device.

    Args:
        model: in training mode; its gradients are None before and after.
        optimizer: over what of it is trained, its learning rate set.
        batches: the passes of the step, on the CPU.
        loss: the summed loss of a batch and its number of targets.
        params: precision and clipping.

    Returns:
        The mean loss in nats and the norm of its gradient before clipping, (2,) in fp32.
    """
    device = next(model.parameters()).device
    targets = max(1, sum(batch.n_targets for batch in batches))
    total = torch.zeros((), device=device)
    # one context for all passes: within it a weight is cast only once
    with autocast(device, params.precision):
        for batch in batches:
            summed, _ = loss(model, batch.to(device))
            mean = summed / targets
            with torch.autocast(device.type, enabled=False):
                mean.backward()  # type: ignore[no-untyped-call]
            total += mean.detach()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if params.grad_clip and (device.type != "cpu" or norm > params.grad_clip):
        # on a CPU it costs nothing to look first, and a pass over all gradients not to
        nn.utils.clip_grads_with_norm_(trained, params.grad_clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack((total, norm))


def fit(
    model: nn.Module,
    *,
    params: TrainParams,
    train: Dataset,
    loss: LossSum,
    validate: Callable[[], Mapping[str, float]],
    sample: Callable[[], str] | None = None,
    task: str = "train",
    state: Path | None = None,
    log: Log = discard,
) -> FitResult:
    """Train `model` in place and leave it in evaluation mode.

    Args:
        model: on its device; parameters that do not require gradients are left alone.
        params: the recipe.
        train: the rows, gone through in a new order each epoch (`gpt.data.batch_indices`).
        loss: the summed loss of a batch and its number of targets.
        validate: measures the model as it is, in the precision of the training; must return at
            least `validation_loss`, in nats.
        sample: a sample of what the model writes, taken at each evaluation.
        task: the name that progress is shown under.
        state: a folder for the loop's state. What is found there is continued from; it is
            written every `checkpoint_seconds`, at each evaluation and on SIGINT or SIGTERM.
        log: hears the metrics of each step, the progress, and the samples.

    Raises:
        InputError: there are no rows.
        RunError: a loss or gradient that is not finite.
        Interrupted: SIGINT or SIGTERM came; the step was finished and the state saved.
    """
    if len(train) == 0:
        raise InputError(f"{task}: there are no training rows; add data")
    rows_per_step = min(params.batch_size * params.accumulation, len(train))
    total = params.steps or (params.epochs or 0) * (len(train) // rows_per_step)
    optimizer = make_optimizer(model, params)
    lengths = train.lengths if params.group_by_length else None
    loop = _LoopState()
    saved = load_state(state, log) if state is not None else None
    if saved is not None:
        loop = _LoopState.restored(saved, model, optimizer)
        log(Message(f"{task}: continuing from step {loop.step} of {total}"))

    def save() -> None:
        if state is not None:
            save_state(state, loop.step, loop.as_saved(model, optimizer))

    def batches_of(step: int) -> list[Batch]:
        rows = batch_indices(len(train), rows_per_step, params.seed, step, lengths)
        return [
            take(train, rows[start : start + params.batch_size])
            for start in range(0, len(rows), params.batch_size)
        ]

    last_save = time.monotonic()
    model.train()
    upcoming = batches_of(loop.step)
    with _deferred_signals() as interrupted:
        while loop.step < total:
            started = time.perf_counter()
            rate = learning_rate_at(loop.step, params, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(_step_seed(params.seed, loop.step))
            measured = train_step(model, optimizer, upcoming, loss, params)
            tokens = sum(batch.n_tokens for batch in upcoming)
            upcoming = batches_of(loop.step + 1)  # while the device may still be at work
            step_loss, norm = measured.tolist()
            if not (math.isfinite(step_loss) and math.isfinite(norm)):
                raise RunError(
                    f"{task}: the loss is {step_loss} and the gradient norm {norm} at step "
                    f"{loop.step}; lower the learning rate or raise warmup_steps"
                )
            loop.step += 1
            loop.tokens += tokens
            loop.losses.append(step_loss)
            seconds = time.perf_counter() - started
            log(
                Metrics(
                    loop.step,
                    {
                        "loss/train": step_loss,
                        "learning_rate": rate,
                        "grad_norm": norm,
                        "tokens": loop.tokens,
                        "tokens_per_second": tokens / seconds,
                    },
                )
            )
            log(Progress(task, loop.step, total, "step", {"loss": step_loss}))
            if loop.step % params.eval_interval == 0 or loop.step == total:
                _evaluate(model, loop, rate, norm, validate, sample, params, log)
                save()
                last_save = time.monotonic()
            if number := interrupted():
                save()
                raise Interrupted(f"{task} stopped after step {loop.step} of {total}", number)
            if time.monotonic() - last_save > params.checkpoint_seconds:
                save()
                last_save = time.monotonic()
    if params.keep == "best" and loop.best_weights is not None:
        model.load_state_dict(loop.best_weights)
    model.eval()
    return FitResult(steps=loop.step, history=loop.history)


@dataclass(slots=True)
class _LoopState:
    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)  # since the last evaluation
    history: list[dict[str, float]] = field(default_factory=list)
    best_loss: float = math.inf
    best_weights: dict[str, Tensor] | None = None

    def as_saved(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "losses": self.losses,
            "history": self.history,
            "best_loss": self.best_loss,
            "best_weights": self.best_weights,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }

    @classmethod
    def restored(
        cls, saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> _LoopState:
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        return cls(**saved)


def _evaluate(
    model: nn.Module,
    loop: _LoopState,
    rate: float,
    norm: float,
    validate: Callable[[], Mapping[str, float]],
    sample: Callable[[], str] | None,
    params: TrainParams,
    log: Log,
) -> None:
    model.eval()
    with torch.no_grad(), autocast(next(model.parameters()).device, params.precision):
        measured = dict(validate())
    loop.history.append(
        {
            "step": loop.step,
            "tokens": loop.tokens,
            "train_loss": sum(loop.losses) / len(loop.losses),
            **measured,
            "learning_rate": rate,
            "grad_norm": norm,
        }
    )
    loop.losses = []
    log(Metrics(loop.step, {_metric_name(name): value for name, value in measured.items()}))
    if params.keep == "best" and measured["validation_loss"] < loop.best_loss:
        loop.best_loss = measured["validation_loss"]
        loop.best_weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    if sample is not None:
        log(Text(f"samples/step-{loop.step:06d}.txt", sample()))
    model.train()


def _metric_name(name: str) -> str:
    """`validation_loss` -> `loss/validation`: the same measure of both splits side by side."""
    split, _, measure = name.partition("_")
    return f"{measure}/{split}" if measure else name


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


@contextlib.contextmanager
def _deferred_signals() -> Iterator[Callable[[], int]]:
    """Within the block SIGINT and SIGTERM are only noted, so that a step is never cut in two.

    Yields a function that returns the number of the first that came, 0 if none did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may handle signals
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
