"""Both servers come up on loopback with the project's runs, and go when told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import stand_in
from local_servers import free_port

from gpt.base.events import Text
from pipeline.flow import ui
from pipeline.tracking.run import StageRun


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read()


def post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=30).read())


def test_the_next_free_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.free_port(port) > port


@pytest.mark.slow
def test_both_pages_are_served_and_ctrl_c_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    run = StageRun(tmp_path, "learn", stand_in.LearnParams(), {})
    run(Text("samples/a.txt", "a sample"))
    run.close("FINISHED")
    project = Path(ui.__file__).parents[2]
    code = (
        "from pathlib import Path; from pipeline.flow import ui;"
        f"ui.serve(Path({str(tmp_path)!r}), mlflow_port={free_port()}, prefect_port={free_port()})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        addresses = tmp_path / ".pipeline" / "ui.json"
        deadline = time.monotonic() + 150
        while not addresses.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        told = json.loads(addresses.read_text())
        assert told["mlflow"].startswith("http://127.0.0.1:")
        assert b"MLflow" in get(told["mlflow"])
        found = post(
            f"{told['mlflow']}/api/2.0/mlflow/runs/search", {"experiment_ids": [run.experiment_id]}
        )
        assert [each["info"]["run_id"] for each in found["runs"]] == [run.id]
        artifact = f"{told['mlflow']}/get-artifact?run_uuid={run.id}&path=samples/a.txt"
        assert get(artifact) == b"a sample"
        page = get(told["prefect"].removesuffix("/api"))
        assert b"<title>Prefect" in page
        assert post(f"{told['prefect']}/flows/count", {}) == 0
        assert (tmp_path / ".prefect" / "prefect.db").exists()
        for name in ("mlflow", "prefect"):
            asking = {"Host": "10.evil.example"}  # MLflow takes it for a private address
            with pytest.raises(urllib.error.HTTPError, match=r"40[03]"):
                urllib.request.urlopen(urllib.request.Request(told[name], headers=asking))
        children = [psutil.Process(pid) for pid in told["pids"].values()]
        children += [each for child in children for each in child.children(recursive=True)]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert told["mlflow"] in output
    assert told["prefect"].removesuffix("/api") in output
    assert not addresses.exists()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
