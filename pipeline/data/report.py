"""The data report: `reports/data.md` with its plots, and its first lines for a terminal.

Rewritten after every stage that makes data. Equal data gives equal bytes: there is no clock and no
host in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from jinja2 import UndefinedError
from rich.console import Console

from gpt.base.errors import InputError, first_few
from gpt.base.files import whole_directory, whole_file
from pipeline.data.facts import CORPUS_FACTS, DATA_SETS, DataFacts, data_facts
from pipeline.show.console import safe_console
from pipeline.show.documents import fill, print_markdown
from pipeline.show.markdown import name_of, share_of
from pipeline.show.plots import draw_bars, draw_lengths, draw_mixture

DATA_PAGE = Path("reports/data.md")
DATA_PLOTS = Path("reports/data")

_DATA_TEMPLATES = Path(__file__).parent
_CLEANING = {
    "min_chars": "a smallest length",
    "max_chars": "a greatest length",
    "languages": "the language",
    "quality": "quality rules",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
}
"""The parameters of the filters, and what each one looks for."""


def write_report(root: Path) -> tuple[Path, list[Path]]:
    """Look at the project's data and write the report, the page and the plots each as a whole.

    Returns:
        The page, and its plots.

    Raises:
        InputError: nothing was downloaded yet, or what there is cannot be read.
    """
    _write(root)
    return root / DATA_PAGE, sorted((root / DATA_PLOTS).iterdir())


def print_data(root: Path, console: Console | None = None) -> None:
    """Rewrite the report, and print its first lines and where it is.

    Raises:
        InputError: nothing was downloaded yet, or what there is cannot be read.
    """
    print_markdown(safe_console(console), fill(_DATA_TEMPLATES / "summary.md", **_write(root)))


def _write(root: Path) -> dict[str, Any]:
    """Write the report; what the templates are filled with."""
    facts = data_facts(root)
    lock = root / ".pipeline" / "data_report.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        values = _values(facts)
        with FileLock(lock):  # a stage may end while a person asks for the report
            with whole_directory(root / DATA_PLOTS) as folder:
                _draw(facts, values["shares"], folder)
            with whole_file(root / DATA_PAGE) as partial:
                text = fill(_DATA_TEMPLATES / "data.md", **values)
                partial.write_text(text, encoding="utf-8", newline="\n")
    except (KeyError, UndefinedError) as error:  # all other facts are gathered here and now
        raise InputError(
            f"{root / CORPUS_FACTS}: lacks {error}; run the stage tokenize again"
        ) from None
    return values


def _values(facts: DataFacts) -> dict[str, Any]:
    corpus = facts.corpus
    clean = (corpus and corpus.get("clean")) or {}
    not_asked = [what for name, what in _CLEANING.items() if not clean.get(name, True)]
    classes = facts.messages["classes"] if facts.messages else {}
    n_messages = sum(classes.values())
    return {
        "data_sets": DATA_SETS,
        "facts": facts,
        "duplicates": _duplicates(corpus, not_asked) if corpus else "",
        "steps": {what: _steps(corpus, what) for what in ("removed", "changed")} if corpus else {},
        "not_asked": not_asked,
        "classes": first_few(
            [f"{name_of(label, 28)} {share_of(n, n_messages)}" for label, n in classes.items()], 4
        ),
        "shares": _shares(corpus) if corpus and corpus["mixture"] else {},
    }


def _duplicates(corpus: Mapping[str, Any], not_asked: Sequence[str]) -> str:
    words = []
    for kind in ("exact", "near"):
        n = sum(each["removed"].get(f"{kind} duplicate", 0) for each in corpus["sources"])
        asked = f"{kind} duplicates" not in not_asked
        words.append(f"{n:,} {kind} ones removed" if asked else f"{kind} ones not looked for")
    return ", ".join(words)


def _steps(corpus: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """What each step of the cleaning removed or changed, in all and by source, the most first."""
    steps: dict[str, dict[str, int]] = {}
    for source in corpus["sources"]:
        for step, n in source[what].items():
            steps.setdefault(step, {})[source["name"]] = n
    found = []
    for step, of in steps.items():
        most = sorted(of, key=lambda name: -of[name])
        words = first_few([f"{name_of(name, 28)} {of[name]:,}" for name in most], 4)
        found.append({"step": step, "n": sum(of.values()), "by_source": words})
    return sorted(found, key=lambda each: (-each["n"], each["step"]))


def _shares(corpus: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """By source of the mixture: its share of the kept tokens, of the weights, of the training."""
    mixed = corpus["mixture"]["sources"]
    tokens = max(sum(each["tokens"] for each in corpus["sources"]), 1)
    weights = sum(each["weight"] for each in mixed.values()) or 1.0
    return {
        each["name"]: (
            each["tokens"] / tokens,
            mixed[each["name"]]["weight"] / weights,
            mixed[each["name"]]["share"],
        )
        for each in corpus["sources"]
        if each["name"] in mixed
    }


def _draw(facts: DataFacts, shares: Mapping[str, tuple[float, float, float]], folder: Path) -> None:
    if corpus := facts.corpus:
        draw_bars(
            folder / "tokens.png",
            "Pretraining text: tokens by source",
            {each["name"]: each["tokens"] for each in corpus["sources"]},
            "tokens of the documents that were kept",
        )
        draw_lengths(
            folder / "document_lengths.png",
            "Pretraining text: how long documents are",
            _bars({each["name"]: each["lengths"] for each in corpus["sources"]}),
            "tokens a document",
            "documents",
        )
    if shares:
        draw_mixture(
            folder / "mixture.png",
            "The mixture: what there is, what was wanted, what it is",
            shares,
        )
    if messages := facts.messages:
        draw_bars(folder / "classes.png", "Messages by class", messages["classes"], "messages")
        draw_lengths(
            folder / "message_lengths.png",
            "How long messages are, by class",
            _bars(messages["characters"]),
            "characters a message",
            "messages",
        )
    if instructions := facts.instructions:
        draw_lengths(
            folder / "answer_lengths.png",
            "How long the answers to instructions are",
            _bars(instructions["answers"]),
            "characters an answer",
            "records",
        )


def _bars(lengths: Mapping[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    bars = {name: (each["edges"], each["counts"]) for name, each in lengths.items()}
    return {name: each for name, each in bars.items() if sum(each[1])}
