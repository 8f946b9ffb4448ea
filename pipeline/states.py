"""The resume states of training stages: where they lie, who may touch them, which are of no use.

A state lies in `.checkpoints/STAGE/FINGERPRINT`, beside DVC's outputs and not in them: DVC deletes
those before a stage runs. Whoever writes or removes what a stage makes holds the stage's lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from gpt.errors import InputError, RunError
from gpt.events import Message
from pipeline.home import home
from pipeline.provenance import code_of
from pipeline.tracking import dvc_md5

if TYPE_CHECKING:
    from pipeline.runner import StageSpec

FOLDER = ".checkpoints"


class BusyError(InputError):
    """Another process is at the same work: it can be done when that one has ended."""


HOW = ("train.devices", "train.parallel", "train.checkpoint_seconds", "workers")
"""The parameters of a stage that say how and not what is done. They change no result, so what was
stopped goes on under others: on the machine that has the GPUs, say."""

_STEP = re.compile(r"step-(\d+)\b.*")
_PARTIAL = ".*.partial"
"""What `gpt.files` and `gpt.checkpoint` call a file or directory that is still being written."""


# --- where a state lies ------------------------------------------------------------------------


def fingerprint(root: Path, stage: str, params: Any, inputs: Mapping[str, str]) -> str:
    """What a training run's state depends on: parameters, inputs and code, in 16 digits.

    The code is the stage's import closure as its `dvc.yaml` lists it. The parameters named in `HOW`
    are left out.

    Args:
        root: the project.
        stage: its name in `dvc.yaml`.
        params: the stage's parameters, a dataclass.
        inputs: path relative to `root` -> md5 as DVC computes it.

    Raises:
        InputError: `dvc.yaml` cannot be read, or names code that is not there.
    """
    code = code_of(root, stage)
    values = dataclasses.asdict(params)
    for section, within in (("", values), ("train.", values.get("train"))):
        for name in HOW:
            if within and name.startswith(section):
                within.pop(name.removeprefix(section), None)
    code_md5 = {dep: dvc_md5(root / dep) for dep in code}
    whole = json.dumps([values, dict(inputs), code_md5], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def state_folder(root: Path, stage: str, params: Any, inputs: Mapping[str, str]) -> Path:
    """Where the state of a training lies under these parameters and inputs, and the code as it is.

    Arguments and errors are those of `fingerprint`.
    """
    return home(root) / FOLDER / stage / fingerprint(root, stage, params, inputs)


def older_states(root: Path, stage: str, state: Path) -> Message | None:
    """What to tell of a stage's other states when it starts without one; None if nothing."""
    if state.is_dir() or not (others := _states(root, stage)):
        return None
    states, are, them = ("states", "are", "them") if len(others) > 1 else ("state", "is", "it")
    size = size_in_words(sum(map(size_of, others)))
    return Message(
        f"{stage}: {len(others)} older {states} under {FOLDER}/{stage} ({size}) {are} of other "
        f"parameters, inputs or code; `gpt-pipeline clean` removes {them}"
    )


def size_in_words(size: int) -> str:
    """Bytes as a person says them, in decimal units: `0.3 MB`, `24.0 MB`, `1.5 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 999.95e6 else f"{size / 1e6:.1f} MB"


def _states(root: Path, stage: str) -> list[Path]:
    try:
        found = sorted((home(root) / FOLDER / stage).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [each for each in found if _is_folder(each) and not each.name.startswith(".")]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _step(state: Path) -> int | None:
    """The step of the newest state in the folder; None if nothing was saved yet."""
    steps = [int(match[1]) for each in state.iterdir() if (match := _STEP.fullmatch(each.name))]
    return max(steps, default=None)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = [each for each in path.rglob("*") if not each.is_dir()] if _is_folder(path) else [path]
    return sum(each.lstat().st_size for each in files)


# --- one process a stage -----------------------------------------------------------------------


@contextlib.contextmanager
def stage_lock(root: Path, stage: str) -> Iterator[None]:
    """Within the block no other process runs the stage in this project.

    The system keeps the lock: it is free again when this process is gone, however it went.

    Raises:
        BusyError: another process holds it; at once, without waiting.
        InputError: it cannot be taken.
    """
    with _held(root, stage, stage, "is running this stage here"):
        yield


@contextlib.contextmanager
def state_lock(root: Path, stage: str, state: Path) -> Iterator[None]:
    """Within the block nobody else goes on from the state, in no other checkout either.

    Raises:
        BusyError: another process does; at once, without waiting.
        InputError: it cannot be taken.
    """
    name = _state_lock_name(stage, state)
    with _held(home(root), name, stage, "makes just this in another checkout of the project"):
        yield


def _state_lock_name(stage: str, state: Path) -> str:
    return f"{stage}-{state.name}"


@contextlib.contextmanager
def _held(root: Path, name: str, stage: str, what: str) -> Iterator[None]:
    """Hold a lock, and let others know who does."""
    with _locked(root, name, stage, what):
        pid = _pid_file(root, name)
        with contextlib.suppress(OSError):  # it only serves a better message
            pid.write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                pid.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(root: Path, name: str, stage: str, what: str = "is at work on it") -> Iterator[None]:
    path = _pid_file(root, name).with_suffix(".lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise BusyError(f"{stage}: {_holder(root, name)} {what}; wait for it or stop it") from None
    except OSError as error:
        raise InputError(
            f"{path.relative_to(root)}: cannot be locked ({error.strerror or error}); "
            "make the folder writable"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _holder(root: Path, name: str) -> str:
    """Who holds a lock, as far as it can be told."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        pid = int(_pid_file(root, name).read_text())
        if pid > 0 and psutil.pid_exists(pid):  # else it is of one that was killed before
            return f"process {pid}"
    return "another process"


