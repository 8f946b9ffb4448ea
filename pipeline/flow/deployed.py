"""The flows that deployments run on an agent: the pipeline at a commit with the run's parameters,
and a check for changed sources.

This process works in the workspace that `pipeline.flow.agent_start` created. Existing outputs are
pulled from DVC's remote before the stages run, and new ones are pushed to it afterwards.

Import this module only when `pipeline.flow.prefect_api.environment` is in place: Prefect reads its
settings when it is imported.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import AwaitingRetry, Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.variables import Variable

from gpt.base.errors import InputError, RunError
from pipeline.dag.cache import dvc_md5, mend
from pipeline.dag.dvc_files import LOCK_FILE, find_root
from pipeline.dag.graph import Dag
from pipeline.dag.repository import has_remote
from pipeline.dag.repro import Processes, StageError
from pipeline.flow.agent_start import AGENT_VARIABLE, WORKER_VARIABLE, run_note
from pipeline.flow.flow import failed_state, run_stages, task_of
from pipeline.project.overrides import params_with, text_with, write_params
from pipeline.project.params import PARAMS_FILE, check_stages, load_params, preset_file, read_params
from pipeline.project.processes import watch_parent
from pipeline.project.settings import FlowParams

NEW_DATA = "gpt-pipeline.new-data"
"""The event emitted when sources changed; a deployment may have a trigger on it."""
_SOURCES = "gpt_pipeline_sources"


def _name() -> str:
    given = flow_run.parameters
    words = [", ".join(given.get("targets") or ()) or "all stages", given.get("preset") or ""]
    words += [f"{path}={value}" for path, value in (given.get("overrides") or {}).items()]
    return " ".join(filter(None, words)).replace("{", "{{").replace("}", "}}")


@flow(
    name="gpt-pipeline",
    flow_run_name=_name,
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # most wait; `jobs` limits how many run
)  # type: ignore[untyped-decorator]
def gpt_pipeline_on_agent(
    targets: list[str] | None = None,
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    force: bool = False,
    jobs: int = 3,
    commit: str = "",
) -> State[Any]:
    """Bring the pipeline up to date at a commit, and push its outputs to the DVC remote.

    Args:
        targets: names of stages; if empty, every stage except the optional ones.
        preset: a file of `presets/` that replaces `params.yaml`.
        overrides: parameter (`pretrain.train.steps`) -> value; applied after the preset.
        force: run the stages even if nothing changed.
        jobs: how many stages run at the same time.
        commit: a branch, a tag or a hash; by default the newest commit of the agent's branch.
    """
    root = find_root(Path.cwd())
    processes = Processes()
    try:
        set_params(root, targets or [], preset, overrides or {})
        if jobs < 1:
            raise InputError(f"jobs: at least 1 stage must run at a time (got {jobs})")
    except InputError as error:
        get_run_logger().error("%s", error)
        return failed_state(error)
    worker = int(os.environ.get(WORKER_VARIABLE) or 0)
    if worker:  # without its worker the flow run could not be cancelled, nor its end be reported
        watch_parent(worker, lambda: processes.stop(signal.SIGTERM))
    with processes.stopped_by_signals():
        state = _share(root, processes, "dvc pull", "dvc", "pull", "--run-cache", "--allow-missing")
        if state.is_completed():
            dag = _with_sound_outputs(root)
            state = run_stages(root, targets or [], force, jobs, processes, dag=dag)
            if not processes.stopped_by:
                pushed = _share(root, processes, "dvc push", "pipeline", "push")
                if state.is_completed() and not pushed.is_completed():
                    state = pushed
                _report(root)
        if worker and os.getppid() != worker:
            _hand_back()
    return state


def _with_sound_outputs(root: Path) -> Dag:
    """Compare pulled outputs with `dvc.lock`, as DVC trusts its remote, then return the DAG."""
    dag = Dag(root)
    in_place = [name for name, changes in dag.changes().items() if not changes]
    if damaged := mend(dag, in_place).damaged:
        get_run_logger().warning("%s: not what %s says, and removed", ", ".join(damaged), LOCK_FILE)
    return dag


def set_params(
    root: Path, targets: list[str], preset: str | None, overrides: dict[str, Any]
) -> None:
    """Replace the commit's parameters by those of the run.

    Raises:
        InputError: there is no such stage, preset or parameter, or a value is invalid; the message
            is the one for `params.yaml`.
    """
    check_stages(targets)
    file = root / PARAMS_FILE if preset is None else preset_file(root, preset)
    content = file.read_bytes()
    load_params(file)
    if overrides:
        try:
            params_with(read_params(file), overrides)
        except InputError as error:
            raise InputError(f"overrides: {error}") from None
        content = text_with(content, overrides)
    write_params(root, content)
    load_params(root / PARAMS_FILE)


# --- the DVC remote -------------------------------------------------------------------------------


def _share(root: Path, processes: Processes, name: str, *arguments: str) -> State[Any]:
    """Run a DVC command that uses the remote, as a separate task with retries."""
    if not has_remote(root):
        line = "no DVC remote is set (`dvc remote add -d NAME PLACE`): nothing to share"
        get_run_logger().info(line)
        return Completed(name="Skipped", message="no DVC remote is set")

    def share() -> State[Any]:
        done = processes.run(root, [sys.executable, "-m", *arguments])
        if processes.stopped_by:
            return Cancelled(message="stopped by the user")
        if done.returncode == 0:
            said = done.stdout.strip().splitlines()
            return Completed(message=said[-1] if said else name)
        said = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
        reason = said[-1].partition(": ")[2] if said else "it failed"
        line = f"{name}: {reason}; see that the remote answers (`dvc remote list`), and run again"
        return failed_state(StageError(line, kind="network"))

    params = load_params(root / PARAMS_FILE).flow or FlowParams()

    def tried() -> State[Any]:  # Prefect's own retries wait even when the flow run is cancelled
        state = share()
        for n in range(params.retries):
            if not state.is_failed() or processes.stopping.wait(params.wait * 2**n):
                break
            state = share()
        return Cancelled(message="stopped by the user") if processes.stopped_by else state

    state: State[Any] = task_of(name, tried)(return_state=True)
    return state


def _report(root: Path) -> None:
    """Write the report, which MLflow keeps; if that fails, the flow run does not fail."""
    from pipeline.report.terminal import print_report

    try:
        print_report(root, always=False)
    except (InputError, RunError) as error:
        get_run_logger().warning("no report: %s", error)


def _hand_back() -> None:
    """Reschedule the flow run for the next worker, and exit without reporting another state."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(
            flow_run.id,
            AwaitingRetry(message="the worker was gone; the next one goes on from the kept state"),
            force=True,
        )
    # another agent may already run it, so this one must not treat it as lost
    run_note(Path(os.environ[AGENT_VARIABLE]), str(flow_run.id)).unlink(missing_ok=True)
    os._exit(0)


