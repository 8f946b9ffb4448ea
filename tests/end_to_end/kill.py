"""Kill a training stage again and again, and compare what comes out with a run that never stopped.

    python -m tests.end_to_end.kill --stage pretrain --runs 20

It is the real thing that is killed: `dvc repro` with all its processes, in a copy of the project,
at moments drawn over the whole length of an uninterrupted run, so that start-up, training, saving,
evaluation and the end of the stage are all hit. Every file that comes out must have the same
bytes, every curve in MLflow the same values, each step once, and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import yaml

ROOT = Path(__file__).parents[2]

# what a source archive holds and the pipeline needs
_PARTS = (
    *("gpt", "stages", "pipeline", "samples", "presets", "params.yaml", "dvc.yaml"),
    *("optional/dvc.yaml", "pyproject.toml", "README.md", ".dvcignore", ".dvc/config"),
)
_BEFORE = {
    "pretrain": ("tokenize",),
    "finetune_classifier": ("download", "pretrain"),
    "finetune_instruct": ("download", "pretrain"),
    "tune_preferences": ("finetune_instruct",),
}
"""Which stages a stage needs; DVC brings what those need."""

_ADDRESSES = {"tune_preferences": "optional/dvc.yaml:tune_preferences"}
"""What DVC calls a stage, where it is not by its name."""

_STEPS = 240
"""Five to ten seconds of training on two cores."""

# where the tools keep what they know; all else in a project is the user's and is compared
_TOOLS = {".dvc", ".pipeline", "mlartifacts", "mlflow.db", "mlflow.db-journal"}

_DVC_WAS_CUT = "Unable to read RWLock-file"

_TIMED = ("system/", "tokens_per_second")
"""Metrics that measure the machine and the time."""

_CONTINUING = re.compile(r"continuing from step (\d+) of (\d+)(?:, (\d+) passes into the next)?")
_STATE = re.compile(r"step-(\d{8})\.[0-9a-f]+\.pt")

Signal = Literal["kill", "term"]
Damage = Literal["none", "truncate", "flip"]

Event = Literal["saved", "writing", "written", "closing", "closed", "gone"]
EVENTS: tuple[Event, ...] = get_args(Event)
"""What a kill can be aimed at, in a stage's order: a state was saved; the model is being written;
it is there and is being registered; the MLflow run was closed and its note is being written; the
note is there; the state is gone, and DVC has still to note that the stage is done."""


# --- what is looked at -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """A run in MLflow: `curves` are its metrics, each with all its steps and values, in order."""

    id: str
    status: str
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `dvc repro` left in a project once it had ended by itself."""

    code: int
    seconds: float
    files: dict[str, str]
    """Path to sha256: everything in the project but what the tools keep for themselves."""
    runs: list[Run]
    """The stage's, the oldest first."""
    output: str
    """The last lines that were printed."""


@dataclass(slots=True)
class Kill:
    """One kill, and what was on the disk after it."""

    seconds: float
    """Since `dvc repro` was started."""
    place: str
    """How far the stage was, in words."""
    saved: int | None
    """The step of the newest whole state; None if there is none."""
    run_id: str | None
    """The MLflow run that the state belongs to; None if there is no state."""
    target: str
    damaged: int | None = None
    """The step of the state that was damaged afterwards."""
    expected: int | None = None
    """The step that the next start must go on from; None: it must begin anew."""
    went_on: int | None = None
    """The step that the next start went on from; None if it began anew or did not come so far."""

    def __str__(self) -> str:
        saved = "" if self.saved is None else f", saved {self.saved}"
        damaged = "" if self.damaged is None else f", damaged {self.damaged}"
        return f"{self.seconds:.2f} s ({self.place}{saved}{damaged}{self.target})"


