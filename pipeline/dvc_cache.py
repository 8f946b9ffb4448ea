"""DVC's cache and remote, asked by md5: whatever was ever kept, also what no lock names now."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.errors import InputError, RunError
from pipeline.dag import allow_missing_git

if TYPE_CHECKING:
    from dvc.repo import Repo


def has_remote(root: Path) -> bool:
    """Whether DVC has a remote to push to and pull from by default."""
    from dvc.config import Config

    return bool(Config(str(root / ".dvc"), validate=False)["core"].get("remote"))


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


class DvcCache:
    """The cache of a project, and its default remote.

    Raises:
        InputError: DVC cannot open the project.
    """

    def __init__(self, root: Path) -> None:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        allow_missing_git(root)
        try:
            self._repo: Repo = Repo(str(root))
        except DvcException as error:
            raise InputError(f"{root}: DVC cannot open it ({error}); restore .dvc") from None
        self._odb: Any = self._repo.cache.local

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

    def members(self, md5: str) -> dict[str, str] | None:
        """The files of a directory and their md5; None where the cache has not got it."""
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree
        from dvc_objects.errors import ObjectFormatError

        if not md5.endswith(".dir"):
            return None
        with contextlib.suppress(FileNotFoundError, ObjectFormatError):
            tree = Tree.load(self._odb, HashInfo("md5", md5))
            return {"/".join(key): str(info.value) for key, _, info in tree}
        return None

    def read(self, md5: str, member: str = "") -> bytes | None:
        """A file, or one of a directory's; None where the cache has not got it."""
        if member:
            md5 = (self.members(md5) or {}).get(member, "")
        try:
            return Path(self._odb.oid_to_path(md5)).read_bytes() if md5 else None
        except OSError:
            return None

    def has(self, md5: str) -> bool:
        """Whether all of a file or directory is in the cache."""
        files = self.members(md5)
        if files is None:
            return not md5.endswith(".dir") and bool(md5) and self._odb.exists(md5)
        return all(self._odb.exists(each) for each in {md5, *files.values()})

    @property
    def has_remote(self) -> bool:
        """Whether there is a default remote to fetch from."""
        return bool(self._repo.config["core"].get("remote"))

    def fetch(self, md5: str) -> bool:
        """Bring a file or directory from the default remote into the cache; whether it is there.

        Raises:
            RunError: the remote cannot be reached.
        """
        from dvc.exceptions import DvcException
        from dvc_data.hashfile.hash_info import HashInfo

        if self.has(md5):
            return True
        if not self.has_remote:
            return False
        try:
            self._repo.cloud.pull([HashInfo("md5", md5)])
            if files := self.members(md5):  # of a directory the list alone came
                self._repo.cloud.pull([HashInfo("md5", each) for each in set(files.values())])
        except (FileNotFoundError, DvcException):
            return self.has(md5)
        except Exception as error:  # each kind of remote has errors of its own
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RunError(
                f"DVC's remote cannot be read ({reason}); check `dvc remote list`"
            ) from error
        return self.has(md5)

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
