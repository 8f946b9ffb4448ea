"""A stage's first steps, run for real in a process of their own, to tell what the whole will take.

The process is what `python -m pipeline stage NAME` would be: the same imports, the same function
with the same parameters and inputs, its outputs in a scratch folder. No MLflow run, nothing in the
project. It notes what it hears with the time and its memory, and stops once it has seen enough.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gpt.base.errors import InputError, RunError
from gpt.base.events import Event, Metrics, Text

WARM_UP = 2
"""The first steps, which are slower: memory is new, kernels are chosen."""
STEPS, SECONDS, PATIENCE = 5, 3.0, 20.0
"""Enough is an evaluation and so many steps after the warm-up, of so many seconds together or of
however many in so many seconds."""
EVALUATE_AFTER = 6
LIMIT = 60.0
"""Seconds from the first step after which the process is ended with what is known."""
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
        device_peak: the most that was taken of a graphics card's memory; None without one.
        finish: what a run does behind its stage: pictures, checksums, writing the model.
        complete: the whole stage was over before enough was seen.
    """

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    peak: int = 0
    device_peak: int | None = None
    finish: float = 0.0
    complete: bool = False

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
        errors = Path(folder) / "errors.txt"
        started = time.time()
        code = Path(__file__).resolve().parent.parent.parent
        path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        arguments = [stage, str(root), str(params), folder, str(weights)]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline", "probe", *arguments],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            try:
                _wait(process, notes)
            finally:
                process.kill()
                process.wait()
        lines = list(_read(notes))
        said = [line["text"] for line in lines if line["what"] == "input"]
        if said:
            raise InputError(said[0])
        probe = read_notes(lines, started)
        if not probe.steps:
            failed = [line["text"] for line in lines if line["what"] == "failed"]
            last = (failed or errors.read_text(errors="replace").strip().splitlines() or ["?"])[-1]
            raise RunError(f"{stage}: could not be measured: {last}")
        return probe


def _wait(process: subprocess.Popen[bytes], notes: Path) -> None:
    """Until the process has ended or had its time."""
    began = time.monotonic()
    look = LIMIT
    while process.poll() is None:
        time.sleep(0.05)
        waited = time.monotonic() - began
        if waited < look:
            continue
        look = waited + 1
        seen = [line["at"] for line in _read(notes) if line["what"] == "step"]
        if seen and time.time() - seen[0] > LIMIT:
            return
        if not seen and waited > START_LIMIT:
            return


def _read(notes: Path) -> Iterator[dict[str, Any]]:
    """The whole lines; the last may be cut off."""
    if notes.exists():
        written = notes.read_text(encoding="utf-8")
        for line in written[: written.rfind("\n") + 1].splitlines():
            yield json.loads(line)


def read_notes(lines: list[dict[str, Any]], started: float) -> Probe:
    """What the notes of a process say that was started at `started`."""
    probe = Probe()
    evaluated: list[tuple[float, float]] = []  # validation, and the end of what is known
    for line in lines:
        at = line["at"] - started
        probe.peak = max(probe.peak, line["peak"])
        if line["device_peak"] is not None:
            probe.device_peak = max(probe.device_peak or 0, line["device_peak"])
        match line["what"]:
            case "step":
                if evaluated:
                    validation, _ = evaluated.pop()
                    whole = at - line["seconds"] - probe.steps[-1].end
                    probe.evaluations.append(Evaluation(validation, max(whole, validation)))
                probe.steps.append(Step(line["step"], at, line["seconds"]))
            case "validation" if probe.steps:
                evaluated = [(at - probe.steps[-1].end, at)]
            case "sample" if evaluated:
                evaluated = [(evaluated[0][0], at)]
            case "end":
                probe.complete = line["complete"]
            case "finished":
                probe.finish = line["seconds"]
    if evaluated:
        validation, end = evaluated.pop()
        probe.evaluations.append(Evaluation(validation, end - probe.steps[-1].end))
    return probe


