"""Resume states: what they depend on, one process a stage, what is told of older ones."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stand_in
from test_stage import checkpoint, note, run_of, start, steps, wait_for

from gpt.base.errors import InputError
from pipeline.project.file_locks import stage_lock
from pipeline.run.resume import size_in_words
from pipeline.run.stage import run_stage
from pipeline.tracking.connection import connect
from pipeline.tracking.provenance import HOW, MadeOf

Clean = Callable[..., tuple[int, list[str], str]]


def make_state(project: Path, name: str, size: int = 0, step: int | None = None) -> Path:
    """A state of the stage `learn` with a file of this size, which takes no room."""
    state = project / ".checkpoints" / "learn" / name
    state.mkdir(parents=True)
    saved = state / ("run.json" if step is None else f"step-{step:08d}.{'0' * 32}.pt")
    saved.touch()
    os.truncate(saved, size)
    return state


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
    assert run_stage("learn", project) == 0
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
    assert run_stage("learn", bare) == 2
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
    assert steps(project, "learn", "train_loss") == list(range(1, 101))
    assert run_of(project, "learn").info.status == "FINISHED"
    assert len(connect(project).search_runs([before["experiment_id"]])) == 1
    assert (project / ".checkpoints/learn/0123456789abcdef").exists()


def test_the_lock_goes_with_its_process(project: Path) -> None:
    stand_in.set_params(project, learn={"pause": 0.05, "train": {"steps": 1000}})
    process = start("learn", project)
    wait_for(lambda: checkpoint(project) is not None)
    process.kill()
    process.communicate()
    stand_in.set_params(project, learn={"train": {"steps": 10}})
    assert run_stage("learn", project) == 0


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
        assert run_stage("learn", bare) == 2
    assert capsys.readouterr().err == (
        "error: learn: another process is running this stage here; wait for it or stop it\n"
    )


def test_other_stages_run_beside_it(project: Path) -> None:
    with stage_lock(project, "learn"):
        assert run_stage("prepare", project) == 0


def test_a_place_where_nothing_can_be_locked_is_one_line(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare / ".pipeline").write_text("a file, so no folder can be made there")
    assert run_stage("learn", bare) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: .pipeline/locks/learn.lock: cannot be locked (")
    assert error.count("\n") == 1


# --- telling of older states -------------------------------------------------------------------


def test_a_run_that_starts_anew_tells_of_older_states(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.set_params(project, learn={"fail_at": 13})
    assert run_stage("learn", project) == 1
    assert "older" not in capsys.readouterr().out

    make_state(project, "0123456789abcdef", 1_500_000_000, step=1200)
    assert run_stage("learn", project) == 1
    assert "older" not in capsys.readouterr().out, "it goes on from a state of its own"

    stand_in.set_params(project, learn={"fail_at": 14})
    assert run_stage("learn", project) == 1
    assert (
        "learn | 2 older states under .checkpoints/learn (1.5 GB) are of other parameters, inputs "
        "or code; `gpt-pipeline clean` removes them\n"
    ) in capsys.readouterr().out


def test_one_older_state_is_told_of_in_the_singular(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_state(project, "0123456789abcdef", 2_340_000)
    assert run_stage("learn", project) == 0
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
