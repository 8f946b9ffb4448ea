"""What may come from outside, printed: a terminal shows it and does not obey it.

Names, labels, samples, answers, commits' subjects and messages of errors can hold escapes that set
a window's title, hide what was said before or turn the direction of writing.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, TextIO

# All controls but tab and newline, what turns the direction of writing, halves of characters.
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe(text: str) -> str:
    """Text that a terminal shows, not obeys; what it would obey is spelt out, as ⟨U+001B⟩."""
    return _UNSAFE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n"))


def say(text: object = "", *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print at once, on standard output by default, what may come from outside."""
    print(safe(str(text)), end=end, file=file, flush=True)


def say_result(text: str, *, end: str = "\n") -> None:
    """Print what a model answered: as it is into a pipe or a file, `safe` on a terminal."""
    print(safe(text) if sys.stdout.isatty() else text, end=end, flush=True)


def say_json(value: Any, *, indent: int | None = 2) -> None:
    """Print JSON that any program reads and no terminal obeys."""
    shows_all = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(value, indent=indent, ensure_ascii=not shows_all)
    print(_UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)
