"""Cores, cards and slots between stages that run side by side."""

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import pipeline
from pipeline.flow import resources
from pipeline.flow.prefect_api import environment as server_environment
from pipeline.flow.resources import SLOTS_VARIABLE, Need, Resources, cards, needs

HOLD_SLOTS = """
import threading
from prefect.client.orchestration import get_client
from pipeline.flow.resources import Need, Resources
with get_client(sync_client=True) as client:
    client.upsert_global_concurrency_limit_by_name("cards", 1)
for turn in range(2):
    with Resources(1, threading.Event()).held(Need(devices=1), print) as environment:
        print("holds" if environment == {} else environment, flush=True)
        input()
    print("gave back", flush=True)
"""


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
        with Resources(8, stopping).held(Need(devices=1), lambda _: None) as environment:
            assert environment is None


@pytest.mark.parametrize(
    ("named", "found"),
    [("", []), ("-1", []), ("0,-1,1", ["0"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])],
)
def test_the_cards_are_those_that_cuda_would_show(monkeypatch, named, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert cards() == found


@pytest.mark.slow
def test_a_prefect_server_that_is_away_fails_no_stage_that_gives_its_slot_back_or_wants_one(
    prefect_server, tmp_path
):
    environment = {
        **os.environ,
        **server_environment(tmp_path),
        "PYTHONPATH": str(Path(pipeline.__file__).parent.parent),
        "PREFECT_API_URL": prefect_server.api,
        "CUDA_VISIBLE_DEVICES": "",
        SLOTS_VARIABLE: "cards",
    }

    log = tmp_path / "holder.log"
    with log.open("w") as errors:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD_SLOTS],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert holder.stdout.readline() == "holds\n"
        prefect_server.stop()
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "gave back\n"
        time.sleep(2)  # by now it asks for the next one
        assert holder.poll() is None
        prefect_server.start()
        # the slot that could not be given back is free when its lease has ended
        if (said := holder.stdout.readline()) != "holds\n":
            assert said == "waits for 1 of the slots 'cards', which other runs hold\n"
            assert holder.stdout.readline() == "holds\n"
        assert holder.communicate("\n", 30)[0] == "gave back\n"
        assert holder.returncode == 0
    finally:
        holder.kill()
    assert "failed to process" not in log.read_text(), "to wait is no error"


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
