"""A training that is done, as a DVC experiment: `dvc exp show` lists it, `dvc exp apply` takes it.

It is saved from a copy of the project, so that the person's own files, index and `dvc.lock` stay as
they are. `dvc exp run` is not what makes it, since with DVC 3.67 that fails in a fresh clone unless
the last stage's plotted outputs are in the cache, and even with `--temp` stashes the person's edits
away for a moment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.base.errors import InputError, RunError
from gpt.base.files import write_json
from pipeline.dag.dvc_files import LOCK_FILE
from pipeline.project.git import git
from pipeline.project.overrides import text_with, write_params
from pipeline.project.params import PARAMS_FILE

FOLDER = Path(".pipeline")


def check_git(root: Path) -> None:
    """Experiments are commits.

    Raises:
        InputError: the project is not the top of a git repository, or has no commit.
    """
    try:
        top = git(root, "rev-parse", "--show-toplevel")
        git(root, "rev-parse", "--verify", "HEAD")
    except RunError:
        top = ""
    if not top or Path(top).resolve() != root.resolve():
        raise InputError(
            f"{root}: DVC experiments are commits, and this is no git repository with one; run "
            "`git init` here and commit the project"
        )


def save_experiment(
    root: Path,
    name: str,
    stage: str,
    changes: Mapping[str, Any],
    *,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    metrics: Mapping[str, Mapping[str, Any]],
) -> None:
    """Keep what a stage made under changed parameters as an experiment of the commit at hand.

    One of the same name and commit is replaced. Stages that read the outputs run again after
    `dvc exp apply`.

    Args:
        root: the project: see `check_git`.
        name: of the experiment.
        stage: of `dvc.yaml`.
        changes: path below the stage's section of `params.yaml` -> value; None takes it away.
        inputs: those of the stage's inputs that git does not keep: path relative to the root ->
            where it is.
        outputs: all of its outputs, likewise.
        metrics: path relative to the root of a file of metrics -> what it says of the experiment
            in the place of what it says now.

    Raises:
        RunError: git or DVC cannot do it.
    """
    (root / FOLDER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / FOLDER, prefix="experiment-") as folder:
        tree = Path(folder) / "project"
        cache = _copy_project(root, tree)
        for path, source in {**inputs, **outputs}.items():
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
        for path, values in metrics.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            write_json(tree / path, values)
        _change(tree, stage, changes, cache)
        # metrics that no commit has yet; the rest of the outputs git is told to pass over
        new = git(tree, "ls-files", "-z", "--others", "--exclude-standard", *outputs, *metrics)
        include = [f"--include-untracked={path}" for path in filter(None, new.split("\0"))]
        _dvc(tree, "exp", "save", "--force", "--name", name, *include, stage)
        head = git(tree, "rev-parse", "HEAD")
        ref = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
        where = str(tree)
        git(root, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", where, f"+{ref}:{ref}")


def _copy_project(root: Path, tree: Path) -> Path:
    """What git keeps of the project, as it is in the workspace; it shares git's and DVC's stores.

    Its index is that of the last commit.

    Returns:
        The folder of DVC's cache.
    """
    from dvc.repo import Repo

    git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root.resolve()), str(tree))
    git(tree, "read-tree", "HEAD")
    for name in filter(None, git(root, "ls-files", "-z").split("\0")):
        if (root / name).is_symlink() or (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name, follow_symlinks=False)
    for key in ("user.name", "user.email"):  # of commits; a machine may have none
        known = subprocess.run(["git", "-C", str(tree), "config", key], capture_output=True)
        if known.returncode:
            git(tree, "config", key, "gpt-pipeline")
    with Repo(str(root)) as repo:
        cache = Path(repo.cache.local_cache_dir)
    (tree / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache}\n", encoding="utf-8")
    return cache


def _change(tree: Path, stage: str, changes: Mapping[str, Any], cache: Path) -> None:
    from dvc.utils.serialize import modify_yaml

    values = {f"{stage}.{path}": value for path, value in changes.items()}
    write_params(tree, text_with((tree / PARAMS_FILE).read_bytes(), values))

    def cache_has(out: Mapping[str, Any]) -> bool:
        md5 = str(out.get("md5", ""))
        return not md5.endswith(".dir") or (cache / "files" / "md5" / md5[:2] / md5[2:]).is_file()

    if (tree / LOCK_FILE).is_file():
        with modify_yaml(str(tree / LOCK_FILE)) as lock:
            stages = lock.get("stages") or {}
            for name, entry in list(stages.items()):
                # DVC cannot save while an entry names a folder that was made elsewhere
                if not all(map(cache_has, entry.get("outs") or ())):
                    del stages[name]


def _dvc(folder: Path, *arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        subprocess.run(
            (sys.executable, "-m", "dvc", *arguments),
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip()] or ["no word why"]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1])
        raise RunError(f"`dvc {' '.join(arguments[:2])}` failed: {reason}") from None
