"""The provenance of a stage: its code, inputs and parameters, recorded when it starts.

The run stores them together with a patch of uncommitted code, so that it can be reproduced later.
The parameters are stored as a separate file; a changed `params.yaml` alone therefore does not count
as changed code, neither in `git.dirty` nor in the patch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.base.errors import InputError, RunError, first_few
from pipeline.dag.cache import dvc_md5
from pipeline.dag.code import code_of
from pipeline.dag.dvc_files import pipeline_stages
from pipeline.dag.objects import md5_of
from pipeline.project.git import git, git_output
from pipeline.project.params import PARAMS_FILE
from pipeline.project.secrets import without_secrets
from pipeline.project.yaml_files import parse_yaml

CODE, PATCH = "code.json", "changes.patch"
"""Files in a run's folder `lineage/`, beside `params.yaml`."""

PATCH_LIMIT = 5_000_000
"""The largest patch that is stored, in bytes."""

NOT_CODE = (":!params.yaml", ":!dvc.lock", ":!*/dvc.lock", ":!reports")
"""Git pathspecs that exclude what the pipeline changes while it runs or records separately."""

HOW = ("train.devices", "train.parallel", "train.checkpoint_seconds", "workers")
"""Parameters that set how a stage runs, not what it computes. They change no result, so a stopped
run can resume with other values, for example on a machine with GPUs."""

_NAMED = 20  # untracked files, in a tag


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """The provenance that a run stores.

    Attributes:
        tags: the run's tags.
        files: name below `lineage/` -> content.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeOf:
    """Everything that determines a stage's outputs.

    Attributes:
        root: the project; paths are relative to it.
        stage: the stage's name in `dvc.yaml`.
        params: its parameters, a dataclass.
        settings: the bytes of `params.yaml`.
        code: file -> md5 of all code that it runs.
        inputs: path -> md5, as DVC computes it, of its inputs.
    """

    root: Path
    stage: str
    params: Any
    settings: bytes
    code: Mapping[str, str]
    inputs: Mapping[str, str]

    @classmethod
    def now(cls, root: Path, stage: str, params: Any, inputs: Iterable[str] = ()) -> MadeOf:
        """The state of code, parameters and inputs if the stage started now.

        Args:
            root: the project.
            stage: the stage's name in `dvc.yaml`.
            params: its parameters, a dataclass.
            inputs: the paths of its inputs, relative to `root`.

        Raises:
            InputError: `dvc.yaml` cannot be read, or names missing code.
        """
        return cls(
            root=root,
            stage=stage,
            params=params,
            settings=(root / PARAMS_FILE).read_bytes(),
            code={path: md5_of(root / path) for path in code_of(root, stage)},
            inputs={path: dvc_md5(root / path) for path in inputs},
        )

    def fingerprint(self) -> str:
        """A digest of what a resume state depends on: parameters, inputs and code; 16 digits.

        The parameters named in `HOW` are left out.
        """
        values = dataclasses.asdict(self.params)
        for section, within in (("", values), ("train.", values.get("train"))):
            for name in HOW:
                if within and name.startswith(section):
                    within.pop(name.removeprefix(section), None)
        whole = json.dumps([values, dict(self.inputs), dict(self.code)], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def check_unchanged(self) -> None:
        """Check at the end of a stage that code, parameters and inputs have not changed.

        DVC hashes them only after a stage has ended. It would record in `dvc.lock` that the edited
        versions made the outputs, and consider the outputs up to date.

        Raises:
            RunError: something was edited while the stage ran.
        """
        edited = [
            path
            for path in dict.fromkeys([*self.code, *code_of(self.root, self.stage)])
            if self.code.get(path) != md5_of(self.root / path)
        ]
        edited += [
            path
            for path, md5 in self.inputs.items()
            if not (self.root / path).exists() or dvc_md5(self.root / path) != md5
        ]
        now = (self.root / PARAMS_FILE).read_bytes()
        if _section(self.settings, self.stage) != _section(now, self.stage):
            edited.append(f"{self.stage} in {PARAMS_FILE}")
        if edited:
            raise RunError(
                f"{self.stage}: {', '.join(edited)} changed while it ran, so nobody could say what "
                "made its outputs; put it back and `gpt-pipeline run` goes on from the kept state, "
                "or run again"
            )

    def kept(self) -> Provenance:
        """The provenance to store with the run, including uncommitted code, without secrets."""
        files = {
            PARAMS_FILE: self.settings,
            CODE: json.dumps(dict(self.code), indent=2, sort_keys=True).encode() + b"\n",
        }
        tags = git_state(self.root)
        if tags.get("git.dirty") == "true":
            patch, size = _patch(self.root)
            if patch:
                files[PATCH] = patch
            tags["git.patch"] = "kept" if patch else f"too large ({size / 1e6:.1f} MB)"
        if tags and (untracked := _untracked(self.root, [*self.code, *self.inputs])):
            tags["git.untracked"] = first_few(untracked, _NAMED)
        tags["code"] = hashlib.md5(files[CODE], usedforsecurity=False).hexdigest()
        shown = {name: _redacted(content) for name, content in files.items()}
        if hidden := [name for name in files if shown[name] != files[name]]:
            tags["lineage.redacted"] = ", ".join(hidden)
        return Provenance(tags=tags, files=shown)


def git_state(root: Path) -> dict[str, str]:
    """The commit and whether the code differs from it; empty without a git repository.

    `dvc.lock` files and `reports/` are ignored, as they change while the pipeline runs, and so is
    `params.yaml`, which a run stores separately.
    """
    try:
        commit = git(root, "rev-parse", "HEAD")
        changes = git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *NOT_CODE)
    except RunError:
        return {}
    return {
        "mlflow.source.git.commit": commit,
        "git.commit": commit,
        "git.dirty": str(bool(changes)).lower(),
    }


def _section(params: bytes, stage: str) -> Any:
    try:
        return parse_yaml(params, PARAMS_FILE).get(stage)
    except (InputError, AttributeError):
        return None


def _redacted(content: bytes) -> bytes:
    # in this encoding every byte is a character, so all other bytes are preserved
    return without_secrets(content.decode("latin-1")).encode("latin-1")


def _patch(root: Path) -> tuple[bytes, int]:
    """A patch from the commit to the current code, and its size; an empty patch if too large."""
    plain = ("--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-relative")
    prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
    kept, size = bytearray(), 0
    for piece in git_output(root, "diff", *plain, *prefixes, "HEAD", "--", ".", *NOT_CODE):
        size += len(piece)
        if size <= PATCH_LIMIT:
            kept += piece
    return (bytes(kept) if size <= PATCH_LIMIT else b""), size


def _untracked(root: Path, paths: Iterable[str]) -> list[str]:
    """Untracked files among a stage's inputs, except outputs of other stages, which DVC tracks."""
    made = {
        path if isinstance(path, str) else next(iter(path))
        for stages in pipeline_stages(root)
        for stage in stages.values()
        for key in ("outs", "metrics", "plots")
        for path in stage.get(key) or ()
    }
    own = [path for path in paths if path not in made]
    if not own:
        return []
    try:
        names = git(root, "ls-files", "-z", "--others", "--directory", "--", *own).split("\0")
    except RunError:  # for paths outside the repository
        return []
    return sorted(name for name in names if name and "__pycache__" not in name)
