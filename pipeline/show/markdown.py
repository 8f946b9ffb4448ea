"""Markdown tables of figures and of text from outside, none of which becomes Markdown or HTML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from gpt.base.errors import shortened

Cell = str | int | float | None

EXCERPT = 160
"""Characters of a text in a table."""
NOTHING = "—"
LINE_BREAK = "↵"
"""Stands for a line break in a text that is shown in one line."""


def share_of(part: float, whole: float) -> str:
    """A share as a person reads it: `12.3%`, and what is there is never 0."""
    if not whole:
        return NOTHING
    share = part / whole
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def ratio(a: float, b: float) -> str:
    """`a` for every `b`: `4.27`."""
    return f"{a / b:.2f}" if b else NOTHING


def label_of(metric: str) -> str:
    """A metric's name as pages show it: `validation_loss` -> `validation loss`."""
    return metric.replace("_", " ").replace("/", " ")


def shown(cell: Cell) -> str:
    """A cell as plain text."""
    if cell is None:
        return NOTHING
    return f"{cell:,}" if isinstance(cell, int | float) else visible(cell)


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], align: str = "") -> str:
    """A Markdown table that can be read as text too; whatever is in a cell is escaped.

    Args:
        columns: the headings.
        rows: the cells; numbers get thousands separators, None is a dash.
        align: `l` or `r` a column; by default all but the first are figures.
    """
    align = align or "l" + "r" * (len(columns) - 1)
    lines = [[escaped(column) for column in columns]]
    lines += [[escaped(shown(cell)) for cell in row] for row in rows]
    return _padded(lines, align)


def padded_table(text: str) -> str:
    """The same of a Markdown table whose cells are escaped already."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    align = "".join("r" if rule.endswith(":") else "l" for rule in lines.pop(1))
    return _padded(lines, align) + "\n"


def _padded(lines: Sequence[Sequence[str]], align: str) -> str:
    if len(lines) == 1:
        return "None."
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    if align[-1] == "l":
        widths[-1] = max(3, len(lines[0][-1]))  # excerpts: padding would only be blanks
    pad: dict[str, Callable[[str, int], str]] = {"l": str.ljust, "r": str.rjust}
    padded = [
        [pad[side](cell, width) for side, cell, width in zip(align, line, widths, strict=True)]
        for line in lines
    ]
    rule = [
        "-" * (width - 1) + (":" if side == "r" else "-")
        for side, width in zip(align, widths, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


# What begins Markdown, HTML or a formula within a line. A backslash is easier to read than an
# entity, but | and $ need one: tables and formulas are cut out before backslashes are looked at.
_SPECIAL = {ord(c): f"\\{c}" for c in "\\`*[]~"} | {
    ord("&"): "&amp;",
    ord("<"): "&lt;",
    ord(">"): "&gt;",
    ord("|"): "&#124;",
    ord("$"): "&#36;",
}
# within a word, as in `python_docs`, an underscore is no emphasis
_EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
# what becomes a link or a picture by itself: http://, www., a@b, :smile:
_BY_ITSELF = re.compile(r":(?=//|[\w+-]+:)|(?<=www)\.|@", re.IGNORECASE)
_LINE_END = re.compile(r"\s*[\n\r\v\f\x85\u2028\u2029]\s*")


def visible(text: str, limit: int | None = EXCERPT) -> str:
    """Text in one line, shortened; what cannot be seen is spelt out, as ⟨U+202E⟩."""
    line = " ".join(_LINE_END.sub(f" {LINE_BREAK} ", text.strip()).split())
    if limit is not None:
        line = shortened(line, limit)
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c)[0] == "C" else c for c in line)


def name_of(text: str, characters: int = 40) -> str:
    """A name that is not too long; it loses its middle, for names often differ at their ends."""
    name = visible(text, limit=None)
    if len(name) <= characters:
        return name
    end = characters // 3
    return f"{name[: characters - end - 1].rstrip()}…{name[-end:].lstrip()}"


def escaped(text: str) -> str:
    """Text as Markdown that shows just that: no table, link or HTML comes out of it."""

    def entity(match: re.Match[str]) -> str:
        return f"&#{ord(match[0])};"

    line = visible(text, limit=None).translate(_SPECIAL)
    return _BY_ITSELF.sub(entity, _EMPHASIS.sub(r"\\_", line))
