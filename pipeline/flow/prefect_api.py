"""Prefect's server as this project starts it: on loopback, quiet, and for nobody's web page.

For the length of one run it is gone when its starter is gone. Prefect can start such a server by
itself, but only once it is imported, in the same process group (so that Ctrl-C ends it before the
run could be recorded), and it outlives a killed starter.

Prefect answers pages of any origin, and whoever may make a deployment may run commands on an agent.
Here a browser's request is answered only under a name of this machine and from the server's own
pages.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gpt.base.errors import InputError, RunError
from gpt.base.files import whole_file
from pipeline.flow.lifetime import settle
from pipeline.project.folders import shared_folder
from pipeline.project.processes import collect_seldom
from pipeline.project.secrets import without_secrets
from pipeline.show.terminal import say

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS_VARIABLE = "GPT_PIPELINE_ALLOWED_HOSTS"
"""Names, comma-separated, under which our Prefect server may be reached beside this machine's."""
_START_SECONDS = 180.0
"""The first start creates the database, which takes a slow machine a while."""
_PATIENCE_SECONDS = 10.0
"""Who waits longer is told for what."""

_DATABASE_VARIABLES = (
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
)
_ERROR = re.compile(r"[\w.]*(?:Error|Exception)[\w.]*: (.+)")
"""The line of a traceback that says what happened."""
_DAMAGED = re.compile(r"not a database|malformed")
"""What SQLite says of a file that is damaged."""
_NO_ROOM = 1 << 16


