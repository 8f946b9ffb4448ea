"""The resume states of training stages: where they lie, and what they depend on.

A state lies in `.checkpoints/STAGE/FINGERPRINT`, beside DVC's outputs and not in them: DVC deletes
those before a stage runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.events import Message
from pipeline.home import home
from pipeline.provenance import code_of
from pipeline.tracking import dvc_md5

FOLDER = ".checkpoints"


HOW = ("train.devices", "train.parallel", "train.checkpoint_seconds", "workers")
"""The parameters of a stage that say how and not what is done. They change no result, so what was
stopped goes on under others: on the machine that has the GPUs, say."""

_STEP = re.compile(r"step-(\d+)\b.*")
PARTIAL = ".*.partial"
"""What `gpt.files` and `gpt.checkpoint` call a file or directory that is still being written."""


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
    if state.is_dir() or not (others := states_of(root, stage)):
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


def states_of(root: Path, stage: str) -> list[Path]:
    """The folders of a stage's states, in order of their names."""
    try:
        found = sorted((home(root) / FOLDER / stage).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [each for each in found if is_folder(each) and not each.name.startswith(".")]


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def step_of(state: Path) -> int | None:
    """The step of the newest state in the folder; None if nothing was saved yet."""
    steps = [int(match[1]) for each in state.iterdir() if (match := _STEP.fullmatch(each.name))]
    return max(steps, default=None)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = [each for each in path.rglob("*") if not each.is_dir()] if is_folder(path) else [path]
    return sum(each.lstat().st_size for each in files)


def remove_state(state: Path) -> None:
    """Remove a state from one moment to the next: no run may go on from half of it."""
    partial = state.with_name(PARTIAL.replace("*", state.name))
    if partial.exists():
        shutil.rmtree(partial)
    state.replace(partial)
    shutil.rmtree(partial)