def _pid_file(root: Path, name: str) -> Path:
    return root / ".pipeline" / "locks" / f"{name}.pid"


# --- what is of no use -------------------------------------------------------------------------


_EMPTY = "an empty folder"


@dataclass(frozen=True, slots=True)
class Removed:
    """Something that `clean` removed: its path relative to the project, its bytes, what it was."""

    path: str
    size: int
    what: str

    def __str__(self) -> str:
        if self.what == _EMPTY:
            return f"{self.path}: {self.what}"
        return f"{self.path}: {', '.join(filter(None, [size_in_words(self.size), self.what]))}"


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that `clean` left: a path relative to the project, and why."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"kept: {self.what}, {self.why}"


def clean(
    root: Path,
    stages: Mapping[str, StageSpec],
    next_state: Callable[[str], Path] | None = None,
) -> Iterator[Removed | Kept]:
    """Remove the states that no run goes on from, and what killed processes left half-written.

    A stage that is running is left alone. States of a stage whose next one cannot be told are kept.

    Args:
        root: the project.
        stages: every stage by its name; states of other names are of no use.
        next_state: a training stage's name -> the state that its next run would go on from;
            InputError if that cannot be told. None: states that a run would go on from go too.

    Yields:
        What went or stayed, each when it did.

    Raises:
        RunError: something cannot be removed.
    """
    folder = home(root) / FOLDER
    found = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in found if name not in stages and not name.startswith(".")]
    for stage in [*stages, *others]:
        if (folder / stage).is_dir() or any(_left_outputs(root, stages.get(stage))):
            yield from _clean_stage(root, stage, stages.get(stage), next_state)


def _clean_stage(
    root: Path,
    stage: str,
    spec: StageSpec | None,
    next_state: Callable[[str], Path] | None,
) -> Iterator[Removed | Kept]:
    folder = home(root) / FOLDER / stage
    going_on, unknown = None, ""
    if next_state and spec and spec.continues and _states(root, stage):
        # before the lock is taken: to hash the inputs takes long, and a run need not wait for it
        try:
            going_on = next_state(stage)
        except InputError as error:
            unknown = str(error)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_locked(root, stage, stage, "is running this stage here"))
        except InputError as error:
            yield Kept(f"all of {stage}", f"as {str(error).removeprefix(f'{stage}: ')}")
            return
        states = _states(root, stage)
        for state in states:
            if unknown:
                why = f"as it cannot be told whether a run would go on from it: {unknown}"
                yield Kept(_shown(root, state), why)
            elif state == going_on:
                yield Kept(_shown(root, state), f"the next run of {stage} goes on from it")
            else:
                yield _clean_state(root, stage, state)
        for partial in [*_left_outputs(root, spec), *sorted(folder.rglob(_PARTIAL))]:
            if partial.exists():  # else it went with one above it
                yield _remove(root, partial, "half-written")
        if _is_folder(folder) and not any(folder.iterdir()):
            folder.rmdir()
            if not states:
                yield Removed(_shown(root, folder), 0, _EMPTY)


def _clean_state(root: Path, stage: str, state: Path) -> Removed | Kept:
    """Remove a state, unless a run in another checkout works with it."""
    try:
        with _locked(home(root), _state_lock_name(stage, state), stage):
            step = _step(state)
            return _remove(root, state, "" if step is None else f"of step {step}")
    except BusyError:
        return Kept(_shown(root, state), f"a run of {stage} in another checkout works with it")


def _left_outputs(root: Path, spec: StageSpec | None) -> Iterator[Path]:
    """What is left of outputs that were being written when their process was killed."""
    for output in spec.outputs.values() if spec else ():
        path = root / output
        partial = path.with_name(_PARTIAL.replace("*", path.name))
        if partial.exists():
            yield partial


def _remove(root: Path, path: Path, what: str) -> Removed:
    removed = Removed(_shown(root, path), size_of(path), what)
    try:
        if not _is_folder(path):
            path.unlink()
        elif path.match(_PARTIAL):
            shutil.rmtree(path)
        else:
            remove_state(path)
    except OSError as error:
        raise RunError(
            f"{removed.path}: cannot be removed ({error.strerror or error}); make it writable and "
            "try again"
        ) from None
    return removed


def remove_state(state: Path) -> None:
    """Remove a state from one moment to the next: no run may go on from half of it."""
    partial = state.with_name(_PARTIAL.replace("*", state.name))
    if partial.exists():
        shutil.rmtree(partial)
    state.replace(partial)
    shutil.rmtree(partial)


def _shown(root: Path, path: Path) -> str:
    return path.relative_to(home(root) if path.is_relative_to(home(root)) else root).as_posix()
