"""Prefect's server as this project starts it: on loopback, quiet, closed to other web pages.

The server ends with the process that started it. Prefect can start such a server itself, but only
after it is imported and in the same process group, so that Ctrl-C ends it before the run is
recorded; and that server keeps running when its parent is killed.

Prefect's own server accepts requests from pages of any origin, and anyone who can create a
deployment can run commands on an agent. Here a browser's request is accepted only if it names this
machine as its host and comes from the server's own pages.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from gpt.base.errors import InputError, RunError
from gpt.base.files import write_json
from pipeline.project.folders import shared_folder
from pipeline.project.processes import collect_seldom, import_path
from pipeline.project.scratch import abandoned, scratch
from pipeline.project.secrets import without_secrets
from pipeline.show.terminal import say

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HOSTS_VARIABLE = "GPT_PIPELINE_ALLOWED_HOSTS"
"""Further host names, comma-separated, under which our Prefect server may be reached."""
HOST = "127.0.0.1"
_START_SECONDS = 180.0
"""The first start creates the database, which is slow on a slow machine."""
_PATIENCE_SECONDS = 10.0
"""After this delay a line says what the command is waiting for."""
_STOP_SECONDS = 15.0
_FLOW_RUN = "flow-run.json"

_DATABASE_VARIABLES = (
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
)
_ERROR = re.compile(r"[\w.]*(?:Error|Exception)[\w.]*: (.+)")
"""The line of a traceback that holds the error."""
_DAMAGED = re.compile(r"not a database|malformed")
"""SQLite's error messages for a damaged file."""


