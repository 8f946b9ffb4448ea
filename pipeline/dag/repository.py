"""DVC's repository: opened without git too, its remote, and its table of running commands."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.base.errors import InputError, RunError, in_one_line
from gpt.base.files import whole_file

if TYPE_CHECKING:
    from dvc.repo import Repo


def allow_missing_git(root: Path) -> None:
    """Let DVC work in a source archive: without a git repository it wants to be told so."""
    local = root / ".dvc" / "config.local"
    if any((folder / ".git").exists() for folder in (root, *root.parents)) or local.exists():
        return
    with whole_file(local) as partial:
        partial.write_text("[core]\n    no_scm = true\n", encoding="utf-8")


def open_repo(root: Path) -> Repo:
    """DVC in this process, without the bars that it draws between our lines on a terminal.

    Raises:
        InputError: DVC cannot open the project.
    """
    from dvc.repo import Repo

    for bars in ("dvc.progress", "dvc_data.callbacks"):
        logging.getLogger(bars).setLevel(logging.CRITICAL)
    allow_missing_git(root)
    with _opening():
        return Repo(str(root), _wait_for_lock=True)


def has_remote(root: Path) -> bool:
    """Whether DVC has a remote to push to and pull from by default.

    Raises:
        InputError: its settings cannot be read.
    """
    from dvc.config import Config

    with _opening():
        return bool(Config(str(root / ".dvc"), validate=False)["core"].get("remote"))


def remote_of(root: Path) -> tuple[str, bool] | None:
    """The address of DVC's default remote, and whether it is there; None where none is set.

    Raises:
        RunError: it cannot be reached.
    """
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            if not repo.config["core"].get("remote"):
                return None
            remote = repo.cloud.get_remote()
            there = remote.fs.exists(remote.path) or remote.fs.protocol != "local"
            return str(remote.config.get("url", remote.path)), there
    except Exception as error:  # each kind of remote has errors of its own
        raise RunError(f"cannot be reached: {in_one_line(error)}") from None


@contextmanager
def _opening() -> Iterator[None]:
    from dvc.exceptions import DvcException

    try:
        yield
    except (DvcException, OSError) as error:
        what = "make it a folder that can be written"
        if isinstance(error, DvcException):
            what = "mend it, or take it from git: `git checkout .dvc`"
        raise InputError(
            f".dvc: DVC cannot open the project ({in_one_line(error)}); {what}"
        ) from None


def mend_rwlock(root: Path) -> bool:
    """Mend DVC's table of running commands where kills left it wrong; whether they did.

    DVC writes it in place, and does not start when it is cut off. Of a process it only asks whether
    there is one of that number: after a reboot, or in a container, there is.
    """
    from dvc.lock import LockError, make_lock

    path = root / ".dvc" / "tmp" / "rwlock"
    if not path.exists():
        return False
    with contextlib.suppress(LockError):  # a DVC command is writing it now
        with make_lock(f"{path}.lock", tmp_dir=str(path.parent)):
            try:
                table = {"write": {}, "read": {}} | json.loads(path.read_bytes())
                running = {
                    "write": {at: by for at, by in table["write"].items() if is_running(**by)},
                    "read": {
                        at: [each for each in by if is_running(**each)]
                        for at, by in table["read"].items()
                    },
                }
            except (AttributeError, KeyError, TypeError, ValueError):
                table, running = None, {}
            wrong = bool(running != table)
            if wrong:
                path.write_text(json.dumps(running), encoding="utf-8")
        return wrong
    return False


def is_running(pid: int, cmd: str) -> bool:
    """Whether a process that DVC noted is there still, and not another one of its number."""
    import psutil

    try:
        process = psutil.Process(int(pid))
        there = process.cmdline()
        if not there:  # it has just been started, or has ended and is not waited for yet
            return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    words = " ".join(there).split()  # an argument may hold blanks
    return all(word in words for word in cmd.split()[1:][-1:])
