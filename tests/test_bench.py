"""The benchmarks measure what their tables say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.harness import Comparison, Peak, alternate
from bench.naive import naive_copy
from gpt.config import GPTConfig
from gpt.errors import RunError
from gpt.model import GPT

ROOT = Path(__file__).parents[1]


def test_alternatives_take_turns_and_the_warm_up_does_not_count():
    calls: list[str] = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3}


def test_an_alternative_that_does_other_work_is_refused():
    with pytest.raises(RunError, match="b gives another result than a"):
        alternate({"a": lambda: 1, "b": lambda: 2}, rounds=1, agree=int.__eq__)


def test_rates_are_medians_and_ratios_are_between_runs_of_one_round():
    comparison = Comparison(
        title="",
        work=100,
        unit="tokens",
        # the machine was slow in the second round and stalled one run in the third
        seconds={"ours": [1.0, 4.0, 1.0], "peer": [2.0, 8.4, 19.0]},
        peak=Peak("peak", lambda: 400.0),
        cost=2,
    )
    assert comparison.rate("ours") == 100
    assert comparison.rate("peer") == pytest.approx(100 / 8.4)
    assert comparison.ratios("peer") == pytest.approx([2.0, 2.1, 19.0])
    assert comparison.rows() == [
        ["ours", "100", "50%", "", ""],
        ["peer", "11.9", "6%", "2.10x", "2.00 … 19.00"],
    ]


def test_a_peak_is_the_highest_of_all_probes_so_that_a_busy_moment_does_not_lower_it():
    measured = iter([3.0, 9.0, 5.0])
    peak = Peak("peak", lambda: next(measured))
    alternate({"a": lambda: None}, rounds=2, peak=peak)
    assert peak.best == 9.0
    assert next(measured, None) is None


def test_the_naive_model_computes_what_ours_does():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, context_length=16, n_layer=2, n_head=2, n_embd=16))
    for parameter in model.parameters():  # norms and biases with a say, too
        parameter.data += 0.2 * torch.randn_like(parameter)
    idx = torch.randint(97, (3, 12))
    with torch.no_grad():
        assert torch.allclose(model(idx), naive_copy(model)(idx), atol=1e-4)


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
        "error: argument NAME: 'speed' is none of training, generation, tokenization\n"
    )
