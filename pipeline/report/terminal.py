"""The report at the end of a run: what was built, how good it is, and what to do next.

Written as one HTML page and as Markdown (`pipeline.report.page`); the terminal shows it in short.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from pprint import pformat

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gpt.base.errors import RunError, in_one_line
from gpt.base.files import write_json
from pipeline.report.card import model_card
from pipeline.report.content import (
    Grid,
    Verdict,
    assistant_in_short,
    bases,
    before_and_after,
    classes,
    classifier_in_short,
    costs,
    spread,
    verdicts,
    what_fine_tuning_buys,
)
from pipeline.report.facts import Answer, Facts, report_facts
from pipeline.report.page import MARKDOWN, PAGE, PICTURES, Report, write_report
from pipeline.show.console import safe_console
from pipeline.show.markdown import shown, visible
from pipeline.tracking.connection import connect

SHOWN_ANSWERS = 3
_TOLD = Path(".pipeline/report.json")
"""Which facts the report that was written last told."""

_NEXT = (
    ("talk to the assistant", "gpt-pipeline chat"),
    ("classify a message", 'gpt-pipeline classify "You won a free cruise! Text SEA to 80800"'),
    ("let the base model write", 'gpt-pipeline generate "The old clock"'),
    ("compare runs and models", "make ui"),
    ("change something", "edit params.yaml, then gpt-pipeline status and make run"),
)
_EXCERPT = 90  # characters of an answer


def print_report(root: Path, console: Console | None = None, *, always: bool = True) -> None:
    """Print the report of the project's last results in short, and write it anew.

    MLflow keeps what was written beside the evaluation's run, and each registered version's card.

    Args:
        root: the project.
        console: where to print.
        always: ask MLflow and write the report even if nothing ran since it was written.

    Raises:
        InputError: the pipeline has not been run to its end.
    """
    console = safe_console(console)
    facts = report_facts(root, ask=always)
    if always or not _is_told(root, facts):
        report = write_report(root, facts)
        if kept := _keep_in_mlflow(root, facts, report):
            console.print(_text(kept), style="yellow", soft_wrap=True)
        write_json(root / _TOLD, _fingerprint(facts))
    for title, parts in _parts(facts):
        console.print()
        console.print(Text(title, style="bold"))
        for part in parts:
            console.print(Padding(part, (0, 0, 0, 2)))
    console.print(Text(f"\n{PAGE.as_posix()}: the whole report; {MARKDOWN.as_posix()}: the same"))


def _fingerprint(facts: Facts) -> str:
    """Tells facts apart, but for the time at which they were gathered."""
    # in which order things were read is no news
    told = pformat(replace(facts, made=datetime.min), sort_dicts=True)
    return sha256(told.encode()).hexdigest()


def _is_told(root: Path, facts: Facts) -> bool:
    try:
        told = json.loads((root / _TOLD).read_text())
    except (OSError, ValueError):
        return False
    there = all((root / each).exists() for each in (PAGE, MARKDOWN, PICTURES))
    return bool(there and told == _fingerprint(facts))


def _keep_in_mlflow(root: Path, facts: Facts, report: Report) -> str:
    """Why MLflow did not take the report and the cards; empty if it did."""
    evaluated = facts.executions.get("evaluate")
    run_id = evaluated.run_id if evaluated else None
    if run_id is None and not facts.versions:
        return ""  # the report says why
    from pipeline.tracking.mlflow_classes import MlflowException

    try:
        client = connect(root)
        for name, version in facts.versions.items():
            client.update_model_version(name, str(version), model_card(facts, name))
        if run_id is not None:
            client.log_artifact(run_id, str(report.page), "report")
    except (RunError, MlflowException, OSError) as error:
        why = in_one_line(error)
        return f"MLflow did not take the report; `gpt-pipeline report` tries again: {why}"
    return ""


def _parts(facts: Facts) -> list[tuple[str, list[RenderableType]]]:
    parts: list[tuple[str, list[RenderableType]]] = []
    if facts.executions:
        parts.append(("Stages", [_table(costs(facts), without="code"), _text(facts.tracking)]))
    return [
        *parts,
        ("Verdicts", [_verdict(each) for each in verdicts(facts)]),
        ("Base models, on the validation text", [_table(bases(facts))]),
        (
            "Classifier",
            [
                _text(classifier_in_short(facts)),
                Text(),
                _table(what_fine_tuning_buys(facts)),
                Text(),
                _table(classes(facts)),
            ],
        ),
        (
            "Assistant",
            [
                _text(assistant_in_short(facts)),
                Text(),
                _table(before_and_after(facts)),
                Text(),
                _samples(spread(facts.answers, SHOWN_ANSWERS)),
            ],
        ),
        ("Next", [_next()]),
    ]


def _text(text: str) -> Text:
    return Text(visible(text, limit=None))  # as text: a label or an answer is not markup


def _table(grid: Grid, without: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    kept = [i for i, column in enumerate(grid.columns) if column != without]
    for i in kept:
        table.add_column(
            grid.columns[i], justify="right" if grid.align[i] == "r" else "left", no_wrap=i == 0
        )
    for row in grid.rows:
        table.add_row(*(Text(shown(row[i])) for i in kept))
    return table


def _verdict(verdict: Verdict) -> Text:
    style = {"promoted": "green", "kept": "yellow"}.get(verdict.state, "dim")
    line = Text(f"{visible(verdict.model)}: ") + Text(verdict.verdict, style=style)
    said = [f"; {verdict.score} {verdict.of}.", *verdict.why]
    return line + Text(visible(" ".join(said), limit=None))


def _samples(answers: list[Answer]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=True)
    for column in ("instruction", "before", "after"):
        table.add_column(column, ratio=1)
    for answer in answers:
        cells = (answer.task, answer.base, answer.assistant)
        table.add_row(*(Text(visible(cell, limit=_EXCERPT)) for cell in cells))
        table.add_row()
    return table


def _next() -> Table:
    table = Table.grid(padding=(0, 3))
    for what, command in _NEXT:
        table.add_row(what, Text(command, style="bold"))
    return table
