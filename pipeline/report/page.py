"""The report of a run as files: `reports/report.md` with its plots, and `reports/report.html`, the
same as one file to send around.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from gpt.base.errors import InputError, in_one_line
from gpt.base.files import whole_directory, whole_file
from gpt.base.labels import class_key, class_of
from pipeline.project.stage_table import STAGES
from pipeline.report.facts import Facts
from pipeline.show.console import seconds_in_words
from pipeline.show.documents import fill, html_page
from pipeline.show.markdown import NOTHING
from pipeline.show.plots import draw_confusion, draw_curves, draw_scores
from pipeline.verdict.promotion import PREDICTIONS, Decision

HTML = Path("reports/report.html")
MARKDOWN = Path("reports/report.md")
REPORT_PLOTS = Path("reports/report")
REPORT_TEMPLATES = Path(__file__).parent

_BASES = ("pretrain", "gpt2")
_IN_NATS = ("loss", "perplexity", "bits_per_byte")
"""The scores that are not shares."""
_EVALUATED = {
    "base": ("pretrain", "loss"),
    "classifier": ("classifier", "accuracy"),
    "assistant": ("assistant", "loss"),
}
"""By registered model: what the evaluation calls it, and its most telling score."""


def write_report(root: Path, facts: Facts) -> list[Path]:
    """Write the page, its Markdown and the plots, each as a whole.

    Returns:
        The plots.

    Raises:
        InputError: a table that is drawn cannot be read.
    """
    lock = root / ".pipeline" / "report.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # a run may end while a person asks for the report
        with whole_directory(root / REPORT_PLOTS) as folder:
            _draw(root, facts, folder)
        plots = sorted((root / REPORT_PLOTS).iterdir())
        names = [path.name for path in plots]
        text = fill(REPORT_TEMPLATES / "report.md", plots=names, **values(facts))
        page = html_page(text, REPORT_TEMPLATES / "report.html", root / "reports")
        for path, content in ((MARKDOWN, text), (HTML, page)):
            with whole_file(root / path) as file:
                file.write_text(content, encoding="utf-8", newline="\n")
    return plots


# --- plots ----------------------------------------------------------------------------------------


def _draw(root: Path, facts: Facts, folder: Path) -> None:
    if scores := _accuracies(facts):
        majority = facts.scores("classifier").get("majority_accuracy")
        draw_scores(
            folder / "accuracies.png",
            "The classifier's test part: who gets how much right",
            {
                name.partition(" (")[0]: (
                    of["accuracy"],
                    of.get("accuracy_low"),
                    of.get("accuracy_high"),
                )
                for name, of in scores.items()
            },
            "accuracy, with its 95 % interval",
            ("always the most frequent class", majority) if majority is not None else None,
        )
    confusion = root / PREDICTIONS / "classifier_confusion.csv"
    if confusion.is_file():
        with _readable(confusion):
            draw_confusion(confusion, folder, parts=["test"])
    for stage, spec in STAGES.items():
        history = root / "reports" / stage / "history.csv"
        if history.is_file():
            with tempfile.TemporaryDirectory() as scratch, _readable(history):
                plots = draw_curves(history, spec.title, Path(scratch), learning_rate=False)
                for path in plots:
                    shutil.move(path, folder / f"{stage}_{path.name}")


@contextlib.contextmanager
def _readable(table: Path) -> Iterator[None]:
    """Within the block a table that is cut off or holds something else is an error of one line."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{table}: cannot be drawn ({in_one_line(error)}); run the stage again: "
            "`gpt-pipeline run --force`"
        ) from None


# --- what the templates are filled with -----------------------------------------------------------


