"""A real Chromium, as the user whose browser an attacker's page is open in, and as the user's own.

Everything is on loopback; other names are mapped to it in the browser alone.
"""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)"
)
EVIL = "evil.example"
"""A name of the attacker's, which leads to this machine."""


def command(profile: Path, *options: str) -> list[str]:
    assert CHROMIUM is not None
    return [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--host-resolver-rules=MAP {EVIL} 127.0.0.1",
        f"--user-data-dir={profile}",
        *options,
    ]


def shown(url: str, profile: Path) -> str:
    """What a page has become when its scripts are at rest."""
    done = subprocess.run(
        command(profile, "--virtual-time-budget=30000", "--dump-dom", url),
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.stdout


@contextmanager
def _page(body: bytes) -> Iterator[tuple[int, threading.Event, dict[str, Any]]]:
    """A server of one page, and what the page reports to it."""
    told, reported = threading.Event(), dict[str, Any]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            reported.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            told.set()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1], told, reported
        finally:
            server.shutdown()


def visit(script: str, profile: Path, *, host: str = "127.0.0.1", seconds: float = 120) -> Any:
    """Open an attacker's page and let its script run.

    Args:
        script: the body of an async function; what it returns is reported.
        profile: an empty folder.
        host: the name under which the page is served, at a port of its own.
        seconds: after so many the page should have reported.

    Returns:
        What the script returned.
    """
    page = (
        f"<!doctype html><title>page</title><iframe name=sink></iframe><script type=module>"
        f"const run = async () => {{ {script} }};"
        "run().then(r => ({ returned: r }), e => ({ raised: String(e) }))"
        ".then(r => fetch('/', { method: 'POST', body: JSON.stringify(r) }));</script>"
    )
    with _page(page.encode()) as (port, told, reported):
        browser = subprocess.Popen(
            command(profile, "--remote-debugging-port=0", f"http://{host}:{port}/"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert told.wait(seconds), "the page has not reported"
        finally:
            browser.terminate()
            browser.wait(30)
    return reported["returned"]
