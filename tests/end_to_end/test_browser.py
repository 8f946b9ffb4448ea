"""Pages in a real Chromium: an attacker's make nothing in Prefect, and Prefect's own work."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser import EVIL, needs_chromium, shown, visit
from local_servers import end_server, free_port
from story import call_api

from pipeline.flow import ui
from pipeline.flow.prefect_api import LocalServer

pytestmark = [needs_chromium, pytest.mark.slow, pytest.mark.timeout(900)]

ATTACK = """
const base = BASE, path = base + '/api/flows/', out = {}, body = JSON.stringify({ name: 'evil' });
const attempt = async (name, make) => {
  try { out[name] = await make(); } catch (error) { out[name] = 'refused'; }
};
const post = options => fetch(path, { method: 'POST', body, ...options });
const json = { 'content-type': 'application/json' };
await attempt('json', async () => (await post({ headers: json })).status);
await attempt('read', async () => (await fetch(base + '/api/admin/settings')).status);
for (const referrerPolicy of ['unsafe-url', 'no-referrer']) {
  await attempt('text ' + referrerPolicy, () =>
    post({ mode: 'no-cors', headers: { 'content-type': 'text/plain' }, referrerPolicy }));
  await attempt('no type ' + referrerPolicy, () =>
    post({ mode: 'no-cors', body: new Blob([body]), referrerPolicy }));
}
await attempt('beacon', () => navigator.sendBeacon(path, new Blob([body])));
await attempt('form', async () => {
  const form = document.createElement('form'), field = document.createElement('input');
  Object.assign(form, { method: 'POST', enctype: 'text/plain', action: path, target: 'sink' });
  Object.assign(field, { name: '{"name":"evil","x":"', value: '"}' });
  form.append(field);
  document.body.append(form);
  form.submit();
  await new Promise(done => setTimeout(done, 1500));
});
await attempt('socket', () => new Promise((done, refuse) => {
  const socket = new WebSocket(base.replace('http', 'ws') + '/api/events/in');
  Object.assign(socket, { onopen: () => done('open'), onerror: refuse });
}));
return out;
"""


@pytest.fixture(scope="module", autouse=True)
def _servers_of_the_project() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def run_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Prefect's address as `gpt-pipeline run` starts it."""
    with LocalServer(tmp_path_factory.mktemp("run")) as server:
        yield server.url.removesuffix("/api")


@pytest.fixture(scope="module")
def ui_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Prefect's address as `gpt-pipeline ui` starts it."""
    folder = tmp_path_factory.mktemp("ui")
    code = (
        "from pathlib import Path; from pipeline.flow import ui; ui.serve(Path(),"
        f"mlflow_port={free_port()}, prefect_port={free_port()})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(ui.__file__).parents[2])},
    )
    try:
        addresses = folder / ".pipeline" / "ui.json"
        until = time.monotonic() + 180
        while not addresses.exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        yield json.loads(addresses.read_text())["prefect"].removesuffix("/api")
    finally:
        end_server(process)


@pytest.mark.parametrize(
    ("page", "asked"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), (EVIL, "127.0.0.1"), (EVIL, EVIL)],
)
@pytest.mark.parametrize("server", ["ui_server", "run_server"])
def test_an_attackers_page_makes_nothing_and_reads_nothing(
    request: pytest.FixtureRequest, server: str, page: str, asked: str, tmp_path: Path
) -> None:
    address = request.getfixturevalue(server)
    base = json.dumps(address.replace("127.0.0.1", asked))
    out = visit(ATTACK.replace("BASE", base), tmp_path, host=page)
    assert {out[name] for name in ("json", "read", "socket")} == {"refused"}
    assert "evil" not in [each["name"] for each in call_api(f"{address}/api", "flows/filter", {})]


def test_prefects_own_pages_work_under_both_names(ui_server: str, tmp_path: Path) -> None:
    api = f"{ui_server}/api"
    flow = call_api(api, "flows/", {"name": "a flow"})["id"]
    run = call_api(api, "flow_runs/", {"flow_id": flow, "name": "a-run"})["id"]
    ended = {"state": {"type": "COMPLETED"}, "force": True}
    call_api(api, f"flow_runs/{run}/set_state", ended)
    for name in ("127.0.0.1", "localhost"):
        for pages in ("", "/v2"):  # both of Prefect's
            url = f"{ui_server.replace('127.0.0.1', name)}{pages}/runs/flow-run/{run}"
            page = shown(url, tmp_path / f"{name}{pages[1:]}")
            for what in ("a-run", "a flow", "Completed", "<canvas"):
                assert what in page, f"{url}: no {what}"
