"""What the servers that tests start on loopback share: their ports and their end."""

import contextlib
import os
import socket
import subprocess

# below those that the system gives to connections, a part for each process of the tests
_PART, _FIRST = 2_000, 20_000
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_given = os.getpid() % _PART


def free_port() -> int:
    """A port that no server of these tests has or had, and nobody else has now.

    Nothing else is given it before the server listens.
    """
    global _given
    for _ in range(_PART):
        _given = (_given + 1) % _PART
        port = _FIRST + _worker % 5 * _PART + _given
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def end_server(server: subprocess.Popen[bytes]) -> None:
    """As one ends a server; one that takes its time about it is killed."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(30)
    server.kill()
    server.wait()
