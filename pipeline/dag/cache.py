"""DVC's cache and remote, accessed by md5, including objects that no `dvc.lock` names now."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt.base.errors import InputError, RunError, in_one_line
from gpt.base.files import remove
from pipeline.dag.code import files_of_code, is_code, md5_of_code
from pipeline.dag.graph import Dag, Reason
from pipeline.dag.objects import Objects, md5_of, remove_damaged
from pipeline.dag.repository import has_remote, open_repo


def dvc_md5(path: Path) -> str:
    """DVC's md5 of a file or (ending in `.dir`) a directory, as in `dvc.lock`."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import localfs

    cache = HashFileDB(localfs, os.devnull)  # never touched: a dry run only computes
    _, _, built = build(cache, str(path.resolve()), localfs, "md5", dry_run=True)
    return str(built.hash_info.value)


def md5_now(root: Path, path: str) -> str:
    """The md5 that DVC would record now for a stage's input; for code, empty if the path holds
    none."""
    if not is_code(path):
        return dvc_md5(root / path)
    return md5_of_code({file: md5_of(root / file) for file in files_of_code(root, path)}, path)


def push(root: Path) -> int:
    """Push the project's outputs to the default remote: `dvc push --run-cache`, and the metrics.

    DVC's run cache refers to a stage's metrics, but as `cache: false` leaves them to git, DVC does
    not push them. Without them another machine could not restore the stage from the run cache.

    Returns:
        The number of files that the remote did not have.

    Raises:
        InputError: there is no remote.
        RunError: the push failed.
    """
    if not has_remote(root):
        raise InputError("no DVC remote is set; `dvc remote add --default NAME PLACE` names one")
    with contextlib.closing(open_repo(root)) as repo:
        try:
            pushed = int(repo.push(run_cache=True))
            outs = [out for stage in repo.index.stages for out in stage.outs]
            metrics = {out.hash_info for out in outs if not out.use_cache and out.hash_info}
            kept = {each for each in metrics if repo.cache.local.exists(each.value)}
            result = repo.cloud.push(kept)
        except Exception as error:  # each kind of remote has errors of its own
            raise RunError(
                f"dvc push: {in_one_line(error)}; see that the remote answers (`dvc remote list`), "
                "and push again"
            ) from error
    if result.failed:
        raise RunError(f"dvc push: {len(result.failed)} files of metrics failed; push again")
    return pushed + len(result.transferred)


@dataclass(slots=True)
class Flaws:
    """Faults of outputs that DVC reports as made, restored or cached."""

    damaged: list[str] = field(default_factory=list)
    """Outputs in the workspace that differed from `dvc.lock` and were removed."""
    lacking: list[str] = field(default_factory=list)
    """Intact outputs that are missing from DVC's cache, or incomplete there."""
    dropped: list[str] = field(default_factory=list)
    """The md5 of damaged objects that were removed from the cache."""


def mend(dag: Dag, names: Iterable[str]) -> Flaws:
    """Compare the outputs of stages, byte for byte, with `dvc.lock`, and remove damaged ones.

    DVC does neither: it trusts its cache, and only logs what it could not write there. What is
    removed here counts as missing, so DVC restores it from elsewhere or runs the stage.

    Args:
        dag: the project.
        names: the names of the stages.

    Raises:
        RunError: something damaged cannot be removed.
    """
    objects, flaws = dag.objects, Flaws()
    for name, outputs in dag.recorded_outputs(names).items():
        for path, md5 in outputs.items():
            place = dag.root / path
            damaged = not place.exists() or dvc_md5(place) != md5
            lacking = path not in dag.stages[name].uncached and not objects.has(md5)
            if damaged or lacking:
                (flaws.damaged if damaged else flaws.lacking).append(path)
                files = (objects.members(md5) or {}).values()
                flaws.dropped += [each for each in (md5, *files) if objects.drop_damaged(each)]
            if damaged:
                remove_damaged(place)
    return flaws


def is_made(dag: Dag, name: str, reasons: Sequence[Reason]) -> bool:
    """Whether a stage's outputs are up to date and only missing from DVC's cache, which could not
    store them or was deleted.

    Args:
        dag: the project.
        name: the name of the stage.
        reasons: why the stage is out of date.
    """
    if reasons and all(each.not_in_cache for each in reasons):
        return all(
            (dag.root / path).exists() and dvc_md5(dag.root / path) == md5
            for path, md5 in dag.recorded_outputs([name])[name].items()
        )
    return dag.is_noted_as_made(name)


class DvcCache(Objects):
    """The cache of a project, and its default remote.

    Raises:
        InputError: DVC cannot open the project.
    """

    def __init__(self, root: Path) -> None:
        self._repo = open_repo(root)
        super().__init__(self._repo.cache.local)

    def close(self) -> None:
        """Close everything that DVC holds open."""
        self._repo.close()

    def fetch(self, md5: str) -> bool:
        """Fetch a file or directory from the default remote; whether the cache has it then.

        Damaged objects are removed from the cache and count as missing.

        Raises:
            RunError: the remote cannot be reached.
        """
        from dvc.exceptions import DvcException
        from dvc_data.hashfile.hash_info import HashInfo

        if not self._is_whole(md5) and self._repo.config["core"].get("remote"):
            try:
                self._repo.cloud.pull([HashInfo("md5", md5)])
                files = set((self.members(md5) or {}).values())  # a folder: only its list came
                self._repo.cloud.pull([HashInfo("md5", each) for each in files])
            except (FileNotFoundError, DvcException):
                pass
            except Exception as error:  # each kind of remote has errors of its own
                raise RunError(
                    f"DVC's remote cannot be read ({in_one_line(error)}); check `dvc remote list`"
                ) from error
        return self._is_whole(md5)

    def _is_whole(self, md5: str) -> bool:
        dropped = sum(map(self.drop_damaged, {md5, *(self.members(md5) or {}).values()}))
        return not dropped and self.has(md5)

    def put(self, md5: str, path: Path) -> None:
        """Write an object to a path as a copy, so that later edits do not change the cache.

        Raises:
            RunError: it cannot be written.
        """
        files = self.members(md5)
        try:
            remove(path)
            if files is not None:
                path.mkdir(parents=True)
            for name, each in ({"": md5} if files is None else files).items():
                target = path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.path(each), target)
        except OSError as error:
            raise RunError(
                f"{path}: {error.strerror or error}; make room or make it writable"
            ) from None
