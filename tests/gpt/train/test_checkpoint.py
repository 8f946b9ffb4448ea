"""States of a training run: whole or not there, beside the training, and read back exactly."""

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from gpt.base.errors import InputError, RunError
from gpt.base.events import Message
from gpt.train import checkpoint
from gpt.train.checkpoint import Checkpoints


def state(value: float) -> dict:
    return {
        "weights": {"a": torch.full((300, 7), value), "b": torch.arange(5)},
        "history": [{"step": 1, "loss": value}],
        "best": None,
    }


def write(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.finish()
    return checkpoints


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_state_is_read_back_as_it_was(tmp_path):
    write(tmp_path / "new" / "folder", 5)
    loaded = Checkpoints(tmp_path / "new" / "folder").load()
    expected = state(5)
    assert torch.equal(loaded["weights"]["a"], expected["weights"]["a"])
    assert torch.equal(loaded["weights"]["b"], expected["weights"]["b"])
    assert loaded["history"] == expected["history"]
    assert loaded["best"] is None


def test_without_states_there_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    assert checkpoints.newest() is None
    assert files(tmp_path) == []


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    checkpoints = write(tmp_path, 1, 3, 20)
    assert [path.name[:13] for path in files(tmp_path)] == ["step-00000003", "step-00000020"]
    assert checkpoints.newest() == 20
    assert checkpoints.load()["history"][0]["loss"] == 20


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "empty", "other name"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, damage):
    write(tmp_path, 1, 2)
    newest = files(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    match damage:
        case "truncated":
            newest.write_bytes(data[: len(data) // 2])
        case "bit flipped":
            data[len(data) // 2] ^= 1
            newest.write_bytes(data)
        case "empty":
            newest.write_bytes(b"")
        case "other name":
            newest.rename(tmp_path / f"step-00000002.{'0' * 32}.pt")
    heard = []
    again = Checkpoints(tmp_path)
    assert again.load(heard.append)["history"][0]["loss"] == 1
    assert heard == [
        Message("the state of step 2 is damaged; going back to that of step 1", level="warning")
    ]
    # it must not be one of the last two from now on
    again.save(2, state(2))
    again.finish()
    assert [path.name[:13] for path in files(tmp_path)] == ["step-00000001", "step-00000002"]
    assert Checkpoints(tmp_path).load(heard.append)["history"][0]["loss"] == 2
    assert len(heard) == 1


def test_two_damaged_states_start_anew_and_say_so(tmp_path):
    write(tmp_path, 1, 2)
    for path in files(tmp_path):
        path.write_bytes(b"x")
    heard = []
    assert Checkpoints(tmp_path).load(heard.append) is None
    assert [event.text for event in heard] == [
        "the state of step 2 is damaged; going back to that of step 1",
        "the state of step 1 is damaged; starting anew",
    ]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".state.partial").write_bytes(b"half")
    Checkpoints(tmp_path)
    assert len(files(tmp_path)) == 1


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    write(tmp_path / "states", 1)
    (path,) = files(tmp_path / "states")
    torch.save(Evil(), path)
    path.rename(path.with_name(f"step-00000001.{checkpoint._hash_of(path)}.pt"))
    with pytest.raises(Exception, match="weights_only"):
        Checkpoints(tmp_path / "states").load()
    assert not (tmp_path / "evil").exists()


def test_saving_goes_on_beside_its_caller_until_the_tensors_are_read(tmp_path, monkeypatch):
    go_on = threading.Event()
    write_file = checkpoint._save

    def slow(*arguments):
        go_on.wait(10)
        write_file(*arguments)

    monkeypatch.setattr(checkpoint, "_save", slow)
    checkpoints = Checkpoints(tmp_path)
    tensor = torch.zeros(3)
    checkpoints.save(1, {"tensor": tensor})
    assert checkpoints.newest() is None  # so `save` has returned before anything was written
    threading.Timer(0.2, go_on.set).start()
    checkpoints.wait_until_read()
    tensor += 1
    checkpoints.finish()
    assert checkpoints.load()["tensor"].tolist() == [0, 0, 0]


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError) as caught:
        Checkpoints(tmp_path / "file" / "states")
    assert "cannot be kept here (Not a directory); make the folder writable" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be kept here"):
            Checkpoints(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_in_one_line_and_the_state_before_is_kept(small_disk):
    checkpoints = write(small_disk / "states", 7)
    checkpoints.save(8, {"large": torch.zeros(3_000_000)})
    with pytest.raises(RunError) as caught:
        checkpoints.wait_until_read()
    assert str(caught.value) == (
        f"{small_disk}/states: the state of step 8 could not be saved (No space left on device); "
        "make room there, and the same command goes on from step 7"
    )
    assert len(files(small_disk / "states")) == 1, "nothing half-written is left"
    assert Checkpoints(small_disk / "states").load()["history"][0]["loss"] == 7


def test_a_failed_save_is_told_once_by_whichever_call_comes_next(small_disk):
    for call in ("wait_until_read", "finish", "save"):
        checkpoints = Checkpoints(small_disk / call)
        checkpoints.save(8, {"large": torch.zeros(3_000_000)})
        with pytest.raises(RunError, match="the same command starts anew"):
            checkpoints.save(9, state(9)) if call == "save" else getattr(checkpoints, call)()
        checkpoints.save(9, state(9))
        checkpoints.finish()
        assert checkpoints.newest() == 9
