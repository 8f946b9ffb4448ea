"""A point of a sweep as a DVC experiment: `dvc exp show` lists it, `dvc exp apply` applies it.

It is saved from the point's workspace, so that the user's files, index and `dvc.lock` are not
changed. `dvc exp run` is not used: with DVC 3.67 it fails in a fresh clone unless the last stage's
plotted outputs are in the cache, and even with `--temp` it briefly stashes the user's edits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from gpt.base.errors import RunError
from pipeline.dag.dvc_files import LOCK_FILE
from pipeline.project.git import git


def save_experiment(root: Path, workspace: Path, name: str, stages: Iterable[str]) -> None:
    """Save a workspace as an experiment of its commit; one of the same name is replaced.

    Args:
        root: the project.
        workspace: a checkout of its commit (`make_workspace`), with edits, in which the stages are
            up to date.
        name: the name of the experiment.
        stages: the stages to save.

    Raises:
        RunError: git or DVC failed.
    """
    from dvc.repo import Repo
    from dvc.utils.serialize import modify_yaml

    with Repo(str(workspace)) as repo:
        objects = Path(repo.cache.local_cache_dir) / "files" / "md5"
    with modify_yaml(str(workspace / LOCK_FILE)) as lock:
        for stage, entry in list(lock["stages"].items()):
            # DVC cannot save if an entry names a folder that was made elsewhere
            md5s = [str(out.get("md5", "")) for out in entry.get("outs") or ()]
            folders = [objects / md5[:2] / md5[2:] for md5 in md5s if md5.endswith(".dir")]
            if not all(folder.is_file() for folder in folders):
                del lock["stages"][stage]
    for key in ("user.name", "user.email"):  # for the commit; git may have none configured
        git(workspace, "config", key, "gpt-pipeline")
    # metrics that are not committed yet
    new = git(workspace, "ls-files", "-z", "--others", "--exclude-standard", "reports")
    include = [f"--include-untracked={path}" for path in filter(None, new.split("\0"))]
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "save", "--force", "--name", name, *include, *stages],
        cwd=workspace,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word why"]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1])
        raise RunError(f"`dvc exp save` failed: {reason}")
    head = git(workspace, "rev-parse", "HEAD")
    ref = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
    where = str(workspace)
    git(root, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", where, f"+{ref}:{ref}")
