"""Runs git commands, without git variables from the caller's environment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from gpt.base.errors import InputError, RunError


def git(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """The output of a git command.

    Raises:
        RunError: git is not there, or fails.
    """
    said = b"".join(git_output(folder, *arguments, environment=environment))
    return said.decode(errors="replace").strip("\n")


def git_output(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[bytes]:
    """The same in pieces: a patch may be larger than the memory.

    Raises:
        RunError: git is not there, or fails.
    """
    # a git hook that starts us sets variables that name its repository
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                ("git", "-C", str(folder), *arguments),
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**inherited, **(environment or {})},
            )
        except OSError as error:
            raise RunError(f"git cannot be started ({error.strerror}); install it") from None
        with process:
            assert process.stdout is not None
            while piece := process.stdout.read(1 << 16):
                yield piece
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()
            said = [line for line in lines if line.strip()] or ["no word why"]
            reason = next((line for line in said if line.startswith("fatal")), said[-1])
            raise RunError(f"`git {arguments[0]}` failed: {reason}")


def commit_of(project: Path, commit: str) -> str:
    """The full hash of a commit.

    Raises:
        InputError: the project is no git repository, or has no such commit.
    """
    if not (project / ".git").exists():
        raise InputError(
            f"{project}: is no git repository, and commits are git's; clone the project"
        )
    try:
        return git(
            project, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}"
        )
    except RunError:
        raise InputError(
            f"{commit}: no such commit in {project}; fetch it, or name another"
        ) from None


def commit_of_path(project: Path, path: str) -> str:
    """The last commit that changed what lies at a path; empty where git has none."""
    with contextlib.suppress(RunError):
        return git(project, "log", "-1", "--format=%H", "--", path)
    return ""


def is_changed(project: Path, path: str) -> bool:
    """Whether the content of a path differs from the last commit."""
    try:
        return bool(git(project, "status", "--porcelain", "--", path))
    except RunError:
        return False