@dataclass(slots=True)
class KilledRun:
    """A run that was killed and started again until it ended by itself."""

    kills: list[Kill]
    outcome: Outcome
    problems: list[str] = field(default_factory=list)
    """What the starts in between did wrong."""
    mended: int = 0
    """How often a kill had cut DVC's own table of running commands, so that DVC did not start
    until `gpt-pipeline clean` had removed it."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """The folder of an experiment: the prepared project, its copies, and what the runs printed."""

    folder: Path
    stage: str
    prepared: Path
    """The project with everything up to date that comes before the stage."""

    def copy(self, name: str) -> Path:
        """A fresh copy of the prepared project, in which the stage has never run."""
        root = self.folder / name
        shutil.copytree(self.prepared, root, symlinks=True)
        return root

    def repro(self, root: Path, log: Path, *targets: str) -> Started:
        """Start `dvc repro` in a process group of its own."""
        # without DVC's run cache, which would bring back what an equal run made
        addresses = [_ADDRESSES.get(target, target) for target in targets]
        command = (sys.executable, "-m", "dvc", "repro", "--no-run-cache", *addresses)
        return Started(command, root, self._environment(root), log)

    def clean(self, root: Path) -> None:
        """What a person does after DVC says that its lock file is corrupted."""
        command = (sys.executable, "-m", "pipeline", "clean")
        subprocess.run(
            command, cwd=root, env=self._environment(root), check=True, capture_output=True
        )

    def _environment(self, root: Path) -> dict[str, str]:
        for name in ("tmp", "site"):
            (self.folder / name).mkdir(exist_ok=True)
        ours = ("PREFECT_", "MLFLOW_", "GPT_PIPELINE_", "DVC_")
        return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
            # `python` in dvc.yaml is the running one, and the code is the copy's
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(root),
            # what killed processes leave in such places goes with the experiment
            "TMPDIR": str(self.folder / "tmp"),
            "DVC_SITE_CACHE_DIR": str(self.folder / "site"),
            "GPT_PIPELINE_CACHE": os.devnull,
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
        }


class Started:
    """A command and all the processes that it starts; none of them survives the `with` block."""

    def __init__(
        self, command: Sequence[str], root: Path, environment: Mapping[str, str], log: Path
    ) -> None:
        self.log = log
        self._file = log.open("wb")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C at the terminal is for us alone, killpg for them
        )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._file.close()

    def ends_before(self, moment: float | Callable[[], bool]) -> bool:
        """Wait for the moment, in seconds or told by a function; whether the end came first."""
        if callable(moment):
            while self.process.poll() is None:
                if moment():
                    return False
                time.sleep(0.0005)  # some of these moments last a few milliseconds
            return True
        try:
            self.process.wait(max(0.0, self.began + moment - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def stage_process(self) -> int | None:
        """The process that `dvc` started for the stage, if there is one now."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if child.cmdline()[1:4] == ["-m", "pipeline", "stage"]:
                    return child.pid
        return None

    def send(self, number: int, pid: int | None = None) -> None:
        """Send a signal to one process, or to all, and wait until all have ended."""
        with contextlib.suppress(ProcessLookupError):
            if pid is None:
                os.killpg(self.process.pid, number)
            else:
                os.kill(pid, number)
        self.process.wait(120)
        for _ in range(1200):
            # the stage may still be saving when DVC has gone; zombies do not count
            if not any(_in_group(self.process.pid)):
                return
            time.sleep(0.1)
        raise TimeoutError(f"processes that signal {number} did not end within two minutes")

    def printed(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")


def _in_group(group: int) -> Iterator[int]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid


# --- the experiment --------------------------------------------------------------------------


def small_params(*stages: str, steps: int | None = None) -> dict[str, Any]:
    """The preset `smoke`, in which `stages` have everything that resuming must not lose.

    Dropout and accumulation, so that generators and gradients count; evaluations whose best is
    kept; and a state saved every half second.
    """
    params: dict[str, Any] = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    # fine-tuning has its dropout from the base
    params["pretrain"]["model"] |= {"n_layer": 2, "n_embd": 64, "dropout": 0.1}
    for stage in stages:
        params[stage]["train"] |= {
            "steps": steps or _STEPS,
            "batch_size": 4,
            "accumulation": 2,
            # so high that the best evaluation need not be the last one
            "learning_rate": 3.0e-2,
            "schedule": "constant",
            "eval_interval": max(1, (steps or _STEPS) // 8),
            "checkpoint_seconds": 0.5,
            "keep": "best",
        }
    return params


def prepare(folder: Path, stage: str, params: Mapping[str, Any] | None = None) -> Scratch:
    """Copy the project into `folder` and bring up to date what comes before `stage`.

    Args:
        folder: where all copies and logs go.
        stage: the one that will be killed.
        params: what `params.yaml` holds; None is `small_params`.

    Raises:
        RuntimeError: a stage before it failed.
    """
    scratch = Scratch(folder, stage, folder / "prepared")
    for part in _PARTS:
        source, target = ROOT / part, scratch.prepared / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    (scratch.prepared / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    (scratch.prepared / "params.yaml").write_text(
        yaml.safe_dump(params or small_params(stage), sort_keys=False)
    )
    (folder / "logs").mkdir()
    with scratch.repro(
        scratch.prepared, folder / "logs" / "prepare.txt", *_BEFORE[stage]
    ) as started:
        if started.process.wait():
            raise RuntimeError(f"the stages before {stage} failed:\n{started.printed()}")
    return scratch


def straight(scratch: Scratch) -> Outcome:
    """The stage without any interruption: what every other run must equal.

    Raises:
        RuntimeError: it failed, or what it left is not as it should be even so.
    """
    root = scratch.copy(f"straight-{scratch.stage}")
    with scratch.repro(
        root, scratch.folder / "logs" / f"straight-{scratch.stage}.txt", scratch.stage
    ) as started:
        code = started.process.wait()
    outcome = _look(scratch, root, code, started)
    # against itself: leftovers, and steps that are there twice
    if wrong := compare(outcome, outcome):
        raise RuntimeError("\n".join(["the straight run is not as it should be:", *wrong]))
    return outcome


def killed(
    scratch: Scratch,
    name: str,
    moments: Sequence[float | Event],
    *,
    signal_name: Signal = "kill",
    damage: Damage = "none",
    whole_group: Sequence[bool] = (),
) -> KilledRun:
    """The stage in a fresh copy, killed at each of `moments`, then left to end by itself.

    Args:
        scratch: the prepared project.
        name: of the copy.
        moments: seconds after a start, or an event; a start that ends before its moment is the
            last.
        signal_name: what is sent.
        damage: what happens to the newest state after each kill.
        whole_group: for each moment whether SIGTERM goes to all processes, or to the stage's alone.
    """
    root = scratch.copy(name)
    kills: list[Kill] = []
    problems: list[str] = []
    damaged: set[str] = set()
    fresh = 1  # starts that found no state, and so make a run of their own in MLflow
    mended = starts = number = 0
    every = [*moments, None]
    while True:
        moment = every[number]
        starts += 1
        log = scratch.folder / "logs" / f"{name}-start-{starts}.txt"
        with scratch.repro(root, log, scratch.stage) as started:
            if moment is None:
                started.process.wait()
                ended = True
            else:
                ended = started.ends_before(
                    _watch(root, scratch.stage, moment) if isinstance(moment, str) else moment
                )
            if ended and _DVC_WAS_CUT in started.printed():
                mended += 1
                scratch.clean(root)
                continue
            if ended:
                break
            alone = signal_name == "term" and number < len(whole_group) and not whole_group[number]
            pid = started.stage_process() if alone else None
            seconds = time.monotonic() - started.began
            started.send(signal.SIGTERM if signal_name == "term" else signal.SIGKILL, pid)
        problems += _went_on(kills, started.printed(), ended=False)
        kill = _look_after_kill(scratch, root, seconds, damaged)
        kill.target = ", the stage alone" if pid is not None else ""
        if damage != "none" and kill.saved is not None:
            kill.damaged = _damage(root, scratch.stage, damage, damaged)
            states = _states(_state_folder(root, scratch.stage), damaged)
            kill.expected = states[-1][0] if states else None
        kills.append(kill)
        number += 1
        fresh += kill.run_id is None
    problems += _went_on(kills, started.printed(), ended=started.process.returncode == 0)
    outcome = _look(scratch, root, started.process.returncode, started)
    if len(outcome.runs) > fresh:
        problems.append(
            f"MLflow has {len(outcome.runs)} runs of {scratch.stage}, but only {fresh} of "
            f"{len(kills) + 1} starts found no state to go on from"
        )
    return KilledRun(kills, outcome, problems, mended)


def compare(reference: Outcome, outcome: Outcome) -> list[str]:
    """What differs from the straight run, a line each; empty if nothing does."""
    if outcome.code:
        return [f"`dvc repro` ended with code {outcome.code}: {outcome.output}"]
    found = []
    for path in sorted(reference.files.keys() | outcome.files.keys()):
        if path not in outcome.files:
            found.append(f"{path} is missing")
        elif path not in reference.files:
            found.append(f"{path} was left behind")
        elif reference.files[path] != outcome.files[path]:
            found.append(f"{path} has other bytes")
        elif path.startswith(".checkpoints/") or ".partial" in path:
            found.append(f"{path} was left behind, by the straight run too")
    finished = [run for run in outcome.runs if run.status == "FINISHED"]
    if not finished:
        found.append(f"no MLflow run is FINISHED: {[run.status for run in outcome.runs]}")
    found += [
        f"MLflow run {run.id} stays {run.status}"
        for run in outcome.runs
        if run.status not in ("FINISHED", "KILLED")
    ]
    expected = next(run for run in reversed(reference.runs) if run.status == "FINISHED").curves
    # more than one: killed when its run was closed, but before DVC had noted that the stage is done
    for run in finished:
        found += [f"MLflow run {run.id}: {what}" for what in _compare_curves(expected, run.curves)]
    return found


def _compare_curves(
    expected: Mapping[str, list[tuple[int, float]]], found: Mapping[str, list[tuple[int, float]]]
) -> Iterator[str]:
    for key in sorted(expected.keys() | found.keys()):
        counts = collections.Counter(step for step, _ in found.get(key, ()))
        if twice := [step for step, count in counts.items() if count > 1]:
            yield f"{key} is there more than once at {_steps(twice)}"
        if key.startswith("system/"):
            continue  # sampled by the clock: as many as there was time for
        wanted, got = dict(expected.get(key, ())), dict(found.get(key, ()))
        if missing := sorted(wanted.keys() - got.keys()):
            yield f"{key} is missing at {_steps(missing)}"
        if more := sorted(got.keys() - wanted.keys()):
            yield f"{key} is there at {_steps(more)}, which the straight run does not have"
        if key.startswith(_TIMED):
            continue
        # by their text: a value that is not a number equals itself
        if other := [s for s in sorted(wanted) if s in got and repr(wanted[s]) != repr(got[s])]:
            step = other[0]
            yield f"{key} differs at {_steps(other)}: {got[step]!r} for {wanted[step]!r}"


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:5]))
    return f"step {shown}" + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


