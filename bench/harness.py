"""Alternatives on the same inputs, side by side, and the tables of that.

A machine is rarely quiet and rarely equally fast for a minute. So alternatives take turns
(A B C A B C …), each in its own process, each ratio is between two runs of the same round, and the
median of the rounds counts. Speeds depend on the machine; the ratios and the shares of its peaks
are what to read.
"""

from __future__ import annotations

import datetime
import functools
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.table import Table

from bench.worker import Alternative, Ran, workers
from gpt.base.errors import RunError
from gpt.base.files import whole_file
from gpt.model.device import Precision


class Skipped(Exception):  # noqa: N818  nothing went wrong
    """A benchmark that cannot be had here; says why in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to measure."""

    threads: int
    rounds: int = 5
    quick: bool = False
    """Small shapes and inputs: to see that everything works, not to quote."""
    full: bool = False
    """Also run to its end, once, what is otherwise timed in part and multiplied."""
    batch: int = 8
    """Rows in a training step of GPT-2 124M."""
    vocabulary: Path | None = None
    """A folder of GPT-2's vocabulary files; without one a small vocabulary is learnt."""
    weights: Path | None = None
    """A model directory to fine-tune; without one GPT-2 124M with random weights."""
    mirror: Path | None = None
    """The folder of real data."""

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Each in which ours is measured; a quick run sees to the one that takes more code."""
        return ("bf16",) if self.quick else ("fp32", "bf16")


# --- the machine ----------------------------------------------------------------------------------


class Peak:
    """The most that the machine was seen to give of something, a second.

    Probed at the start and again in every round of a comparison: the machine may have been busy
    with something else at one of these moments, hardly at all of them.
    """

    def __init__(
        self, name: str, measure: Callable[[], float], unit: str = "", whole: Peak | None = None
    ) -> None:
        self.name = name
        self.probed: list[float] = []
        self._measure = measure
        self._unit = unit  # of a thousand million
        self._whole = whole
        self.probe()

    @property
    def best(self) -> float:
        """The highest of all probes."""
        return max(self.probed)

    def probe(self) -> None:
        """Measure once more."""
        self.probed.append(self._measure())
        if self._whole is not None:
            self._whole.probed.append(self.probed[-1])

    def of_a_comparison(self) -> Peak:
        """The same, by what is probed from now on: a shared machine gives now more, now less."""
        return Peak(self.name, self._measure, self._unit, whole=self)

    def __str__(self) -> str:
        lowest, highest = min(self.probed) / 1e9, self.best / 1e9
        return (
            f"{self.name.capitalize()} in these rounds {lowest:,.1f} … {highest:,.1f} {self._unit}"
        )


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
            dtype: Peak("matmul peak", functools.partial(_matmul_rate, size, dtype), "GFLOP/s")
            for dtype in (torch.float32, torch.bfloat16)
        },
        memory=Peak("memory bandwidth", functools.partial(_read_rate, n_bytes), "GB/s"),
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
    numbers, vector = torch.ones(n_bytes // 4), torch.ones(1024)
    # which of them keeps up with memory differs between machines; none writes anything
    kernels: list[Callable[[], Any]] = [
        numbers.sum,
        numbers.amax,
        lambda: torch.dot(numbers, numbers),
        lambda: torch.mv(numbers.view(-1, 1024), vector),
    ]
    return n_bytes / min(_best_time(kernel) for kernel in kernels)


def _best_time(run: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of some runs: of a peak, what disturbs it is no part."""
    run()
    return min(_time(run) for _ in range(repeats))


