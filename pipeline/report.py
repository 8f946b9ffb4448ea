"""The page at the end of a run: what was built, how good it is, and what to do next."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gpt.errors import InputError
from pipeline.console import seconds_in_words
from pipeline.dag import last_run

SHOWN_ANSWERS = 3

_NEXT = (
    ("talk to the assistant", "gpt-pipeline chat"),
    ("classify a message", 'gpt-pipeline classify "You won a free cruise! Text SEA to 80800"'),
    ("let the base model write", 'gpt-pipeline generate "The old clock"'),
    ("compare runs and models", "make ui"),
    ("change something", "edit params.yaml, then gpt-pipeline status and make run"),
)


def print_report(root: Path, console: Console | None = None) -> None:
    """Print the report of the project's last results.

    Raises:
        InputError: the pipeline has not been run to its end.
    """
    console = console or Console(highlight=False)
    metrics = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((root / "reports").glob("*/metrics.json"))
    }
    evaluation = metrics.get("evaluation")
    answers = root / "reports" / "evaluation" / "predictions" / "assistant.csv"
    if evaluation is None or not answers.is_file():
        raise InputError(
            f"{root / 'reports' / 'evaluation'}: nothing to report yet; run `gpt-pipeline run`"
        )
    sections: list[tuple[str, RenderableType]] = [
        ("Base models, on the validation text", _bases(evaluation)),
        ("Classifier, on messages it never saw", _classifier(evaluation["classifier"])),
        ("Assistant, on instructions it never saw", _assistant(evaluation["assistant"], answers)),
    ]
    if times := _times(root):
        sections.insert(0, ("Stages", times))
    sections.append(("Next", _next()))
    for title, body in sections:
        console.print()
        console.print(Text(title, style="bold"))
        console.print(Padding(body, (0, 0, 0, 2)))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _times(root: Path) -> Table | None:
    """How long each stage took when it last ran to its end."""
    table = _table("stage", "last run", "took")
    for path in sorted((root / ".pipeline" / "runs").glob("*.json"), key=_changed):
        note = last_run(root, path.stem)
        if note.get("status") == "FINISHED":
            when = datetime.fromtimestamp(_changed(path))
            table.add_row(path.stem, f"{when:%Y-%m-%d %H:%M}", seconds_in_words(note["seconds"]))
    return table if table.row_count else None


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _bases(evaluation: dict[str, dict[str, float]]) -> Table:
    table = _table("model", "loss", "perplexity", "bits a byte", "untrained loss")
    for name in ("pretrain", "gpt2"):
        figures = evaluation[name]
        table.add_row(
            f"models/{name}",
            f"{figures['loss']:.3f}",
            f"{figures['perplexity']:,.1f}",
            f"{figures['bits_per_byte']:.3f}",
            f"{figures['untrained_loss']:.3f}",
        )
    return table


def _classifier(figures: dict[str, float]) -> Group:
    labels = [key.removeprefix("f1_") for key in figures if key.startswith("f1_")]
    table = _table("class", "precision", "recall", "F1")
    for label in sorted(set(labels) - {"macro"}):
        table.add_row(
            label,
            *(f"{figures[f'{score}_{label}']:.1%}" for score in ("precision", "recall", "f1")),
        )
    line = f"accuracy {figures['accuracy']:.2%} of {figures['rows']:.0f} messages"
    return Group(Text(line), Text(), table)


def _assistant(figures: dict[str, float], answers: Path) -> Group:
    table = _table("", "loss", "exact match", "word F1")
    for name, prefix in (("before fine-tuning", "base_"), ("after", "")):
        table.add_row(
            name,
            f"{figures[f'{prefix}loss']:.3f}",
            f"{figures[f'{prefix}exact_match']:.1%}",
            f"{figures[f'{prefix}word_f1']:.1%}",
        )
    frame = pd.read_csv(answers, keep_default_na=False, dtype=str)
    samples = _table("instruction", "before", "after")
    for column in samples.columns:
        column.justify = "left"
        column.ratio = 1
    spread = [len(frame) * i // SHOWN_ANSWERS for i in range(min(SHOWN_ANSWERS, len(frame)))]
    for _, row in frame.iloc[spread].iterrows():
        task = f"{row['instruction']}\n{row['input']}".strip()
        before, after = _shortened(row["base_answer"]), _shortened(row["answer"])
        # as text: what a model wrote is not markup
        samples.add_row(*map(Text, (task, before, after)))
        samples.add_row()
    return Group(table, Text(), samples)


def _shortened(text: str, characters: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"


def _next() -> Table:
    table = Table.grid(padding=(0, 3))
    for what, command in _NEXT:
        table.add_row(what, Text(command, style="bold"))
    return table