# --- looking at a project --------------------------------------------------------------------


def _look(scratch: Scratch, root: Path, code: int, started: Started) -> Outcome:
    seconds = time.monotonic() - started.began
    files = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.relative_to(root).parts[0] not in _TOOLS
        and "__pycache__" not in path.parts
    }
    folders = [path for path in (root / ".checkpoints").glob("*/*") if path.is_dir()]
    files |= {f"{path.relative_to(root).as_posix()}/": "a folder" for path in folders}
    output = "\n".join(started.printed().splitlines()[-12:])
    return Outcome(code, seconds, files, _runs(root, scratch.stage), output)


def _runs(root: Path, stage: str) -> list[Run]:
    """All MLflow runs of a stage with every value that was logged."""
    from pipeline.tracking.connection import quiet_environment
    from pipeline.tracking.keys import EXPERIMENT_PREFIX

    if not (root / "mlflow.db").is_file():
        return []
    os.environ.update(quiet_environment())  # before MLflow is imported
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT_PREFIX + stage)
    if experiment is None:
        return []
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return [
        Run(
            run.info.run_id,
            run.info.status,
            {
                key: sorted(
                    (metric.step, metric.value)
                    for metric in client.get_metric_history(run.info.run_id, key)
                )
                for key in run.data.metrics
            },
        )
        for run in found
    ]