def values(facts: Facts) -> dict[str, Any]:
    """What the templates of the page, the card and the terminal's summary are filled with."""
    classifier = facts.scores("classifier")
    recalls = [name.removeprefix("recall_") for name in classifier if name.startswith("recall_")]
    bases = {name: facts.scores(name) for name in _BASES}
    parts = [name.partition("/")[2] for scores in bases.values() for name in scores if "/" in name]
    return {
        "facts": facts,
        "verdicts": verdicts(facts),
        "bases": bases,
        "text_sources": dict.fromkeys(parts),
        "accuracies": _accuracies(facts),
        "classifier": classifier,
        "class_key": class_key,
        "classes": sorted(filter(None, map(class_of, recalls))),
        "assistant": facts.scores("assistant"),
        "date": lambda time: time and f"{time:%Y-%m-%d %H:%M}",
        "decimal": figure,
        "percent": percent,
        "seconds": lambda seconds: None if seconds is None else seconds_in_words(seconds),
    }


def figure(
    of: Mapping[str, float], name: str, digits: int = 3, *, scale: float = 1, unit: str = ""
) -> str | None:
    """A score with its interval, `4.166 (4.102-4.230)`; None where it was not measured."""
    if name not in of:
        return None
    value, low, high = (
        None if end is None else f"{end * scale:,.{digits}f}"
        for end in (of[name], of.get(f"{name}_low"), of.get(f"{name}_high"))
    )
    interval = "" if low is None or high is None else f" ({low}\N{EN DASH}{high})"
    return f"{value}{unit}{interval}"


percent = partial(figure, digits=1, scale=100, unit=" %")
"""The same of a share: `98.8 % (97.3-99.6)`."""


def _accuracies(facts: Facts) -> dict[str, dict[str, float]]:
    """By who classified and how: `accuracy` and `f1_macro` on the classifier's test part."""
    found = {}
    for base in _BASES:
        scores = facts.scores(base)
        shots = f"few-shot ({scores.get('few_shot_examples', 0):,.1f} examples)"
        for method, words in (("zero_shot_", "zero-shot"), ("few_shot_", shots)):
            found[f"{base}, {words}"] = {
                name.removeprefix(method): n for name, n in scores.items() if method in name
            }
    base_of = facts.base_of("finetune_classifier")
    found[f"{base_of or 'classifier'}, fine-tuned"] = facts.scores("classifier")
    return {name: of for name, of in found.items() if "accuracy" in of}


def verdicts(facts: Facts) -> list[dict[str, Any]]:
    """Of every model that was evaluated or compared: its score, and what was decided and why."""
    found = []
    for name in dict.fromkeys([*_EVALUATED, *facts.decisions]):
        decision = facts.decisions.get(name)
        version = facts.versions.get(name)
        if decision and version not in (None, decision.version):
            decision = None  # of an earlier version
        if decision:
            version = decision.version
        model, score = _EVALUATED.get(name, ("", decision.score if decision else ""))
        measured = facts.scores(model)
        if score not in measured and decision and decision.new is not None:
            score, measured = decision.score, {decision.score: decision.new}
        in_words = figure if score in _IN_NATS else percent
        found.append(
            {
                "title": name.capitalize() + (f", version {version}" if version else ""),
                "decision": decision,
                "score": f"{in_words(measured, score) or NOTHING} {score}",
                "why": _why(decision) if decision else "",
            }
        )
    return found


def _why(decision: Decision) -> str:
    why = f"{decision.why[:1].upper()}{decision.why[1:].rstrip('.')}."
    if decision.old is None or decision.new is None:
        return why
    in_nats = decision.score in _IN_NATS
    old, new = (
        (figure if in_nats else percent)({decision.score: value}, decision.score)
        for value in (decision.old, decision.new)
    )
    scale, digits, unit = (1, 3, "") if in_nats else (100, 1, " points")
    difference, *interval = [
        f"{end * scale:+.{digits}f}"
        for end in (decision.difference, decision.low, decision.high)
        if end is not None
    ]
    return (
        f"{why} Champion (version {decision.champion}): {decision.score} {old}, this version: "
        f"{new}, difference {difference}{unit} ({' to '.join(interval)}) on "
        f"{decision.examples:,} examples."
    )
