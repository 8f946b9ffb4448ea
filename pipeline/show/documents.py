"""Documents made from Markdown templates: files, one HTML page, and what the terminal shows.

Every value that a template is filled with is escaped, so text from outside stays text. A template
must not start a line with a value: `#` or `-` would be markup there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from pipeline.show.markdown import (
    EXCERPT,
    escaped,
    name_of,
    padded_table,
    ratio,
    share_of,
    shown,
    visible,
)

_TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)


def fill(template: Path, **values: Any) -> str:
    """A Markdown template filled in, its tables padded so that they can be read as text too.

    Raises:
        UndefinedError: the template uses a value that is not there.
    """
    return re.sub(r"\n{3,}", "\n\n", f"{_filled(template, _in_markdown, values).strip()}\n")


def fill_text(template: Path, **values: Any) -> str:
    """A template of text for a terminal filled in, with rich's markup; values are escaped.

    Raises:
        UndefinedError: the template uses a value that is not there.
    """
    return _filled(template, _in_markup, values)


def _filled(template: Path, finalize: Callable[[Any], str], values: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(excerpt=_excerpt, name=name_of, ratio=ratio, share=share_of)
    text = environment.get_template(template.name).render(values)
    return _TABLE.sub(lambda match: padded_table(match[0]), f"{text}\n")


def print_markdown(console: Console, text: str) -> None:
    """Show Markdown as a terminal can."""
    console.print(Markdown(text, hyperlinks=False))


def _excerpt(text: str, characters: int = EXCERPT) -> str:
    return visible(text, characters) or "(empty)"


def _in_markup(value: Any) -> str:
    return escape(visible(str(value), limit=None))


def _in_markdown(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:,.1f}".removesuffix(".0")
    return escaped(value if isinstance(value, str) else shown(value))