def _state_folder(root: Path, stage: str) -> Path | None:
    folders = list((root / ".checkpoints" / stage).glob("*"))
    return folders[0] if folders else None


def _states(folder: Path | None, damaged: set[str]) -> list[tuple[int, Path]]:
    """The states on the disk that are whole, the oldest first."""
    paths = sorted(folder.glob("step-*.pt")) if folder else []
    matches = [(_STATE.fullmatch(path.name), path) for path in paths]
    return [(int(match[1]), path) for match, path in matches if match and path.name not in damaged]


def _model(root: Path, stage: str) -> Path:
    names = {
        "finetune_classifier": "classifier",
        "finetune_instruct": "assistant",
        "tune_preferences": "preferred",
    }
    return root / "models" / names.get(stage, stage)


def _newer(path: Path, moment: float) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime > moment
    return False


def _watch(root: Path, stage: str, event: Event) -> Callable[[], bool]:
    """A function that tells whether an event has come since now."""
    now = time.time()
    before = {path.name for path in (root / ".checkpoints" / stage).glob("*/step-*.pt")}
    model = _model(root, stage)
    note = root / ".pipeline" / "runs" / f"{stage}.json"

    def written() -> bool:
        return _newer(model / "model.safetensors", now)

    def come() -> bool:
        match event:
            case "saved":
                states = (root / ".checkpoints" / stage).glob("*/step-*.pt")
                return any(path.name not in before for path in states)
            case "writing":
                return _newer(model.with_name(f".{model.name}.partial"), now)
            case "written":
                return written()
            case "closing":
                return written() and _newer(note.with_name(f".{note.name}.partial"), now)
            case "closed":
                return written() and _newer(note, now) and '"FINISHED"' in note.read_text()
            case "gone":
                return written() and _state_folder(root, stage) is None

    return come


