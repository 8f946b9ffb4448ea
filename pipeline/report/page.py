"""The report of a run as files: `reports/report.html`, one file to send around, and
`reports/report.md` with its pictures.

Texts, labels and names come from outside: in the page they are escaped by the template's engine, in
Markdown by `pipeline.show.markdown`.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from jinja2 import Environment, StrictUndefined

from gpt.base.errors import InputError, in_one_line, shortened
from gpt.base.files import whole_directory, whole_file
from pipeline.project.stage_table import STAGES
from pipeline.report.content import (
    Block,
    Gallery,
    Grid,
    Heading,
    Paragraph,
    Picture,
    Pictures,
    Section,
    Texts,
    Verdict,
    Verdicts,
    accuracies,
    sections,
)
from pipeline.report.facts import Facts
from pipeline.show.markdown import escaped, shown, table, visible
from pipeline.show.plots import draw_confusion, draw_curves, draw_scores

PAGE = Path("reports/report.html")
MARKDOWN = Path("reports/report.md")
PICTURES = Path("reports/report")

_TEMPLATE = Path(__file__).with_name("report.html")
_LONGEST = 600  # characters of a text that is compared


@dataclass(frozen=True, slots=True)
class Report:
    """Where the report is."""

    page: Path
    markdown: Path
    pictures: list[Path]


def write_report(root: Path, facts: Facts) -> Report:
    """Write the page, its Markdown and the pictures, each as a whole.

    Raises:
        InputError: a table that is drawn cannot be read.
    """
    lock = root / ".pipeline" / "report.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # a run may end while a person asks for the report
        with whole_directory(root / PICTURES) as folder:
            pictures = _draw(facts, folder)
        content = sections(facts, pictures)
        drawn = sorted((root / PICTURES).iterdir())
        for path, text in ((PAGE, as_html(content, drawn)), (MARKDOWN, as_markdown(content))):
            with whole_file(root / path) as partial:
                partial.write_text(text, encoding="utf-8", newline="\n")
    return Report(root / PAGE, root / MARKDOWN, drawn)


# --- pictures -------------------------------------------------------------------------------------


def _draw(facts: Facts, folder: Path) -> Pictures:
    compared, confusion, curves = [], [], []
    if scores := accuracies(facts):
        file = "accuracies.png"
        majority = facts.evaluation["classifier"].get("majority_accuracy")
        draw_scores(
            folder / file,
            "The classifier's test part: who gets how much right",
            {
                name.partition(" (")[0]: (accuracy.value, accuracy.low, accuracy.high)
                for name, (accuracy, _) in scores.items()
            },
            "accuracy, with its 95 % interval",
            ("always the most frequent class", majority.value) if majority else None,
        )
        compared.append(Picture(file, "Accuracy without, with little and with all training"))
    if facts.confusion:
        with _readable(facts.confusion):
            drawn = draw_confusion(facts.confusion, folder, parts=["test"])
        confusion = [Picture(path.name, "Which classes were taken for which") for path in drawn]
    for stage, history in facts.histories.items():
        with tempfile.TemporaryDirectory() as scratch, _readable(history):
            for path in draw_curves(
                history, STAGES[stage].title, Path(scratch), learning_rate=False
            ):
                name = f"{stage}_{path.name}"
                shutil.move(path, folder / name)
                curves.append(Picture(name, f"{stage}: {path.stem.replace('_', ' ')}"))
    return Pictures(compared, confusion, curves)


@contextlib.contextmanager
def _readable(table: Path) -> Iterator[None]:
    """Within the block a table that is cut off or holds something else is told in one line."""
    try:
        yield
    except (KeyError, ValueError) as error:
        why = in_one_line(error)
        raise InputError(
            f"{table}: cannot be drawn ({why}); run the stage again: `gpt-pipeline run --force`"
        ) from None


# --- HTML -----------------------------------------------------------------------------------------


def as_html(content: Sequence[Section], pictures: Sequence[Path]) -> str:
    """The page, pictures and all, in one file that loads nothing and runs nothing."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(shown=shown, line=_in_full, lines=_lines)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        sections=content,
        data={
            path.name: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            for path in pictures
        },
    )


def _in_full(text: str) -> str:
    return visible(text, limit=None)


def _lines(text: str) -> str:
    """A text with its line breaks, shortened; what cannot be seen is spelt out."""
    return "\n".join(map(_in_full, _excerpt(text).splitlines()))


def _excerpt(text: str) -> str:
    text = text.strip()
    return shortened(text, _LONGEST) or "(empty)"


# --- Markdown -------------------------------------------------------------------------------------


def as_markdown(content: Sequence[Section]) -> str:
    """The same in Markdown; the pictures are files in the folder `report` beside it."""
    parts = []
    for i, section in enumerate(content):
        parts.append(f"{'##' if i else '#'} {escaped(section.title)}")
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"### {escaped(text)}"
        case Paragraph(text):
            return escaped(text)
        case Grid(columns, rows, align):
            return table(columns, rows, align.replace("c", "l"))
        case Picture(file, title):
            return f"![{escaped(title)}]({PICTURES.name}/{file})"
        case Gallery(pictures):
            return "\n\n".join(map(_markdown, pictures))
        case Verdicts(verdicts):
            return "\n".join(map(_verdict, verdicts))
        case Texts(task, answers):
            lines = [f"- {who}: {escaped(_excerpt(text))}" for who, text in answers]
            return "\n".join([f"**{escaped(_excerpt(task))}**\n", *lines])


def _verdict(verdict: Verdict) -> str:
    head = f"**{escaped(verdict.model)}: {verdict.verdict}.**"
    score = escaped(f"{verdict.of.capitalize()}: {verdict.score}.")
    return f"- {head} {' '.join([score, *map(escaped, verdict.why)])}"
