"""What is one thing here and another there: parameters, packages, checksums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NOTHING = "none"
"""What stands for a value that one of both has not."""


@dataclass(frozen=True, slots=True)
class Change:
    """One of them. None where that side has no such thing."""

    what: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        before, after = (NOTHING if v is None else v for v in (self.before, self.after))
        return f"{self.what} {before} → {after}"


def changes(
    before: Mapping[str, str], after: Mapping[str, str], without: Iterable[str] = ()
) -> list[Change]:
    """What differs, in the order of `after`; then what only `before` has.

    Args:
        before: the values of one.
        after: the values of the other.
        without: keys that do not count.
    """
    keys = [key for key in dict.fromkeys((*after, *before)) if key not in set(without)]
    pairs = (Change(key, before.get(key), after.get(key)) for key in keys)
    return [each for each in pairs if each.before != each.after]
