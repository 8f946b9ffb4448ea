"""A small real project: git, DVC, four stages in a diamond, no training."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_servers import end_server, free_port

from pipeline.flow.prefect_api import answers
from pipeline.flow.prefect_api import environment as server_environment
from pipeline.tracking.connection import connect

REPOSITORY = Path(__file__).resolve().parent.parent.parent

STAGE = '''\
"""One stage of the small project: joins its inputs, as large and as slow as it is told."""
import json, os, pathlib, sys, time
name, out, seconds, size, *inputs = sys.argv[1:]
if os.environ.get("FAIL") == name:
    verdict = pathlib.Path(".pipeline/exit", name + ".json")
    verdict.parent.mkdir(parents=True, exist_ok=True)
    verdict.write_text(json.dumps({"code": 2, "error": f"{name}.txt: no good; mend it"}))
    print(f"error: {name}.txt: no good; mend it", file=sys.stderr)
    sys.exit(2)
kind, _, times = os.environ.get(f"FAULT_{name}", "").partition(" ")
tries = pathlib.Path(f"tries-{name}")
if kind and len(tries.read_text() if tries.exists() else "") < int(times):
    with tries.open("a") as file:
        file.write(".")
    if kind == "killed":
        os.kill(os.getpid(), 9)
    if kind == "killed-in-a-shell":
        sys.exit(128 + 9)
    verdict = pathlib.Path(".pipeline/exit", name + ".json")
    verdict.parent.mkdir(parents=True, exist_ok=True)
    verdict.write_text(json.dumps({"code": 1, "error": f"{name}: no net", "kind": kind}))
    sys.exit(1)
if os.environ.get("GPT_PIPELINE_EVENTS"):
    with open(os.environ["GPT_PIPELINE_EVENTS"], "a") as file:
        file.write(json.dumps({"event": "message", "text": f"hello from {name}"}) + "\\n")
print("printed by", name, flush=True)
def written(by):
    path = pathlib.Path("ran-" + by)
    return len(path.read_text().split()) if path.exists() else 0
with open(f"ran-{name}", "a") as file:
    file.write(f"{time.time()} ")
    file.flush()
    other, until = os.environ.get(f"MEETS_{name}"), time.monotonic() + 60
    while other and written(other) < written(name) and time.monotonic() < until:
        time.sleep(0.05)
    try:
        time.sleep(float(seconds))
    except KeyboardInterrupt:
        sys.exit(130)
    file.write(f"{time.time()}\\n")
text = name + "".join(pathlib.Path(path).read_text() for path in inputs)
pathlib.Path(out).mkdir()
for index in range(20):
    pathlib.Path(out, f"{index}.bin").write_bytes(f"{text[:100]}{index}".encode() * int(size))
pathlib.Path(out + ".txt").write_text(text)
metrics = {"length": len(text), "deep": {"pi": 3.14159265}}
pathlib.Path(out + ".json").write_text(json.dumps(metrics))
'''


def _stage(name: str, inputs: list[str], seconds: float = 0.0, size: int = 10) -> str:
    deps = "".join(f"      - {path}\n" for path in ["stage.py", *inputs])
    files = " ".join(inputs)
    return (
        f"  {name}:\n    cmd: python stage.py {name} {name} {seconds} {size} {files}\n"
        f"    deps:\n{deps}    params:\n      - {name}\n"
        f"    outs:\n      - {name}\n      - {name}.txt\n"
        f"    metrics:\n      - {name}.json:\n          cache: false\n"
    )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: that takes longer than most tests that need them."""
    root = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect(root)
    return root / "mlflow.db"


class PrefectServer:
    """A whole Prefect server, as a team has one, that can go away and come back."""

    def __init__(self, home: Path) -> None:
        self._port = free_port()
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self.api = f"http://127.0.0.1:{self._port}/api"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(self._port)],
            env={**os.environ, **server_environment(self._home)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 120
        while not answers(self.api):
            assert time.monotonic() < until
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            end_server(self._process)


@pytest.fixture
def prefect_server(tmp_path):
    server = PrefectServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_project(tmp_path, monkeypatch):
    """Makes the project: `first` feeds `left` and `right`, both feed `last`."""

    def make(seconds: float = 0.0, size: int = 10, git: bool = True) -> Path:
        root = tmp_path / "project"
        (root / ".dvc").mkdir(parents=True)
        shutil.copy(REPOSITORY / ".dvc" / "config", root / ".dvc")
        (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
        (root / "stage.py").write_text(STAGE)
        (root / "seed.txt").write_text("seed ")
        (root / "dvc.yaml").write_text(
            "stages:\n"
            + _stage("last", ["left.txt", "right.txt"])
            + _stage("left", ["first.txt"], seconds, size)
            + _stage("right", ["first.txt"], seconds, size)
            + _stage("first", ["seed.txt"])
        )
        (root / "params.yaml").write_text(
            "first: {a: 1}\nleft: {train: {rate: 0.001, steps: 3}}\nright: {a: 1}\nlast: {a: 1}\n"
        )
        if git:
            subprocess.run(["git", "init", "-q", str(root)], check=True)
        monkeypatch.chdir(root)
        monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
        monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        return root

    return make


@pytest.fixture
def project(make_project):
    return make_project()


@pytest.fixture
def add_optional():
    """Gives a project an optional stage `extra`, which reads what `left` makes."""

    def add(root: Path) -> None:
        (root / "optional").mkdir()
        stage = _stage("extra", ["left.txt"]).replace("    cmd", "    wdir: ..\n    cmd")
        (root / "optional" / "dvc.yaml").write_text(f"stages:\n{stage}")
        with (root / "params.yaml").open("a") as params:
            params.write("extra: {a: 1}\n")

    return add


@pytest.fixture
def dvc():
    """Runs DVC in the current folder; its output."""

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run