def environment(root: Path) -> dict[str, str]:
    """Environment variables that keep Prefect, DVC and MLflow inside the project and this machine.

    Variables that the user has set are kept.
    """
    defaults = {
        "PREFECT_HOME": str(shared_folder(root) / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Prefect's default, in memory, loses the holders of concurrency slots on a server restart
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        # The terminal shows the stages; Prefect's logs are available in its API and pages.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "DVC_NO_ANALYTICS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def answers(api: str, timeout: float = 1.0) -> bool:
    """Whether a Prefect API answers at this address."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=timeout) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException, ValueError):
        return False


def running_api(root: Path) -> str | None:
    """The address of a running API: `PREFECT_API_URL`, or that of `make ui`, if there is one."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = (shared_folder(root) / ".pipeline" / "ui.json").read_text(encoding="utf-8")
        url = str(json.loads(told)["prefect"])
        return url if answers(url) else None
    return None


@contextlib.contextmanager
def prefect_told() -> Iterator[None]:
    """Within the block, failures to reach Prefect and refusals by it become one-line errors.

    Raises:
        InputError: the environment names a proxy that cannot be used.
        RunError: Prefect cannot be reached or refuses.
    """
    import httpx

    try:
        httpx.Client().close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise InputError(
            f"HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY: {str(error).strip().rstrip('.')}; "
            "correct it, or unset it here"
        ) from None
    try:
        yield
    except (httpx.HTTPError, RuntimeError) as error:
        # Prefect raises RuntimeError before a flow run; RunError is not a RuntimeError
        if isinstance(error, RuntimeError) and not str(error).startswith("Failed to reach API"):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RunError(
            f"Prefect: {reason.strip().rstrip('.')}; see that its server is up, and check "
            "PREFECT_API_URL and PREFECT_API_AUTH_STRING"
        ) from None


class Server:
    """A server in a separate process group, so that Ctrl-C does not reach it directly.

    Args:
        name: the server's name in error messages.
        url: its base address; `/health` below it answers once the server has started.
        command: a module and its arguments.
        log: the file for its output.
        settings: environment variables added to those of this process.
        pass_fds: file descriptors that it inherits.
    """

    def __init__(
        self,
        name: str,
        url: str,
        command: Sequence[str],
        log: Path,
        settings: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name, self.url, self.log = name, url, log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *command],
                pass_fds=pass_fds,
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,  # when it closes, Prefect's server stops
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            RunError: the server ended, or did not answer in time.
        """
        began, told = time.monotonic(), False
        while not answers(self.url):
            waited = time.monotonic() - began
            if self.process.poll() is not None or waited > _START_SECONDS:
                self.stop()
                raise RunError(self.fault())
            if waited > _PATIENCE_SECONDS and not told:
                told = True
                say(f"waiting for {self.name} to start; its log is {self.log}", file=sys.stderr)
            time.sleep(0.05)

    def fault(self) -> str:
        """Why the server did not start."""
        return f"{self.name} did not start; {self.log} says why"

    def stop(self) -> None:
        """Terminate the process group; kill it if it does not end in time."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
                return


class LocalServer(Server):
    """A Prefect API in a separate process, started by the constructor; `wait` until it answers.

    As a context manager it answers inside the block and is stopped at the end.

    Args:
        root: the project.
        port: the port on loopback; 0 for a free one.
        pages: also serve Prefect's pages and run all its services.
    """

    def __init__(self, root: Path, port: int = 0, *, pages: bool = False) -> None:
        settings = environment(root)
        log = Path(settings["PREFECT_HOME"]).expanduser() / "server.log"
        if pages:
            settings["PREFECT_UI_API_URL"] = "/api"  # relative: works under every host name
        else:  # blocks are created only on the pages
            settings["PREFECT_SERVER_REGISTER_BLOCKS_ON_START"] = "false"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        except OSError as error:
            raise RunError(
                f"PREFECT_HOME {log.parent}: cannot be written ({error.strerror}); make it "
                "writable, make room there, or set PREFECT_HOME to another folder"
            ) from None
        # pass the bound socket: a port that was only looked up could be taken in the meantime
        with socket.create_server((HOST, port)) as listener:
            handle, mode = listener.fileno(), "pages" if pages else "api"
            super().__init__(
                "Prefect's server",
                f"http://{HOST}:{listener.getsockname()[1]}/api",
                ["pipeline.flow.prefect_api", str(handle), str(root), mode],
                log,
                {**settings, "PYTHONPATH": import_path()},
                [handle],
            )

    def fault(self) -> str:
        """Why the server did not start, according to its log, and what to do about it."""
        folder = self.log.parent
        said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [match[1] for line in said if (match := _ERROR.match(line))]
        reason = errors[-1] if errors else "it gave no reason"
        named = next(filter(os.environ.get, _DATABASE_VARIABLES), "")
        where = f"the database that {named} names" if named else str(folder)
        remedy = f"see that {where} can be reached and written, and has room"
        if not named and _DAMAGED.search(reason):
            remedy = f"move {folder / 'prefect.db'} away, and a new history begins"
        return without_secrets(
            f"Prefect's server did not start: {reason}; {remedy} (its log: {self.log})"
        )

    def __enter__(self) -> Self:
        self.wait()  # stops the server if it does not start
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server after it has written everything that it received."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            super().stop()


def use_api(root: Path) -> LocalServer | None:
    """Make this process's Prefect, not yet imported, use the running API, or start one.

    Returns:
        The server if one was started; the caller may `wait` for it, and it ends with this process.
        None if an API was running already.
    """
    os.environ.update(environment(root))
    server = None
    if (url := running_api(root)) is None:
        server = LocalServer(root)
        # Registered before Prefect is imported, so that it runs after Prefect's exit handlers.
        atexit.register(server.stop)
        url = server.url
    os.environ["PREFECT_API_URL"] = url
    return server


# --- flow runs of killed processes ----------------------------------------------------------------


def note_flow_run(root: Path, run_id: str, api: str) -> None:
    """Write a note of this process's flow run, and settle those of killed processes.

    The note lies in a scratch folder of the process. If the process is killed, the server that it
    started, or otherwise the next run, marks the flow run as crashed in Prefect.

    Args:
        root: the project.
        run_id: Prefect's id of the flow run.
        api: the address of Prefect's API.
    """
    settle(root, api)
    held = contextlib.ExitStack()
    with contextlib.suppress(OSError):  # the note matters only if the run is killed
        folder = held.enter_context(scratch(root))
        write_json(folder / _FLOW_RUN, {"id": run_id, "api": api})
    atexit.register(held.close)  # at exit: Prefect receives the final state last


def settle(root: Path, api: str) -> None:
    """Mark the flow runs of killed processes as crashed, and remove their scratch folders.

    If Prefect does not accept a state now, its folder is kept for the next attempt.

    Args:
        root: the project.
        api: the address of Prefect's API.
    """
    for folder in abandoned(root):
        try:
            note = json.loads((folder / _FLOW_RUN).read_text(encoding="utf-8"))
            # the project's own server has a different port each time
            same = urlsplit(note["api"]).hostname == urlsplit(api).hostname
            settled = same and _crash(note["id"], api)
        except (OSError, ValueError, KeyError, TypeError):  # not the note of a flow run
            settled = True
        if settled:
            shutil.rmtree(folder, ignore_errors=True)


def _crash(run_id: str, api: str) -> bool:
    """Mark a flow run and its unfinished tasks as crashed; whether Prefect accepted that."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Crashed

    crashed = Crashed(message="the process that ran it was killed")
    with (
        contextlib.suppress(httpx.HTTPError, RuntimeError),
        temporary_settings({PREFECT_API_URL: api}),
        get_client(sync_client=True) as client,
    ):
        with contextlib.suppress(ObjectNotFound):  # the flow run was deleted
            flow_run = client.read_flow_run(uuid.UUID(run_id))
            if flow_run.state and flow_run.state.is_final():
                return True
            of_it = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
            for each in client.read_task_runs(flow_run_filter=of_it):
                if each.state and not each.state.is_final():
                    client.set_task_run_state(each.id, crashed, force=True)
            client.set_flow_run_state(flow_run.id, crashed, force=True)
        return True
    return False


# --- in the process of the server -----------------------------------------------------------------


def named_hosts() -> list[str]:
    """Further host names under which our Prefect server may be reached.

    Raises:
        InputError: the variable holds something else, such as a wildcard or a URL with a scheme.
    """
    names = os.environ.get(HOSTS_VARIABLE, "").replace(",", " ").split()
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
            raise InputError(
                f"{HOSTS_VARIABLE}: {name!r} is no host name; give names alone, comma-separated, "
                "as prefect.example"
            )
    return names


def guarded(app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> ASGIApp:
    """Restrict an app to this machine's host names (against DNS rebinding) and to its own pages.

    Requests from pages of other origins are refused, with or without a preflight, websockets
    included. A browser sends the page's origin; that of the server's own pages equals the request's
    `Host`. Programs send no origin.

    Args:
        app: the app to guard.
        hosts: further host names that are allowed.
        origins: further origins that are allowed, for example `https://prefect.example`.
    """
    from starlette.datastructures import Headers
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse

    refusal = PlainTextResponse(
        "only this server's own pages may ask it; "
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS names the origins of others\n",
        403,
    )

    async def own_pages_only(scope: Scope, receive: Receive, send: Send) -> None:
        answer = app
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            own = {f"{scheme}://{headers.get('host', '')}" for scheme in ("http", "https")}
            if not own.union(origins).issuperset(headers.getlist("origin")):
                answer = refusal
        await answer(scope, receive, send)

    return TrustedHostMiddleware(
        own_pages_only, ["127.0.0.1", "localhost", *hosts], www_redirect=False
    )


def serve(listener: socket.socket, root: Path, *, pages: bool = False) -> None:
    """Serve Prefect's API on a bound socket until standard input is closed, or until SIGTERM.

    Args:
        listener: a socket bound to loopback.
        root: the project; at the end the flow runs of its killed processes are marked as crashed.
        pages: also serve Prefect's pages and run all its services.
    """
    collect_seldom()
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import PREFECT_SERVER_CORS_ALLOWED_ORIGINS

    origins = PREFECT_SERVER_CORS_ALLOWED_ORIGINS.value().split(",")
    server = uvicorn.Server(
        uvicorn.Config(
            guarded(create_app(ephemeral=not pages, final=True), named_hosts(), origins),
            log_level="error",
            lifespan="on",
            timeout_graceful_shutdown=5,
            headers=[
                # other pages must not embed this one in a frame (clickjacking)
                ("X-Frame-Options", "SAMEORIGIN"),
                # nor may it contact other servers, as it does to load settings from its vendor
                ("Content-Security-Policy", "connect-src 'self'"),
            ],
        )
    )

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would still be held at exit
            pass
        try:
            settle(root, f"http://{HOST}:{listener.getsockname()[1]}/api")
        finally:
            server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]), pages=sys.argv[3] == "pages")
