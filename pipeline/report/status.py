"""The state of the DAG: what is up to date, what would run and why, and what it costs.

Everything is read from DVC and from the project's files, and no heavy library is imported, so that
the answer comes at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.text import Text

from gpt.base.errors import InputError
from gpt.base.files import read_json
from pipeline.dag.graph import Dag, Reason, Stage
from pipeline.project.stage_table import STAGES
from pipeline.show.console import safe_console, seconds_in_words
from pipeline.show.markdown import NOTHING, label_of
from pipeline.show.terminal import say_json
from pipeline.tracking.keys import flatten_metrics
from pipeline.tracking.run_notes import last_run, made_by

State = Literal["up to date", "would run", "may run", "optional"]

_STATE_STYLES: dict[State, str] = {
    "up to date": "green",
    "would run": "yellow",
    "may run": "cyan",
    "optional": "dim",
}
_STATUS_COLUMNS = ("stage", "state", "took", "run", "metrics")
_MOST_REASONS = 5
_ID_LENGTH = 8  # characters of an MLflow run's id


@dataclass(frozen=True, slots=True)
class StageStatus:
    """What there is to say about one stage.

    Attributes:
        name: of the stage.
        state: whether it would run.
        optional: it runs only when it is asked for.
        reasons: why it would run.
        after: the stages before it that would run, so it may have to run too.
        seconds: how long the run that made its outputs took; None if that is not known.
        metrics: its final metrics, nested names joined by a slash.
        run: the MLflow run that made its outputs: `id`, `name` (`#4 train.steps=700`), `status` and
            `url`; None if that is not known.
        last_status: how the last run of the stage ended, which may be another one.
    """

    name: str
    state: State
    optional: bool
    reasons: list[Reason]
    after: list[str]
    seconds: float | None
    metrics: dict[str, float]
    run: dict[str, str] | None
    last_status: str


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
        run = {key: str(note.get(key) or "") for key in ("name", "status", "url")}
        statuses.append(
            StageStatus(
                name=name,
                state=state,
                optional=stage.optional,
                reasons=changes[name],
                after=after,
                seconds=note.get("seconds"),
                metrics=_metrics(root, stage),
                run={"id": str(note["run_id"]), **run} if "run_id" in note else None,
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
    widths = [max(map(len, cells)) for cells in zip(_STATUS_COLUMNS, *lines, strict=True)]
    console.print(_line(_STATUS_COLUMNS, widths, ["dim"] * len(_STATUS_COLUMNS)))
    for status, cells in zip(statuses, lines, strict=True):
        console.print(_line(cells, widths, ["bold", _STATE_STYLES[status.state], "", "dim", ""]))
        for text, style in _notes(status, verbose):
            console.print(Text(f"  {text}", style=style))
    if last := _last_line(statuses):
        console.print(f"\n{last}")


def _line(cells: Sequence[str], widths: Sequence[int], styles: Sequence[str]) -> Text:
    """Cells in columns, durations aligned to the right."""
    padded = [
        cell.rjust(width) if column == "took" else cell.ljust(width)
        for column, cell, width in zip(_STATUS_COLUMNS, cells, widths, strict=True)
    ]
    line = Text("  ").join(map(Text, padded, styles))
    line.rstrip()
    return line


def _cells(status: StageStatus) -> tuple[str, ...]:
    took = NOTHING if status.seconds is None else seconds_in_words(status.seconds)
    run = NOTHING
    if status.run:
        number, _, _ = status.run["name"].partition(" ")
        run = f"{number} {status.run['id'][:_ID_LENGTH]}".strip()
    spec = STAGES.get(status.name)
    names = (spec and spec.headline) or list(status.metrics)[:1]
    metrics = [
        f"{label_of(name)} {_figure(status.metrics[name])}"
        for name in names
        if name in status.metrics
    ]
    return status.name, status.state, took, run, ", ".join(metrics) or NOTHING


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and value >= 10 else f"{value:.4g}"


def _notes(status: StageStatus, verbose: bool) -> list[tuple[str, str]]:
    """The lines below a stage's own, each with its style."""
    notes: list[tuple[str, str]] = []
    if status.state == "optional":
        notes.append((f"runs only when asked for: `gpt-pipeline run {status.name}`", "dim"))
    if status.state != "optional" or verbose:
        shown = status.reasons if verbose else status.reasons[:_MOST_REASONS]
        notes += [(str(each), "yellow") for each in shown]
        if more := len(status.reasons) - len(shown):
            notes.append((f"and {more} more; --verbose shows all", "yellow"))
        if status.after and not status.reasons:
            notes.append((f"after {', '.join(status.after)}", "cyan"))
    if status.last_status not in ("FINISHED", ""):
        notes.append((f"its last run is {status.last_status}", "red"))
    if verbose:
        if status.run:
            notes += [(status.run[key], "dim") for key in ("name", "url") if status.run[key]]
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
        line += f"; last time {len(known)} of them took {seconds_in_words(sum(known))}"
    return f"{line}."