def environment(root: Path) -> dict[str, str]:
    """Variables under which Prefect, DVC and MLflow keep to the project and to this machine.

    What the user set stays.
    """
    defaults = {
        "PREFECT_HOME": str(shared_folder(root) / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # in memory, Prefect's default, a restart of the server loses who holds a slot
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
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
    except (OSError, http.client.HTTPException, ValueError):
        return False


def running_api(root: Path) -> str | None:
    """The API to use if there is one already: `PREFECT_API_URL`, else the one of `make ui`."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    try:
        told = (shared_folder(root) / ".pipeline" / "ui.json").read_text(encoding="utf-8")
        url = json.loads(told)["prefect"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return url if isinstance(url, str) and answers(url) else None


@contextlib.contextmanager
def prefect_told() -> Iterator[None]:
    """Within the block, a Prefect that cannot be reached or refuses is told in one line.

    Raises:
        InputError: the environment names a proxy that no request can be sent through.
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
        of_prefect = isinstance(error, httpx.HTTPError)
        # Prefect's own words before a flow run; RunError is no RuntimeError
        if not of_prefect and not str(error).startswith("Failed to reach API"):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RunError(
            f"Prefect: {reason.strip().rstrip('.')}; see that its server is up, and check "
            "PREFECT_API_URL and PREFECT_API_AUTH_STRING"
        ) from None


class LocalServer:
    """A Prefect API in a process of its own; starts at once, `wait` until it answers.

    As a context manager it answers within the block, and ends with it.
    """

    def __init__(self, root: Path) -> None:
        settings = environment(root)
        self._log = Path(settings["PREFECT_HOME"]).expanduser() / "server.log"
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            opened = self._log.open("wb")
        except OSError as error:
            raise RunError(
                f"PREFECT_HOME {self._log.parent}: cannot be written ({error.strerror}); make it "
                "writable, make room there, or set PREFECT_HOME to another folder"
            ) from None
        # handed on with its port: one that is only looked up may be another's by then
        with opened as log, socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "pipeline.flow.prefect_api",
                    str(listener.fileno()),
                    str(root),
                ],
                pass_fds=[listener.fileno()],
                # Its end tells the server that we are gone, however we went.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={
                    # the kinds of blocks are for who makes one, at a server that stays
                    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
                    **os.environ,
                    **settings,
                    "PYTHONPATH": import_path(),
                },
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when the API answers.

        Raises:
            RunError: it does not start.
        """
        began, told = time.monotonic(), False
        while not answers(self.url):
            waited = time.monotonic() - began
            if self._process.poll() is not None or waited > _START_SECONDS:
                self.stop()
                raise RunError(self._fault())
            if waited > _PATIENCE_SECONDS and not told:
                told = True
                line = f"waiting for Prefect's server to start; its log is {self._log}"
                say(line, file=sys.stderr)
            time.sleep(0.05)

    def _fault(self) -> str:
        """Why the server did not start, as far as its log tells, and what to do."""
        folder, said = self._log.parent, []
        with contextlib.suppress(OSError):
            said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [match[1] for line in said if (match := _ERROR.match(line))]
        reason = errors[-1] if errors else "it gave no reason"
        if not errors and shutil.disk_usage(folder).free < _NO_ROOM:
            reason = os.strerror(errno.ENOSPC)  # for its log, too
        named = next(filter(os.environ.get, _DATABASE_VARIABLES), "")
        where = f"the database that {named} names" if named else str(folder)
        remedy = f"see that {where} can be reached and written, and has room"
        if not named and _DAMAGED.search(reason):
            remedy = f"move {folder / 'prefect.db'} away, and a new history begins"
        return without_secrets(
            f"Prefect's server did not start: {reason}; {remedy} (its log: {self._log})"
        )

    def __enter__(self) -> Self:
        self.wait()  # which ends what does not start
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server; what it was told before is written by then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def use_api(root: Path) -> LocalServer | None:
    """Let this process's Prefect, not yet imported, use the API that runs, else one of its own.

    Returns:
        The server that was started and may be waited for; it ends with this process. None where
        there was one.
    """
    os.environ.update(environment(root))
    server = None
    if (url := running_api(root)) is None:
        server = LocalServer(root)
        # Registered before Prefect is imported, so that it ends after Prefect sent its last word.
        atexit.register(server.stop)
        url = server.url
    os.environ["PREFECT_API_URL"] = url
    return server


def import_path() -> str:
    """`PYTHONPATH` of a process that runs modules of this project from any folder.

    With Python's `-P`: the folder may be a checkout of another commit.
    """
    here = str(Path(__file__).resolve().parent.parent.parent)
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def _tables(database: Path) -> str:
    """The Prefect that is here and the revision of the tables in its SQLite file; empty without."""
    import sqlite3

    import prefect

    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as file:
            (revision,) = file.execute("SELECT version_num FROM alembic_version").fetchone()
    except (sqlite3.Error, TypeError):
        return ""
    return f"{prefect.__version__} {revision}"


def named_hosts() -> list[str]:
    """Names beside this machine's under which our Prefect server may be reached.

    Raises:
        InputError: the variable holds something else, as a wildcard or an address with a scheme.
    """
    names = [
        name for each in os.environ.get(HOSTS_VARIABLE, "").split(",") if (name := each.strip())
    ]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
            raise InputError(
                f"{HOSTS_VARIABLE}: {name!r} is no host name; give names alone, comma-separated, "
                "as prefect.example"
            )
    return names


class _OwnPagesOnly:
    """Refuse what a page of another origin asks, with a preflight or without, and by a websocket.

    A browser names the page's origin; the server's own pages have that of the request's `Host`.
    Programs name none. Nor may another page hold ours in a frame, for clicks that it steers, nor
    ours ask anyone but this server: Prefect's look for settings at who counts its users.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        answer = self._app
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            own = {f"{scheme}://{headers.get('host', '')}" for scheme in ("http", "https")}
            if not own.union(self._origins).issuperset(headers.getlist("origin")):
                answer = PlainTextResponse(
                    "only this server's own pages may ask it; "
                    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS names the origins of others\n",
                    403,
                )

        async def send_kept_here(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                sent["X-Frame-Options"] = "SAMEORIGIN"
                sent["Content-Security-Policy"] = "connect-src 'self'"
            await send(message)

        await answer(scope, receive, send_kept_here)


def guarded(app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> ASGIApp:
    """The app under a name of this machine alone, whatever DNS says, and for its own pages alone.

    Args:
        app: to be guarded.
        hosts: other names that it may have.
        origins: of other pages that may ask it, as `https://prefect.example`.
    """
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    named = ["127.0.0.1", "localhost", *hosts]
    return TrustedHostMiddleware(_OwnPagesOnly(app, origins), named, www_redirect=False)


def serve(listener: socket.socket, root: Path, *, pages: bool = False) -> None:
    """Serve Prefect's API on a bound socket until standard input ends, or until SIGTERM.

    Args:
        listener: on loopback.
        root: the project; flow runs of its killed processes are settled at the end.
        pages: with Prefect's pages and all its services.
    """
    collect_seldom()
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import (
        PREFECT_SERVER_CORS_ALLOWED_ORIGINS,
        get_current_settings,
        temporary_settings,
    )
    from sqlalchemy.engine import make_url

    address = get_current_settings().server.database.connection_url
    url = make_url(address.get_secret_value() if address else "sqlite://")
    database = Path(url.database or ".").absolute()
    noted = database.with_name(f"{database.name}.tables")
    tables, known = _tables(database), ""
    with contextlib.suppress(OSError):
        known = noted.read_text(encoding="utf-8")
    # this Prefect left them so: there is nothing to migrate
    settings = {"server.database.migrate_on_start": False} if tables and tables == known else {}

    config = uvicorn.Config(
        guarded(
            create_app(ephemeral=not pages, final=True),
            named_hosts(),
            PREFECT_SERVER_CORS_ALLOWED_ORIGINS.value().split(","),
        ),
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)

    def watch() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock would outlive this thread
            pass
        try:
            settle(root, f"http://127.0.0.1:{listener.getsockname()[1]}/api")
        finally:
            server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    with temporary_settings(settings):
        server.run(sockets=[listener])
    if server.started and (tables := _tables(database)) and tables != known:
        with whole_file(noted) as partial:
            partial.write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--pages":
        serve(socket.create_server(("127.0.0.1", int(sys.argv[2]))), Path.cwd(), pages=True)
    else:
        serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
