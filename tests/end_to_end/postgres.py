"""A PostgreSQL server on loopback, from the system's own package, in a folder that goes with it."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from local_servers import free_port


def _programs() -> Path | None:
    """The folder of `initdb` and `postgres`; Debian's is on nobody's path."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    packaged = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in packaged), default=None, key=_major)


def _major(folder: Path) -> int:
    return int(folder.parent.name) if folder.parent.name.isdigit() else 0


PROGRAMS = _programs()
needs_postgresql = pytest.mark.skipif(
    PROGRAMS is None, reason="PostgreSQL: install it (Debian's package `postgresql`)"
)


class Postgres:
    """A server that asks for a password, running within the `with` block."""

    user = "team"

    def __init__(self) -> None:
        # signs that have a meaning in an address: what forgets to escape them does not connect
        self.secret = secrets.token_hex(12)
        self.password = f"p@ss/{self.secret}%"
        self.port = free_port()

    def __enter__(self) -> "Postgres":
        assert PROGRAMS is not None
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        data, asked = self.folder / "data", self.folder / "password"
        asked.write_text(self.password)
        # postgres refuses to be root's
        self._as: dict[str, Any] = {}
        if os.getuid() == 0:
            self._as = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            for path in (self.folder, asked):
                shutil.chown(path, "nobody", "nogroup")
        initdb = [PROGRAMS / "initdb", "-D", data, "-U", self.user, "-E", "UTF8", "--no-locale"]
        initdb += ["--auth=scram-sha-256", f"--pwfile={asked}", "--no-sync"]
        subprocess.run(initdb, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, **self._as)
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.folder,
            "fsync": "off",
        }
        command = [PROGRAMS / "postgres", "-D", data, "-p", str(self.port)]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self.log = self.folder / "server.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, **self._as
            )
        end = time.monotonic() + 60
        while subprocess.run(
            [PROGRAMS / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        ).returncode:
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, "PostgreSQL did not start"
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)  # does not wait for those who are connected
        self._process.wait(60)
        shutil.rmtree(self.folder)

    def create(self, name: str, driver: str = "") -> str:
        """The address of a new database, for SQLAlchemy."""
        self._psql("postgres", f'CREATE DATABASE "{name}"')
        return self.address(name, driver)

    def address(self, name: str, driver: str = "", password: str = "") -> str:
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        secret = quote(password or self.password, safe="")
        return f"{scheme}://{self.user}:{secret}@127.0.0.1:{self.port}/{name}"

    def ask(self, name: str, sql: str) -> str:
        """What a query gives, as `psql` prints it without headings."""
        return self._psql(name, sql).strip()

    def dump(self, name: str) -> str:
        """All that is in a database, as text."""
        return self._client("pg_dump", "-d", name)

    def _psql(self, name: str, sql: str) -> str:
        return self._client("psql", "-d", name, "-qAt", "-c", sql)

    def _client(self, program: str, *arguments: str) -> str:
        assert PROGRAMS is not None
        command = [PROGRAMS / program, "-h", "127.0.0.1", "-p", str(self.port), "-U", self.user]
        environment = {**os.environ, "PGPASSWORD": self.password}
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout
