"""An agent: looks at its machine, makes a work pool and GPU slots known to Prefect, keeps a worker
going, and takes up flow runs that were lost.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from gpt.base.errors import InputError, RunError
from gpt.base.files import write_json
from pipeline.flow.agent_start import AGENT_VARIABLE, COMMAND, agent_folder, run_note
from pipeline.flow.prefect_api import answers, import_path
from pipeline.flow.resources import SLOTS_VARIABLE, cards, cores
from pipeline.project.folders import HOME_VARIABLE, shared_folder
from pipeline.project.secrets import without_credentials
from pipeline.show.console import n_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.states import State

POOL = "gpu"
_LEAST_DISK, _LEAST_MEMORY = 2e9, 1e9
_RENDEZVOUS_PORT = 29500
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 15.0
_SAVE_SECONDS = 60.0
_ATTEMPTS = 5
"""A flow run that was lost so often is not taken up again."""


@dataclass(frozen=True, slots=True)
class Check:
    """One look at the machine: what, how it is, and whether work can be done like that."""

    what: str
    found: str
    state: Literal["ok", "warning", "error"] = "ok"

    def __str__(self) -> str:
        mark = "" if self.state == "ok" else f"  ({self.state})"
        return f"{self.what:<11} {self.found}{mark}"


def check_machine(root: Path, api: str) -> list[Check]:
    """What an agent on this machine has to work with."""

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
        _check_port(),
        Check("Prefect", prefect)
        if answers(api, 5)
        else Check("Prefect", f"{prefect}: no answer", "error"),
        _check_mlflow(root),
        _check_git(root),
        _check_remote(root),
    ]


def _check_port() -> Check:
    port = os.environ.get("PET_MASTER_PORT") or str(_RENDEZVOUS_PORT)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except (OSError, ValueError, OverflowError):
            taken = f"{port} is no free port; set PET_MASTER_PORT to train on several machines"
            return Check("port", taken, "warning")
    return Check("port", f"{port} is free for training on several machines")


def _check_mlflow(root: Path) -> Check:
    from pipeline.tracking.connection import reachable, tracking_uri

    uri = tracking_uri(root)
    place = without_credentials(uri)
    if not reachable(root):
        return Check("MLflow", f"{place}: no answer", "error")
    if uri.startswith("sqlite:"):
        return Check("MLflow", f"{place}; set MLFLOW_TRACKING_URI to share runs", "warning")
    return Check("MLflow", place)


def _check_git(root: Path) -> Check:
    from pipeline.project.git import commit_of, git

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
    from pipeline.dag.repository import remote_of

    try:
        remote = remote_of(root)
    except RunError as error:
        return Check("DVC remote", without_credentials(str(error)), "error")
    if remote is None:
        none = "none is set (`dvc remote add -d NAME PLACE`), so outputs stay here"
        return Check("DVC remote", none, "warning")
    place = without_credentials(remote.place)
    if remote.missing:
        new = f"{place} is not there; the first push makes it, if nothing is to be mounted"
        return Check("DVC remote", new, "warning")
    return Check("DVC remote", place)


# --- the work pool, the slots, the worker ---------------------------------------------------------


def limit_name() -> str:
    """The Prefect concurrency limit of this machine's accelerators."""
    return f"gpu-{re.sub(r'[^A-Za-z0-9_-]+', '-', socket.gethostname())}"


