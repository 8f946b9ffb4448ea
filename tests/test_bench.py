"""The benchmarks measure what their tables say."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.nn import functional as F

from bench.__main__ import NAMES, main
from bench.gpt import ablation
from bench.gpt.naive import naive_copy
from bench.gpt.training import Shape, our_job
from bench.harness import Comparison, Peak, Settings, alternate, compare_in_workers
from bench.stages import classification
from bench.stages.classification import NaiveRun
from bench.worker import Alternative, Job, Ran, Worker, as_it_comes, as_ours, workers
from gpt.base.errors import InputError, RunError
from gpt.batches.data import batch_indices
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, GPTClassifier
from gpt.train.recipe import TrainParams
from stages.finetune_classifier import freeze

ROOT = Path(__file__).parents[1]
TINY = GPTConfig(vocab_size=97, context_length=16, n_layer=2, n_head=2, n_embd=16)


# --- what the workers below are told --------------------------------------------------------------


def write_turns(name: str, path: Path) -> Job:
    """Each run leaves its name and its process in a file that all share."""

    def run() -> None:
        with path.open("a") as file:
            file.write(f"{name} {os.getpid()}\n")

    return Job(run=run)


def give(value: int) -> Job:
    return Job(run=lambda: value)


def sleep_before_and_after(seconds: float) -> Job:
    return Job(
        run=lambda: "worked",
        before=lambda: time.sleep(seconds),
        report=lambda result: (time.sleep(seconds), result)[1],
    )


def hold(n_bytes: int) -> Job:
    held = []
    return Job(run=lambda: held.append(b"1" * n_bytes))


def is_deterministic() -> Job:
    return Job(run=torch.are_deterministic_algorithms_enabled)


def die(code: int) -> Job:
    return Job(run=lambda: os._exit(code))


def be_killed() -> Job:
    return Job(run=lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail(error: type[Exception], message: str) -> Job:
    raise error(message)


def multiply() -> Job:
    a = torch.randn(512, 512)
    return Job(run=lambda: (a @ a).sum().item())


# --- taking turns ---------------------------------------------------------------------------------


def test_alternatives_take_turns_and_the_warm_up_does_not_count():
    calls: list[str] = []

    def run(name: str) -> Ran:
        calls.append(name)
        return Ran(seconds=float(len(calls)), result=None)

    runs = alternate({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert [ran.seconds for ran in runs["a"]] == [3, 5, 7]
    assert [ran.seconds for ran in runs["b"]] == [4, 6, 8]
    calls.clear()
    runs = alternate({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=3, warm_up=False)
    assert calls == ["a", "b"] * 3
    assert [ran.seconds for ran in runs["a"]] == [1, 3, 5]


def test_workers_take_turns_each_in_a_process_of_its_own_and_are_gone_in_the_end(tmp_path):
    turns = tmp_path / "turns"
    runs = compare_in_workers(
        {name: Alternative(write_turns, (name, turns)) for name in ("a", "b")},
        Settings(threads=1, rounds=2),
    )
    lines = [line.split() for line in turns.read_text().splitlines()]
    assert [name for name, _ in lines] == ["a", "b"] * 3
    pids = {int(pid) for _, pid in lines}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert {name: len(done) for name, done in runs.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("warm_up", [True, False])
def test_an_alternative_that_does_other_work_is_refused(warm_up):
    alternatives = {"a": lambda: Ran(seconds=1, result=1), "b": lambda: Ran(seconds=1, result=2)}
    with pytest.raises(RunError, match=r"b gives another result than a \(2, not 1\)"):
        alternate(alternatives, rounds=1, agree=int.__eq__, warm_up=warm_up)


def test_an_alternative_that_does_other_work_in_its_process_is_refused():
    with pytest.raises(RunError, match="b gives another result than a"):
        compare_in_workers(
            {"a": Alternative(give, (1,)), "b": Alternative(give, (2,))},
            Settings(threads=1, rounds=1),
            agree=int.__eq__,
        )


# --- a worker -------------------------------------------------------------------------------------


def test_what_comes_before_a_run_and_after_it_is_not_timed():
    with workers({"a": Alternative(sleep_before_and_after, (0.3,))}, threads=1) as started:
        ran = started["a"]()
    assert ran.result == "worked"
    assert ran.seconds < 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_each_worker_tells_its_own_peak_memory():
    alternatives = {
        "small": Alternative(hold, (1,)),
        "large": Alternative(hold, (400_000_000,)),
    }
    with workers(alternatives, threads=1) as started:
        peaks = {name: run().peak_memory for name, run in started.items()}
    assert peaks["large"] - peaks["small"] == pytest.approx(4e8, rel=0.1)


def test_only_our_worker_gets_what_we_set_for_a_process():
    alternatives = {
        "ours": Alternative(is_deterministic, setting=as_ours),
        "theirs": Alternative(is_deterministic, setting=as_it_comes),
    }
    with workers(alternatives, threads=1) as started:
        assert {name: run().result for name, run in started.items()} == {
            "ours": True,
            "theirs": False,
        }


@pytest.mark.parametrize(
    ("alternative", "message"),
    [
        (Alternative(die, (3,)), "a: its process ended with exit code 3"),
        (Alternative(be_killed), "a: its process was killed; was there too little memory?"),
    ],
)
def test_a_worker_that_dies_gives_one_clear_line(alternative, message):
    with (
        workers({"a": alternative}, threads=1) as started,
        pytest.raises(RunError) as raised,
    ):
        started["a"]()
    assert str(raised.value) == message


def test_an_error_in_a_worker_is_raised_here_in_one_line():
    with pytest.raises(RunError) as failed:
        Worker("a", Alternative(fail, (ValueError, "no such shape\nand a long tale")), 1)
    assert str(failed.value) == "a: ValueError: no such shape"
    with pytest.raises(InputError, match="a: no module; install the peers with `pip install"):
        Worker("a", Alternative(fail, (ModuleNotFoundError, "no module")), 1)


def test_a_worker_that_waits_uses_no_processor():
    with workers({"a": Alternative(multiply)}, threads=2) as started:
        started["a"]()
        time.sleep(0.2)  # threads that wait for more work look for it a moment
        process = psutil.Process(started["a"].pid)
        before = process.cpu_times()
        time.sleep(0.5)
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="the system must end it")
def test_a_worker_dies_with_its_parent_in_the_middle_of_a_run():
    code = (
        "import time\n"
        "from bench.worker import Alternative, Worker\n"
        "from tests.test_bench import sleep_before_and_after\n"
        "if __name__ == '__main__':\n"
        "    worker = Worker('a', Alternative(sleep_before_and_after, (60,)), 1)\n"
        "    print(worker.pid, flush=True)\n"
        "    worker()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.2)
    parent.kill()
    parent.communicate()
    worker.wait(timeout=5)


# --- tables ---------------------------------------------------------------------------------------


def test_rates_are_medians_and_ratios_are_between_runs_of_one_round():
    comparison = Comparison(
        title="",
        work=100,
        unit="tokens",
        # the machine was slow in the second round and stalled one run in the third
        seconds={"ours": [1.0, 4.0, 1.0], "peer": [2.0, 8.4, 19.0]},
        peak=Peak("peak", lambda: 400.0),
        cost=2,
        columns={"peak memory": {"ours": "1.00 GB", "peer": "2.00 GB"}, "loss": {"ours": "3"}},
    )
    assert comparison.rate("ours") == 100
    assert comparison.rate("peer") == pytest.approx(100 / 8.4)
    assert comparison.ratios("peer") == pytest.approx([2.0, 2.1, 19.0])
    assert comparison.rows() == [
        ["ours", "100", "50%", "1.00 GB", "3", "", ""],
        ["peer", "11.9", "6%", "2.00 GB", "", "2.10x", "2.00 … 19.00"],
    ]
    assert comparison.header() == [
        "alternative",
        "tokens/s",
        "share of peak",
        "peak memory",
        "loss",
        "first against it",
        "rounds",
    ]


def test_where_nothing_is_counted_the_seconds_of_a_run_are_shown():
    comparison = Comparison(title="", seconds={"ours": [3.0, 1.0, 2.0], "peer": [6.0, 8.0, 4.0]})
    assert comparison.header() == ["alternative", "seconds", "first against it", "rounds"]
    assert comparison.rows() == [
        ["ours", "2.0", "", ""],
        ["peer", "6.0", "2.00x", "2.00 … 8.00"],
    ]


def test_a_peak_is_the_highest_of_all_probes_so_that_a_busy_moment_does_not_lower_it():
    measured = iter([3.0, 9.0, 5.0])
    peak = Peak("peak", lambda: next(measured))
    alternate({"a": lambda: Ran(seconds=1, result=None)}, rounds=1, peaks=[peak])
    assert peak.best == 9.0
    assert next(measured, None) is None


def test_shares_are_of_what_was_there_while_a_comparison_ran():
    given = iter([9e9, 3e9, 4e9])
    session = Peak("memory bandwidth", lambda: next(given), "GB/s")
    peak = session.of_a_comparison()
    alternate({"a": lambda: Ran(seconds=1, result=None)}, 1, peaks=[peak], warm_up=False)
    assert (peak.best, session.best) == (4e9, 9e9)
    comparison = Comparison(title="", seconds={"a": [1]}, unit="tokens", peak=peak, note="Once.")
    assert comparison.remarks == (
        "Once. Memory bandwidth in these rounds 3.0 … 4.0 GB/s; shares are of the highest."
    )


def test_the_naive_model_computes_what_ours_does():
    torch.manual_seed(0)
    model = GPT(TINY)
    for parameter in model.parameters():  # norms and biases with a say, too
        parameter.data += 0.2 * torch.randn_like(parameter)
    idx = torch.randint(97, (3, 12))
    with torch.no_grad():
        assert torch.allclose(model(idx), naive_copy(model)(idx), atol=1e-4)


def test_a_naive_classification_step_is_a_plain_gradient_step_on_the_rows_of_the_stage():
    torch.manual_seed(0)
    model = GPTClassifier(TINY, ["ham", "spam"])
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    lengths = torch.randint(3, 13, (24,))
    texts = torch.randint(97, (24, 12))
    classes = torch.randint(2, (24,))
    params = TrainParams(epochs=1, batch_size=8, learning_rate=1e-2, seed=5)
    parts = dict.fromkeys(("train", "validation"), (texts, lengths, classes))
    naive = NaiveRun.start(model, parts, params)

    freeze(model, 1, None)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for number in range(3):
        rows = torch.tensor(batch_indices(24, 8, 5, number))
        # cut to the longest of the batch: what is behind the last real token changes nothing
        inputs = texts[rows, : lengths[rows].max()]
        loss = F.cross_entropy(model(inputs, lengths[rows]), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert naive.step(number) == pytest.approx(loss.item(), abs=1e-4)
    learnt, expected = naive.model.state_dict(), naive_copy(model).state_dict()
    for name, weight in expected.items():
        if name.endswith("key.bias"):
            continue  # softmax takes it back out: its gradient is rounding alone
        assert torch.allclose(learnt[name], weight, atol=1e-3), name
    with torch.no_grad():
        right = (model(texts, lengths).argmax(1) == classes).float().mean().item()
    assert naive.evaluate("validation")[1] == pytest.approx(right)


def test_a_whole_naive_run_is_counted_as_it_is_done(monkeypatch):
    torch.manual_seed(0)
    model = GPTClassifier(TINY, ["ham", "spam"])

    def part(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.randint(97, (n, 6)), torch.full((n,), 6), torch.randint(2, (n,))

    params = TrainParams(epochs=3, batch_size=4, eval_interval=4, seed=5)
    naive = NaiveRun.start(model, {"train": part(43), "validation": part(10)}, params)
    rows = {"trained": 0, "evaluated": 0}
    forward = type(naive.model).forward

    def counted(model, idx):
        rows["trained" if model.training else "evaluated"] += len(idx)
        return forward(model, idx)

    monkeypatch.setattr(type(naive.model), "forward", counted)
    naive.train()
    assert rows["trained"] == naive.steps * 4 == 3 * 10 * 4
    # at steps 0, 4, … 28 and after 3 epochs: 5 batches of one part, all 10 rows of the other
    assert rows["evaluated"] == (8 + 3) * (5 * 4 + 10) + 43 + 10
    # the last batch of a part, which may be smaller, is counted as a whole one while it trains
    assert naive.evaluated_batches == (8 + 3) * (5 + 3) + (43 + 10) / 4


def test_a_whole_naive_run_is_a_sum_of_its_steps_and_evaluated_batches():
    timed = {"steps": 10, "step_seconds": 2, "evaluated_batches": 7.5, "batch_seconds": 4}
    assert classification._whole(timed) == 50


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_is_printed_and_written_where_it_is_wanted(tmp_path):
    before = {file: file.read_bytes() for file in (ROOT / "bench" / "results").glob("*")}
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "tokenization", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert ran.returncode == 0, ran.stderr
    written = (tmp_path / "tokenization.md").read_text("utf-8")
    assert "| alternative | MB/s | first against it | rounds |" in written
    for name in ("ours: Tokenizer.encode_batch", "tiktoken", "ours: the stage tokenize"):
        assert f"\n| {name} | " in written
        assert name in ran.stdout
    assert "medians of 3 rounds, quick" in written
    assert [file.name for file in tmp_path.iterdir()] == ["tokenization.md"]
    assert before == {file: file.read_bytes() for file in (ROOT / "bench" / "results").glob("*")}


def test_an_unknown_benchmark_is_named_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["speed"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: argument NAME: 'speed' is none of training, generation, tokenization, "
        "classification, instruction, ablation, keeping, recipe, assistant, orchestration\n"
    )


def test_what_cannot_be_had_is_skipped_in_one_line(monkeypatch, capsys):
    monkeypatch.delenv("GPT_PIPELINE_MIRROR", raising=False)
    monkeypatch.setattr("bench.__main__.measure_machine", lambda settings: "a machine")
    assert main(["classification", "instruction"]) == 0
    out = capsys.readouterr().out
    for name, file in (
        ("classification", "SMSSpamCollection"),
        ("instruction", "instruction-data.json"),
    ):
        assert (
            f"\n{name}: skipped: needs real data: set GPT_PIPELINE_MIRROR to a folder that holds "
            f"{file}\n" in out
        )


@pytest.mark.parametrize("change", ablation.CHANGES)
def test_what_is_switched_off_is_what_the_step_would_use(change, monkeypatch):
    replaced: list[str] = []

    def replace(module: str, name: str, value: object) -> None:
        holder = sys.modules[module]
        replaced.append(name)
        assert callable(getattr(holder, name))
        monkeypatch.setattr(holder, name, value)

    monkeypatch.setattr(ablation, "_replace", replace)
    monkeypatch.setattr(ablation, "as_ours", lambda threads: None)
    torch.manual_seed(0)
    shape = Shape("tiny", TINY, 2)
    ours = our_job(shape, "fp32").run()
    ablation.CHANGES[change](1)
    assert len(replaced) == 1
    assert our_job(shape, "fp32").run() == pytest.approx(ours, abs=1e-4)


@pytest.mark.slow
# orchestration takes minutes, and is made of commands that the end-to-end tests run
@pytest.mark.parametrize("name", [name for name in NAMES if name != "orchestration"])
def test_a_quick_run_of_each_benchmark_gives_its_tables(name, tmp_path):
    if name == "generation" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--rounds=1", name, "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"GPT_PIPELINE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    written = (tmp_path / f"{name}.md").read_text("utf-8")
    assert "\n| alternative | " in written
    first = {
        "ablation": "with",
        "assistant": "full, answers, packed",
        "keeping": "a step",
        "recipe": "muon",
    }.get(name, "ours")
    assert f"\n| {first}" in written
