"""Documents made from Markdown templates: Markdown files, an HTML page, and terminal output.

Every value that a template is filled with is escaped, so text from outside stays text. A template
must not start a line with a value: `#` or `-` would be markup there.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from pipeline.show.markdown import (
    EXCERPT,
    LINE_BREAK,
    escaped,
    label_of,
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
        keep_trailing_newline=True,
    )
    environment.filters.update(
        excerpt=_excerpt, label=label_of, name=name_of, ratio=ratio, share=share_of
    )
    text = environment.get_template(template.name).render(values)
    return _TABLE.sub(lambda match: padded_table(match[0]), f"{text}\n")


def html_page(text: str, shell: Path, folder: Path) -> str:
    """Markdown as one HTML file that loads nothing and runs nothing.

    Args:
        text: the document; its first heading is the page's title, the second-level ones are linked.
        shell: the HTML around it, with `$title`, `$links` and `$body`.
        folder: where the paths of its images start.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace(f" {LINE_BREAK} ", "<br>")
    links = []
    for i, title in enumerate(re.findall("<h2>(.*?)</h2>", body)):
        body = body.replace("<h2>", f'<h2 id="s{i}">', 1)
        links.append(f'<a href="#s{i}">{title}</a>')
    _, title, _ = re.split("</?h1>", body, maxsplit=2)
    body = re.sub(r'(?<=<img src=")[\w./-]+(?=")', lambda match: _data_uri(folder / match[0]), body)
    page = Template(shell.read_text(encoding="utf-8"))
    return page.substitute(title=title, links="\n".join(links), body=body)


def _data_uri(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"


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
