"""An agent: checks its machine, creates a work pool in Prefect, keeps a worker
running, and reschedules flow runs that were lost.

Import this module only when `pipeline.flow.prefect_api.environment` is in place: Prefect reads its
settings when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Crashed
from prefect.workers.process import ProcessWorker

from gpt.base.errors import InputError, RunError
from pipeline.dag.repository import remote_of
from pipeline.flow.agent_start import AGENT_VARIABLE, agent_folder, run_note
from pipeline.flow.prefect_api import answers
from pipeline.flow.resources import SLOTS_VARIABLE, cards, cores
from pipeline.project.file_locks import stage_lock
from pipeline.project.folders import HOME_VARIABLE, shared_folder
from pipeline.project.git import commit_of, git
from pipeline.project.processes import import_path, one_interrupt
from pipeline.project.secrets import without_credentials
from pipeline.show.console import n_of
from pipeline.show.terminal import say
from pipeline.tracking.connection import reachable, tracking_uri

_LEAST_DISK, _LEAST_MEMORY = 2e9, 1e9
_LOOK_SECONDS = 1.0
_RESTART_SECONDS = 15.0
"""Delay between two starts of the worker, in case it cannot start at all."""
_SAVE_SECONDS = 60.0
_REPORT_SECONDS = 300.0
_ATTEMPTS = 5
"""A flow run that was lost this many times is not rescheduled again."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the machine: its subject, its result, and whether the agent can work with it."""

    what: str
    found: str
    state: Literal["ok", "warning", "error"] = "ok"

    def __str__(self) -> str:
        mark = "" if self.state == "ok" else f"  ({self.state})"
        return f"{self.what:<11} {self.found}{mark}"


def check_machine(root: Path, api: str) -> list[Check]:
    """Check whether an agent can work on this machine."""
    found, prefect = cards(), without_credentials(api)
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(root)
    return [
        Check("device", n_of(len(found), "NVIDIA card") if found else f"CPU, {cores()} cores"),
        Check(
            "memory",
            f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
            "error" if memory.available < _LEAST_MEMORY else "ok",
        ),
        Check(
            "disk",
            f"{disk.free / 1e9:.1f} GB free at {root}",
            "error" if disk.free < _LEAST_DISK else "ok",
        ),
        Check("Prefect", prefect)
        if answers(api, 5)
        else Check("Prefect", f"{prefect}: no answer", "error"),
        _check_mlflow(root),
        _check_git(root),
        _check_remote(root),
    ]


def _check_mlflow(root: Path) -> Check:
    place = without_credentials(tracking_uri(root))
    if not reachable(root):
        return Check("MLflow", f"{place}: no answer", "error")
    if place.startswith("sqlite:"):
        return Check("MLflow", f"{place}; set MLFLOW_TRACKING_URI to share runs", "warning")
    return Check("MLflow", place)


def _check_git(root: Path) -> Check:
    try:
        commit = commit_of(root, "HEAD")[:7]
        if not git(root, "remote"):
            return Check("git", f"at {commit}; no remote, so no newer commits come", "warning")
        origin = without_credentials(git(root, "remote", "get-url", git(root, "remote").split()[0]))
        git(root, "ls-remote", "--quiet", "--heads", environment={"GIT_TERMINAL_PROMPT": "0"})
    except InputError as error:
        return Check("git", str(error), "error")
    except RunError as error:
        return Check("git", without_credentials(str(error)), "warning")
    return Check("git", f"at {commit}, from {origin}")


def _check_remote(root: Path) -> Check:
    try:
        remote = remote_of(root)
    except RunError as error:
        return Check("DVC remote", without_credentials(str(error)), "error")
    if remote is None:
        none = "none is set (`dvc remote add -d NAME PLACE`), so outputs stay here"
        return Check("DVC remote", none, "warning")
    new = " is not there; the first push makes it, if nothing is to be mounted"
    address, there = remote
    place = without_credentials(address) + ("" if there else new)
    return Check("DVC remote", place, "ok" if there else "warning")


# --- the work pool and the worker -----------------------------------------------------------------


def serve(
    root: Path,
    api: str,
    *,
    pool: str = "gpu",
    slots: int | None = None,
    runs: int | None = None,
) -> None:
    """Take flow runs from the work pool until Ctrl-C or SIGTERM.

    Flow runs in progress then save their state, and the next agent resumes them.

    Args:
        root: a checkout of the project; newer commits are fetched from its git remote.
        api: the address of the Prefect API.
        pool: the work pool, created if it does not exist.
        slots: how many stages may use an accelerator at the same time; by default the number of
            GPUs, or 1 without a GPU.
        runs: how many flow runs are executed at the same time; by default `slots` + 1.

    Raises:
        InputError: another agent is running in this project, or a check of the machine failed.
    """
    with stage_lock(shared_folder(root), "agent"):
        checks = check_machine(root, api)
        for check in checks:
            say(check)
        if bad := [check for check in checks if check.state == "error"]:
            names = ", ".join(check.what for check in bad)
            raise InputError(f"agent: {names}: see above; mend it and start the agent again")
        slots = slots or max(1, len(cards()))
        with get_client(sync_client=True) as client:
            _Agent(root, api, pool, slots, runs or slots + 1, client).serve()


