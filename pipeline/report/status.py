"""The DAG as a person asks for it: what is up to date, what would run and why, and what it costs.

Everything is read from DVC and from files that lie in the project; nothing heavy is imported, so
that the answer comes at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from gpt.base.errors import InputError
from gpt.base.files import read_json
from pipeline.dag.graph import Change, Dag, Stage
from pipeline.project.stage_table import STAGES
from pipeline.show.console import safe_console, seconds_in_words
from pipeline.show.markdown import NOTHING, label_of
from pipeline.show.terminal import say_json
from pipeline.tracking.keys import flatten_metrics
from pipeline.tracking.run_notes import last_run, made_by

State = Literal["up to date", "would run", "may run", "optional"]

_STYLES: dict[State, str] = {
    "up to date": "green",
    "would run": "yellow",
    "may run": "cyan",
    "optional": "dim",
}


_MOST_REASONS = 5
_SHORT_ID = 8


@dataclass(frozen=True, slots=True)
class Run:
    """An MLflow run of a stage, as `.pipeline/runs` notes it."""

    id: str
    name: str
    """`#4 train.steps=700`; empty where it was noted before names were."""
    status: str
    url: str


@dataclass(frozen=True, slots=True)
class StageStatus:
    """What there is to say about one stage."""

    name: str
    state: State
    optional: bool
    reasons: list[Change]
    """Why it would run."""
    after: list[str]
    """The stages before it that would run, so that it may have to."""
    seconds: float | None
    """So long the run took that made what is there; None if none is known."""
    metrics: dict[str, float]
    """All that it came to, nested names joined by a slash."""
    run: Run | None
    """The one that made what is there."""
    last_status: str
    """How the last run of the stage ended, which may be another."""


def stage_statuses(root: Path) -> list[StageStatus]:
    """The state of every stage, in the order in which they would run.

    Raises:
        InputError: `dvc.yaml` cannot be read.
    """
    dag = Dag(root)
    changes = dag.changes()
    notes = made_by(dag)
    stale: set[str] = set()
    statuses: list[StageStatus] = []
    for name, stage in dag.stages.items():
        after = [upstream for upstream in stage.upstream if upstream in stale]
        state: State = "would run" if changes[name] else "may run" if after else "up to date"
        if state != "up to date":
            if stage.optional:
                state = "optional"
            else:
                stale.add(name)
        note = notes[name]
        seconds = note.get("seconds")
        statuses.append(
            StageStatus(
                name=name,
                state=state,
                optional=stage.optional,
                reasons=changes[name],
                after=after,
                seconds=float(seconds) if isinstance(seconds, int | float) else None,
                metrics=_metrics(root, stage),
                run=_run(note),
                last_status=str(last_run(root, name).get("status") or ""),
            )
        )
    return statuses


def _metrics(root: Path, stage: Stage) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in stage.metrics:
        with contextlib.suppress(InputError):  # not there yet, or being written: then it has none
            found |= flatten_metrics(read_json(root / path, missing="", remedy=""))
    return found


def _run(note: Mapping[str, Any]) -> Run | None:
    if "run_id" not in note:
        return None
    told = {key: str(note.get(key) or "") for key in ("name", "status", "url")}
    return Run(id=str(note["run_id"]), **told)


def print_status(root: Path, *, verbose: bool = False, as_json: bool = False) -> None:
    """Print the state of every stage.

    Args:
        root: the project.
        verbose: every reason, every metric and the addresses of the runs.
        as_json: all of it as JSON.
    """
    statuses = stage_statuses(root)
    if as_json:
        say_json({"stages": [asdict(each) for each in statuses]})
        return
    console = safe_console(soft_wrap=True)
    lines = [_cells(each) for each in statuses]
    columns = ("stage", "state", "took", "run", "metrics")
    widths = [max(map(len, cells)) for cells in zip(columns, *lines, strict=True)]
    heading = [Text(cell, style="dim") for cell in columns]
    console.print(_line(heading, widths))
    for status, cells in zip(statuses, lines, strict=True):
        styles = ("bold", _STYLES[status.state], "", "dim", "")
        styled = [Text(cell, style=style) for cell, style in zip(cells, styles, strict=True)]
        console.print(_line(styled, widths))
        for text, style in _notes(status, verbose):
            console.print(Text(f"  {text}", style=style))
    if last := _last_line(statuses):
        console.print(f"\n{last}")


def _line(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    """Cells in columns; durations are figures, and what is last needs no padding."""
    line = Text()
    for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        padding = " " * (width - len(cell))
        if index:
            line += Text("  ")
        line += Text(padding) + cell if index == 2 else cell + Text(padding)
    line.rstrip()
    return line


def _cells(status: StageStatus) -> tuple[str, ...]:
    took = NOTHING if status.seconds is None else seconds_in_words(status.seconds)
    run = NOTHING
    if status.run:
        number = status.run.name.split(" ", 1)[0]
        run = f"{number} {status.run.id[:_SHORT_ID]}".strip()
    return status.name, status.state, took, run, _short_metrics(status)


def _short_metrics(status: StageStatus) -> str:
    spec = STAGES.get(status.name)
    names = (spec and spec.headline) or list(status.metrics)[:1]
    known = {name: status.metrics[name] for name in names if name in status.metrics}
    shown = [f"{label_of(name)} {_figure(value)}" for name, value in known.items()]
    return ", ".join(shown) or NOTHING


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and value >= 10 else f"{value:.4g}"


def _notes(status: StageStatus, verbose: bool) -> list[tuple[str, str]]:
    """The lines below a stage's own, each with its style."""
    notes: list[tuple[str, str]] = []
    if status.state == "optional":
        notes.append((f"runs only when asked for: `gpt-pipeline run {status.name}`", "dim"))
    if status.state != "optional" or verbose:
        most = len(status.reasons) if verbose else _MOST_REASONS
        notes += [(str(each), "yellow") for each in status.reasons[:most]]
        if more := len(status.reasons) - most if status.reasons[most:] else 0:
            notes.append((f"and {more} more; --verbose shows all", "yellow"))
        if status.after and not status.reasons:
            notes.append((f"after {', '.join(status.after)}", "cyan"))
    if status.last_status not in ("FINISHED", ""):
        notes.append((f"its last run is {status.last_status}", "red"))
    if verbose:
        if status.run:
            notes += [(text, "dim") for text in (status.run.name, status.run.url) if text]
        notes += [(f"{name} {_figure(value)}", "dim") for name, value in status.metrics.items()]
    return notes


def _last_line(statuses: Sequence[StageStatus]) -> str:
    stale = [each for each in statuses if each.state in ("would run", "may run")]
    if not stale:
        return ""
    plain = sum(not each.optional for each in statuses)
    line = f"`gpt-pipeline run` brings {len(stale)} of {plain} up to date"
    known = [each.seconds for each in stale if each.seconds is not None]
    if known:
        those = "they" if len(known) == len(stale) else f"{len(known)} of them"
        those = "it" if len(stale) == 1 else those
        line += f"; last time {those} took {seconds_in_words(sum(known))}"
    return f"{line}."
