"""A stage's first steps, run for real in a process of their own, to tell what the whole will take.

The process is what `python -m pipeline stage NAME` would be: the same imports, the same function
with the same parameters and inputs, its outputs in a scratch folder. No MLflow run, nothing in the
project. It notes the steps and evaluations that it sees, and stops once they are enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter

from gpt.base.errors import InputError, RunError
from gpt.base.events import Event, Metrics, Text
from pipeline.project.processes import import_path

WARM_UP = 2
"""The first steps, which are slower: memory is allocated, kernels are chosen."""
STEPS, SECONDS, PATIENCE = 5, 3.0, 20.0
"""Enough is an evaluation and so many steps after the warm-up, of so many seconds together or of
however many in so many seconds."""
EVALUATE_AFTER = 6
LIMIT = 60.0
"""Seconds from the first step after which the next one is the last in any case."""
START_LIMIT = 600.0
"""Seconds to the first step; so much and `LIMIT` later the process is killed."""
_SEEN = "probe.json"


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step, counted from 1: when it had ended, and how long it took."""

    number: int
    end: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation: seconds to measure the validation loss, and with sample and saved state."""

    validation: float
    whole: float


@dataclass(slots=True)
class Probe:
    """What was seen; times are in seconds from the process's start, memory is in bytes.

    Attributes:
        steps: those that were seen, from the first.
        evaluations: those that were seen.
        peak: the largest resident size of the process.
        device_peak: the largest amount of a graphics card's memory; None without one.
        finish: what a run does after its stage: pictures, checksums, writing the model.
    """

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    peak: int = 0
    device_peak: int | None = None
    finish: float = 0.0

    @property
    def start(self) -> float:
        """From the process's start to the first step: imports, data, the frozen blocks."""
        return self.steps[0].end - self.steps[0].seconds


def probe_stage(stage: str, root: Path, params: Path, weights: int) -> Probe:
    """Run the first steps of `stage`.

    Args:
        stage: the name of a stage that trains.
        root: the project, which is only read.
        params: the file of parameters.
        weights: the size of the model that would be saved, in bytes.

    Raises:
        InputError: what the stage itself says of its input.
        RunError: the process failed before it had ended a step.
    """
    with tempfile.TemporaryDirectory(prefix="gpt-pipeline-") as folder:
        command = [sys.executable, "-P", "-m", "pipeline", "probe"]
        try:
            done = subprocess.run(
                [*command, stage, str(root), str(params), folder, str(weights), str(time.time())],
                env={**os.environ, "PYTHONPATH": import_path()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                check=False,
                timeout=START_LIMIT + LIMIT,
            )
            code, errors = done.returncode, done.stderr
        except subprocess.TimeoutExpired:
            code, errors = 1, "a step takes too long"
        if code == 0:
            return TypeAdapter(Probe).validate_json((Path(folder) / _SEEN).read_bytes())
    said = (errors.strip().splitlines() or ["?"])[-1].removeprefix("error: ")
    if code == 2:
        raise InputError(said)
    raise RunError(f"{stage}: could not be measured: {said}")


# --- in the process of its own --------------------------------------------------------------------


class _Enough(BaseException):
    """The stage has shown what it was run for."""


class Watch:
    """Notes a stage's steps and evaluations from its events, and ends it once that is enough.

    Args:
        started: when its process was started, as `time.time` has it.
    """

    def __init__(self, started: float) -> None:
        self.seen = Probe()
        self._started = started
        self._tokens = 0.0
        self._evaluating = False

    def __call__(self, event: Event) -> None:
        """Note an event.

        Raises:
            _Enough: it was the last one that is needed.
        """
        at, steps = time.time() - self._started, self.seen.steps
        match event:
            case Metrics(step, values) if "train_loss" in values:
                tokens = values["tokens"] - self._tokens
                self._tokens = values["tokens"]
                seconds = tokens / values["tokens_per_second"]
                self._evaluated_until(at - seconds)
                self._evaluating = False
                steps.append(Step(step, at, seconds))
                if self._is_enough():
                    raise _Enough
            case Metrics(_, values) if "validation_loss" in values and steps:
                took = at - steps[-1].end
                self.seen.evaluations.append(Evaluation(took, took))
                self._evaluating = True
            case Text():
                self._evaluated_until(at)

    def _evaluated_until(self, end: float) -> None:
        """The evaluation after the last step, if there was one, took until then."""
        if self._evaluating:
            validation = self.seen.evaluations[-1].validation
            whole = max(validation, end - self.seen.steps[-1].end)
            self.seen.evaluations[-1] = Evaluation(validation, whole)

    def _is_enough(self) -> bool:
        steps = self.seen.steps
        timed = [step.seconds for step in steps[WARM_UP:]]
        passed = steps[-1].end - steps[0].end
        long = sum(timed) >= SECONDS or passed >= PATIENCE
        return passed >= LIMIT or (bool(self.seen.evaluations) and len(timed) >= STEPS and long)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says there may be the size of who started the process
        found = re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="ascii"))
        return int(found[1]) * 1024 if found else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of macOS, in bytes


