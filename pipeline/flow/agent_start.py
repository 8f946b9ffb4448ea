"""Starts one flow run on an agent: from the worker's command to the workspace.

The worker starts `gpt-pipeline flow-run`, which creates a workspace of the commit and then becomes
Prefect's engine there (by `exec`: the worker watches and stops this same process). From its note
under `.pipeline/agent/runs` an agent that starts later learns which flow runs were lost.

The flow and its environment variables are taken from `prefect.yaml` at the deployment's commit.
Only the parameters of the flow run come from the server. A flow run is refused if `prefect.yaml`
lacks its deployment, or if it sets job variables.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gpt.base.errors import InputError, RunError
from gpt.base.files import write_json
from pipeline.dag.workspace import make_workspace
from pipeline.project.folders import shared_folder, workspace_environment
from pipeline.project.git import commit_of, git
from pipeline.project.yaml_files import read_yaml
from pipeline.show.terminal import say

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

COMMAND = "gpt-pipeline flow-run"
"""The only command that an agent's worker starts."""
AGENT_VARIABLE = "GPT_PIPELINE_AGENT"
"""The agent's own checkout of the project."""
WORKER_VARIABLE = "GPT_PIPELINE_WORKER"
"""The process of the worker that started the flow run."""


def agent_folder(root: Path) -> Path:
    """Where an agent keeps its notes, logs and workspaces."""
    return shared_folder(root) / ".pipeline" / "agent"


def run_note(root: Path, run_id: str) -> Path:
    """The file that names a flow run's process and workspace, kept until Prefect has its end."""
    return agent_folder(root) / "runs" / f"{run_id}.json"


def become_flow_run() -> None:
    """Create the workspace of the flow run that the environment names, and become its engine.

    Returns only if the flow run failed before that; the error is then reported in one line.

    Raises:
        InputError: the process was not started by a worker of `gpt-pipeline agent`.
    """
    run_id = os.environ.get("PREFECT__FLOW_RUN_ID")
    agent = os.environ.get(AGENT_VARIABLE)
    if not run_id or not agent:
        raise InputError("flow-run: is what a worker starts; start one with `gpt-pipeline agent`")
    root = Path(agent)
    worker = os.getppid()  # before the checkout: the worker may end during it
    folder = agent_folder(root)
    _write_to(folder / "logs" / f"{run_id}.log")
    workspace = folder / "workspaces" / run_id
    created = psutil.Process().create_time()
    note = {"pid": os.getpid(), "created": created, "worker": worker, "workspace": str(workspace)}
    write_json(run_note(root, run_id), note)
    from prefect.client.orchestration import get_client
    from prefect.states import Failed

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)  # type: ignore[arg-type]
        try:
            if not workspace.exists():  # otherwise an interrupted run resumes in it
                # a workspace gets its final name only when it is complete
                partial = workspace.with_name(f".{run_id}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                make_workspace(
                    root, _commit(root, str(run.parameters.get("commit") or "")), partial
                )
                partial.rename(workspace)
            if run.deployment_id is None:
                raise InputError("refused: a flow run without a deployment; use prefect.yaml's")
            deployment = client.read_deployment(run.deployment_id)
            variables = held_by_project(workspace, deployment, run)
        except (InputError, RunError) as error:
            write_json(run_note(root, run_id), {**note, "refused": str(error)})
            client.set_flow_run_state(run_id, Failed(message=str(error)), force=True)
            say(f"error: {error}", file=sys.stderr)
            return  # with exit code 0: the worker would report any other as a crash
    os.chdir(workspace)
    settings = {
        **os.environ,
        **variables,
        **workspace_environment(root, workspace),
        "PREFECT__FLOW_ENTRYPOINT": str(deployment.entrypoint),
        WORKER_VARIABLE: str(worker),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # stages print by themselves
    }
    os.execve(sys.executable, [sys.executable, "-c", _ENGINE], settings)


def held_by_project(folder: Path, deployment: DeploymentResponse, run: FlowRun) -> dict[str, str]:
    """The environment variables of a deployment in `prefect.yaml`; its pull steps are not run.

    Args:
        folder: the checkout.
        deployment: the deployment as stored on the server.
        run: the flow run.

    Raises:
        InputError: `prefect.yaml` has no such deployment or cannot be read, or the flow run sets
            job variables.
    """
    file = folder / "prefect.yaml"
    content = read_yaml(file, "prefect.yaml", missing="is not in this commit")
    wanted = (deployment.name, deployment.entrypoint)
    try:
        held = {
            (each["name"], each["entrypoint"]): dict(
                ((each.get("work_pool") or {}).get("job_variables") or {}).get("env") or {}
            )
            for each in content["deployments"]
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError("prefect.yaml: is not as Prefect describes it; correct it") from None
    if wanted not in held or run.job_variables:
        what = f"job variables {run.job_variables!r}"
        if wanted not in held:
            what = f"deployment {wanted[0]!r} with entrypoint {wanted[1]!r}"
        raise InputError(
            f"refused: {what:.200}, which prefect.yaml does not have at this commit; an agent runs "
            "nothing else (`prefect --no-prompt deploy --all` makes its deployments anew)"
        )
    return {name: str(value) for name, value in held[wanted].items()}


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
"""`prefect.engine` without reading results: if the server says that the run has ended, it would
unpickle a file that the server names."""


def _write_to(log: Path) -> None:
    """Redirect the output to a file: a pipe to the worker would break when the worker ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _commit(root: Path, asked: str) -> str:
    """The requested commit, fetched if necessary; by default the newest of the agent's branch.

    Raises:
        InputError: neither the checkout nor its remote has such a commit.
    """
    fault, remotes = "", list[str]()
    try:
        remotes = git(root, "remote").split()
        git(root, "fetch", "--quiet", "--all", "--tags")
    except RunError as error:  # the local commits may be enough
        fault = f" ({error})"
        say(f"warning: {error}; the newest commit that is here is taken", file=sys.stderr)
    theirs = [f"{each}/{asked}" for each in remotes]
    candidates = [*theirs, asked] if asked else ["@{upstream}", "HEAD"]
    for each in candidates:
        with contextlib.suppress(InputError):
            return commit_of(root, each)
    raise InputError(
        f"commit {repr(asked)[1:-1]}: is not in the agent's project{fault}; push it, or correct it"
    )
