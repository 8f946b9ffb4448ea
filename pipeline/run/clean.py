"""`gpt-pipeline clean`: removes files that are no longer needed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpt.base.errors import InputError, RunError
from pipeline.project.file_locks import BusyError, stage_lock, state_lock
from pipeline.project.folders import shared_folder
from pipeline.project.stage_table import StageSpec
from pipeline.run.resume import (
    FOLDER,
    PARTIAL,
    is_folder,
    remove_state,
    size_in_words,
    size_of,
    states_of,
    step_of,
)

_EMPTY = "an empty folder"


@dataclass(frozen=True, slots=True)
class Removed:
    """Something that `clean` removed: its path relative to the project, its size, what it was."""

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
    """Remove resume states that no run would use, and partial files of killed processes.

    A running stage is left alone. If a stage's next state cannot be determined, all are kept.

    Args:
        root: the project.
        stages: every stage by name; states under any other name are unused.
        next_state: a training stage's name -> the state that its next run would resume from;
            InputError if that cannot be determined. None: remove those states too.

    Yields:
        Each item as it is removed or kept.

    Raises:
        RunError: something cannot be removed.
    """
    folder = shared_folder(root) / FOLDER
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
    folder = shared_folder(root) / FOLDER / stage
    going_on, unknown = None, ""
    if next_state and spec and spec.continues and states_of(root, stage):
        # before taking the lock: hashing the inputs is slow, and no run should wait for it
        try:
            going_on = next_state(stage)
        except InputError as error:
            unknown = str(error)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(stage_lock(root, stage))
        except InputError as error:
            yield Kept(f"all of {stage}", f"as {str(error).removeprefix(f'{stage}: ')}")
            return
        states = states_of(root, stage)
        for state in states:
            if unknown:
                why = f"as it cannot be told whether a run would go on from it: {unknown}"
                yield Kept(_shown(root, state), why)
            elif state == going_on:
                yield Kept(_shown(root, state), f"the next run of {stage} goes on from it")
            else:
                yield _clean_state(root, stage, state)
        for partial in [*_left_outputs(root, spec), *sorted(folder.rglob(PARTIAL))]:
            if partial.exists():  # otherwise it was removed with its parent
                yield _remove(root, partial, "half-written")
        if is_folder(folder) and not any(folder.iterdir()):
            folder.rmdir()
            if not states:
                yield Removed(_shown(root, folder), 0, _EMPTY)


def _clean_state(root: Path, stage: str, state: Path) -> Removed | Kept:
    """Remove a state, unless a run in another checkout is using it."""
    try:
        with state_lock(root, stage, state):
            step = step_of(state)
            return _remove(root, state, "" if step is None else f"of step {step}")
    except BusyError:
        return Kept(_shown(root, state), f"a run of {stage} in another checkout works with it")


def _left_outputs(root: Path, spec: StageSpec | None) -> Iterator[Path]:
    """Partial outputs of processes that were killed while writing them."""
    for output in spec.outputs.values() if spec else ():
        path = root / output
        partial = path.with_name(PARTIAL.replace("*", path.name))
        if partial.exists():
            yield partial


def _remove(root: Path, path: Path, what: str) -> Removed:
    removed = Removed(_shown(root, path), size_of(path), what)
    try:
        if not is_folder(path):
            path.unlink()
        elif path.match(PARTIAL):
            shutil.rmtree(path)
        else:
            remove_state(path)
    except OSError as error:
        raise RunError(
            f"{removed.path}: cannot be removed ({error.strerror or error}); make it writable and "
            "try again"
        ) from None
    return removed


def _shown(root: Path, path: Path) -> str:
    return path.relative_to(
        shared_folder(root) if path.is_relative_to(shared_folder(root)) else root
    ).as_posix()