def _device_peak() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())


def shortened(params: Any) -> Any:
    """The stage's own parameters, except that an evaluation comes soon, and on one device."""
    train = params.train
    changes = {"eval_interval": min(EVALUATE_AFTER, train.eval_interval), "devices": 1}
    return dataclasses.replace(params, train=dataclasses.replace(train, **changes))


def become_probe(
    stage: str, root: Path, params_file: Path, scratch: Path, weights: int, started: float
) -> NoReturn:
    """Be the process that `probe_stage` starts: the stage as `pipeline.run.stage` calls it, in
    `scratch`, until enough was seen.

    Raises:
        InputError: what the stage says of its input.
    """
    import pipeline.run.stage  # noqa: F401  a stage's process holds it too
    from pipeline.dag.cache import dvc_md5
    from pipeline.project.params import load_params, section
    from pipeline.project.stage_table import STAGES
    from pipeline.tracking.connection import load_mlflow

    spec = STAGES[stage]
    params = section(load_params(params_file), stage)
    inputs = {keyword: root / path for keyword, path in spec.input_paths(params).items()}
    function = spec.load()
    for path in inputs.values():
        dvc_md5(path)
    load_mlflow()
    watch = Watch(started)
    with contextlib.suppress(_Enough):
        function(
            shortened(params),
            **inputs,
            **{keyword: scratch / path for keyword, path in spec.outputs.items()},
            state=scratch / "state",
            log=watch,
        )
    began = time.monotonic()
    _finish(stage, scratch, weights)
    watch.seen.finish = time.monotonic() - began
    watch.seen.peak, watch.seen.device_peak = peak_memory(), _device_peak()
    (scratch / _SEEN).write_bytes(TypeAdapter(Probe).dump_json(watch.seen))
    # at once: a state may still be on its way to the scratch folder, and no one will read it
    os._exit(0)


def _finish(stage: str, scratch: Path, weights: int) -> None:
    """What `pipeline.run.stage` does after the stage, with a history and a file of the model's
    size."""
    import pipeline.tracking.registry  # noqa: F401
    from gpt.base.files import whole_file
    from pipeline.dag.cache import dvc_md5
    from pipeline.project.stage_table import STAGES
    from pipeline.show.plots import draw_curves

    history = scratch / "probe-history.csv"
    history.write_text("step,train_loss,validation_loss,learning_rate\n1,2,2,0.1\n2,1,1,0.1\n")
    draw_curves(history, STAGES[stage].title, scratch)
    model = scratch / "probe-model"
    with whole_file(model) as partial, partial.open("wb") as file:
        chunk = bytes(1 << 20)
        for start in range(0, weights, len(chunk)):
            file.write(chunk[: weights - start])
    dvc_md5(model)