def _time(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- a comparison ---------------------------------------------------------------------------------


def compare_in_workers(
    alternatives: Mapping[str, Alternative],
    settings: Settings,
    agree: Callable[[Any, Any], bool] | None = None,
    peaks: Sequence[Peak] = (),
    warm_up: bool = True,
) -> dict[str, list[Ran]]:
    """`alternate`, each alternative in a process of its own; all of them ended in the end."""
    with workers(alternatives, settings.threads) as started:
        return alternate(started, settings.rounds, agree, peaks, warm_up)


def alternate(
    alternatives: Mapping[str, Callable[[], Ran]],
    rounds: int,
    agree: Callable[[Any, Any], bool] | None = None,
    peaks: Sequence[Peak] = (),
    warm_up: bool = True,
) -> dict[str, list[Ran]]:
    """Run each alternative once in every round, in turn, after one run that does not count.

    Args:
        alternatives: at least one; the first is what the others are held against.
        rounds: how often each is timed.
        agree: whether two results are those of the same work. Each alternative's first result
            must agree with that of the first alternative.
        peaks: probed in every round.
        warm_up: False where a run is long: then the first counts, too.

    Returns:
        The runs of each alternative, one a round.

    Raises:
        RunError: an alternative did other work than the first.
    """
    runs: dict[str, list[Ran]] = {name: [] for name in alternatives}
    for number in range(rounds + warm_up):
        for peak in peaks:
            peak.probe()
        for name, run in alternatives.items():
            runs[name].append(run())
        if number == 0 and agree is not None:
            _check_agreement(runs, agree)
    return {name: done[int(warm_up) :] for name, done in runs.items()}


def _check_agreement(runs: Mapping[str, Sequence[Ran]], agree: Callable[[Any, Any], bool]) -> None:
    (ours, (first, *_)), *others = runs.items()
    for name, (theirs, *_) in others:
        if not agree(first.result, theirs.result):
            raise RunError(
                f"{name} gives another result than {ours} ({_shown(theirs.result)}, not "
                f"{_shown(first.result)}): their times say nothing"
            )


def _shown(result: Any) -> str:
    text = str(result)
    return text if len(text) <= 60 else f"{text[:57]}…"


def seconds_of(runs: Mapping[str, Sequence[Ran]]) -> dict[str, list[float]]:
    """The seconds of each alternative, one number a round."""
    return {name: [ran.seconds for ran in done] for name, done in runs.items()}


def peak_memory_of(runs: Mapping[str, Sequence[Ran]]) -> dict[str, str]:
    """The most that each alternative's process held, as a table shows it."""
    return {
        name: f"{most / 1e9:.2f} GB" if (most := max(ran.peak_memory for ran in done)) else "?"
        for name, done in runs.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The times of some alternatives for the same work, the first of them ours."""

    title: str
    seconds: Mapping[str, Sequence[float]]
    """Of each alternative, one number a round."""
    work: float = 1
    """How much one run does."""
    unit: str = ""
    """Of what; where nothing is counted, a run's seconds are shown instead of a rate."""
    peak: Peak | None = None
    """What of the machine limits it."""
    cost: float = 0.0
    """How much of that a unit needs."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What else a table says of each alternative, by column and alternative."""
    note: str = ""
    """What a reader has to know."""

    @property
    def remarks(self) -> str:
        """What stands below its table."""
        peak = [] if self.peak is None else [f"{self.peak}; shares are of the highest."]
        return " ".join([*filter(None, [self.note]), *peak])

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
        measured = f"{self.unit}/s" if self.unit else "seconds"
        return ["alternative", measured, *share, *self.columns, "first against it", "rounds"]

    def rows(self) -> list[list[str]]:
        """A line for each alternative."""
        rows = []
        for position, name in enumerate(self.seconds):
            rate, ratios = self.rate(name), self.ratios(name)
            measured = rate if self.unit else median(self.seconds[name])
            share = [] if self.peak is None else [f"{rate * self.cost / self.peak.best:.0%}"]
            against = (
                [f"{median(ratios):.2f}x", f"{min(ratios):.2f} … {max(ratios):.2f}"]
                if position
                else ["", ""]
            )
            rows.append(
                [
                    name,
                    f"{measured:,.0f}" if measured >= 100 else f"{measured:.1f}",
                    *share,
                    *(column.get(name, "") for column in self.columns.values()),
                    *against,
                ]
            )
        return rows


# --- tables ---------------------------------------------------------------------------------------


def as_table(comparison: Comparison) -> Table:
    """The comparison for a terminal."""
    table = Table(
        title=comparison.title,
        title_justify="left",
        caption=comparison.remarks or None,
        caption_justify="left",
    )
    for position, column in enumerate(comparison.header()):
        table.add_column(
            column,
            justify="right" if position else "left",
            no_wrap=column in ("alternative", "rounds"),  # the others' headers may be wrapped
        )
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
        f"medians of {settings.rounds} round{'' if settings.rounds == 1 else 's'}"
        + (", quick: small shapes, not to be quoted." if settings.quick else "."),
    ]
    for comparison in comparisons:
        header = comparison.header()
        lines += ["", f"## {comparison.title}", ""]
        lines += [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
        lines += [_line(row) for row in comparison.rows()]
        lines += ["", comparison.remarks] if comparison.remarks else []
    with whole_file(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
