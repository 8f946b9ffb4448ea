"""Labels: when two labels are the same class, and how the metrics of a class are named."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from gpt.base.errors import first_few, shortened

_UNSEEN = r"\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff"  # white space and zero-width characters
_ENDS = re.compile(rf"\A[{_UNSEEN}]+|[{_UNSEEN}]+\Z")
_OF_ALL = re.compile(r"(class )*macro(_low|_high)?")


def plain_label(label: str) -> str:
    """A label without white space and zero-width characters at its ends.

    Characters that can be encoded in two ways (`é`) are normalized to Unicode's form C.
    """
    return _ENDS.sub("", unicodedata.normalize("NFC", label))


def class_key(label: str) -> str:
    """The name of a class in its metrics, after `f1_` and the like: its label.

    A class that is named like a mean over the classes (`f1_macro`) gets a name of its own:
    `f1_class macro`.
    """
    return f"class {label}" if _OF_ALL.fullmatch(label) else label


def class_of(key: str) -> str | None:
    """The label of a name that `class_key` made; None for a mean over the classes."""
    if not _OF_ALL.fullmatch(key):
        return key
    return key.removeprefix("class ") if key.startswith("class ") else None


def in_short(labels: Sequence[str], most: int = 3) -> str:
    """The first of some labels for a line, long ones cut: `'ham', 'spam' and 4 more`."""
    return first_few([repr(shortened(label, 40)) for label in labels], most)