def serve(
    root: Path,
    api: str,
    *,
    pool: str = POOL,
    slots: int | None = None,
    runs: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Take flow runs from the work pool until Ctrl-C or SIGTERM.

    What runs then saves its state and is taken up by the next agent.

    Args:
        root: a checkout of the project; its git remote gives newer commits.
        api: of Prefect.
        pool: the work pool, made if it is not there.
        slots: stages that may work on an accelerator at the same time; by default the number of
            cards, 1 where there is none.
        runs: flow runs at the same time; by default one more than slots.
        say: prints a line.

    Raises:
        InputError: another agent works in this project, or the machine cannot do the work.
    """
    from pipeline.project.file_locks import stage_lock

    with stage_lock(shared_folder(root), "agent"):
        checks = check_machine(root, api)
        for check in checks:
            say(str(check))
        if bad := [check for check in checks if check.state == "error"]:
            names = ", ".join(check.what for check in bad)
            raise InputError(f"agent: {names}: see above; mend it and start the agent again")
        slots = slots or max(1, len(cards()))
        _Agent(root, api, pool, slots, runs or slots + 1, say).serve()


@dataclass(slots=True)
class _Agent:
    root: Path
    api: str
    pool: str
    slots: int
    runs: int
    say: Callable[[str], None]
    stopped: bool = False
    _gone: dict[str, float] = field(default_factory=dict)
    """Since when the process of a flow run is seen to be gone."""

    def serve(self) -> None:
        from prefect.client.orchestration import get_client

        self._end_former_worker()
        with get_client(sync_client=True) as client, _stopped_by_signals(self):
            self._make_known(client)
            self.take_up_lost(client, at_once=True)
            self._remove_workspaces(client)
            worker = self._start_worker()
            try:
                self.say(
                    f"work pool {self.pool!r}, {n_of(self.slots, 'slot')} ({limit_name()}), "
                    f"{n_of(self.runs, 'flow run')} at a time; Ctrl-C stops it, and what runs is "
                    "kept"
                )
                while not self.stopped:
                    time.sleep(_LOOK_SECONDS)
                    if worker.poll() is not None and not self.stopped:
                        self.say("the worker ended by itself; a new one takes its runs up")
                        worker = self._start_worker()
                    # a server that restarts, say: the next look tells
                    with contextlib.suppress(Exception):
                        self.take_up_lost(client)
            finally:
                self._stop(worker, client)

    def _make_known(self, client: SyncPrefectClient) -> None:
        from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate, WorkPoolCreate
        from prefect.exceptions import ObjectNotFound
        from prefect.workers.process import ProcessWorker

        try:
            found = client.read_work_pool(self.pool)
            if found.type != "process":
                raise InputError(
                    f"work pool {self.pool}: is of type {found.type}, and an agent serves one of "
                    "type process; name another with --pool"
                )
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            variables = template["variables"]["properties"]
            variables["command"]["default"] = COMMAND
            client.create_work_pool(
                WorkPoolCreate(
                    name=self.pool,
                    type="process",
                    description="Machines that run the pipeline: gpt-pipeline agent.",
                    base_job_template=template,
                )
            )
        client.upsert_global_concurrency_limit_by_name(limit_name(), self.slots)
        if not any(self._alive(note) for _, note in self._notes()):
            # nobody on this machine holds one: a server that lost its leases may say otherwise
            client.update_global_concurrency_limit(
                limit_name(), GlobalConcurrencyLimitUpdate(active_slots=0)
            )

    def _start_worker(self) -> subprocess.Popen[bytes]:
        folder = agent_folder(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            "-P",
            "-m",
            "pipeline.flow.agent_worker",
            self.pool,
            socket.gethostname(),
            str(self.runs),
        ]
        with (folder / "worker.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.root,
                env={
                    **os.environ,
                    "PREFECT_API_URL": self.api,
                    "PYTHONPATH": import_path(),
                    AGENT_VARIABLE: str(self.root.resolve()),
                    HOME_VARIABLE: str(shared_folder(self.root)),
                    SLOTS_VARIABLE: limit_name(),
                    "PREFECT_WORKER_QUERY_SECONDS": os.environ.get(
                        "PREFECT_WORKER_QUERY_SECONDS", "5"
                    ),
                    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
                    # `gpt-pipeline flow-run` is the one beside the running Python
                    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C comes to us
            )
        try:
            note = {"pid": worker.pid, "created": psutil.Process(worker.pid).create_time()}
            write_json(folder / "worker.json", note)
        except BaseException:  # no agent would find it
            worker.kill()
            raise
        return worker

    def _end_former_worker(self) -> None:
        """One whose agent was killed would compete with ours."""
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            note = json.loads((agent_folder(self.root) / "worker.json").read_text("utf-8"))
            if self._alive(note):
                psutil.Process(note["pid"]).kill()

    def _stop(self, worker: subprocess.Popen[bytes], client: SyncPrefectClient) -> None:
        running = [note for _, note in self._notes() if self._alive(note)]
        if running:
            self.say(f"stopping; {len(running)} flow runs save their state for the next agent")
        # its flow runs see that it is gone, and hand themselves back
        worker.kill()
        worker.wait()
        until = time.monotonic() + _SAVE_SECONDS
        while any(map(self._alive, running)) and time.monotonic() < until:
            time.sleep(0.2)
        with contextlib.suppress(Exception):
            self.take_up_lost(client, at_once=True)
        self.say("stopped")

    def _notes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted((agent_folder(self.root) / "runs").glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                yield path.stem, json.loads(path.read_text("utf-8"))

    def _alive(self, note: dict[str, Any]) -> bool:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(note["pid"])
            same = abs(process.create_time() - note["created"]) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        return False

    def take_up_lost(self, client: SyncPrefectClient, *, at_once: bool = False) -> None:
        """Let flow runs whose process is gone be run again, and forget those that have ended.

        Args:
            client: of Prefect.
            at_once: there is no worker that could still have something to say of them.
        """
        for run_id, note in self._notes():
            if self._alive(note):
                self._gone.pop(run_id, None)
            elif at_once or "refused" in note or self._long_gone(run_id):
                self._conclude(client, run_id, note, at_once=at_once)

    def _long_gone(self, run_id: str) -> bool:
        """A worker that is there has said by now how the process ended; its word would be the last
        one otherwise."""
        since = self._gone.setdefault(run_id, time.monotonic())
        return time.monotonic() - since > _GRACE_SECONDS

    def _conclude(
        self, client: SyncPrefectClient, run_id: str, note: dict[str, Any], *, at_once: bool
    ) -> None:
        """Say in Prefect what becomes of a flow run that has no process any more."""
        from prefect.exceptions import ObjectNotFound
        from prefect.states import AwaitingRetry, Cancelled, Crashed

        again = False
        with contextlib.suppress(ObjectNotFound):
            run = client.read_flow_run(run_id)  # type: ignore[arg-type]
            state = run.state
            if dict(self._notes()).get(run_id) != note:
                return  # a worker has started it again meanwhile
            if state is not None and state.is_pending() and not at_once and _is_new(state):
                return  # a worker is starting it now
            if state is None or state.is_scheduled():  # it waits for a worker, ours perhaps
                again = True
            elif state.is_cancelling():
                client.set_flow_run_state(run.id, Cancelled(message="its process is gone"), True)
            elif state.is_running() or state.is_pending() or state.is_crashed():
                again = run.run_count < _ATTEMPTS
                said = "its process was lost"
                if again:
                    self.say(f"{run.name}: {said}; it goes on from its kept state")
                    kept = AwaitingRetry(message=f"{said}; it goes on from its kept state")
                    client.set_flow_run_state(run.id, kept, True)
                else:
                    many = Crashed(message=f"{said}, and it was started {run.run_count} times")
                    self.say(f"{run.name}: {many.message}: it has failed")
                    client.set_flow_run_state(run.id, many, True)
        if not again:
            if "refused" in note:
                self.say(f"flow run {run_id}: {note['refused']}")
            if note.get("workspace"):
                shutil.rmtree(note["workspace"], ignore_errors=True)
        self._gone.pop(run_id, None)
        run_note(self.root, run_id).unlink(missing_ok=True)

    def _remove_workspaces(self, client: SyncPrefectClient) -> None:
        """Those of flow runs that ended on another machine, or while they waited for a worker."""
        from prefect.exceptions import ObjectNotFound

        noted = {run_id for run_id, _ in self._notes()}
        for folder in (agent_folder(self.root) / "workspaces").glob("[!.]*"):
            with contextlib.suppress(ObjectNotFound):
                state = client.read_flow_run(folder.name).state  # type: ignore[arg-type]
                if folder.name in noted or state is None or not state.is_final():
                    continue
            shutil.rmtree(folder, ignore_errors=True)


def _is_new(state: State[Any]) -> bool:
    age = datetime.datetime.now(datetime.UTC) - state.timestamp
    return bool(age.total_seconds() < _GRACE_SECONDS)


@contextlib.contextmanager
def _stopped_by_signals(agent: _Agent) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        agent.stopped = True

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
