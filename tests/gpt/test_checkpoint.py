"""A state is whole or passed over."""

import pytest
import torch

from gpt.checkpoint import load_state, save_state
from gpt.events import Message


def _states(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def test_a_state_is_read_back_exactly(tmp_path):
    state = {
        "step": 3,
        "history": [{"loss": 0.1}],
        "best": None,
        "weights": {"a": torch.randn(3, 4), "b": torch.arange(5)},
    }
    save_state(tmp_path, 3, state)
    again = load_state(tmp_path)
    assert again is not None
    assert torch.equal(again["weights"]["a"], state["weights"]["a"])
    assert torch.equal(again["weights"]["b"], state["weights"]["b"])
    assert {k: again[k] for k in ("step", "history", "best")} == {
        "step": 3,
        "history": [{"loss": 0.1}],
        "best": None,
    }


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    for step in (1, 2, 10, 11):
        save_state(tmp_path, step, {"step": step})
    assert _states(tmp_path) == ["step-00000010.pt", "step-00000011.pt"]
    assert len(list(tmp_path.iterdir())) == 4  # each with its digest


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no digest"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, damage):
    save_state(tmp_path, 1, {"step": 1})
    save_state(tmp_path, 2, {"step": 2})
    newest = tmp_path / "step-00000002.pt"
    if damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:-9])
    elif damage == "flipped":
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    else:
        (tmp_path / "step-00000002.pt.sha256").unlink()
    heard: list[object] = []
    assert load_state(tmp_path, heard.append) == {"step": 1}
    assert heard == [
        Message("step-00000002.pt is damaged; going back to the one before", level="warning")
    ]


def test_there_is_none_in_an_empty_or_absent_folder(tmp_path):
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "absent") is None


def test_nothing_half_written_is_left_when_saving_fails(tmp_path):
    save_state(tmp_path, 1, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_state(tmp_path, 2, {"step": lambda: 2})
    assert _states(tmp_path) == ["step-00000001.pt"]
    assert not list(tmp_path.glob(".*"))
    assert load_state(tmp_path) == {"step": 1}
