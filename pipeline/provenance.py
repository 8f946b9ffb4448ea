"""What a run was made of beside its data: the parameters' file, the code, and what git lacks of it.

It is taken when a stage starts and kept with its run, so that the run can be made again later. The
parameters are recorded as a file of their own, and so a changed `params.yaml` alone does not count
as changed code: neither in `git.dirty` nor in the patch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.errors import InputError, RunError
from pipeline.dag import pipeline_files, read_stages
from pipeline.params import PARAMS_FILE
from pipeline.secrets import without_secrets
from pipeline.tracking import NOT_CODE, dvc_md5, git_state
from pipeline.yaml_files import parse_yaml

CODE, PATCH = "code.json", "changes.patch"
"""Files below `lineage/` of a run, beside `params.yaml`."""

PATCH_LIMIT = 5_000_000
"""A patch of more bytes is not kept."""

_NAMED = 20  # untracked files, in a tag


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What is kept of a run's making.

    Attributes:
        tags: of the run.
        files: name below `lineage/` -> content.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def provenance(root: Path, stage: str, inputs: Iterable[str] = ()) -> Provenance:
    """The parameters and the code of a stage as they are now.

    Args:
        root: the project.
        stage: its name in `dvc.yaml`.
        inputs: what it reads, paths relative to `root`.

    Raises:
        InputError: `params.yaml`, `dvc.yaml` or code that it names is missing.
    """
    code = {path: dvc_md5(root / path) for path in code_of(root, stage)}
    files = {
        PARAMS_FILE: (root / PARAMS_FILE).read_bytes(),
        CODE: json.dumps(code, indent=2, sort_keys=True).encode() + b"\n",
    }
    tags = git_state(root)
    if tags.get("git.dirty") == "true":
        patch, size = _patch(root)
        if patch:
            files[PATCH] = patch
        tags["git.patch"] = "kept" if patch else f"too large ({size / 1e6:.1f} MB)"
    if tags and (untracked := _untracked(root, [*code, *inputs])):
        more = len(untracked) - _NAMED
        tags["git.untracked"] = ", ".join(untracked[:_NAMED]) + (
            f" and {more} more" if more > 0 else ""
        )
    tags["code"] = hashlib.md5(files[CODE], usedforsecurity=False).hexdigest()
    shown = {name: _redacted(content) for name, content in files.items()}
    if hidden := [name for name in files if shown[name] != files[name]]:
        tags["lineage.redacted"] = ", ".join(hidden)
    return Provenance(tags=tags, files=shown)


def check_unchanged(root: Path, stage: str, made_of: Provenance, inputs: Mapping[str, str]) -> None:
    """A stage's code, parameters and inputs are at its end what they were at its beginning.

    DVC looks at them when a stage has ended: it would write into `dvc.lock` that what is there now
    had made the outputs, and never make them again.

    Args:
        root: the project.
        stage: its name in `dvc.yaml`.
        made_of: what it began with.
        inputs: and what it read, path relative to `root` -> MD5.

    Raises:
        RunError: something was edited meanwhile.
    """
    began = json.loads(made_of.files[CODE])
    edited = [
        path
        for path in dict.fromkeys([*began, *code_of(root, stage)])
        if not (root / path).is_file() or began.get(path) != dvc_md5(root / path)
    ]
    edited += [
        path
        for path, md5 in inputs.items()
        if not (root / path).exists() or dvc_md5(root / path) != md5
    ]
    now = _redacted((root / PARAMS_FILE).read_bytes())
    if _section(made_of.files[PARAMS_FILE], stage) != _section(now, stage):
        edited.append(f"{stage} in {PARAMS_FILE}")
    if edited:
        raise RunError(
            f"{stage}: {', '.join(edited)} changed while it ran, so nobody could say what made its "
            "outputs; put it back and `gpt-pipeline run` goes on from the kept state, or run again"
        )


def _section(params: bytes, stage: str) -> Any:
    try:
        return parse_yaml(params, PARAMS_FILE).get(stage)
    except (InputError, AttributeError):
        return None


def code_of(root: Path, stage: str) -> list[str]:
    """The files of code that a stage depends on: its import closure, as `dvc.yaml` lists it.

    Raises:
        InputError: `dvc.yaml` cannot be read, or names code that is not there.
    """
    for stages in _stages(root):
        if isinstance(entry := stages.get(stage), dict) and isinstance(entry.get("deps"), list):
            code = [dep for dep in entry["deps"] if dep.endswith(".py")]
            break
    else:
        raise InputError(f"dvc.yaml: names no deps of {stage}, or cannot be read; restore the file")
    if missing := [dep for dep in code if not (root / dep).is_file()]:
        raise InputError(f"{missing[0]} is missing, and {stage} depends on it; restore the file")
    return code


def _redacted(content: bytes) -> bytes:
    # every byte is a character of this encoding, so that nothing else changes
    return without_secrets(content.decode("latin-1")).encode("latin-1")


def _stages(root: Path) -> Iterator[Mapping[str, Any]]:
    """What each of the project's `dvc.yaml` says of stages; nothing where it cannot be read."""
    for file in pipeline_files(root):
        with contextlib.suppress(InputError):
            yield read_stages(file)


def _patch(root: Path) -> tuple[bytes, int]:
    """What `git apply` makes of the commit the code as it is, and its size; empty if too large."""
    plain = ("--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-relative")
    command = ("diff", *plain, "--src-prefix=a/", "--dst-prefix=b/", "HEAD", "--", ".", *NOT_CODE)
    kept, size = bytearray(), 0
    with _git_process(root, *command) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(1 << 16):
            size += len(piece)
            if size <= PATCH_LIMIT:
                kept += piece
    return (bytes(kept) if size <= PATCH_LIMIT else b""), size


def _untracked(root: Path, paths: Iterable[str]) -> list[str]:
    """Files among those that a stage reads which git does not have; what stages make is DVC's."""
    made = {
        path if isinstance(path, str) else next(iter(path))
        for stages in _stages(root)
        for stage in stages.values()
        for key in ("outs", "metrics", "plots")
        for path in stage.get(key) or ()
    }
    own = [path for path in paths if path not in made]
    if not own:
        return []
    try:
        names = _git(root, "ls-files", "-z", "--others", "--directory", "--", *own)
    except (OSError, subprocess.CalledProcessError):  # what lies outside the repository
        return []
    found = (name for name in names.decode(errors="replace").split("\0") if name)
    return sorted(name for name in found if "__pycache__" not in name)


def _git(root: Path, *arguments: str) -> bytes:
    with _git_process(root, *arguments) as process:
        said, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, "git")
    return said


def _git_process(root: Path, *arguments: str) -> subprocess.Popen[bytes]:
    # a hook of git that starts us says by variables which repository is its own
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.Popen(
        ("git", "-C", str(root), *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=inherited,
    )
