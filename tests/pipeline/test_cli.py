"""The command line: one line and an exit code for what a person did wrong."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_project import make_data_project
from typer.testing import CliRunner

import pipeline
from pipeline.cli import app

HERE = Path(pipeline.__file__).parent.parent


@pytest.fixture
def command():
    """Runs the command line in the current folder: exit code, output, errors."""

    def run(*arguments: str, given: str | None = None) -> tuple[int, str, str]:
        result = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            capture_output=True,
            text=True,
            check=False,
            input=given,
            env={**os.environ, "PYTHONPATH": str(HERE)},
        )
        return result.returncode, result.stdout, result.stderr

    return run


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def with_presets(project):
    presets = project / "presets"
    presets.mkdir()
    (presets / "small.yaml").write_text("# For a small machine\nfirst: {a: 2}\n")
    (presets / "large.yaml").write_text("# For a large machine\nfirst: {a: 3}\n")
    git("add", "params.yaml", "presets")
    git("commit", "-q", "-m", "presets")
    return project


def test_help_is_quick_and_loads_nothing_heavy(command):
    began = time.monotonic()
    code, shown, _ = command("--help")
    assert code == 0
    assert time.monotonic() - began < 5  # 0.4 s on an idle machine
    for name in (
        "run",
        "stage",
        "status",
        "preset",
        "ui",
        "generate",
        "chat",
        "classify",
        "report",
        "clean",
        "estimate",
    ):
        assert f" {name} " in shown
    assert " probe " not in shown  # `estimate` alone starts it
    heavy = (
        "[m for m in ('torch', 'prefect', 'dvc', 'mlflow', 'pandas', 'yaml') if m in sys.modules]"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, pipeline.cli; print({heavy})"],
        capture_output=True,
        text=True,
        check=True,
        cwd=HERE,
    )
    assert result.stdout.strip() == "[]"


def test_it_works_from_a_folder_below(project, command, monkeypatch):
    (project / "notes").mkdir()
    monkeypatch.chdir(project / "notes")
    code, shown, _ = command("status")
    assert code == 0
    assert shown.splitlines()[1].startswith("first")


def test_outside_a_project_one_line_says_so(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, shown, errors = command("status")
    assert (code, shown) == (2, "")
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert "change into the project's folder" in errors


def test_a_prefect_that_is_not_there_is_one_line(project, command, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    code, shown, errors = command("notify", "slack-webhook/ops")
    assert (code, shown) == (1, "")
    assert errors.count("\n") == 1
    assert errors.startswith("error: Prefect: ")
    assert "check PREFECT_API_URL" in errors


@pytest.mark.parametrize("arguments", [("run", "pretrian"), ("stage", "pretrian")])
def test_an_unknown_stage_is_answered_with_the_known_ones(project, command, arguments):
    code, _, errors = command(*arguments)
    assert code == 2
    assert errors.startswith("error: pretrian: no such stage; use one of download, tokenize, ")
    assert errors.count("\n") == 1


def test_a_bad_params_file_stops_a_run_before_any_work(project, command):
    code, _, errors = command("run")
    assert code == 2
    assert errors.startswith("error: params.yaml: first: unknown parameter")
    assert errors.count("\n") == 1
    assert not (project / ".prefect").exists()


@pytest.mark.parametrize(
    ("arguments", "folder", "stage"),
    [
        (("generate", "Once"), "pretrain", "pretrain"),
        (("chat", "Say hello."), "assistant", "finetune_instruct"),
        (("classify", "Hello."), "classifier", "finetune_classifier"),
    ],
)
def test_a_missing_model_is_answered_with_the_remedy(project, command, arguments, folder, stage):
    code, _, errors = command(*arguments)
    assert code == 2
    assert errors == (
        f"error: models/{folder}: no model there; make it with `gpt-pipeline run {stage}`\n"
    )


def test_presets_are_listed_with_what_they_are_for(with_presets, command):
    (with_presets / "params.yaml").write_bytes(
        (with_presets / "presets" / "small.yaml").read_bytes()
    )
    code, shown, _ = command("preset")
    assert code == 0
    assert shown.splitlines() == ["  large  For a large machine", "* small  For a small machine"]


def test_a_preset_replaces_the_committed_file_and_another_preset(with_presets, command):
    params = with_presets / "params.yaml"
    for name in ("small", "large", "small"):
        code, shown, _ = command("preset", name)
        assert code == 0
        assert f"params.yaml is now presets/{name}.yaml" in shown
        assert params.read_bytes() == (with_presets / "presets" / f"{name}.yaml").read_bytes()


def test_what_a_preset_replaces_becomes_a_preset_unless_it_is_kept(with_presets, command):
    params = with_presets / "params.yaml"
    params.write_text("first: {a: 99}\n")
    assert command("preset", "small")[0] == 0
    assert command("preset", "replaced")[0] == 0
    assert params.read_text() == "first: {a: 99}\n"

    params.write_text("first: {a: 100}\n")
    code, _, errors = command("preset", "small")
    assert code == 2
    assert errors.startswith("error: params.yaml: holds edits that are kept nowhere else; commit")
    assert params.read_text() == "first: {a: 100}\n"

    git("commit", "-q", "-a", "-m", "kept")
    assert command("preset", "small")[0] == 0


def test_an_unknown_preset_is_answered_with_the_known_ones(with_presets, command):
    code, _, errors = command("preset", "smal")
    assert (code, errors) == (2, "error: smal: no such preset; there are large, small\n")


def test_without_git_what_a_preset_replaces_becomes_a_preset(make_project, command):
    root = make_project(git=False)
    (root / "presets").mkdir()
    (root / "presets" / "small.yaml").write_text("# Small\nfirst: {a: 2}\n")
    before = (root / "params.yaml").read_bytes()
    assert command("preset", "small")[0] == 0
    assert (root / "presets" / "replaced.yaml").read_bytes() == before


def test_a_python_without_the_packages_hands_over_to_the_projects_environment(tmp_path):
    package = tmp_path / "pipeline"
    package.mkdir()
    for name in ("__init__.py", "__main__.py"):
        (package / name).write_bytes((HERE / "pipeline" / name).read_bytes())
    bare = [getattr(sys, "_base_executable", sys.executable), "-I", "-S", "-c"]
    start = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = ['stage', 'x'];"
        "from pipeline.__main__ import start; start()"
    )
    alone = subprocess.run([*bare, start], capture_output=True, text=True, check=False)
    assert alone.returncode == 1
    assert (
        alone.stderr
        == "error: this Python lacks the project's packages; `make run` installs them\n"
    )

    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "project: $*"\n')
    python.chmod(0o755)
    handed = subprocess.run([*bare, start], capture_output=True, text=True, check=False)
    assert handed.stdout == "project: -m pipeline stage x\n"


def test_data_writes_the_report_and_says_it_in_short(project, command):
    make_data_project(project, ["docs", "stories"])
    code, shown, _ = command("data")
    assert code == 0
    assert "pretraining text (documents)" in shown
    assert "reports/data.md: the whole report, with plots" in shown
    assert (project / "reports" / "data.md").read_text().startswith("# The data\n")
    assert " data " in command("--help")[1]


def test_data_before_anything_was_downloaded_is_one_line(project, command):
    code, shown, errors = command("data")
    assert (code, shown) == (2, "")
    assert errors.count("\n") == 1
    assert "nothing was downloaded yet; run `gpt-pipeline run tokenize` first" in errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/p/lock"),
            "Read-only file system (/p/lock)",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; allow more"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/none']"),
            "No usable temporary directory found in ['/none']; set TMPDIR",
        ),
    ],
)
def test_a_machine_that_refuses_is_told_in_a_line_from_any_command(
    error, line, project, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("pipeline.report.status.print_status", refuse)
    with pytest.raises(SystemExit) as ended:
        app(["status"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["lineage"],
        ["generate", "x", "--model"],
        ["classify", "x", "--model"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_is_too_long_for_a_file_is_one_line(arguments, project):
    done = CliRunner().invoke(app, [*arguments, "x" * 5000])
    assert done.exit_code == 2
    assert re.fullmatch(r"error: .{,130}: File name too long; name another\n", done.output)
