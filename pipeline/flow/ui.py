"""Both pages for a browser: MLflow (runs, models) and Prefect (flow runs), on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gpt.base.errors import InputError, RunError
from gpt.base.files import write_json
from pipeline.flow import prefect_api as server
from pipeline.project.folders import shared_folder
from pipeline.project.secrets import without_secrets
from pipeline.tracking.connection import PAGES, connect, quiet_environment, tracking_uri

HOST = "127.0.0.1"
MLFLOW_PORT, PREFECT_PORT = 5000, 4200

_START_SECONDS = 180.0
_STOP_SECONDS = 10.0


@dataclass(slots=True)
class _Service:
    """A server in a process group of its own, so that Ctrl-C reaches it only through us."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, url: str) -> None:
        """Return when `url` answers.

        Raises:
            RunError: the server ended, or does not answer in time.
        """
        until = time.monotonic() + _START_SECONDS
        while not _answers(url):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RunError(f"{self.name} did not start; {self.log} says why")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ask the whole group to end; make it if it does not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
                return


def serve(
    root: Path,
    *,
    mlflow_port: int = MLFLOW_PORT,
    prefect_port: int = PREFECT_PORT,
    say: Callable[[str], None] = print,
) -> None:
    """Serve both pages until Ctrl-C or SIGTERM; the addresses are in `.pipeline/ui.json` meanwhile.

    A server that `MLFLOW_TRACKING_URI` or `PREFECT_API_URL` names is shown instead of starting one.
    A database that `MLFLOW_TRACKING_URI` or `PREFECT_SERVER_DATABASE_CONNECTION_URL` names is
    served in the place of the project's own.

    Args:
        root: the project.
        mlflow_port: the first port to try; the next free one is taken.
        prefect_port: likewise.
        say: prints a line.

    Raises:
        InputError: names are given to Prefect's server, and no token.
        RunError: a server does not start, or ends by itself.
    """
    if server.named_hosts() and not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise InputError(
            f"{server.HOSTS_VARIABLE}: lets Prefect be reached from elsewhere, and it asks nobody "
            "who they are; set PREFECT_SERVER_API_AUTH_STRING (docs/servers.md), or unset this"
        )
    folder = shared_folder(root) / ".pipeline"
    addresses = folder / "ui.json"
    services: list[_Service] = []
    with _one_interrupt():
        try:
            mlflow = tracking_uri(root)
            if not mlflow.startswith("http"):
                mlflow = f"http://{HOST}:{free_port(mlflow_port)}"
                services.append(_start_mlflow(root, mlflow, folder))
            api = os.environ.get("PREFECT_API_URL")
            if not api:
                api = f"http://{HOST}:{free_port(prefect_port)}/api"
                services.append(_start_prefect(root, api, folder))
            say("starting MLflow and Prefect …")
            for service in services:
                service.wait(f"{mlflow}/health" if service.name == "MLflow" else f"{api}/health")
            pids = {service.name.lower(): service.process.pid for service in services}
            shown = {"mlflow": without_secrets(mlflow), "prefect": without_secrets(api)}
            write_json(addresses, {**shown, "pids": pids})
            say(f"MLflow   {shown['mlflow']}/#/experiments?{PAGES}")
            say(f"Prefect  {shown['prefect'].removesuffix('/api')}")
            say("Ctrl-C stops both.")
            while True:
                for service in services:
                    if service.process.poll() is not None:
                        raise RunError(f"{service.name} ended by itself; {service.log} says why")
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass
        finally:
            addresses.unlink(missing_ok=True)
            for service in services:
                service.stop()
    say("stopped")


def free_port(first: int) -> int:
    """The first port from `first` on that nothing listens on, on loopback.

    Raises:
        RunError: a hundred in a row are taken.
    """
    for port in range(first, first + 100):
        with socket.socket() as probe:
            # as servers do, else a port whose connections were just closed counts as taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise RunError(f"no free port on {HOST} from {first} on; name another one")


def _start_mlflow(root: Path, url: str, folder: Path) -> _Service:
    connect(root)  # the tables are made here, under our lock, not by the server beside a stage
    artifacts = (shared_folder(root) / "mlartifacts").as_uri()
    command = ["-m", "mlflow", "server", "--artifacts-destination", artifacts, "--workers", "1"]
    command += ["--host", HOST, "--port", url.rpartition(":")[2]]
    settings = {
        **quiet_environment(),
        # in the environment: everyone on the machine can read a command, a password in it too
        "MLFLOW_BACKEND_STORE_URI": tracking_uri(root),
        # runs evaluations that are started on its pages; none are, and it takes four processes
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # by default also `10.*`, meant for addresses, which a name like 10.example is, too
        "MLFLOW_SERVER_ALLOWED_HOSTS": os.environ.get(
            "MLFLOW_SERVER_ALLOWED_HOSTS", "127.0.0.1:*,localhost:*"
        ),
    }
    return _start("MLflow", command, settings, root, folder)


def _start_prefect(root: Path, api: str, folder: Path) -> _Service:
    port = api.removesuffix("/api").rpartition(":")[2]
    command = ["-m", "pipeline.flow.prefect_api", "--pages", port]
    settings = {
        **server.environment(root),
        "PREFECT_UI_API_URL": "/api",  # under whatever name the pages are looked at
        "PYTHONPATH": server.import_path(),
    }
    return _start("Prefect", command, settings, root, folder)


def _start(
    name: str, command: Sequence[str], settings: Mapping[str, str], root: Path, folder: Path
) -> _Service:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name.lower()}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", *command],
            cwd=root,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,  # its end tells Prefect's server that we are gone
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return _Service(name, process, log)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM raises KeyboardInterrupt, others do nothing."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
