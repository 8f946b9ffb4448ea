"""The web pages of MLflow (runs, models) and Prefect (flow runs), served on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from gpt.base.errors import InputError, RunError
from gpt.base.files import write_json
from pipeline.flow.prefect_api import HOST, HOSTS_VARIABLE, LocalServer, Server, named_hosts
from pipeline.project.folders import shared_folder
from pipeline.project.processes import one_interrupt
from pipeline.project.secrets import without_secrets
from pipeline.show.terminal import say
from pipeline.tracking.connection import PAGES, connect, quiet_environment, tracking_uri

MLFLOW_PORT, PREFECT_PORT = 5000, 4200


def serve(
    root: Path,
    *,
    mlflow_port: int = MLFLOW_PORT,
    prefect_port: int = PREFECT_PORT,
) -> None:
    """Serve both until Ctrl-C or SIGTERM; meanwhile `.pipeline/ui.json` holds their addresses.

    If `MLFLOW_TRACKING_URI` or `PREFECT_API_URL` names a server, its address is shown and none is
    started. If `MLFLOW_TRACKING_URI` or `PREFECT_SERVER_DATABASE_CONNECTION_URL` names a database,
    that one is served instead of the project's own.

    Args:
        root: the project.
        mlflow_port: the first port to try; if it is taken, the next free one is used.
        prefect_port: likewise.

    Raises:
        InputError: host names are set for Prefect's server, but no token.
        RunError: a server does not start, or ends unexpectedly.
    """
    if named_hosts() and not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise InputError(
            f"{HOSTS_VARIABLE}: lets Prefect be reached from elsewhere, and it asks nobody "
            "who they are; set PREFECT_SERVER_API_AUTH_STRING (docs/servers.md), or unset this"
        )
    folder = shared_folder(root) / ".pipeline"
    folder.mkdir(parents=True, exist_ok=True)
    addresses = folder / "ui.json"
    servers: dict[str, Server] = {}
    with one_interrupt():
        try:
            mlflow, prefect = tracking_uri(root), os.environ.get("PREFECT_API_URL")
            if not mlflow.startswith("http"):
                servers["mlflow"] = _start_mlflow(root, free_port(mlflow_port), folder)
                mlflow = servers["mlflow"].url
            if not prefect:
                servers["prefect"] = LocalServer(root, free_port(prefect_port), pages=True)
                prefect = servers["prefect"].url
            say("starting MLflow and Prefect …")
            for server in servers.values():
                server.wait()
            pids = {name: server.process.pid for name, server in servers.items()}
            shown = {"mlflow": without_secrets(mlflow), "prefect": without_secrets(prefect)}
            write_json(addresses, {**shown, "pids": pids})
            say(f"MLflow   {shown['mlflow']}/#/experiments?{PAGES}")
            say(f"Prefect  {shown['prefect'].removesuffix('/api')}")
            say("Ctrl-C stops both.")
            while True:
                for server in servers.values():
                    if server.process.poll() is not None:
                        raise RunError(f"{server.name} ended by itself; {server.log} says why")
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass
        finally:
            addresses.unlink(missing_ok=True)
            for server in servers.values():
                server.stop()
    say("stopped")


def free_port(first: int) -> int:
    """The first free port on loopback, counting up from `first`.

    Raises:
        RunError: a hundred ports in a row are taken.
    """
    for port in range(first, first + 100):
        with contextlib.suppress(OSError), socket.create_server((HOST, port)):
            return port
    raise RunError(f"no free port on {HOST} from {first} on; name another one")


def _start_mlflow(root: Path, port: int, folder: Path) -> Server:
    connect(root)  # creates the tables under our lock, before the server or a stage does
    artifacts = (shared_folder(root) / "mlartifacts").as_uri()
    command = ["mlflow", "server", "--artifacts-destination", artifacts, "--workers", "1"]
    command += ["--host", HOST, "--port", str(port)]
    settings = {
        **quiet_environment(),
        # in the environment: every user of the machine can read command lines, passwords included
        "MLFLOW_BACKEND_STORE_URI": tracking_uri(root),
        # the job runner for evaluations started on the pages: unused here, takes four processes
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # the default also allows `10.*`, meant for IP addresses; it would match 10.example
        "MLFLOW_SERVER_ALLOWED_HOSTS": os.environ.get(
            "MLFLOW_SERVER_ALLOWED_HOSTS", "127.0.0.1:*,localhost:*"
        ),
    }
    return Server("MLflow", f"http://{HOST}:{port}", command, folder / "mlflow.log", settings)
