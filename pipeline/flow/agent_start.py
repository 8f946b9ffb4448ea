"""One flow run on an agent, from its worker's command to the workspace that it works in.

The worker starts `gpt-pipeline flow-run`. That makes the workspace of the commit, and becomes
Prefect's engine there: the same process, which the worker watches, stops and hears of. The note of
it under `.pipeline/agent/runs` tells an agent that starts later what was lost.

What is run, and under which variables, is what `prefect.yaml` says at the commit. The server is
asked for the parameters of the flow run alone; a flow run for which it says something else of the
rest is refused.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from gpt.base.errors import InputError, RunError
from gpt.base.files import write_json
from pipeline.dag.workspace import make_workspace
from pipeline.project.folders import shared_folder, workspace_environment
from pipeline.project.git import commit_of, git
from pipeline.project.yaml_files import read_yaml
from pipeline.show.terminal import say

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

COMMAND = "gpt-pipeline flow-run"
"""All that a worker of an agent starts."""
AGENT_VARIABLE = "GPT_PIPELINE_AGENT"
"""The agent's own checkout of the project."""
WORKER_VARIABLE = "GPT_PIPELINE_WORKER"
"""The process of the worker that started the flow run."""


def agent_folder(root: Path) -> Path:
    """Where an agent keeps its notes, logs and workspaces."""
    return shared_folder(root) / ".pipeline" / "agent"


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
        run = client.read_flow_run(run_id)  # type: ignore[arg-type]
        try:
            if not workspace.exists():  # else the run was cut off, and goes on in it
                # one that was killed while it was made has no name yet
                partial = workspace.with_name(f".{run_id}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                make_workspace(
                    root, _commit(root, str(run.parameters.get("commit") or "")), partial
                )
                partial.rename(workspace)
            entrypoint, variables = held_by_project(workspace, asked_by_server(client, run))
        except (InputError, RunError) as error:
            write_json(run_note(root, run_id), {**note, "refused": str(error)})
            client.set_flow_run_state(run_id, Failed(message=str(error)), force=True)
            say(f"error: {error}", file=sys.stderr)
            return 0  # told, and nothing that a worker could add to
    os.chdir(workspace)
    settings = {
        **os.environ,
        **variables,
        **workspace_environment(root, workspace),
        "PREFECT__FLOW_ENTRYPOINT": entrypoint,
        WORKER_VARIABLE: str(worker),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the stages show themselves
    }
    os.execve(sys.executable, [sys.executable, "-c", _ENGINE], settings)
    raise AssertionError("the engine has taken the place of this")


def asked_by_server(client: SyncPrefectClient, run: FlowRun) -> dict[str, Any]:
    """What a flow run's deployment, the flow run itself and its work pool want to be run.

    Raises:
        InputError: it has no deployment.
    """
    if run.deployment_id is None or run.work_pool_name is None:
        raise InputError("refused: a flow run without a deployment; schedule one of prefect.yaml's")
    deployment = client.read_deployment(run.deployment_id)
    template = client.read_work_pool(run.work_pool_name).base_job_template
    defaults = {
        name: each.get("default")
        for name, each in template.get("variables", {}).get("properties", {}).items()
    }
    fixed = {
        name: value
        for name, value in template.get("job_configuration", {}).items()
        if value != f"{{{{ {name} }}}}"
    }
    variables = {**defaults, **(deployment.job_variables or {}), **(run.job_variables or {})}
    return _asked(deployment.entrypoint, deployment.pull_steps, {**variables, **fixed})


def _asked(entrypoint: Any, pull: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """All that decides what is run, by what a line calls it; without what is not set."""
    unheard = ("labels", "name", "stream_output")  # they change nothing that runs
    heard = {name: value for name, value in variables.items() if value and name not in unheard}
    return {"command": COMMAND, **heard, "entrypoint": entrypoint, "pull steps": pull}


def held_by_project(folder: Path, asked: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The entrypoint and the environment that `prefect.yaml` has for what the server asks.

    Its pull steps are not needed, as the workspace is there.

    Args:
        folder: the checkout.
        asked: as `asked_by_server` gives it.

    Raises:
        InputError: no deployment of `prefect.yaml` is that, or it cannot be read.
    """
    file = folder / "prefect.yaml"
    content = read_yaml(file, "prefect.yaml", missing="is not in this commit")
    try:
        held = [
            _asked(
                each["entrypoint"],
                each.get("pull", content.get("pull")),
                {
                    "env": dict(
                        ((each.get("work_pool") or {}).get("job_variables") or {}).get("env") or {}
                    )
                },
            )
            for each in content["deployments"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError("prefect.yaml: is not as Prefect describes it; correct it") from None
    differing: list[set[str]] = [
        {key for key in asked | its if asked.get(key) != its.get(key)} for its in held
    ]
    if set() in differing:
        environment = asked.get("env", {})
        return asked["entrypoint"], {name: str(value) for name, value in environment.items()}
    nearest: set[str] = min(differing, key=len, default={"entrypoint"})
    shown = ", ".join(f"{key} {str(asked.get(key))[:80]!r}" for key in sorted(nearest))
    raise InputError(
        f"refused: {shown}, which prefect.yaml does not say at this commit; an agent runs nothing "
        "else (`prefect --no-prompt deploy --all` makes its deployments anew)"
    )


_ENGINE = """
import os, uuid
from prefect.engine import configure_from_env, handle_engine_signals
configure_from_env()
run_id = uuid.UUID(os.environ["PREFECT__FLOW_RUN_ID"])
with handle_engine_signals(run_id):
    from prefect.flow_engine import load_flow, load_flow_run, run_flow
    run = load_flow_run(run_id)
    run_flow(load_flow(run), flow_run=run, return_type="state")
"""
"""`prefect.engine`, but for the result: of a run that is said to have ended, it unpickles one from
where the server says that it lies."""


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
        say(f"warning: {error}; the newest commit that is here is taken", file=sys.stderr)
    remotes = git(root, "remote").split() if (root / ".git").exists() else []
    theirs = [f"{each}/{asked}" for each in remotes]
    candidates = [*theirs, asked] if asked else ["@{upstream}", "HEAD"]
    for each in candidates:
        with contextlib.suppress(InputError):
            return commit_of(root, each)
    raise InputError(
        f"commit {repr(asked)[1:-1]}: is not in the agent's project{fault}; push it, or correct it"
    )
