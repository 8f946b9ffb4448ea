"""DVC's cache and remote, asked by md5: whatever was ever kept, also what no lock names now."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gpt.base.errors import InputError, RunError
from pipeline.dag.code import files_of_code, is_code, md5_of_code
from pipeline.dag.graph import Dag, Recorded
from pipeline.dag.objects import Objects, md5_of, remove_damaged
from pipeline.dag.repository import has_remote, open_repo


def dvc_md5(path: Path) -> str:
    """The md5 under which DVC knows a file or (ending in `.dir`) a directory: as in `dvc.lock`."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import localfs

    cache = HashFileDB(localfs, os.devnull)  # never touched: a dry run only computes
    _, _, built = build(cache, str(path.resolve()), localfs, "md5", dry_run=True)
    return str(built.hash_info.value)


def md5_now(root: Path, path: str) -> str:
    """The md5 that DVC would record now of what a stage reads at a path; of code, empty where
    there is none."""
    if not is_code(path):
        return dvc_md5(root / path)
    return md5_of_code({file: md5_of(root / file) for file in files_of_code(root, path)}, path)


def push(root: Path) -> None:
    """Let the default remote have what the project made: `dvc push --run-cache`, and the metrics.

    DVC's run cache names the metrics of a stage too, but `cache: false` leaves them to git, and DVC
    does not push them: another machine that has the run cache alone could restore nothing.

    Raises:
        InputError: there is no remote.
        RunError: it does not take them.
    """
    if not has_remote(root):
        raise InputError("no DVC remote is set; `dvc remote add --default NAME PLACE` names one")
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "push", "--run-cache"]
    done = subprocess.run(command, cwd=root, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word why"]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1])
        raise RunError(
            f"dvc push: {reason.removeprefix('ERROR: ')}; see that the remote answers "
            "(`dvc remote list`), and push again"
        )
    cache = DvcCache(root)
    try:
        cache.push_metrics()
    finally:
        cache.close()


@dataclass(slots=True)
class Flaws:
    """What is wrong with outputs that DVC says it made, restored or kept."""

    damaged: list[str] = field(default_factory=list)
    """Files in place that were not what `dvc.lock` says, and are removed."""
    lacking: list[str] = field(default_factory=list)
    """Sound outputs, or files of one, that DVC's cache has not got."""
    dropped: list[str] = field(default_factory=list)
    """The md5 of damaged objects that were removed from the cache."""


def mend(dag: Dag, names: Iterable[str]) -> Flaws:
    """Compare the outputs of stages, byte for byte, with `dvc.lock`, and remove what is damaged.

    DVC does neither: it trusts its cache, and what it could not write there it only logs. What is
    removed here is missing to DVC, which restores it from elsewhere or runs the stage.

    Args:
        dag: the project.
        names: of the stages.

    Raises:
        RunError: something damaged cannot be removed.
    """
    objects, flaws = dag.objects, Flaws()
    for outputs in dag.recorded_outputs(names).values():
        for output in outputs:
            _mend(dag.root, output, objects, flaws)
    return flaws


def _mend(root: Path, output: Recorded, objects: Objects, flaws: Flaws) -> None:
    files: Mapping[str, str] | None = {"": output.md5}
    if output.md5.endswith(".dir"):
        flaws.dropped += [output.md5] * objects.drop_damaged(output.md5)
        files = objects.members(output.md5)
    if files is None:  # which of its files are sound cannot be told without the list
        place = root / output.path
        if place.exists() and dvc_md5(place) == output.md5:
            flaws.lacking.append(output.path)
        else:
            flaws.damaged.append(output.path)
        return
    for name, md5 in files.items():
        place, kept = root / output.path / name, objects.path(md5)
        if md5_of(place) != md5:
            remove_damaged(place)
            flaws.damaged.append(place.relative_to(root).as_posix())
            flaws.dropped += [md5] * objects.drop_damaged(md5)
        elif output.cached and not (kept.exists() and _size(kept) == _size(place)):
            flaws.lacking.append(place.relative_to(root).as_posix())
            flaws.dropped += [md5] * objects.drop_damaged(md5)


def _size(path: Path) -> int:
    return path.stat().st_size


def are_in_place(dag: Dag, name: str) -> bool:
    """Whether the outputs of a stage, byte for byte, are what `dvc.lock` says."""
    outputs = dag.recorded_outputs([name])[name]
    places = {dag.root / each.path: each.md5 for each in outputs}
    return bool(places) and all(
        path.exists() and dvc_md5(path) == md5 for path, md5 in places.items()
    )


class DvcCache(Objects):
    """The cache of a project, and its default remote.

    Raises:
        InputError: DVC cannot open the project.
    """

    def __init__(self, root: Path) -> None:
        self._repo = open_repo(root)
        super().__init__(self._repo.cache.local)

    def close(self) -> None:
        """Let go of what DVC holds open."""
        self._repo.close()

    def push_metrics(self) -> None:
        """Push what `dvc push` leaves out of the stages' outputs, as far as the cache has it.

        Raises:
            RunError: the remote does not take it.
        """
        outs = [out for stage in self._repo.index.stages for out in stage.outs]
        wanted = {out.hash_info for out in outs if not out.use_cache and out.hash_info}
        result = self._repo.cloud.push({each for each in wanted if self._odb.exists(each.value)})
        if result.failed:
            raise RunError(f"dvc push: {len(result.failed)} files of metrics failed; push again")

    @property
    def has_remote(self) -> bool:
        """Whether there is a default remote to fetch from."""
        return bool(self._repo.config["core"].get("remote"))

    def fetch(self, md5: str) -> bool:
        """Bring a file or directory from the default remote into the cache; whether it is there.

        What is damaged is removed from the cache, and counts as missing.

        Raises:
            RunError: the remote cannot be reached.
        """
        from dvc.exceptions import DvcException
        from dvc_data.hashfile.hash_info import HashInfo

        if self._is_whole(md5):
            return True
        if not self.has_remote:
            return False
        try:
            self._repo.cloud.pull([HashInfo("md5", md5)])
            if files := self.members(md5):  # of a directory the list alone came
                self._repo.cloud.pull([HashInfo("md5", each) for each in set(files.values())])
        except (FileNotFoundError, DvcException):
            return self._is_whole(md5)
        except Exception as error:  # each kind of remote has errors of its own
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RunError(
                f"DVC's remote cannot be read ({reason}); check `dvc remote list`"
            ) from error
        return self._is_whole(md5)

    def _is_whole(self, md5: str) -> bool:
        dropped = sum(map(self.drop_damaged, {md5, *(self.members(md5) or {}).values()}))
        return not dropped and self.has(md5)

    def put(self, md5: str, path: Path) -> None:
        """Write what the cache holds to a path, as copies: what is done there changes no cache.

        Raises:
            RunError: it cannot be written.
        """
        files = self.members(md5) or ({} if md5.endswith(".dir") else {"": md5})
        try:
            if path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if md5.endswith(".dir"):
                path.mkdir(parents=True)
            for name, each in files.items():
                target = path / name if name else path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._odb.oid_to_path(each), target)
        except OSError as error:
            raise RunError(
                f"{os.fspath(path)}: {error.strerror or error}; make room or make it writable"
            ) from None
