"""Alternatives on the same inputs, side by side in one process, and the tables of that.

A machine is rarely quiet and rarely equally fast for a minute. So alternatives take turns
(A B C A B C …), each ratio is between two runs of the same round, and the median of the rounds
counts. Speeds depend on the machine; the ratios and the shares of its peaks are what to read.
"""

from __future__ import annotations

import datetime
import functools
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.table import Table

from gpt.errors import RunError
from gpt.files import whole_file

Alternatives = Mapping[str, Callable[[], Any]]
"""What is compared, by name, ours first: a call is one run, and ends when its work is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to measure."""

    threads: int
    rounds: int = 5
    quick: bool = False
    """Small shapes and inputs: to see that everything works, not to quote."""
    batch: int = 2
    """Rows in a training step of GPT-2 124M."""
    vocabulary: Path | None = None
    """A folder of GPT-2's vocabulary files; without one a small vocabulary is learnt."""


# --- the machine ----------------------------------------------------------------------------------


class Peak:
    """The most that the machine was seen to give of something, a second.

    Probed at the start and again in every round of a comparison: the machine may have been busy
    with something else at one of these moments, hardly at all of them.
    """

    def __init__(self, name: str, measure: Callable[[], float]) -> None:
        self.name = name
        self.best = 0.0
        self._measure = measure
        self.probe()

    def probe(self) -> None:
        """Measure once more; the highest counts."""
        self.best = max(self.best, self._measure())


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where the measurements were taken, and the most it gives."""

    cpu: str
    cores: int
    threads: int
    torch_version: str
    load: float
    """Processes that wanted to run in the minute before: well above 0, others were at work."""
    matmul: Mapping[torch.dtype, Peak]
    """FLOP/s of a large matrix product."""
    memory: Peak
    """Bytes a second that can be read from memory."""

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads, torch {self.torch_version}; "
            f"matmul peak {self.matmul[torch.float32].best / 1e9:,.0f} GFLOP/s fp32, "
            f"{self.matmul[torch.bfloat16].best / 1e9:,.0f} bf16; "
            f"memory {self.memory.best / 1e9:.1f} GB/s; load before the start {self.load:.1f}"
        )


def measure_machine(settings: Settings) -> Machine:
    """Name the machine and measure its peaks with the threads of `settings`."""
    load = psutil.getloadavg()[0]
    size = 1024 if settings.quick else 2048
    # many times what a core's own caches hold, and more than most shared ones
    n_bytes = (1 << 27) if settings.quick else (1 << 30)
    return Machine(
        cpu=_cpu_name(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        load=load,
        matmul={
            dtype: Peak("matmul peak", functools.partial(_matmul_rate, size, dtype))
            for dtype in (torch.float32, torch.bfloat16)
        },
        memory=Peak("memory bandwidth", functools.partial(_read_rate, n_bytes)),
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _matmul_rate(size: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, size, size).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_time(lambda: torch.mm(a, b, out=out))


def _read_rate(n_bytes: int) -> float:
    matrix, vector = torch.ones(n_bytes // 4).view(-1, 1024), torch.ones(1024)
    # which of the two keeps up with memory differs between machines
    return n_bytes / min(_best_time(matrix.sum), _best_time(lambda: torch.mv(matrix, vector)))


def _best_time(run: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of some runs: of a peak, what disturbs it is no part."""
    run()
    return min(_time(run) for _ in range(repeats))


def _time(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- a comparison ---------------------------------------------------------------------------------


def alternate(
    alternatives: Alternatives,
    rounds: int,
    agree: Callable[[Any, Any], bool] | None = None,
    peak: Peak | None = None,
) -> dict[str, list[float]]:
    """Run each alternative once in every round, in turn, after one run that does not count.

    Args:
        alternatives: at least one; the first is what the others are held against.
        rounds: how often each is timed.
        agree: whether two results are those of the same work. Each alternative's first result
            must agree with that of the first alternative.
        peak: probed in every round.

    Returns:
        The seconds of each alternative, one number a round.

    Raises:
        RunError: an alternative did other work than the first.
    """
    results = {name: run() for name, run in alternatives.items()}
    ours, *others = results
    for name in others:
        if agree is not None and not agree(results[ours], results[name]):
            raise RunError(f"{name} gives another result than {ours}: their times say nothing")
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        if peak is not None:
            peak.probe()
        for name, run in alternatives.items():
            seconds[name].append(_time(run))
    return seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The times of some alternatives for the same work, the first of them ours."""

    title: str
    work: float
    """How much one run does."""
    unit: str
    """Of what."""
    seconds: Mapping[str, Sequence[float]]
    """Of each alternative, one number a round."""
    peak: Peak | None = None
    """What of the machine limits it."""
    cost: float = 0.0
    """How much of that a unit needs."""

    def rate(self, name: str) -> float:
        """Units a second in the median run."""
        return self.work / median(self.seconds[name])

    def ratios(self, name: str) -> list[float]:
        """How many times as fast as `name` ours is, round by round."""
        ours = next(iter(self.seconds.values()))
        return [theirs / mine for mine, theirs in zip(ours, self.seconds[name], strict=True)]

    def header(self) -> list[str]:
        """The names of the columns of `rows`."""
        share = [] if self.peak is None else [f"share of {self.peak.name}"]
        return ["alternative", f"{self.unit}/s", *share, "first against it", "rounds"]

    def rows(self) -> list[list[str]]:
        """A line for each alternative."""
        rows = []
        for position, name in enumerate(self.seconds):
            rate, ratios = self.rate(name), self.ratios(name)
            share = [] if self.peak is None else [f"{rate * self.cost / self.peak.best:.0%}"]
            against = (
                [f"{median(ratios):.2f}x", f"{min(ratios):.2f} … {max(ratios):.2f}"]
                if position
                else ["", ""]
            )
            rows.append([name, f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}", *share, *against])
        return rows


# --- tables ---------------------------------------------------------------------------------------


def as_table(comparison: Comparison) -> Table:
    """The comparison for a terminal."""
    table = Table(title=comparison.title, title_justify="left")
    for position, column in enumerate(comparison.header()):
        table.add_column(column, justify="right" if position else "left")
    for row in comparison.rows():
        table.add_row(*row)
    return table


def write_results(
    path: Path,
    comparisons: Iterable[Comparison],
    *,
    machine: Machine,
    settings: Settings,
    command: str,
) -> None:
    """Write the comparisons as Markdown, with where, when and how they were measured."""
    lines = [
        f"# {path.stem}",
        "",
        f"{machine}.",
        "",
        f"`{command}`, {datetime.datetime.now(datetime.UTC).date()}, "
        f"medians of {settings.rounds} rounds"
        + (", quick: small shapes, not to be quoted." if settings.quick else "."),
    ]
    for comparison in comparisons:
        header = comparison.header()
        lines += ["", f"## {comparison.title}", ""]
        lines += [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
        lines += [_line(row) for row in comparison.rows()]
    with whole_file(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
