"""What `gpt-pipeline clean` removes, and what it leaves."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import stand_in
import torch
from test_resume import Clean, make_state
from test_stage import checkpoint, note, run_of, start, wait_for

from gpt.base.files import whole_directory, whole_file
from gpt.train.checkpoint import Checkpoints
from pipeline.project.file_locks import stage_lock
from pipeline.project.params import load_params
from pipeline.run.clean import clean
from pipeline.run.stage import next_states, run_stage


def next_name(project: Path) -> str:
    return next_states(project)("learn").name


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

    assert run_stage("learn", project) == 0
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
        patch.setattr("pipeline.run.stage.load_params", load_params)
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
