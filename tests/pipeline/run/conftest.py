"""The stand-in project, and `gpt-pipeline clean` in it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import stand_in
from typer.testing import CliRunner

from pipeline.cli import app


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in project, its input in place, without MLflow's tables."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    stand_in.install(monkeypatch)
    project = stand_in.make_project(tmp_path)
    (project / "data/prepared").mkdir(parents=True)
    (project / "data/prepared/text").write_text("some text\n")
    return project


@pytest.fixture
def project(bare: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, bare / "mlflow.db")
    return bare


@pytest.fixture
def command() -> Callable[..., tuple[int, list[str], str]]:
    """Runs `gpt-pipeline clean`: exit code, lines, errors."""

    def run(*arguments: str) -> tuple[int, list[str], str]:
        result = CliRunner().invoke(app, ["clean", *arguments])
        return result.exit_code, result.stdout.splitlines(), result.stderr

    return run
