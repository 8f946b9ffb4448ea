"""Labels: when two are one class, and what the figures of a class are called."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from gpt.base.errors import first_few, shortened

_UNSEEN = r"\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff"  # blanks, and what has no width
_ENDS = re.compile(rf"\A[{_UNSEEN}]+|[{_UNSEEN}]+\Z")
_OF_ALL = re.compile(r"(class )*macro(_low|_high)?")


def plain_label(label: str) -> str:
    """A label without what nobody sees: blanks and characters without width at its ends.

    Characters that can be written in two ways (`é`) are written in one, Unicode's form C.
    """
    return _ENDS.sub("", unicodedata.normalize("NFC", label))


def class_key(label: str) -> str:
    """How the figures of a class are named, behind `f1_` and the like: as its label.

    A class with the name that a mean over the classes has (`f1_macro`) is told from it:
    `f1_class macro`.
    """
    return f"class {label}" if _OF_ALL.fullmatch(label) else label


def class_of(key: str) -> str | None:
    """The label that `class_key` made this of; None of a mean over the classes."""
    if not _OF_ALL.fullmatch(key):
        return key
    return key.removeprefix("class ") if key.startswith("class ") else None


def in_short(labels: Sequence[str], most: int = 3) -> str:
    """The first of some labels for a line, long ones cut: `'ham', 'spam' and 4 more`."""
    return first_few([repr(shortened(label, 40)) for label in labels], most)
