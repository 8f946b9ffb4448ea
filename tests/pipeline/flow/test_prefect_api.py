"""A Prefect API for the length of a run."""

import http.client
import json
import time
import urllib.request
from contextlib import closing

import pytest

from gpt.base.errors import InputError, RunError
from pipeline.flow.prefect_api import HOSTS_VARIABLE, LocalServer, named_hosts, prefect_told


@pytest.fixture(autouse=True)
def _database_of_the_project(monkeypatch):
    for name in ("PREFECT_HOME", "PREFECT_SERVER_DATABASE_CONNECTION_URL"):
        monkeypatch.delenv(name, raising=False)


def names(api):
    """The flows that the API knows."""
    request = urllib.request.Request(f"{api}/flows/filter", data=b"{}")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as response:
        return [each["name"] for each in json.load(response)]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Of a server that was started in a checkout of another commit: its code is the starter's."""
    another = tmp_path_factory.mktemp("another")
    (another / "pipeline").mkdir()
    (another / "pipeline" / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(another)
        patch.delenv("PREFECT_HOME", raising=False)
        patch.delenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", raising=False)
        patch.setenv(HOSTS_VARIABLE, "prefect.example, other.example")
        patch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "https://pages.example")
        with LocalServer(tmp_path_factory.mktemp("served")) as server:
            yield int(server.url.removesuffix("/api").rpartition(":")[2])


def ask(port, method, path, body=None, **headers):
    """Status and headers of an answer; `{port}` in a header is the server's."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    sent = {name.replace("_", "-"): value.format(port=port) for name, value in headers.items()}
    connection.request(method, path, body, sent)
    with closing(connection), connection.getresponse() as response:
        return response.status, response.headers


FOREIGN = ["https://evil.example", "http://127.0.0.1:1", "http://evil.localhost:{port}", "null"]
SOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
}


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_page_of_another_origin_is_refused_with_and_without_a_preflight(port, origin):
    status, headers = ask(
        port, "OPTIONS", "/api/flows/", Origin=origin, Access_Control_Request_Method="POST"
    )
    assert status == 403
    assert "access-control-allow-origin" not in headers
    for kind in ("application/json", "text/plain"):
        assert ask(
            port, "POST", "/api/flows/", b'{"name": "evil"}', Origin=origin, Content_Type=kind
        )[0] == (403)
    assert ask(port, "GET", "/api/events/in", Origin=origin, **SOCKET)[0] == 403
    assert names(f"http://127.0.0.1:{port}/api") == []


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:{port}", "localhost.", ""]
)
def test_another_name_than_this_machines_is_refused_whatever_the_origin(port, host):
    for origin in ({}, {"Origin": f"http://{host}"}):
        assert ask(port, "GET", "/api/health", Host=host, **origin)[0] == 400
        assert ask(port, "GET", "/api/events/in", Host=host, **origin, **SOCKET)[0] == 400


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:{port}", "http://127.0.0.1:{port}"),
        ("localhost:{port}", "http://localhost:{port}"),
        ("prefect.example", "https://prefect.example"),
        ("other.example:8080", "http://other.example:8080"),
        ("127.0.0.1:{port}", "https://pages.example"),
    ],
)
def test_own_pages_and_those_that_were_named_are_answered(port, host, origin):
    status, headers = ask(
        port, "POST", "/api/flows/count", b"{}", Host=host, Origin=origin, Content_Type="text/json"
    )
    assert status == 200
    assert headers["x-frame-options"] == "SAMEORIGIN"
    assert headers["content-security-policy"] == "connect-src 'self'"
    assert ask(port, "GET", "/api/events/in", Host=host, Origin=origin, **SOCKET)[0] == 101


@pytest.mark.parametrize("name", ["*", "https://prefect.example", "prefect.example:443"])
def test_what_is_no_host_name_is_not_taken_for_one(monkeypatch, name):
    monkeypatch.setenv(HOSTS_VARIABLE, f"good.example,{name}")
    with pytest.raises(InputError, match="is no host name"):
        named_hosts()


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", "socks://127.0.0.1:9"), ("NO_PROXY", "[::1]:80")]
)
def test_a_proxy_that_cannot_be_used_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"{name}.*; correct it"), prefect_told():
        pass


def test_a_server_that_cannot_start_says_why_at_once_and_advises_to_remove_nothing(
    tmp_path, monkeypatch
):
    def fault():
        with pytest.raises(RunError) as caught, LocalServer(tmp_path):
            pass
        assert "remove" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "file" / "below"))
    assert fault().startswith(f"PREFECT_HOME {tmp_path}/file/below: cannot be written (Not a dir")
    monkeypatch.delenv("PREFECT_HOME")

    began = time.monotonic()
    name = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
    monkeypatch.setenv(name, f"sqlite+aiosqlite:///{tmp_path}/none/prefect.db")
    assert f"unable to open database file; see that the database that {name} names" in fault()
    monkeypatch.delenv(name)

    (tmp_path / ".prefect" / "prefect.db").write_bytes(b"no database" * 1000)
    assert "file is not a database; move" in fault()
    assert time.monotonic() - began < 100
