"""Reads `dvc.yaml` and `dvc.lock`: their paths, and their raw content for each stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt.base.errors import InputError
from pipeline.project.yaml_files import read_yaml

PIPELINE_FILE = "dvc.yaml"
LOCK_FILE = "dvc.lock"
OPTIONAL = "optional"
"""The folder of the pipeline file with the optional stages, which run only on request."""


def find_root(start: Path) -> Path:
    """The project's root: the nearest folder at or above `start` that holds its `dvc.yaml`.

    Raises:
        InputError: there is none.
    """
    start = start.resolve()
    for folder in (start, *start.parents):
        of_another = folder.name == OPTIONAL and (folder.parent / PIPELINE_FILE).is_file()
        if (folder / PIPELINE_FILE).is_file() and not of_another:
            return folder
    raise InputError(f"{start}: no dvc.yaml here or above; change into the project's folder")


def pipeline_files(root: Path) -> list[Path]:
    """The project's `dvc.yaml`, and that of its optional stages if there is one."""
    optional = root / OPTIONAL / PIPELINE_FILE
    return [root / PIPELINE_FILE, *([optional] if optional.is_file() else [])]


def lock_files(root: Path) -> list[Path]:
    """The `dvc.lock` beside each pipeline file; it may not exist yet."""
    return [file.with_name(LOCK_FILE) for file in pipeline_files(root)]


def pipeline_stages(root: Path) -> Iterator[Mapping[str, Any]]:
    """The stages in each `dvc.yaml` of the project; empty for a file that cannot be read."""
    for file in pipeline_files(root):
        with contextlib.suppress(InputError):
            yield read_stages(file)


def read_stages(path: Path) -> dict[str, dict[str, Any]]:
    """The stages in a `dvc.yaml` or a `dvc.lock`; empty if there is no such file.

    Raises:
        InputError: it is not YAML, contains a git conflict, or holds something else.
    """
    if not path.exists():
        return {}
    name = path.relative_to(path.parents[path.parent.name == OPTIONAL]).as_posix()
    raw = read_yaml(path, name)
    stages = (raw.get("stages") or {}) if isinstance(raw, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(each, dict) for each in stages.values()):
        raise InputError(
            f"{name}: holds no stages; bring it back (`git checkout {name}`)"
            f"{', or remove it' if path.name == LOCK_FILE else ''}"
        )
    return stages