# --- in the process of its own --------------------------------------------------------------------


class _Enough(BaseException):
    """The stage has shown what it was run for."""


class _Watch:
    """Notes what a stage says, and ends it once that is enough."""

    def __init__(self, notes: Path) -> None:
        self._file = notes.open("a", encoding="utf-8", buffering=1)
        self._began = 0.0
        self._tokens = 0.0
        self._evaluated = False
        self._timed: list[float] = []
        self._steps = 0

    def note(self, what: str, **more: Any) -> None:
        """One line, flushed with its end."""
        line = {"what": what, "at": time.time(), "peak": peak_memory(), **more}
        self._file.write(json.dumps({**line, "device_peak": _device_peak()}) + "\n")

    def __call__(self, event: Event) -> None:
        match event:
            case Metrics(step, values) if "loss/train" in values:
                tokens = values["tokens"] - self._tokens
                self._tokens = values["tokens"]
                self._step(step, tokens / values["tokens_per_second"])
            case Metrics(_, values) if "loss/validation" in values:
                self._evaluated = True
                self.note("validation")
            case Text():
                self.note("sample")

    def _step(self, step: int, seconds: float) -> None:
        self.note("step", step=step, seconds=seconds)
        self._steps += 1
        now = time.monotonic()
        if self._steps == 1:
            self._began = now
        if self._steps > WARM_UP:
            self._timed.append(seconds)
        long = sum(self._timed) >= SECONDS or now - self._began >= PATIENCE
        if self._evaluated and len(self._timed) >= STEPS and long:
            raise _Enough


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _device_peak() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())


def shortened(params: Any) -> Any:
    """The stage's own parameters, but that an evaluation comes soon, and on one device."""
    train = params.train
    changes = {"eval_interval": min(EVALUATE_AFTER, train.eval_interval), "devices": 1}
    return dataclasses.replace(params, train=dataclasses.replace(train, **changes))


def become_probe(stage: str, root: Path, params: Path, scratch: Path, weights: int) -> NoReturn:
    """Be the process that `probe_stage` starts, whose arguments these are."""
    _run(stage, root, params, scratch, weights)
    # at once: a state may still be on its way to the scratch folder, and no one will read it
    os._exit(0)


def _run(stage: str, root: Path, params_file: Path, scratch: Path, weights: int) -> None:
    """The stage as `pipeline.run.stage` calls it, in `scratch`, up to where enough was seen."""
    import pipeline.run.stage  # noqa: F401  a stage's process holds it too
    from pipeline.dag.cache import dvc_md5
    from pipeline.project.params import load_params, section
    from pipeline.project.stage_table import STAGES
    from pipeline.tracking.connection import load_mlflow

    watch = _Watch(scratch / "notes.jsonl")
    spec = STAGES[stage]
    try:
        params = section(load_params(params_file), stage)
        inputs = {keyword: root / path for keyword, path in spec.input_paths(params).items()}
        function = spec.load()
        for path in inputs.values():
            dvc_md5(path)
        load_mlflow()
        complete = False
        try:
            function(
                shortened(params),
                **inputs,
                **{keyword: scratch / path for keyword, path in spec.outputs.items()},
                state=scratch / "state",
                log=watch,
            )
            complete = True
        except _Enough:
            pass
        watch.note("end", complete=complete)
        with _seconds() as took:
            _finish(stage, scratch, weights)
        watch.note("finished", seconds=took[0])
    except InputError as error:
        watch.note("input", text=str(error))
    except Exception as error:
        watch.note("failed", text=f"{type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def _seconds() -> Iterator[list[float]]:
    began = time.monotonic()
    took: list[float] = []
    yield took
    took.append(time.monotonic() - began)


def _finish(stage: str, scratch: Path, weights: int) -> None:
    """What `pipeline.run.stage` does behind it, with a history and a file of the model's size."""
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
