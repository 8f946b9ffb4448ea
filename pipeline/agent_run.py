"""One flow run on an agent, from its worker's command to the workspace that it works in.

Prefect's process worker starts `gpt-pipeline flow-run`. That makes the workspace of the commit, and
becomes Prefect's engine there: the same process, which the worker watches, stops and hears of. The
note of it under `.pipeline/agent/runs` tells an agent that starts later what was lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil

from gpt.errors import InputError, RunError
from gpt.files import write_json
from pipeline.home import home
from pipeline.workspace import commit_of, environment, git, make_workspace

AGENT_VARIABLE = "GPT_PIPELINE_AGENT"
"""The agent's own checkout of the project."""
WORKER_VARIABLE = "GPT_PIPELINE_WORKER"
"""The process of the worker that started the flow run."""


def agent_folder(root: Path) -> Path:
    """Where an agent keeps its notes, logs and workspaces."""
    return home(root) / ".pipeline" / "agent"


def run_note(root: Path, run_id: str) -> Path:
    """Which process works on a flow run, and where: kept until somebody said how it ended."""
    return agent_folder(root) / "runs" / f"{run_id}.json"


def become_flow_run() -> int:
    """Make the workspace of the flow run that the environment names, and go on as its engine.

    Returns:
        The exit code, if it does not come to that; the flow run has failed with a line then.

    Raises:
        InputError: this was not started by a worker of `gpt-pipeline agent`.
    """
    run_id = os.environ.get("PREFECT__FLOW_RUN_ID")
    agent = os.environ.get(AGENT_VARIABLE)
    if not run_id or not agent:
        raise InputError("flow-run: is what a worker starts; start one with `gpt-pipeline agent`")
    root = Path(agent)
    worker = os.getppid()  # asked before the checkout, which is long enough for it to go
    folder = agent_folder(root)
    _write_to(folder / "logs" / f"{run_id}.log")
    workspace = folder / "workspaces" / run_id
    me = psutil.Process()
    note = {"pid": me.pid, "created": me.create_time(), "workspace": str(workspace)}
    write_json(run_note(root, run_id), note)
    from prefect.client.orchestration import get_client
    from prefect.states import Failed

    with get_client(sync_client=True) as client:
        asked: dict[str, Any] = client.read_flow_run(run_id).parameters
        try:
            if not workspace.exists():  # else the run was cut off, and goes on in it
                # one that was killed while it was made has no name yet
                partial = workspace.with_name(f".{run_id}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                make_workspace(root, _commit(root, str(asked.get("commit") or "")), partial)
                partial.rename(workspace)
        except (InputError, RunError) as error:
            client.set_flow_run_state(run_id, Failed(message=str(error)), force=True)
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 0  # told, and nothing that a worker could add to
    os.chdir(workspace)
    settings = {
        **os.environ,
        **environment(root, workspace),
        WORKER_VARIABLE: str(worker),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the stages show themselves
    }
    os.execve(sys.executable, [sys.executable, "-m", "prefect.engine"], settings)
    raise AssertionError("the engine has taken the place of this")


def _write_to(log: Path) -> None:
    """What is printed goes into a file: a pipe to a worker that is gone would break."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _commit(root: Path, asked: str) -> str:
    """The commit that is asked for, fetched if need be; else the newest of the agent's branch.

    Raises:
        InputError: there is no such commit, here or where this comes from.
    """
    fault = ""
    try:
        if git(root, "remote"):
            git(root, "fetch", "--quiet", "--all", "--tags")
    except RunError as error:  # what is here may do
        fault = f" ({error})"
        print(f"warning: {error}; the newest commit that is here is taken", file=sys.stderr)
    remotes = git(root, "remote").split() if (root / ".git").exists() else []
    theirs = [f"{each}/{asked}" for each in remotes]
    candidates = [*theirs, asked] if asked else ["@{upstream}", "HEAD"]
    for each in candidates:
        with contextlib.suppress(InputError):
            return commit_of(root, each)
    raise InputError(
        f"commit {asked}: is not in the agent's project{fault}; push it, or correct it"
    )