def _look_after_kill(scratch: Scratch, root: Path, seconds: float, damaged: set[str]) -> Kill:
    started = time.time() - seconds  # what is older is of an earlier start
    folder = _state_folder(root, scratch.stage)
    states = _states(folder, damaged)
    run_id = None
    step = 0
    if folder is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            run_id = str(json.loads((folder / "run.json").read_text())["run_id"])
        with contextlib.suppress(OSError):
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            for line in lines:
                with contextlib.suppress(ValueError):
                    match json.loads(line):
                        case [int(at), _, _]:  # else it is a text
                            step = max(step, at)
    model = _model(root, scratch.stage)
    note = root / ".pipeline" / "runs" / f"{scratch.stage}.json"
    written = _newer(model / "model.safetensors", started)
    if folder is None and model.exists():
        locked = f"  {scratch.stage}:" in (root / "dvc.lock").read_text()
        place = "done and in dvc.lock" if locked else "done, not yet in dvc.lock"
    elif folder is None:
        place = "start-up"
    elif written and '"FINISHED"' in note.read_text():
        place = "its run closed, its state still there"
    elif written:
        place = "registering or closing"
    elif _newer(model.with_name(f".{model.name}.partial"), started):
        place = "writing the model"
    elif step:
        place = f"step {step}"
    else:
        place = "start-up, no step yet"
    if folder is not None and (folder / ".state.partial").exists():
        place += " while saving"
    saved = states[-1][0] if states else None
    return Kill(seconds, place, saved, run_id, "", expected=saved)


def _went_on(kills: Sequence[Kill], printed: str, *, ended: bool) -> Iterator[str]:
    """Note from which step a start went on after the last kill; yield what is wrong with that.

    Beginning anew gives the same bytes as well: only this tells that nothing is done twice.
    """
    if not kills:
        return
    kill = kills[-1]
    if match := _CONTINUING.search(printed):
        kill.went_on = int(match[1])
    if kill.went_on != kill.expected and (ended or match):
        was = "began anew" if kill.went_on is None else f"went on from step {kill.went_on}"
        yield f"after the kill at {kill} the next start {was}"
    if kill.damaged is not None and (ended or match) and "is damaged" not in printed:
        yield f"after the kill at {kill} the next start did not tell of the damage"


def _damage(root: Path, stage: str, damage: Damage, damaged: set[str]) -> int | None:
    """Spoil the newest whole state."""
    states = _states(_state_folder(root, stage), damaged)
    if not states:
        return None
    step, path = states[-1]
    half = path.stat().st_size // 2
    if damage == "truncate":
        os.truncate(path, half)
    else:
        with path.open("rb+") as file:
            file.seek(half)
            byte = file.read(1)[0]
            file.seek(half)
            file.write(bytes([byte ^ 1]))
    damaged.add(path.name)
    return step


# --- the command line ------------------------------------------------------------------------


def draw(
    seed: int, number: int, length: float, aim: bool = False
) -> tuple[list[float | Event], list[bool]]:
    """The moments of a run's kills, one to five, and for each whether all processes are meant.

    Args:
        seed: of the experiment.
        number: of the run; each draws for itself.
        length: seconds that the straight run took.
        aim: draw events in place of seconds.
    """
    generator = random.Random(f"{seed}/{number}")
    moments: list[float | Event] = [
        generator.choice(EVENTS) if aim else generator.uniform(0, length)
        for _ in range(generator.randint(1, 5))
    ]
    return moments, [generator.random() < 0.5 for _ in moments]


