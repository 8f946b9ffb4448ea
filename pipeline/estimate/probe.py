"""A stage's first steps, run for real in a process of their own, to tell what the whole will take.

The process is what `python -m pipeline stage NAME` would be: the same imports, the same function
with the same parameters and inputs, its outputs in a scratch folder. No MLflow run, nothing in the
project. It notes each event with the time and its memory, and stops once it has seen enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gpt.base.errors import InputError, RunError
from gpt.base.events import Event, Metrics, Text

WARM_UP = 2
"""The first steps, which are slower: memory is allocated, kernels are chosen."""
STEPS, SECONDS, PATIENCE = 5, 3.0, 20.0
"""Enough is an evaluation and so many steps after the warm-up, of so many seconds together or of
however many in so many seconds."""
EVALUATE_AFTER = 6
LIMIT = 60.0
"""Seconds from the first step after which the process ends with what is known."""
START_LIMIT = 600.0
"""Seconds to the first step."""


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

    @property
    def timed(self) -> list[Step]:
        """The steps after the warm-up; all of them where there are no more."""
        return self.steps[WARM_UP:] or self.steps


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
        notes = Path(folder) / "notes.jsonl"
        notes.touch()
        started = time.time()
        code = Path(__file__).resolve().parent.parent.parent
        path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        arguments = [stage, str(root), str(params), folder, str(weights)]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline", "probe", *arguments],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        written = notes.read_text(encoding="utf-8")
    said = (done.stderr.strip().splitlines() or ["?"])[-1].removeprefix("error: ")
    if done.returncode == 2:
        raise InputError(said)
    # of a process that was killed, the last line may be cut off
    whole = written[: written.rfind("\n") + 1].splitlines()
    probe = read_notes([json.loads(line) for line in whole], started)
    if not probe.steps:
        raise RunError(f"{stage}: could not be measured: {said}")
    return probe


def read_notes(lines: list[dict[str, Any]], started: float) -> Probe:
    """What was seen by a process that was started at `started`, from its notes."""
    probe = Probe()
    evaluated: tuple[float, float] | None = None  # seconds of validation, and the end of all of it

    def add_evaluation(next_step: float = 0.0) -> None:
        if evaluated:
            validation, end = evaluated
            probe.evaluations.append(
                Evaluation(validation, max(end, next_step) - probe.steps[-1].end)
            )

    for line in lines:
        at = line["at"] - started
        probe.peak = max(probe.peak, line["peak"])
        if line["device_peak"] is not None:
            probe.device_peak = max(probe.device_peak or 0, line["device_peak"])
        match line["what"]:
            case "step":
                add_evaluation(at - line["seconds"])
                evaluated = None
                probe.steps.append(Step(line["step"], at, line["seconds"]))
            case "validation" if probe.steps:
                evaluated = (at - probe.steps[-1].end, at)
            case "sample" if evaluated:
                evaluated = (evaluated[0], at)
            case "finished":
                probe.finish = line["seconds"]
    add_evaluation()
    return probe


# --- in the process of its own --------------------------------------------------------------------


class _Enough(BaseException):
    """The stage has shown what it was run for."""


class _Watch:
    """Notes a stage's events, and ends it once that is enough."""

    def __init__(self, notes: Path) -> None:
        self._file = notes.open("a", encoding="utf-8", buffering=1)
        self._limit = _end_after(START_LIMIT)
        self._began = 0.0
        self._tokens = 0.0
        self._evaluated = False
        self._seconds: list[float] = []
        """Of each step."""

    def note(self, what: str, **more: Any) -> None:
        """One line, flushed with its end."""
        line = {"what": what, "at": time.time(), "peak": peak_memory(), **more}
        self._file.write(json.dumps({**line, "device_peak": _device_peak()}) + "\n")

    def __call__(self, event: Event) -> None:
        match event:
            case Metrics(step, values) if "train_loss" in values:
                tokens = values["tokens"] - self._tokens
                self._tokens = values["tokens"]
                self._step(step, tokens / values["tokens_per_second"])
            case Metrics(_, values) if "validation_loss" in values:
                self._evaluated = True
                self.note("validation")
            case Text():
                self.note("sample")

    def _step(self, step: int, seconds: float) -> None:
        self.note("step", step=step, seconds=seconds)
        now = time.monotonic()
        if not self._seconds:
            self._began = now
            self._limit.cancel()
            _end_after(LIMIT)
        self._seconds.append(seconds)
        timed = self._seconds[WARM_UP:]
        long = sum(timed) >= SECONDS or now - self._began >= PATIENCE
        if self._evaluated and len(timed) >= STEPS and long:
            raise _Enough


def _end_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()
    return timer


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
    stage: str, root: Path, params_file: Path, scratch: Path, weights: int
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

    watch = _Watch(scratch / "notes.jsonl")
    spec = STAGES[stage]
    params = section(load_params(params_file), stage)
    inputs = {keyword: root / path for keyword, path in spec.input_paths(params).items()}
    function = spec.load()
    for path in inputs.values():
        dvc_md5(path)
    load_mlflow()
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
    watch.note("finished", seconds=time.monotonic() - began)
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
