"""What `dvc.lock` records of each stage: the one place that knows how DVC writes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.base.errors import InputError
from pipeline.dag.code import is_code
from pipeline.dag.dvc_files import LOCK_FILE, lock_files, read_stages
from pipeline.project.yaml_files import parse_yaml


@dataclass(frozen=True, slots=True)
class LockEntry:
    """The last run of a stage, as a `dvc.lock` records it."""

    inputs: dict[str, str]
    """Path -> md5 of what the stage reads, except code."""
    code: dict[str, str]
    """Path -> md5 of the files and folders of code."""
    code_files: int
    """The number of files in `code`."""
    outputs: dict[str, str]
    params: dict[str, Any]
    """Those of all parameter files together."""


def read_lock(root: Path) -> dict[str, LockEntry]:
    """The entry of each recorded stage of the project, optional ones last.

    Raises:
        InputError: a `dvc.lock` cannot be read.
    """
    stages = {name: raw for file in lock_files(root) for name, raw in read_stages(file).items()}
    try:
        return {name: _entry(raw) for name, raw in stages.items()}
    except (AttributeError, KeyError, TypeError):
        raise InputError(
            f"{LOCK_FILE}: not as DVC writes it; bring it back (`git checkout {LOCK_FILE}`)"
        ) from None


def parse_lock(text: str) -> dict[str, LockEntry]:
    """The entries in the text of a `dvc.lock`; none if it is not such a file."""
    with contextlib.suppress(InputError, KeyError, TypeError, AttributeError):
        stages = parse_yaml(text.encode(), LOCK_FILE)["stages"]
        return {name: _entry(raw) for name, raw in stages.items()}
    return {}


def _entry(raw: Mapping[str, Any]) -> LockEntry:
    deps = raw.get("deps") or ()
    code = [each for each in deps if is_code(each["path"])]
    return LockEntry(
        inputs=_md5s(each for each in deps if not is_code(each["path"])),
        code=_md5s(code),
        code_files=sum(each.get("nfiles", 1) for each in code),
        outputs=_md5s(raw.get("outs") or ()),
        params={k: v for file in (raw.get("params") or {}).values() for k, v in file.items()},
    )


def _md5s(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {each["path"]: str(each.get("md5", "")) for each in entries}