@contextlib.contextmanager
def experiment_folder(keep: Path | None) -> Iterator[Path]:
    """A folder that goes with the block, or `keep`, which stays.

    Raises:
        ValueError: `keep` is there and is not empty.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="gpt-pipeline-kill-") as folder:
            yield Path(folder).resolve()
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ValueError(f"{keep} is there already; name a folder that is empty or new")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.resolve()


def _line(number: int, runs: int, run: KilledRun, wrong: Sequence[str], seconds: float) -> str:
    kills = "; ".join(map(str, run.kills)) or "never, it ended before"
    went_on = [str(kill.went_on) for kill in run.kills if kill.went_on is not None]
    more = len(run.outcome.runs) - 1
    return (
        f"run {number:>{len(str(runs))}}/{runs}  {'DIFFERS' if wrong else 'equal'}  "
        f"killed at {kills}"
        + (f"; went on from step {', '.join(went_on)}" if went_on else "; began anew")
        + (f"; DVC's own lock file mended {run.mended} times" if run.mended else "")
        + (f"; {more} more MLflow run{'s' if more > 1 else ''}" if more > 0 else "")
        + f"; {seconds:.0f} s in all"
    )


def _experiment(arguments: argparse.Namespace, folder: Path) -> int:
    stage, runs = arguments.stage, arguments.runs
    params = small_params(stage, steps=arguments.steps)
    if arguments.params:
        params = yaml.safe_load(arguments.params.read_text())
    say = functools.partial(print, flush=True)
    say(f"preparing what comes before {stage} …")
    scratch = prepare(folder, stage, params)
    say(f"{stage} without interruption …")
    reference = straight(scratch)
    curves = reference.runs[-1].curves
    say(
        f"  {reference.seconds:.1f} s, {len(reference.files)} files, {len(curves)} metrics with "
        f"{sum(map(len, curves.values()))} values"
    )
    began = time.monotonic()
    different = kills = more = mended = 0
    for number in range(1, runs + 1):
        started = time.monotonic()
        name = f"run-{number:02d}"
        moments, whole_group = draw(arguments.seed, number, reference.seconds, arguments.aim)
        run = killed(
            scratch,
            name,
            moments,
            signal_name=arguments.signal,
            damage=arguments.damage,
            whole_group=whole_group,
        )
        wrong = run.problems + compare(reference, run.outcome)
        different += bool(wrong)
        kills += len(run.kills)
        mended += run.mended
        more += len(run.outcome.runs) - 1
        say(_line(number, runs, run, wrong, time.monotonic() - started))
        for each in wrong:
            say(f"    {each}")
        if not arguments.keep:
            shutil.rmtree(folder / name)
    minutes = (time.monotonic() - began) / 60
    say(
        f"{runs - different} of {runs} runs of {stage} are equal to the one that never stopped: "
        f"{kills} kills (SIG{arguments.signal.upper()}, damage: {arguments.damage}), {more} MLflow "
        f"runs begun anew, {mended} times DVC's own lock file mended, {minutes:.1f} minutes"
    )
    return 1 if different else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code: 0 only if every run is equal."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.end_to_end.kill",
        description="Kill a training stage at random moments, and compare with one never killed.",
    )
    add = parser.add_argument
    add("--stage", choices=sorted(_BEFORE), default="pretrain")
    add("--runs", type=int, default=20, help="how many runs are killed (20)")
    add("--signal", choices=("kill", "term"), default="kill")
    add(
        "--damage",
        choices=("none", "truncate", "flip"),
        default="none",
        help="what happens to the newest state after each kill",
    )
    add(
        "--aim",
        action="store_true",
        help="kill when something is on the disk, not after some seconds: the short moments",
    )
    add("--seed", type=int, default=0, help="of the moments (0)")
    add("--steps", type=int, help="of the training; about ten seconds of them")
    add("--params", type=Path, help="a whole params.yaml instead of the small built-in one")
    add("--keep", type=Path, metavar="FOLDER", help="work there, and leave everything there")
    parsed = parser.parse_args(arguments)
    # SIGTERM unwinds as Ctrl-C does, so that nothing stays behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with experiment_folder(parsed.keep) as folder:
            return _experiment(parsed, folder)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
