"""Cores, cards and slots between stages that run side by side."""

import threading
import time
from contextlib import ExitStack

import pytest

from pipeline.flow import resources
from pipeline.flow.resources import (
    SLOTS_VARIABLE,
    Need,
    Resources,
    StoppedWaitingError,
    cards,
    needs,
)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(resources, "cores", lambda: 2)


def wait_until(what, seconds=10.0):
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.01)
    return what()


def held_at_once(shared: Resources, wanted: list[Need]) -> int:
    """How many of the stages have what they need while nobody gives anything back."""
    entered, leave = [], threading.Event()

    def work(need: Need) -> None:
        with shared.held(need, lambda _: None):
            entered.append(need)
            leave.wait(10)

    threads = [threading.Thread(target=work, args=(need,)) for need in wanted]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    time.sleep(0.3)
    n = len(entered)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert len(entered) == len(wanted), "each has its turn"
    return n


@pytest.mark.parametrize(
    ("threads", "at_once"),
    [([1, 1, 1], 3), ([1, 1, 1, 1], 3), ([2, 2], 1), ([2, 1], 1), ([1, 2], 1), ([8, 8], 1)],
)
def test_stages_wait_until_their_threads_have_cores(two_cores, threads, at_once):
    shared = Resources(8, threading.Event())
    assert held_at_once(shared, [Need(each) for each in threads]) == at_once


def test_no_more_stages_run_than_jobs(two_cores):
    assert held_at_once(Resources(1, threading.Event()), [Need(), Need()]) == 1


def test_a_card_serves_one_stage_and_a_stage_has_as_many_as_it_asks_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert cards() == ["4", "7"]
    one, other = (Resources(8, threading.Event()) for _ in range(2))  # of two flows
    told: list[str] = []
    with one.held(Need(devices=1), told.append) as first:
        with other.held(Need(devices=1), told.append) as second:
            assert [first, second] == [
                {"CUDA_VISIBLE_DEVICES": "4"},
                {"CUDA_VISIBLE_DEVICES": "7"},
            ]
            with one.held(Need(devices=0), told.append) as none:
                assert none == {}, "a stage that needs no card waits for none"
        stopping = threading.Event()
        third = Resources(8, stopping)
        got: list[object] = []

        def wait() -> None:
            with third.held(Need(devices=None), told.append) as all_of_them:
                got.append(all_of_them)

        thread = threading.Thread(target=wait)
        thread.start()
        assert wait_until(lambda: told), "it says what it waits for"
        assert told == ["waits for 2 of 2 cards, which other runs hold"]
        assert not got
    thread.join(10)
    assert got == [{"CUDA_VISIBLE_DEVICES": "4,7"}]


def test_who_waits_hears_that_the_flow_is_stopped(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    stopping = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(Resources(8, threading.Event()).held(Need(devices=1), print))
        threading.Timer(0.2, stopping.set).start()
        waiting = Resources(8, stopping).held(Need(devices=1), lambda _: None)
        with pytest.raises(StoppedWaitingError), waiting:
            pass


@pytest.mark.parametrize(
    ("named", "found"),
    [("", []), ("-1", []), ("0,-1,1", ["0"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])],
)
def test_the_cards_are_those_that_cuda_would_show(monkeypatch, named, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert cards() == found


def test_a_machine_without_cards_has_as_many_slots_as_its_agent_says(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(SLOTS_VARIABLE, "1")
    stopping = threading.Event()
    one, other = Resources(8, threading.Event()), Resources(8, stopping)  # of two flows
    told: list[str] = []
    with one.held(Need(devices=1), told.append) as first:
        assert first == {}
        with other.held(Need(devices=0), told.append) as none:
            assert none == {}, "a stage that needs no accelerator waits for none"
        threading.Timer(0.2, stopping.set).start()
        with pytest.raises(StoppedWaitingError), other.held(Need(devices=1), told.append):
            pass
    assert told == ["waits for 1 of 1 slots, which other runs hold"]
    with Resources(8, threading.Event()).held(Need(devices=None), told.append):
        assert len(told) == 1


@pytest.mark.parametrize(
    ("section", "need"),
    [
        ("train: {threads: 3}", Need(3, 1)),
        ("train: {threads: 1, devices: 2}", Need(1, 2)),
        ("train: {threads: 1, devices: auto}", Need(1, None)),
        ("train: {threads: 1, device: cpu}", Need(1, 0)),
        ("train: {}", Need(2, 1)),
        ("threads: 1", Need(1, 1)),
    ],
)
def test_what_a_stage_needs_is_read_from_its_parameters(tmp_path, two_cores, section, need):
    (tmp_path / "params.yaml").write_text(f"pretrain: {{{section}}}\n")
    assert needs(tmp_path, "pretrain", accelerated=True) == need
    assert needs(tmp_path, "pretrain", accelerated=False) == Need(1, 0)
