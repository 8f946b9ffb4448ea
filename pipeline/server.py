"""A Prefect API for the length of one run: on loopback, quiet, gone when its starter is gone.

Prefect can start such a server by itself, but only once it is imported, in the same process group
(so that Ctrl-C ends it before the run could be recorded), and it outlives a killed starter.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from gpt.errors import RunError

_START_SECONDS = 180.0
"""The first start creates the database, which takes a slow machine a while."""


def environment(root: Path) -> dict[str, str]:
    """Variables under which Prefect, DVC and MLflow keep to the project and to this machine.

    What the user set stays.
    """
    defaults = {
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The terminal shows the stages; all that Prefect logs is in its API and its pages.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "DVC_NO_ANALYTICS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def answers(api: str, timeout: float = 1.0) -> bool:
    """Whether a Prefect API is up at this address."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=timeout) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def running_api(root: Path) -> str | None:
    """The API to use if there is one already: `PREFECT_API_URL`, else the one of `make ui`."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    try:
        url = json.loads((root / ".pipeline" / "ui.json").read_text(encoding="utf-8"))["prefect"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return url if isinstance(url, str) and answers(url) else None


class LocalServer:
    """A Prefect API in a process of its own; starts at once, `wait` until it answers."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api"
        self._log = root / ".prefect" / "server.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.server", str(port)],
                # Its end tells the server that we are gone, however we went.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment(root), "PYTHONPATH": _import_path()},
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when the API answers.

        Raises:
            RunError: it does not start.
        """
        until = time.monotonic() + _START_SECONDS
        while not answers(self.url):
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RunError(
                    f"Prefect's API did not start; see {self._log}, or remove "
                    f"{self._log.parent} to begin a new history"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server; what it was told before is written by then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _import_path() -> str:
    here = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def serve(port: int) -> None:
    """Serve Prefect's API on loopback until standard input ends."""
    import uvicorn
    from prefect.server.api.server import create_app

    config = uvicorn.Config(
        create_app(ephemeral=True, final=True),
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)

    def watch() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock would outlive this thread
            pass
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    server.run()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
