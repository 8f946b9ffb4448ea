"""Resume states: what they depend on, one process a stage, what `gpt-pipeline clean` removes."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stand_in
import torch
from test_stage import checkpoint, note, run_of, start, steps, wait_for
from typer.testing import CliRunner

from gpt.base.errors import InputError
from gpt.base.files import whole_directory, whole_file
from gpt.train.checkpoint import Checkpoints
from pipeline.cli import app
from pipeline.project.file_locks import stage_lock
from pipeline.run import stage as runner
from pipeline.run.clean import clean
from pipeline.run.resume import size_in_words
from pipeline.tracking.connection import connect
from pipeline.tracking.provenance import HOW, MadeOf


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


Clean = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def command() -> Clean:
    """Runs `gpt-pipeline clean`: exit code, lines, errors."""

    def run(*arguments: str) -> tuple[int, list[str], str]:
        result = CliRunner().invoke(app, ["clean", *arguments])
        return result.exit_code, result.stdout.splitlines(), result.stderr

    return run


def make_state(project: Path, name: str, size: int = 0, step: int | None = None) -> Path:
    """A state of the stage `learn` with a file of this size, which takes no room."""
    state = project / ".checkpoints" / "learn" / name
    state.mkdir(parents=True)
    saved = state / ("run.json" if step is None else f"step-{step:08d}.{'0' * 32}.pt")
    saved.touch()
    os.truncate(saved, size)
    return state


def next_name(project: Path) -> str:
    return runner.next_states(project)("learn").name


# --- what a state depends on -------------------------------------------------------------------


def test_how_a_training_runs_is_no_part_of_what_its_state_depends_on(bare: Path) -> None:
    def of(train: dict[str, object], **others: object) -> str:
        cls = dataclasses.make_dataclass("Params", ["train", *others])
        return MadeOf.now(bare, "learn", cls(train, **others)).fingerprint()

    same = of({"steps": 3})
    for name in ("devices", "parallel", "checkpoint_seconds"):
        assert of({"steps": 3, name: 1}) == of({"steps": 3, name: 2}) == same, name
        assert of({"steps": 3}, **{name: 1}) != of({"steps": 3}, **{name: 2}), "no part of `train`"
    assert of({"steps": 3}, workers=1) == of({"steps": 3}, workers=2) == same
    assert of({"steps": 3, "workers": 1}) != of({"steps": 3, "workers": 2}), "a part of `train`"
    assert of({"steps": 4}) != same
    assert len(HOW) == 4


def test_a_stopped_run_goes_on_under_another_checkpoint_seconds(project: Path) -> None:
    train = {"steps": 40, "checkpoint_seconds": 60.0}
    stand_in.set_params(project, learn={"pause": 0.05, "train": train})
    process = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    process.kill()
    process.communicate()
    killed = note(project, "learn")["run_id"]
    stand_in.set_params(project, learn={"pause": 0.05, "train": {**train, "checkpoint_seconds": 1}})
    assert runner.run_stage("learn", project) == 0
    assert note(project, "learn")["run_id"] == killed
    assert run_of(project, "learn").data.tags["resumed"] == "1"


def test_an_optional_stages_code_is_named_in_its_own_file(bare: Path) -> None:
    def of(stage: str) -> str:
        cls = dataclasses.make_dataclass("Params", [])
        return MadeOf.now(bare, stage, cls()).fingerprint()

    expected = of("learn")
    (bare / "optional").mkdir()
    (bare / "optional" / "dvc.yaml").write_text(
        "stages:\n  extra:\n    wdir: ..\n    deps: [data/prepared, code.py, more.py]\n"
    )
    assert of("learn") == expected
    with pytest.raises(InputError, match=r"^more\.py is missing, and extra depends on it"):
        of("extra")
    (bare / "more.py").write_text("x = 1")
    before = of("extra")
    (bare / "more.py").write_text("x = 2")
    assert of("extra") != before
    assert of("learn") == expected


@pytest.mark.parametrize("missing", ["code.py", "dvc.yaml"])
def test_a_fingerprint_that_cannot_be_told_is_one_line(
    bare: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    (bare / missing).unlink()
    assert runner.run_stage("learn", bare) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert missing in error
    assert "restore the file" in error


# --- one process a stage -----------------------------------------------------------------------


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Path]:
    """As long as this file is there, the stage `learn` waits at its step 10; it goes in the end."""
    file = tmp_path / "hold"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


def test_a_stage_that_is_running_is_not_run_a_second_time(
    project: Path, command: Clean, hold: Path
) -> None:
    make_state(project, "0123456789abcdef", 1_000_000, step=5)
    stand_in.set_params(project, learn={"hold": str(hold), "train": {"steps": 100}})
    first = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    verdict = project / ".pipeline/exit/learn.json"
    verdict.parent.mkdir(exist_ok=True)
    verdict.write_text("of the first")
    before = note(project, "learn")

    second = start("learn", project)
    out, error = second.communicate(timeout=60)
    assert second.returncode == 2
    assert error == (
        f"error: learn: process {first.pid} is running this stage here; wait for it or stop it\n"
    )
    assert out == ""
    code, lines, _ = command("--all")
    assert code == 0
    assert lines == [
        f"kept: all of learn, as process {first.pid} is running this stage here; wait for it or "
        "stop it",
        "nothing to remove",
    ]

    assert verdict.read_text() == "of the first"
    assert note(project, "learn") == before
    hold.unlink()
    assert first.communicate()[1] == ""
    assert first.returncode == 0
    assert note(project, "learn")["run_id"] == before["run_id"]
    assert steps(project, "learn", "loss/train") == list(range(1, 101))
    assert run_of(project, "learn").info.status == "FINISHED"
    assert len(connect(project).search_runs([before["experiment_id"]])) == 1
    assert (project / ".checkpoints/learn/0123456789abcdef").exists()
    assert not (project / ".pipeline/locks/learn.pid").exists()


def test_the_lock_goes_with_its_process(project: Path) -> None:
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 1000}})
    process = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    process.kill()
    process.communicate()
    assert (project / ".pipeline/locks/learn.pid").exists(), "as a killed process leaves it"
    stand_in.set_params(project, learn={"train": {"steps": 10}})
    assert runner.run_stage("learn", project) == 0


@pytest.mark.parametrize(
    "pid", [None, b"", b"-1", b"no number", b"\xff\xfe", b"9" * 30, b"4999999"]
)
def test_a_holder_that_cannot_be_told_is_another_process(
    bare: Path, capsys: pytest.CaptureFixture[str], pid: bytes | None
) -> None:
    with stage_lock(bare, "learn"):
        file = bare / ".pipeline/locks/learn.pid"
        assert file.read_text() == f"{os.getpid()}\n"
        file.unlink()
        if pid is not None:
            file.write_bytes(pid)
        assert runner.run_stage("learn", bare) == 2
    assert capsys.readouterr().err == (
        "error: learn: another process is running this stage here; wait for it or stop it\n"
    )


def test_other_stages_run_beside_it(project: Path) -> None:
    with stage_lock(project, "learn"):
        assert runner.run_stage("prepare", project) == 0


def test_a_place_where_nothing_can_be_locked_is_one_line(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare / ".pipeline").write_text("a file, so no folder can be made there")
    assert runner.run_stage("learn", bare) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: .pipeline/locks/learn.lock: cannot be locked (")
    assert error.count("\n") == 1


# --- telling of older states -------------------------------------------------------------------


def test_a_run_that_starts_anew_tells_of_older_states(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.set_params(project, learn={"fail_at": 13})
    assert runner.run_stage("learn", project) == 1
    assert "older" not in capsys.readouterr().out

    make_state(project, "0123456789abcdef", 1_500_000_000, step=1200)
    assert runner.run_stage("learn", project) == 1
    assert "older" not in capsys.readouterr().out, "it goes on from a state of its own"

    stand_in.set_params(project, learn={"fail_at": 14})
    assert runner.run_stage("learn", project) == 1
    assert (
        "learn | 2 older states under .checkpoints/learn (1.5 GB) are of other parameters, inputs "
        "or code; `gpt-pipeline clean` removes them\n"
    ) in capsys.readouterr().out


def test_one_older_state_is_told_of_in_the_singular(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_state(project, "0123456789abcdef", 2_340_000)
    assert runner.run_stage("learn", project) == 0
    assert (
        "learn | 1 older state under .checkpoints/learn (2.3 MB) is of other parameters, inputs "
        "or code; `gpt-pipeline clean` removes it\n"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0.0 MB"), (340_000, "0.3 MB"), (999_949_999, "999.9 MB"), (999_950_000, "1.0 GB")],
)
def test_sizes_are_decimal(size: int, words: str) -> None:
    assert size_in_words(size) == words


# --- clean -------------------------------------------------------------------------------------


def test_clean_removes_what_no_run_goes_on_from_and_the_next_run_goes_on(
    project: Path, command: Clean
) -> None:
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 40}})
    process = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    process.kill()
    process.communicate()
    kept = checkpoint(project)
    assert kept is not None
    killed = note(project, "learn")["run_id"]
    with_step = make_state(project, "ffffffffffffffff")
    checkpoints = Checkpoints(with_step)
    checkpoints.save(1200, {"weights": torch.zeros(300_000)})
    checkpoints.finish()
    make_state(project, "0123456789abcdef", 1_500_000_000)

    code, lines, errors = command()
    assert (code, errors) == (0, "")
    assert sorted(lines[:-1]) == [
        ".checkpoints/learn/0123456789abcdef: 1.5 GB",
        ".checkpoints/learn/ffffffffffffffff: 1.2 MB, of step 1200",
        f"kept: .checkpoints/learn/{kept.parent.name}, the next run of learn goes on from it",
    ]
    assert lines[-1] == "1.5 GB freed"
    assert list((project / ".checkpoints/learn").iterdir()) == [kept.parent]
    assert command()[1][-1] == "nothing to remove"

    assert runner.run_stage("learn", project) == 0
    assert note(project, "learn")["run_id"] == killed
    assert run_of(project, "learn").data.tags["resumed"] == "1"


@pytest.mark.parametrize("changed", ["params", "input", "code"])
def test_clean_goes_by_parameters_inputs_and_code(bare: Path, command: Clean, changed: str) -> None:
    state = make_state(bare, next_name(bare), 2_000_000, step=7)
    assert command()[1] == [
        f"kept: .checkpoints/learn/{state.name}, the next run of learn goes on from it",
        "nothing to remove",
    ]
    match changed:
        case "params":
            stand_in.set_params(bare, learn={"fail_at": 14})
        case "input":
            (bare / "data/prepared/text").write_text("other")
        case "code":
            (bare / "code.py").write_text("x = 2\n")
    assert command()[1] == [
        f".checkpoints/learn/{state.name}: 2.0 MB, of step 7",
        "2.0 MB freed",
    ]
    assert not (bare / ".checkpoints/learn").exists()


def test_all_removes_the_state_that_a_run_would_go_on_from(bare: Path, command: Clean) -> None:
    state = make_state(bare, next_name(bare), 2_000_000)
    assert command("--all")[1] == [f".checkpoints/learn/{state.name}: 2.0 MB", "2.0 MB freed"]
    assert not state.exists()


def test_a_bad_params_file_stops_clean_but_not_all(bare: Path, command: Clean) -> None:
    state = make_state(bare, "0123456789abcdef")
    with pytest.MonkeyPatch.context() as patch:
        from pipeline.project import params

        patch.setattr(runner, "load_params", params.load_params)
        code, lines, errors = command()
        assert (code, lines) == (2, [])
        assert errors.startswith("error: params.yaml: ")
        assert errors.count("\n") == 1
        assert state.exists()
        assert command("--all")[0] == 0
    assert not state.exists()


@pytest.mark.parametrize("missing", ["data/prepared", "code.py"])
def test_a_state_is_kept_where_it_cannot_be_told_whether_it_is_of_use(
    bare: Path, command: Clean, missing: str
) -> None:
    state = make_state(bare, "0123456789abcdef")
    (bare / missing).rename(bare / "elsewhere")
    code, lines, _ = command()
    assert code == 0
    assert lines[0].startswith(
        f"kept: .checkpoints/learn/{state.name}, as it cannot be told whether a run would go on "
        f"from it: {missing} is missing"
    )
    assert lines[1:] == ["nothing to remove"]
    assert state.exists()


def test_clean_removes_what_was_left_half_written(bare: Path, command: Clean) -> None:
    class Killed(BaseException):
        """Stands for the end of the process: what it left is put back."""

    def leave(writer: contextlib.AbstractContextManager[Path], copy: Path) -> None:
        with contextlib.suppress(Killed), writer as partial:
            if partial.is_dir():
                (partial / "weights").write_bytes(bytes(1_000_000))
            else:
                partial.write_bytes(bytes(2_000_000))
            partial.rename(copy)
            left.append((copy, partial))
            raise Killed

    left: list[tuple[Path, Path]] = []
    leave(whole_directory(bare / "models/learnt"), bare / "left-model")
    leave(whole_file(bare / "reports/learn/history.csv"), bare / "left-history")
    leave(whole_directory(bare / "data/copy"), bare / "left-copy")
    for copy, partial in left:
        copy.rename(partial)
    state = make_state(bare, next_name(bare), 1000)
    (state / ".state.partial").write_bytes(bytes(3_000_000))
    # half of what an earlier `clean` was removing when it was killed
    make_state(bare, ".0123456789abcdef.partial", 4_000_000, step=3)
    (state / ".hidden").touch()
    (bare / "models/.mine.partial").touch()
    (bare / "models/learnt").mkdir()

    with stage_lock(bare, "copy"):
        code, lines, _ = command()
    assert code == 0
    pid = os.getpid()
    assert lines == [
        f"kept: all of copy, as process {pid} is running this stage here; wait for it or stop it",
        f"kept: .checkpoints/learn/{state.name}, the next run of learn goes on from it",
        "models/.learnt.partial: 1.0 MB, half-written",
        "reports/learn/.history.csv.partial: 2.0 MB, half-written",
        ".checkpoints/learn/.0123456789abcdef.partial: 4.0 MB, half-written",
        f".checkpoints/learn/{state.name}/.state.partial: 3.0 MB, half-written",
        "10.0 MB freed",
    ]
    assert sorted(path.name for path in state.iterdir()) == [".hidden", "run.json"]
    assert sorted(path.name for path in (bare / "models").iterdir()) == [".mine.partial", "learnt"]
    assert command()[1][0] == "data/.copy.partial: 1.0 MB, half-written"


def test_a_state_is_never_removed_by_halves(
    bare: Path, command: Clean, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(bare, "0123456789abcdef", 1000)
    make_state(bare, ".0123456789abcdef.partial")

    def killed(path: Path) -> None:
        if (path / "run.json").stat().st_size:
            raise KeyboardInterrupt
        rmtree(path)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        assert command()[0] == 130
    assert not state.exists()
    assert command()[1][0] == ".checkpoints/learn/.0123456789abcdef.partial: 0.0 MB, half-written"


def test_states_of_no_stage_and_empty_folders_go(bare: Path, command: Clean) -> None:
    for name in ("gone/0123456789abcdef", "prepare/0123456789abcdef", "learn", "older"):
        (bare / ".checkpoints" / name).mkdir(parents=True)
    (bare / ".checkpoints/a-file").touch()
    assert command()[1] == [
        ".checkpoints/prepare/0123456789abcdef: 0.0 MB",
        ".checkpoints/learn: an empty folder",
        ".checkpoints/gone/0123456789abcdef: 0.0 MB",
        ".checkpoints/older: an empty folder",
        "0.0 MB freed",
    ]
    assert [path.name for path in (bare / ".checkpoints").iterdir()] == ["a-file"]
    assert command()[1] == ["nothing to remove"]


def test_nothing_to_remove_in_a_fresh_project(bare: Path, command: Clean) -> None:
    assert command() == (0, ["nothing to remove"], "")
    assert command("--all") == (0, ["nothing to remove"], "")
    assert not (bare / ".pipeline").exists()


def test_what_cannot_be_removed_is_one_line(
    bare: Path, command: Clean, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_state(bare, "0123456789abcdef")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    code, _, errors = command()
    assert code == 1
    assert errors == (
        "error: .checkpoints/learn/0123456789abcdef: cannot be removed (Permission denied); make "
        "it writable and try again\n"
    )


def test_links_are_left_alone(bare: Path) -> None:
    elsewhere = bare / "elsewhere"
    (elsewhere / "0123456789abcdef").mkdir(parents=True)
    (bare / ".checkpoints/learn").mkdir(parents=True)
    (bare / ".checkpoints/learn/link").symlink_to(elsewhere)
    assert list(clean(bare, stand_in.STAGES)) == []
    assert (elsewhere / "0123456789abcdef").exists()
