"""The code that a stage depends on: files, and folders as DVC hashes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pathspec import GitIgnoreSpec

from gpt.base.errors import InputError
from pipeline.dag.dvc_files import pipeline_stages

CODE = ("gpt", "stages")
"""The folders of the code that stages run."""


def is_code(path: str) -> bool:
    """Whether a dependency of a stage, a file or a folder, is code and not data."""
    return path.endswith(".py") or path.partition("/")[0] in CODE


def code_of(root: Path, stage: str) -> list[str]:
    """The code files that a stage depends on, listed in `dvc.yaml` directly or as folders.

    Raises:
        InputError: `dvc.yaml` cannot be read, or names missing code.
    """
    known = {name: entry for stages in pipeline_stages(root) for name, entry in stages.items()}
    listed = known.get(stage, {}).get("deps")
    if not isinstance(listed, list):
        raise InputError(f"dvc.yaml: names no deps of {stage}, or cannot be read; restore the file")
    files = []
    for path in filter(is_code, listed):
        found = files_of_code(root, path)
        if not found:
            raise missing_code(path, stage)
        files += found
    return files


def missing_code(path: str, stage: str) -> InputError:
    """The error for missing code that a stage depends on."""
    return InputError(
        f"{path} is missing, and {stage} depends on it; restore the file, or, where dvc.yaml is of "
        "an earlier state than the code, take the code's own dvc.yaml"
    )


def files_of_code(root: Path, path: str) -> list[str]:
    """The file at a path, or the files of a folder that `.dvcignore` does not exclude."""
    if (root / path).is_file():
        return [path]
    patterns = root / ".dvcignore"
    # not through DVC, whose start takes ten times as long as all of this
    ignored = GitIgnoreSpec.from_lines(
        patterns.read_text(encoding="utf-8").splitlines() if patterns.is_file() else []
    )
    files = (each for each in (root / path).rglob("*") if each.is_file())
    names = sorted(each.relative_to(root).as_posix() for each in files)
    return [name for name in names if not ignored.match_file(name)]


def md5_of_code(files: Mapping[str, str], path: str) -> str:
    """The md5 of a code file or folder as in `dvc.lock`; empty if it holds no code.

    Args:
        files: path -> md5 of code files; may include folders.
        path: the path of the file or folder.
    """
    if path in files:
        return files[path]
    below = [
        {"md5": md5, "relpath": name.removeprefix(f"{path}/")}
        for name, md5 in sorted(files.items())
        if name.startswith(f"{path}/")
    ]
    listed = json.dumps(below, sort_keys=True).encode()
    return f"{hashlib.md5(listed, usedforsecurity=False).hexdigest()}.dir" if below else ""


def note_of_code(root: Path, stage: str) -> Path:
    """The file that notes which code (file -> md5) made a stage's last outputs."""
    return root / ".pipeline" / "code" / f"{stage}.json"
