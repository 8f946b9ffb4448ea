"""What a person means by a name: a version of a model, a file, a run or a commit."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.base.errors import InputError
from pipeline.dag.cache import md5_now
from pipeline.history.runs import Execution, Known
from pipeline.project.git import commit_of

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import ModelVersion

_MODEL = re.compile(r"(?P<name>[\w.-]+)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))?")
_RUN = re.compile(r"[0-9a-f]{1,32}")


@dataclass(frozen=True, slots=True)
class File:
    """A path that stages read or write, or one below it.

    Attributes:
        path: as the stages name it, relative to the project.
        md5: of its bytes as DVC knows them.
        member: what was asked for below it; empty if it is the whole.
        is_code: it is code that stages run.
        read_at: when a run read it, in milliseconds: of several runs that wrote the same bytes the
            last before that counts; 0 where it is not known.
    """

    path: str
    md5: str
    member: str = ""
    is_code: bool = False
    read_at: int = 0

    @property
    def whole_path(self) -> str:
        """With what was asked for below it."""
        return f"{self.path}/{self.member}" if self.member else self.path


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit, by its full hash."""

    sha: str


def find(
    everything: Known, what: str, folder: Path | None = None
) -> ModelVersion | Execution | File | Commit:
    """What a person means by a name.

    Args:
        everything: that is known of the project.
        what: `models:/assistant/3`, `assistant@champion`, `assistant`; a path; the id of a run or
            its beginning; a commit.
        folder: the one that paths are relative to, beside the project's own.

    Raises:
        InputError: there is no such thing, or there are several.
        RunError: there is none here, and MLflow cannot be asked.
    """
    if version := _version(everything, what):
        return version
    if file := _file(everything, what, folder):
        return file
    runs = _by_prefix(everything, what)
    try:
        commit = commit_of(everything.root, what)
    except InputError:
        commit = ""
    if len(runs) + bool(commit) > 1:
        found = [f"the run {each.run_id} of {each.stage}" for each in runs]
        found += [f"the commit {commit}"] if commit else []
        raise InputError(f"{what}: may be {', '.join(found)}; give more of its digits")
    if runs:
        return runs[0]
    if commit:
        return Commit(commit)
    if everything.without:
        raise everything.not_known(f"{what}: not found")
    raise InputError(f"{what}: {_possible(everything, what)}")


def version_name(version: ModelVersion) -> str:
    """`models:/assistant/3`."""
    return f"models:/{version.name}/{version.version}"


def _version(everything: Known, what: str) -> ModelVersion | None:
    explicit = what.startswith("models:/")
    asked = _MODEL.fullmatch(what.removeprefix("models:/"))
    names = list(dict.fromkeys(sorted(each.name for each in everything.versions)))
    if not asked or asked["name"] not in names:
        if not explicit:
            return None
        if everything.without:
            raise everything.not_known(f"{what}: not found")
        told = f"registered are {', '.join(names)}" if names else "no model is registered here"
        raise InputError(f"{what}: no such model; {told}")
    versions = [each for each in everything.versions if each.name == asked["name"]]
    if asked["version"]:
        found = [each for each in versions if str(each.version) == asked["version"]]
        there = f"its versions are {', '.join(str(each.version) for each in versions[::-1])}"
    elif asked["alias"]:
        found = [each for each in versions if asked["alias"] in everything.aliases_of(each)]
        aliases = sorted({a for each in versions for a in everything.aliases_of(each)})
        there = f"its aliases are {', '.join(aliases)}" if aliases else "it has no alias"
    else:
        found, there = versions, ""
    if not found:
        raise InputError(f"{what}: {asked['name']} has no such version; {there}")
    return found[0]


def _file(everything: Known, what: str, folder: Path | None) -> File | None:
    root = everything.root
    code = {path for each in everything.executions for path in each.code}
    paths = {path for each in everything.executions for path in (*each.inputs, *each.outputs)}
    for base in dict.fromkeys([(folder or root).resolve(), root.resolve()]):
        place = Path(os.path.normpath(base / what))
        if not place.is_relative_to(root.resolve()):
            continue
        asked = place.relative_to(root.resolve())
        above = [asked, *asked.parents]
        for path in (each.as_posix() for each in above):
            if path in code or path in paths:
                if path in code:  # a file in a folder of code is known by itself
                    own = asked.as_posix()
                    return File(own, _md5_here(everything, own), is_code=True)
                member = asked.relative_to(path).as_posix()
                md5 = _md5_here(everything, path)
                return File(path, md5, "" if member == "." else member)
        if place.exists():
            outputs = sorted({p for each in everything.executions for p in each.outputs})
            told = f"they write {', '.join(outputs)}" if outputs else "no stage has run yet"
            raise InputError(
                f"{what}: no stage that ran reads it, writes it or runs it as code; {told}"
            )
    return None


def _md5_here(everything: Known, path: str) -> str:
    """The md5 of what lies at a path; else of what should, else of what lay there last."""
    if (everything.root / path).exists():
        return md5_now(everything.root, path)
    by_place = sorted(everything.executions, key=lambda each: not each.here)
    found = (
        each.outputs.get(path) or each.inputs.get(path) or each.code.get(path) for each in by_place
    )
    return next((md5 for md5 in found if md5), "")


def _by_prefix(everything: Known, what: str) -> list[Execution]:
    if not _RUN.fullmatch(what):
        return []
    found = [each for each in everything.executions if each.run_id.startswith(what)]
    if not found and len(what) == 32 and (deleted := everything.by_run(what)):
        return [deleted]
    return found


def _possible(everything: Known, what: str) -> str:
    names = sorted({each.name for each in everything.versions})
    paths = sorted({path for each in everything.executions for path in each.outputs})
    near = difflib.get_close_matches(what, [*names, *paths], n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    models = f"a model ({', '.join(names)})" if names else "a model (none is registered here)"
    return (
        f"no such thing; {meant}name {models}, a file that stages read or write, a run by its id "
        "or a commit"
    )