# --- new data -------------------------------------------------------------------------------------


@flow(name="gpt-pipeline watch", flow_run_name="look for new data")  # type: ignore[untyped-decorator]
def watch_sources(commit: str = "") -> State[Any]:
    """Emit an event if the sources have changed since the last check.

    The sources are the folder `download.local` at the commit, `download.mirror` if it is a folder,
    and the sources listed in `params.yaml`. Content behind a URL is pinned by its sha256.

    Args:
        commit: the commit to check; by default the newest of the agent's branch.
    """
    root = find_root(Path.cwd())
    try:
        now = fingerprint(root)
    except (InputError, OSError) as error:
        return Failed(message=str(error))
    before = Variable.get(_SOURCES)
    if before == now:
        return Completed(message="nothing new")
    if before is not None:
        emit_event(
            event=NEW_DATA,
            resource={
                "prefect.resource.id": "gpt-pipeline.sources",
                "prefect.resource.name": "sources",
            },
            payload={"before": before, "now": now},
        )
        time.sleep(1)  # events are sent by a background thread
    Variable.set(_SOURCES, now, overwrite=True)  # last: a repeated event is better than a lost one
    return Completed(message="there is new data" if before else "seen for the first time")


def fingerprint(root: Path) -> str:
    """A digest of the sources.

    Raises:
        InputError: `params.yaml` is invalid, or a folder that it names is missing.
    """
    params = load_params(root / PARAMS_FILE).download
    parts = [repr(params)]
    mirror = os.environ.get("GPT_PIPELINE_MIRROR") or params.mirror
    folders = [params.local, *([mirror] if mirror and "://" not in mirror else [])]
    for place in (root / Path(each).expanduser() for each in folders):
        if not place.is_dir():
            raise InputError(f"{place}: no such folder, and download names it; correct params.yaml")
        if place.is_relative_to(root):
            parts.append(dvc_md5(place))
        else:  # a mirror may be large: file metadata only, no hashing
            stats = [(path, path.stat()) for path in sorted(place.rglob("*")) if path.is_file()]
            parts += [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