@dataclass(slots=True)
class _Agent:
    root: Path
    api: str
    pool: str
    slots: int
    runs: int
    client: SyncPrefectClient
    _gone: dict[tuple[int, float], float] = field(
        default_factory=dict
    )  # process -> when it was missed

    def serve(self) -> None:
        """Keep a worker running until the first SIGINT or SIGTERM."""
        pool = WorkPoolCreate(
            name=self.pool,
            type="process",
            description="Machines that run the pipeline: gpt-pipeline agent.",
            base_job_template=ProcessWorker.get_default_base_job_template(),
        )
        with contextlib.suppress(ObjectAlreadyExists):
            self.client.create_work_pool(pool)
        self.take_up_lost()
        self._remove_workspaces()
        with one_interrupt():
            worker = self._start_worker()
            began = time.monotonic()
            try:
                say(
                    f"work pool {self.pool!r}, {n_of(self.slots, 'slot')}, "
                    f"{n_of(self.runs, 'flow run')} at a time; Ctrl-C stops it, and what runs is "
                    "kept"
                )
                while True:
                    time.sleep(_LOOK_SECONDS)
                    if worker.poll() is not None:
                        say("the worker ended by itself; a new one takes its runs up")
                        time.sleep(max(0.0, began + _RESTART_SECONDS - time.monotonic()))
                        worker, began = self._start_worker(), time.monotonic()
                    # the server may be restarting; the next attempt can succeed
                    with contextlib.suppress(Exception):
                        self.take_up_lost(worker.pid)
            except KeyboardInterrupt:
                pass
            finally:
                self._stop(worker)

    def _start_worker(self) -> subprocess.Popen[bytes]:
        agent_folder(self.root).mkdir(parents=True, exist_ok=True)
        arguments = [self.pool, socket.gethostname(), str(self.runs)]
        with (agent_folder(self.root) / "worker.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.flow.agent_worker", *arguments],
                cwd=self.root,
                env={
                    "PREFECT_WORKER_QUERY_SECONDS": "5",
                    **os.environ,
                    "PREFECT_API_URL": self.api,
                    "PYTHONPATH": import_path(),
                    AGENT_VARIABLE: str(self.root.resolve()),
                    HOME_VARIABLE: str(shared_folder(self.root)),
                    SLOTS_VARIABLE: str(self.slots),
                    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
                    # so that `gpt-pipeline flow-run` is found next to the running Python
                    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # only the agent receives Ctrl-C
            )

    def _stop(self, worker: subprocess.Popen[bytes]) -> None:
        running = [note for _, note in self._notes() if self._alive(note)]
        if running:
            say(f"stopping; {len(running)} flow runs save their state for the next agent")
        # its flow runs notice that the worker is gone, and reschedule themselves
        worker.kill()
        worker.wait()
        until = time.monotonic() + _SAVE_SECONDS
        while any(map(self._alive, running)) and time.monotonic() < until:
            time.sleep(0.2)
        with contextlib.suppress(Exception):
            self.take_up_lost()
        say("stopped")

    def _notes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted((agent_folder(self.root) / "runs").glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                yield path.stem, json.loads(path.read_text("utf-8"))

    def _alive(self, note: dict[str, Any]) -> bool:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(note["pid"])
            if process.status() != psutil.STATUS_ZOMBIE:
                return bool(abs(process.create_time() - note["created"]) < 1)
        return False

    def take_up_lost(self, worker: int = 0) -> None:
        """Reschedule flow runs whose process is gone, and delete the notes of those that ended.

        Args:
            worker: the process of the running worker. It reports the end of the processes that it
                started, and would overwrite a state set here before.
        """
        for run_id, note in self._notes():
            if not self._alive(note):
                self._conclude(run_id, note, worker)

    def _conclude(self, run_id: str, note: dict[str, Any], worker: int) -> None:
        """Set the state of a flow run whose process is gone, and delete its note."""
        again = False
        with contextlib.suppress(ObjectNotFound):
            run = self.client.read_flow_run(run_id)  # type: ignore[arg-type]
            state = run.state
            if dict(self._notes()).get(run_id) != note:
                return  # a worker has restarted it in the meantime
            if state is None or state.is_scheduled():  # waiting for a worker
                again = True
            elif not state.is_final() and note.get("worker") == worker and self._waits(note):
                return  # its worker will report its end
            elif state.is_cancelling():
                cancelled = Cancelled(message="its process is gone")
                self.client.set_flow_run_state(run.id, cancelled, force=True)
            # one that crashed before it ran would do so again, and its starts are not counted
            elif not state.is_final() or (state.is_crashed() and run.run_count):
                again = self._reschedule(run)
        if "refused" in note:
            say(f"flow run {run_id}: {note['refused']}")
        if not again:
            shutil.rmtree(note["workspace"], ignore_errors=True)
        run_note(self.root, run_id).unlink(missing_ok=True)

    def _waits(self, note: dict[str, Any]) -> bool:
        """Whether its worker may still report its end: the server may be away for a while."""
        since = self._gone.setdefault((note["pid"], note["created"]), time.monotonic())
        return time.monotonic() - since < _REPORT_SECONDS

    def _reschedule(self, run: FlowRun) -> bool:
        """Reschedule a lost flow run, unless it was lost too often."""
        again = bool(run.run_count < _ATTEMPTS)
        line = "its process was lost; it goes on from its kept state"
        if not again:
            line = f"its process was lost, and it was started {run.run_count} times"
        state = AwaitingRetry(message=line) if again else Crashed(message=line)
        say(f"{run.name}: {line}")
        self.client.set_flow_run_state(run.id, state, force=True)
        return again

    def _remove_workspaces(self) -> None:
        """Remove workspaces of flow runs that ended elsewhere, or while waiting for a worker."""
        noted = {run_id for run_id, _ in self._notes()}
        for folder in (agent_folder(self.root) / "workspaces").glob("[!.]*"):
            with contextlib.suppress(ObjectNotFound):
                state = self.client.read_flow_run(folder.name).state  # type: ignore[arg-type]
                if folder.name in noted or state is None or not state.is_final():
                    continue
            shutil.rmtree(folder, ignore_errors=True)
