"""The resume states of stages: their folders, sizes and removal.

A state lies in `.checkpoints/STAGE/FINGERPRINT` (`MadeOf.fingerprint`), outside the stage's
outputs: DVC deletes those before a stage runs.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from gpt.base.events import Message
from pipeline.project.folders import shared_folder
from pipeline.tracking.provenance import MadeOf

FOLDER = ".checkpoints"

_STEP = re.compile(r"step-(\d+)\b.*")  # the name that `gpt.train.checkpoint` gives a state
PARTIAL = ".*.partial"
"""Names that `gpt.base.files` and `gpt.train.checkpoint` give to partial files."""


def state_folder(made_of: MadeOf) -> Path:
    """The folder of the resume state of a training with these inputs, parameters and code."""
    return shared_folder(made_of.root) / FOLDER / made_of.stage / made_of.fingerprint()


def older_states(root: Path, stage: str, state: Path) -> Message | None:
    """A notice about a stage's other states when it starts from scratch; None if there are none."""
    if state.is_dir() or not (others := states_of(root, stage)):
        return None
    states, are, them = ("states", "are", "them") if len(others) > 1 else ("state", "is", "it")
    size = size_in_words(sum(map(size_of, others)))
    return Message(
        f"{stage}: {len(others)} older {states} under {FOLDER}/{stage} ({size}) {are} of other "
        f"parameters, inputs or code; `gpt-pipeline clean` removes {them}"
    )


def size_in_words(size: int) -> str:
    """A size in bytes for display, in decimal units: `0.3 MB`, `24.0 MB`, `1.5 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 999.95e6 else f"{size / 1e6:.1f} MB"


def states_of(root: Path, stage: str) -> list[Path]:
    """The folders of a stage's states, sorted by name."""
    try:
        found = sorted((shared_folder(root) / FOLDER / stage).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [each for each in found if is_folder(each) and not each.name.startswith(".")]


def is_folder(path: Path) -> bool:
    """Whether the path is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def step_of(state: Path) -> int | None:
    """The step of the newest state in the folder; None if nothing was saved yet."""
    steps = [int(match[1]) for each in state.iterdir() if (match := _STEP.fullmatch(each.name))]
    return max(steps, default=None)


def size_of(path: Path) -> int:
    """The size in bytes of a file, or of all files in a directory."""
    files = [each for each in path.rglob("*") if not each.is_dir()] if is_folder(path) else [path]
    return sum(each.lstat().st_size for each in files)


def remove_state(state: Path) -> None:
    """Remove a state atomically, so that no run can resume from a partial one."""
    partial = state.with_name(PARTIAL.replace("*", state.name))
    if partial.exists():
        shutil.rmtree(partial)
    state.replace(partial)
    shutil.rmtree(partial)
