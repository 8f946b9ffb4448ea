"""Find what a name refers to: a model version, a file, a run or a commit."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.base.errors import InputError
from pipeline.dag.cache import md5_now
from pipeline.history.runs import Execution, RunHistory
from pipeline.project.git import commit_of

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import ModelVersion

_VERSION_NAME = re.compile(r"(?P<name>[\w.-]+)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))?")
_RUN_ID = re.compile(r"[0-9a-f]{1,32}")


@dataclass(frozen=True, slots=True)
class ProjectPath:
    """A path that stages read or write, or one below it.

    Attributes:
        path: the one in `dvc.yaml`, relative to the project.
        md5: as DVC computes it.
        member: the path below it that was asked for; empty if all of it was.
        is_code: whether stages run it as code.
        read_at: when a run read it, in milliseconds, or 0: of several runs that wrote the same
            bytes, the last one before that made it.
    """

    path: str
    md5: str
    member: str = ""
    is_code: bool = False
    read_at: int = 0

    @property
    def whole_path(self) -> str:
        """`path` and `member`."""
        return f"{self.path}/{self.member}" if self.member else self.path


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit, by its full hash."""

    sha: str


def find(
    history: RunHistory, what: str, folder: Path | None = None
) -> ModelVersion | Execution | ProjectPath | Commit:
    """Find what a name refers to.

    Args:
        history: of the project.
        what: `models:/assistant/3`, `assistant@champion`, `assistant`; a path; the id of a run or
            its beginning; a commit.
        folder: the one that paths are relative to, beside the project's own.

    Raises:
        InputError: there is no such thing, or there are several.
        RunError: there is none here, and MLflow cannot be asked.
    """
    if version := _version(history, what):
        return version
    if file := _file(history, what, folder):
        return file
    found: list[Execution | Commit] = [
        each
        for each in history.executions
        if _RUN_ID.fullmatch(what) and each.run_id.startswith(what)
    ]
    with contextlib.suppress(InputError):
        found.append(Commit(commit_of(history.root, what)))
    if len(found) > 1:
        words = [
            f"the commit {each.sha}"
            if isinstance(each, Commit)
            else f"the run {each.run_id} of {each.stage}"
            for each in found
        ]
        raise InputError(f"{what}: may be {', '.join(words)}; give more of its digits")
    if found:
        return found[0]
    if history.without:
        raise history.not_known(f"{what}: not found")
    raise InputError(f"{what}: {_possible(history, what)}")


def find_run(
    history: RunHistory, what: str, folder: Path | None = None
) -> tuple[ModelVersion | None, Execution]:
    """The run that a name refers to, and the version if it is a version's name.

    Raises:
        InputError: there is no such thing, it is neither, or the version's run is gone.
        RunError: there is none here, and MLflow cannot be asked.
    """
    found = find(history, what, folder)
    if isinstance(found, Execution):
        return None, found
    if isinstance(found, ProjectPath | Commit):
        raise InputError(
            f"{what}: is no model version and no run; name one, such as classifier/2, "
            "classifier@champion or the beginning of a run's id"
        )
    run = history.by_run(found.run_id)
    if run is None:
        raise InputError(
            f"{what}: its run {found.run_id} is gone from MLflow, and with it what it was made of"
        )
    return found, run


def version_name(version: ModelVersion) -> str:
    """`models:/assistant/3`."""
    return f"models:/{version.name}/{version.version}"


def _version(history: RunHistory, what: str) -> ModelVersion | None:
    asked = _VERSION_NAME.fullmatch(what.removeprefix("models:/"))
    versions = [each for each in history.versions if asked and each.name == asked["name"]]
    if not asked or not versions:
        if not what.startswith("models:/"):
            return None
        if history.without:
            raise history.not_known(f"{what}: not found")
        raise InputError(f"{what}: no such model; registered are {_models(history)}")
    number, alias = asked["version"], asked["alias"]
    for each in versions:
        if number in (None, str(each.version)) and alias in (None, *history.aliases_of(each)):
            return each
    numbers = ", ".join(str(each.version) for each in versions[::-1])
    aliases = sorted({alias for each in versions for alias in history.aliases_of(each)})
    raise InputError(
        f"{what}: {asked['name']} has no such version; its versions are {numbers}, its aliases are "
        f"{', '.join(aliases) or 'none'}"
    )


def _models(history: RunHistory) -> str:
    return ", ".join(sorted({each.name for each in history.versions})) or "none"


def _file(history: RunHistory, what: str, folder: Path | None) -> ProjectPath | None:
    root = history.root.resolve()
    outputs = {path for each in history.executions for path in each.outputs}
    code = {path for each in history.executions for path in each.code}
    known = code | outputs | {path for each in history.executions for path in each.inputs}
    for base in dict.fromkeys([(folder or root).resolve(), root]):
        place = Path(os.path.normpath(base / what))
        if not place.is_relative_to(root):
            continue
        asked = place.relative_to(root)
        path = next((p for p in map(Path.as_posix, [asked, *asked.parents]) if p in known), None)
        if path in code:  # a file in a folder of code is known by itself
            return ProjectPath(asked.as_posix(), _md5_here(history, asked.as_posix()), is_code=True)
        if path is not None:
            member = asked.relative_to(path).as_posix()
            return ProjectPath(path, _md5_here(history, path), "" if member == "." else member)
        if place.exists():
            told = f"they write {', '.join(sorted(outputs))}" if outputs else "no stage has run yet"
            raise InputError(
                f"{what}: no stage that ran reads it, writes it or runs it as code; {told}"
            )
    return None


def _md5_here(history: RunHistory, path: str) -> str:
    """The md5 of a path now; if it is gone, as `dvc.lock` has it, or else as a run had it."""
    if (history.root / path).exists():
        return md5_now(history.root, path)
    by_place = sorted(history.executions, key=lambda each: not each.here)
    found = (
        each.outputs.get(path) or each.inputs.get(path) or each.code.get(path) for each in by_place
    )
    return next((md5 for md5 in found if md5), "")


def _possible(history: RunHistory, what: str) -> str:
    names = {each.name for each in history.versions}
    paths = {path for each in history.executions for path in each.outputs}
    near = difflib.get_close_matches(what, sorted(names | paths), n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return (
        f"no such thing; {meant}name a model (registered: {_models(history)}), a file that "
        "stages read or write, a run by its id or a commit"
    )
