"""A checkout of the project beside its own: one commit's code under parameters of its own.

An agent's flow runs, the points of a sweep and what is made again for a proof run in one, so that
nobody's files, index or `dvc.lock` are touched. It shares git's objects and DVC's cache with the
project, and what `pipeline.project.folders` names: outputs that are known come back without being
made.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gpt.base.errors import RunError
from pipeline.project.git import commit_of, git
from pipeline.project.params import PARAMS_FILE


def make_workspace(
    project: Path, commit: str, folder: Path, *, params: bytes | None = None
) -> Path:
    """Check a commit out into a folder of its own.

    Args:
        project: a checkout of the project, the top of a git repository.
        commit: whatever git takes for one.
        folder: where to; made, and must not be there.
        params: the bytes of `params.yaml` there; None keeps the commit's.

    Returns:
        The folder.

    Raises:
        InputError: the project is no git repository, or has no such commit.
        RunError: git or the disk cannot do it, and nothing is left of the folder; or there was one.
    """
    if folder.exists():  # before anything that would be removed when it fails
        raise RunError(f"{folder}: is there already; move it away")
    project = project.resolve()
    sha = commit_of(project, commit)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = str(project)
        git(project, "clone", "--quiet", "--shared", "--no-checkout", source, str(folder))
        git(folder, "checkout", "--quiet", "--detach", sha)
        _share_cache(project, folder)
        if params is not None:
            (folder / PARAMS_FILE).write_bytes(params)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(
                f"{folder}: {error.strerror or error}; make room or choose another"
            ) from None
        raise
    return folder


def _share_cache(project: Path, folder: Path) -> None:
    """Use the project's cache, and the settings of DVC that git does not keep, as of remotes."""
    from configobj import ConfigObj
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        cache = repo.cache.local_cache_dir
    own = project / ".dvc" / "config.local"
    text = own.read_text(encoding="utf-8") if own.is_file() else ""
    # not through DVC, which writes ASCII only; it reads UTF-8
    config = ConfigObj(text.splitlines(), encoding="utf-8", interpolation=False)
    config.setdefault("cache", {})["dir"] = cache
    with (folder / ".dvc" / "config.local").open("wb") as file:
        config.write(file)
