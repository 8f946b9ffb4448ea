"""How processes of the pipeline are set up."""

import http.server
import os
import pty
import signal
import subprocess
import sys
import threading
import urllib.request

import httpx
import pytest
import requests

from pipeline.project.processes import reach_loopback_directly


@pytest.fixture
def server():
    """The address of a server on loopback that answers 204."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.mark.parametrize(
    "excepted",
    [{}, {"NO_PROXY": "corp.example"}, {"no_proxy": "corp.example, .local"}, {"NO_PROXY": ""}],
)
def test_a_proxy_of_the_environment_does_not_stand_before_loopback(excepted, server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, excepted.get(name, ""))  # so that it is put back
        if name not in excepted:
            monkeypatch.delenv(name)
    monkeypatch.setattr(urllib.request, "_opener", None)  # keeps the proxies that it finds first
    with pytest.raises(OSError, match="Connection refused"):
        urllib.request.urlopen(server, timeout=5)

    reach_loopback_directly()
    reach_loopback_directly()  # as does a process that this one starts

    with urllib.request.urlopen(server, timeout=5) as answer:
        assert answer.status == 204
    assert httpx.get(server).status_code == 204
    assert requests.get(server, timeout=5).status_code == 204
    for name in ("no_proxy", "NO_PROXY"):
        parts = os.environ[name].split(",")
        assert parts[-3:] == ["127.0.0.1", "localhost", "::1"]
        assert ",".join(parts[:-3]) == next(iter(excepted.values()), "").replace(" ", "")
    with pytest.raises(requests.exceptions.ProxyError):  # any other goes as the user says
        requests.get("http://other.example/", timeout=5)


def test_without_a_proxy_in_the_environment_nothing_is_set(monkeypatch):
    for name in [each for each in os.environ if each.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    reach_loopback_directly()
    assert dict(os.environ) == before


_HANGS_UP = """
import os, signal, sys, time
from pipeline.project.processes import end_with_the_terminal
# the tests themselves may run under nohup, and what is ignored is inherited
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.SIG_DFL)
def stop(number, frame):
    print("the terminal is gone, and to say so is no error", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
end_with_the_terminal()
os.write(1, b"ready\\n")  # a signal within print would meet the one in its handler
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


@pytest.mark.parametrize(("how", "seconds", "code"), [("heard", 60, 143), ("ignored", 0.5, 7)])
def test_a_closed_terminal_ends_a_process_as_sigterm_does_unless_nohup_has_it_ignored(
    how, seconds, code
):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _HANGS_UP, how, str(seconds)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    while b"\n" not in said:  # the end of the line may come by itself
        said += os.read(ours, 100)
    os.close(ours)
    for _ in range(3):  # a shell sends it, and so does the system
        process.send_signal(signal.SIGHUP)
    assert process.wait(30) == code
