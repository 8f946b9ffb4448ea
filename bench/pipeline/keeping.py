"""What it costs to lose nothing: a training step beside a save of its state, and one tracked.

Saves come by the clock, so the seconds that one costs are held against the interval; what is
written to the disk after the step is no part of it, unless it slows the step down.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench.gpt.training import Shape, large_shape, start
from bench.harness import Comparison, Machine, Settings, compare_in_workers, seconds_of
from bench.worker import Alternative, Job, as_ours
from gpt.base.events import Metrics
from gpt.batches.metrics import lm_loss_sum
from gpt.model.device import Precision
from gpt.model.parallel import SharedModel
from gpt.train.checkpoint import Checkpoints
from gpt.train.loop import Pass, accumulate, update
from gpt.train.recipe import TrainParams, make_optimizers
from pipeline.tracking.run import StageRun


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """A step by itself against one with a save, and against one with MLflow."""
    shape = large_shape(settings)
    seconds = TrainParams(steps=1).checkpoint_seconds
    for precision in settings.precisions:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
            arguments = (shape, precision, Path(folder))
            runs = compare_in_workers(
                {
                    "a step": Alternative(plain_job, arguments, as_ours),
                    "beside a save": Alternative(saving_job, arguments, as_ours),
                    "tracked": Alternative(tracked_job, arguments, as_ours),
                },
                settings,
            )
            share = _tracking_share(Path(folder) / "alone", 3 if settings.quick else 60)
        times = seconds_of(runs)
        save = median(_differences(times["beside a save"], times["a step"]))
        yield Comparison(
            title=f"What keeping costs, {shape.title}, {precision}",
            work=shape.tokens,
            unit="tokens",
            seconds=times,
            note=f"A save costs {save:+.2f} s: {save / seconds:.1%} of the default interval of "
            f"{seconds:.0f} s. Tracking a step a second takes {share:.2%} of what the processor "
            "gives, by the time it was at work.",
        )


def _tracking_share(folder: Path, seconds: float) -> float:
    """How much of all cores tracking takes: in a step's time it is lost in the noise."""
    folder.mkdir()
    run = StageRun(folder, "pretrain", TrainParams(steps=1), {}, state=folder / "run")
    started, used = time.monotonic(), time.process_time()
    step = 0
    while (now := time.monotonic()) < started + seconds:
        run(_metrics(step, 1.0))
        step += 1
        time.sleep(1)
    share = (time.process_time() - used) / (now - started) / (os.cpu_count() or 1)
    run.close("FINISHED")
    return share


def _metrics(step: int, loss: float) -> Metrics:
    """What `fit` says of a step."""
    names = ("train_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second")
    return Metrics(step, dict.fromkeys(names, loss))


def _differences(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


# --- in the workers -------------------------------------------------------------------------------


class _Training:
    def __init__(self, shape: Shape, precision: Precision) -> None:
        model, batch = start(shape)
        self.params = TrainParams(steps=1, precision=precision)
        self.model, self.passes = SharedModel(model), [Pass(batch)]
        self.optimizers = make_optimizers(model, self.params)
        self.number = 0
        self.best = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def accumulate(self) -> float:
        return accumulate(self.model, self.passes, lm_loss_sum, self.params).sum().item()

    def update(self) -> float:
        self.number += 1
        return update(self.model, self.optimizers, self.params).item()


def plain_job(shape: Shape, precision: Precision, folder: Path) -> Job:
    """A step, and nothing of it kept."""
    training = _Training(shape, precision)

    def step() -> float:
        loss = training.accumulate()
        training.update()
        return loss

    return Job(run=step)


def saving_job(shape: Shape, precision: Precision, folder: Path) -> Job:
    """A step that begins right after a save of the whole state began."""
    training = _Training(shape, precision)
    checkpoints = Checkpoints(folder / "states")

    def step() -> float:
        if training.number:  # before the first step the optimizers have nothing to save
            state = {"best": training.best, **training.model.state(training.optimizers)}
            checkpoints.save(training.number, state)
        loss = training.accumulate()
        checkpoints.wait_until_read()
        training.update()
        return loss

    def on_the_disk(loss: float) -> float:
        checkpoints.finish()
        return loss

    return Job(run=step, report=on_the_disk)


def tracked_job(shape: Shape, precision: Precision, folder: Path) -> Job:
    """A step whose metrics go to MLflow, as a stage's do, while MLflow samples the machine."""
    training = _Training(shape, precision)
    run = StageRun(folder, "pretrain", training.params, {}, state=folder / "run")

    def step() -> float:
        loss = training.accumulate()
        training.update()
        run(_metrics(training.number, loss))
        return loss

    return Job(run=step)
