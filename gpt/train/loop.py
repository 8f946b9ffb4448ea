"""THE training loop: one `fit` for pretraining, classification and instruction tuning.

A step is a pure function of the previous state and the step number: its rows are determined by
(seed, step), the dropout of each pass by a generator seeded with (seed, step, place), and its
learning rate by the step alone. So a resumed run is byte for byte equal to an uninterrupted one,
and a run on several processes is equal up to rounding.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gpt.base.errors import InputError, RunError
from gpt.base.events import Log, Message, Metrics, Progress, Text, discard
from gpt.base.files import whole_file
from gpt.batches.data import Batch, Dataset, batch_indices, take
from gpt.model.device import autocast
from gpt.model.parallel import SharedModel, add_up, from_first, gather, leave, passes, world
from gpt.train.checkpoint import Checkpoints
from gpt.train.recipe import TrainParams, learning_rate_at, make_optimizers, set_learning_rate

WINDOW = 64
"""The number of previous steps that a loss is compared with."""
_ENOUGH_LOSSES = 16
_SPIKE_TIMES = 3.0

LossSum = Callable[[Any, Batch], tuple[Tensor, int]]
"""Model and batch to the summed loss in nats (a scalar) and the number of targets in it."""


@dataclass(slots=True)
class FitResult:
    """The result of a training run."""

    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    """One row per evaluation: step, train_loss (mean since the last), the measured values, …"""

    def write_history(self, path: Path) -> None:
        """Write the history as CSV, one column per quantity."""
        with whole_file(path) as partial:
            pd.DataFrame(self.history).to_csv(partial, index=False)


class Interrupted(KeyboardInterrupt):
    """A signal stopped the training; its step was finished, its state saved.

    `signal` is the signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass of a step.

    Attributes:
        batch: on the CPU.
        rows: which rows of the data are in it.
        seed: of its dropout; None leaves the generator as it is.
    """

    batch: Batch
    rows: Sequence[int] = ()
    seed: int | None = None


def accumulate(
    model: SharedModel,
    passes: Sequence[Pass],
    loss: LossSum,
    params: TrainParams,
    *,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """Add up the gradient of the mean loss over all targets of a step's passes.

    The gradient is that of one big batch, however it is split into passes and over processes.
    Nothing here waits for the device.

    Args:
        model: in training mode.
        passes: those of this process.
        loss: the summed loss of a batch and its number of targets.
        params: the precision.
        between: called after each pass but the last.

    Returns:
        The contribution of each pass to the mean loss, in nats, (passes,) in fp32.
    """
    device = model.device
    targets: int | Tensor = sum(each.batch.n_targets for each in passes)
    if world().size > 1:
        targets = add_up(torch.tensor(targets)).to(device)
    targets = targets.clamp(min=1) if isinstance(targets, Tensor) else max(1, targets)
    losses = []
    # one context for all passes: within it a weight is cast only once
    with autocast(device, params.precision, keep_casts=not model.sharded):
        for index, each in enumerate(passes):
            if each.seed is not None:
                torch.manual_seed(each.seed)
            batch = each.batch.to(device)
            last = index == len(passes) - 1
            losses.append(model.backward(functools.partial(_mean, loss, batch, targets), last))
            if between is not None and not last:
                between()
    return torch.stack(losses)


def _mean(loss: LossSum, batch: Batch, targets: int | Tensor, model: Any) -> Tensor:
    return loss(model, batch)[0] / targets


def update(
    model: SharedModel, optimizers: Sequence[torch.optim.Optimizer], params: TrainParams
) -> Tensor:
    """Clip the gradient and take the optimizers' step; the gradients are None afterwards.

    Returns:
        The norm of the gradient before clipping, a scalar in fp32.
    """
    trained = [p for p in model.module.parameters() if p.grad is not None]
    norm = _norm([p.grad for p in trained if p.grad is not None])
    if params.grad_clip and (norm.device.type != "cpu" or norm > params.grad_clip):
        # on a CPU this check is free, and it saves a pass over all gradients
        nn.utils.clip_grads_with_norm_(trained, params.grad_clip, norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(tensors)
    # of tensors in parts it is one in parts itself
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def fit(
    model: nn.Module,
    *,
    params: TrainParams,
    train: Dataset,
    loss: LossSum,
    validate: Callable[[Any], Mapping[str, float]],
    sample: Callable[[Any], str] | None = None,
    origin: Callable[[int], str] = "row {}".format,
    task: str = "train",
    state: Path | None = None,
    log: Log = discard,
) -> FitResult:
    """Train `model` in place and leave it in evaluation mode.

    With several processes (`gpt.model.parallel`) all call this with the same arguments; only the
    first returns, writes to `state` and logs.

    Args:
        model: on its device; parameters that do not require gradients are left alone.
        params: the recipe.
        train: the rows, in a new order each epoch (`gpt.batches.data.batch_indices`).
        loss: the summed loss of a batch and its number of targets.
        validate: evaluates the given model, in the precision of the training; must return at
            least `validation_loss`, in nats.
        sample: generates a sample with the given model; called at each evaluation.
        origin: describes where a row comes from, for the message about a loss that is not finite.
        task: the name of the progress bar.
        state: a folder for the loop's state. A state found there is resumed; it is written every
            `checkpoint_seconds`, at each evaluation and on SIGINT or SIGTERM.
        log: receives the metrics of each step, the progress, and the samples.

    Raises:
        InputError: there are no rows, fewer rows in a step than devices, `state` is not writable,
            or `compile: on` and compiling is not possible.
        RunError: a loss or gradient that is not finite, or a state that could not be saved.
        Interrupted: SIGINT or SIGTERM came; the pass was finished and the state saved.
        gpt.model.parallel.Dismissed: the training is over and this is not the first process.
    """
    if len(train) == 0:
        raise InputError(f"{task}: there are no training rows; add data")
    run = _Training(model, params, train, loss, validate, sample, origin, task, state, log)
    result = run.result()
    leave()
    return result


@dataclass(slots=True)
class _LoopState:
    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)  # since the last evaluation
    recent: list[float] = field(default_factory=list)  # the last WINDOW of them
    history: list[dict[str, float]] = field(default_factory=list)
    best_loss: float = math.inf
    stale: int = 0  # evaluations since the best loss


class _Training:
    """A training run: the arguments of `fit`, and the progress."""

    def __init__(
        self,
        model: nn.Module,
        params: TrainParams,
        train: Dataset,
        loss: LossSum,
        validate: Callable[[Any], Mapping[str, float]],
        sample: Callable[[Any], str] | None,
        origin: Callable[[int], str],
        task: str,
        state: Path | None,
        log: Log,
    ) -> None:
        first = world().first
        self.params, self.train, self.loss, self.task = params, train, loss, task
        self.validate, self.sample, self.origin = validate, sample, origin
        self.log = log if first else discard
        self.rows = min(params.rows, len(train))
        self.total = params.steps or (params.epochs or 0) * (len(train) // self.rows)
        self.checkpoints = Checkpoints(state) if state is not None and first else None
        self.resumable = state is not None
        self.caller = model
        self.model = SharedModel(model, params.parallel)
        self.optimizers = make_optimizers(self.model.module, params)
        self.loop = _LoopState()
        self.best: dict[str, Tensor] | None = None
        if self.resumable:
            self._resume()

    # --- the loop

    def result(self) -> FitResult:
        """Run to the end."""
        module, loop = self.model.module, self.loop
        module.train()
        self.saved_at = time.monotonic()
        with _compiled(module, self.params, self.model.device), _deferred_signals() as interrupted:
            self.interrupted = interrupted
            upcoming = self._passes(loop.step) if not self._over() else []
            for each in upcoming[:1]:
                batch = each.batch.to(self.model.device)
                self.model.settle(functools.partial(_mean, self.loss, batch, 1))
            while not self._over():
                upcoming = self._step(upcoming)
        if self.checkpoints:
            self.checkpoints.finish()
        if self.params.keep == "best" and self.best is not None:
            with torch.no_grad():
                for name, value in module.state_dict().items():
                    value.copy_(self.best[name])
        self.model.give_back()
        self.caller.eval()
        return FitResult(steps=loop.step, history=loop.history)

    def _over(self) -> bool:
        patience = self.params.patience or math.inf
        return self.loop.step >= self.total or self.loop.stale >= patience

    def _step(self, upcoming: list[Pass]) -> list[Pass]:
        """One step; returns the passes of the next."""
        params, loop = self.params, self.loop
        started = time.perf_counter()
        rate = learning_rate_at(loop.step, params, self.total)
        set_learning_rate(self.optimizers, rate)
        losses = accumulate(
            self.model,
            upcoming,
            self.loss,
            params,
            between=self._between_passes if world().size == 1 else None,
        )
        evaluates = (loop.step + 1) % params.eval_interval == 0 or loop.step + 1 == self.total
        if self.checkpoints:
            self.checkpoints.wait_until_read()  # the tensors being saved change next
        trained = [p for p in self.model.module.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained] if evaluates else []
        gradient = update(self.model, self.optimizers, params)
        following = self._passes(loop.step + 1)  # while the device may still be busy
        step_loss, norm = torch.stack((losses.sum(), gradient)).tolist()
        tokens = sum(each.batch.n_tokens for each in upcoming)
        # all processes save and stop at the same step
        told = [step_loss, tokens, bool(self.interrupted()), world().first and self._due()]
        step_loss, tokens, stop, due = add_up(torch.tensor(told, dtype=torch.float64)).tolist()
        number = stop and (self.interrupted() or signal.SIGTERM)
        if not (math.isfinite(step_loss) and math.isfinite(norm)):
            raise RunError(self._not_finite(step_loss, norm, losses, upcoming))
        loop.step += 1
        loop.tokens += int(tokens)
        loop.losses.append(step_loss)
        self._look_for_spike(step_loss)
        seconds = time.perf_counter() - started
        values = {
            "train_loss": step_loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": loop.tokens,
            "tokens_per_second": tokens / seconds,
        }
        if evaluates:
            change = [p.detach() - old for p, old in zip(trained, before, strict=True)]
            values["param_norm"] = _norm([p.detach() for p in trained]).item()
            values["update_ratio"] = _norm(change).item() / max(values["param_norm"], 1e-12)
            del before, change
        self.log(Metrics(loop.step, values))
        self.log(Progress(self.task, loop.step, self.total, "step", {"train_loss": step_loss}))
        if evaluates:
            self._evaluate(values)
        if world().size == 1:
            number = self.interrupted()
        if evaluates or due or number:
            self._save()
        if number:
            self._stop(f"after step {loop.step}", number)
        return following

    def _due(self) -> bool:
        return time.monotonic() - self.saved_at > self.params.checkpoint_seconds

    def _passes(self, step: int) -> list[Pass]:
        """This process's passes of a step."""
        lengths = self.train.lengths if self.params.group_by_length else None
        rows = batch_indices(len(self.train), self.rows, self.params.seed, step, lengths)
        return [
            Pass(take(self.train, some), some, _seed(self.params.seed, step, start))
            for start, some in passes(rows, self.params.batch_size)
        ]

    def _evaluate(self, values: Mapping[str, float]) -> None:
        params, loop, module = self.params, self.loop, self.model.module
        module.eval()
        with torch.no_grad(), autocast(self.model.device, params.precision):
            measured = from_first(dict(self.model.measure(self.validate)))
        kept = ("learning_rate", "grad_norm", "param_norm", "update_ratio")
        loop.history.append(
            {
                "step": loop.step,
                "tokens": loop.tokens,
                "train_loss": sum(loop.losses) / len(loop.losses),
                **measured,
                **{name: values[name] for name in kept},
            }
        )
        loop.losses = []
        self.log(Metrics(loop.step, measured))
        loop.stale += 1
        if measured["validation_loss"] < loop.best_loss:
            loop.best_loss, loop.stale = measured["validation_loss"], 0
            if params.keep == "best":
                self.best = {name: t.detach().clone() for name, t in module.state_dict().items()}
        # a sharded model can only generate if all processes take part
        if self.sample is not None and (self.model.sharded or world().first):
            text = self.model.measure(self.sample)
            self.log(Text(f"samples/step-{loop.step:06d}.txt", text))
        module.train()
        if loop.step < self.total and self._over():
            self.log(
                Message(
                    f"{self.task}: no lower validation loss in {loop.stale} evaluations; "
                    f"stopped early, after step {loop.step} of {self.total}"
                )
            )

    # --- what keeps it safe

    def _resume(self) -> None:
        saved = self.checkpoints.load(self.log) if self.checkpoints else None
        loop = from_first(saved and saved["loop"])
        if loop is None:
            return
        self.loop = _LoopState(**loop)
        self.model.restore(saved, self.optimizers)
        if from_first(bool(saved and saved["best"])):
            self.best = {n: torch.empty_like(t) for n, t in self.model.module.state_dict().items()}
            self.model.fill(self.best, saved and saved["best"])
        if saved:
            torch.set_rng_state(saved["generators"]["torch"])
            if len(saved["generators"]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(saved["generators"]["cuda"])
        self.log(Message(f"{self.task}: continuing from step {self.loop.step} of {self.total}"))

    def _save(self) -> None:
        """Begin to save the state as it is."""
        self.saved_at = time.monotonic()
        if not self.resumable:
            return
        loop = self.loop
        state = {
            # copies: the state is written while the loop continues
            "loop": {
                name: list(value) if isinstance(value := getattr(loop, name), list) else value
                for name in _LoopState.__slots__
            },
            "best": self.model.whole(self.best) if self.best is not None else None,
            # steps seed their own generators; validation may draw from these
            "generators": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
            **self.model.state(self.optimizers),
        }
        if self.checkpoints:
            self.checkpoints.save(loop.step, state)

    def _between_passes(self) -> None:
        """If the run is stopped between passes, abandon the step and save the state before it."""
        if number := self.interrupted():
            self.model.module.zero_grad(set_to_none=True)
            self._save()
            self._stop(f"within step {self.loop.step + 1}", number)

    def _stop(self, where: str, number: int) -> None:
        if self.checkpoints:
            self.checkpoints.finish()
        kept = "; its state is saved, and the same command goes on from there"
        raise Interrupted(
            f"{self.task} stopped {where} of {self.total}{kept if self.resumable else ''}", number
        )

    def _look_for_spike(self, loss: float) -> None:
        loop = self.loop
        if (times := spike(loss, loop.recent)) is not None:
            self.log(Metrics(loop.step, {"loss_spike": times}))
            self.log(
                Message(
                    f"{self.task}: the loss of step {loop.step} is {loss:.3f}, {times:.1f} times "
                    "the usual; if it does not come down again, lower the learning rate",
                    level="warning",
                )
            )
        loop.recent = [*loop.recent, loss][-WINDOW:]

    def _not_finite(
        self, step_loss: float, norm: float, losses: Tensor, upcoming: Sequence[Pass]
    ) -> str:
        """The error for a step whose loss or gradient is not finite; every process must call it."""
        finite = torch.isfinite(losses).tolist()
        bad = [list(each.rows) for each, good in zip(upcoming, finite, strict=True) if not good]
        every = gather((bad[0] if bad else None, [row for each in upcoming for row in each.rows]))
        spoilt = next((rows for rows, _ in every if rows is not None), None)
        rows = spoilt if spoilt is not None else [row for _, rows in every for row in rows]
        named = "; ".join(self.origin(row) for row in rows[:3])
        more = f"; and {len(rows) - 3} more" if len(rows) > 3 else ""
        kept = ""
        if self.checkpoints:
            self.checkpoints.finish()
            step = self.checkpoints.newest()
            kept = f" The state of step {step} is kept." if step is not None else ""
        return (
            f"{self.task}: the loss is {step_loss} and the gradient norm {norm} at step "
            f"{self.loop.step + 1}, on {named}{more}; lower the learning rate, raise warmup_steps, "
            f"or mend the data.{kept}"
        )


def spike(loss: float, before: Sequence[float]) -> float | None:
    """The ratio of a step's loss to the median of the previous losses, if it is a spike.

    It is one if it exceeds the highest of them by more than three times the distance from their
    median to the highest. The rule is scale-free, so neither the noise of small batches nor the
    steep fall of the first steps triggers it.

    Args:
        loss: of this step.
        before: those of the steps before, at most `WINDOW` of them.

    Returns:
        loss / median, or None if it is no spike.
    """
    if len(before) < _ENOUGH_LOSSES:
        return None
    usual, highest = statistics.median(before), max(before)
    if loss <= highest + _SPIKE_TIMES * (highest - usual) or loss <= usual:
        return None
    return loss / usual if usual > 0 else None


def _seed(seed: int, step: int, place: int) -> int:
    """The seed of the pass whose first row is the `place`th of its step."""
    return int(np.random.SeedSequence([seed, step, place]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def _compiled(module: nn.Module, params: TrainParams, device: torch.device) -> Iterator[None]:
    """Within the block, the module's transformer blocks are compiled by torch.compile if requested.

    Raises:
        InputError: compiling is not possible.
    """
    wanted = params.compile == "on" or (params.compile == "auto" and device.type == "cuda")
    blocks = list(getattr(module, "h", ())) if wanted else []
    if blocks and torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True, warn_only=True)  # in the compiler too
    for block in blocks:
        block.compile()
    try:
        yield
    except Exception as error:
        if not (blocks and type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"train.compile: torch.compile cannot translate the model here ({reason}); "
            "install a C++ compiler, or set compile: off"
        ) from error
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextlib.contextmanager
def _deferred_signals() -> Iterator[Callable[[], int]]:
    """Within the block SIGINT and SIGTERM are only recorded, so that no step is interrupted.

    Yields a function that returns the number of the first signal received, 0 if none.
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
