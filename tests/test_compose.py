"""compose.yaml, read as Docker Compose reads it: nothing here starts a container."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LOCKED = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text().split() if "==" in line
)
SECRET = r"\$\{(\w+):\?[^}]+\}"
"""A variable that Compose refuses to do without."""


def test_the_team_has_its_four_servers() -> None:
    assert set(SERVICES) == {"postgres", "s3", "mlflow", "prefect"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_published_port_is_on_loopback_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), "Compose listens everywhere otherwise"


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_pinned_to_a_version(name: str) -> None:
    image = SERVICES[name]["image"]
    base = re.findall(r"^FROM (\S+)", SERVICES[name].get("build", {}).get("dockerfile_inline", ""))
    for each in [image, *base]:
        assert re.search(r":v?\d+(\.\d+)+", each), f"{each} may be another one tomorrow"


def test_versions_are_those_of_the_lock() -> None:
    mlflow = SERVICES["mlflow"]["build"]["dockerfile_inline"]
    assert f"mlflow:v{LOCKED['mlflow']}\n" in mlflow
    assert SERVICES["mlflow"]["image"].endswith(f":{LOCKED['mlflow']}")
    installed = dict(word.split("==") for word in mlflow.split() if "==" in word)
    assert installed == {name: LOCKED[name] for name in ("psycopg2-binary", "boto3")}
    assert SERVICES["prefect"]["image"] == f"prefecthq/prefect:{LOCKED['prefect']}-python3.11"


@pytest.mark.parametrize("name", SERVICES)
def test_a_server_says_when_it_is_well_and_comes_back_by_itself(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"
    for condition in SERVICES[name].get("depends_on", {}).values():
        assert condition == {"condition": "service_healthy"}


def test_what_must_last_is_on_named_volumes() -> None:
    used = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, _, target = volume.partition(":")
            used[source] = (name, target)
    assert set(used) == set(COMPOSE["volumes"])
    assert used["postgres"] == ("postgres", "/var/lib/postgresql/data")
    assert used["prefect"] == ("prefect", SERVICES["prefect"]["environment"]["PREFECT_HOME"])


def test_every_secret_comes_from_the_env_file_and_none_has_a_value_here() -> None:
    named = set(re.findall(SECRET, TEXT))
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == named
    assert not re.search(r"^\w+=.", example, re.MULTILINE), "an example with a real secret"
    for service in SERVICES.values():
        assert "env_file" not in service
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY", key):
                assert re.fullmatch(SECRET, value), key
            if address := re.match(r"\w+(?:\+\w+)?://[^:@/]+:(.+)@", value):
                assert re.fullmatch(SECRET, address[1]), key
        assert not re.search(SECRET, str(service.get("command", "")))


def test_git_does_not_track_the_env_file() -> None:
    if not (ROOT / ".git").exists():
        assert "/.env\n" in (ROOT / ".gitignore").read_text()
        return
    told = subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", ".env"])
    assert told.returncode == 0


def test_nothing_is_reported_to_anyone() -> None:
    assert SERVICES["mlflow"]["environment"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert SERVICES["prefect"]["environment"]["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    for name in ("mlflow", "prefect"):
        assert SERVICES[name]["environment"]["DO_NOT_TRACK"] == "true"


def test_gpu_slots_outlive_a_restart_of_prefects_server() -> None:
    from importlib import import_module

    where = SERVICES["prefect"]["environment"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    assert hasattr(import_module(where), "ConcurrencyLeaseStorage")


def test_mlflow_is_told_its_database_and_store_by_names_that_it_knows() -> None:
    from mlflow.cli import server

    known = {name for option in server.params for name in [getattr(option, "envvar", None)] if name}
    environment = SERVICES["mlflow"]["environment"]
    for name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"):
        assert name in known
        assert name in environment
    assert environment["MLFLOW_S3_ENDPOINT_URL"] == "http://s3:8333"
    assert environment["AWS_ACCESS_KEY_ID"] == SERVICES["s3"]["environment"]["AWS_ACCESS_KEY_ID"]


def test_prefect_is_told_its_settings_by_names_that_it_knows() -> None:
    from prefect import settings

    told = {name for name in SERVICES["prefect"]["environment"] if name.startswith("PREFECT_")}
    assert {name for name in told if not hasattr(settings, name)} == set()


def test_prefect_wants_a_token_and_lets_no_other_page_read() -> None:
    environment = SERVICES["prefect"]["environment"]
    assert re.fullmatch(rf"gpt-pipeline:{SECRET}", environment["PREFECT_SERVER_API_AUTH_STRING"])
    assert environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4200"
    assert environment["PREFECT_UI_API_URL"] == "/api"
