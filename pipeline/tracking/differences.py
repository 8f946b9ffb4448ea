"""What is one thing here and another there (parameters, packages, checksums), and a run named after
what it does otherwise than the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.base.errors import shortened
from pipeline.tracking.keys import key_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOTHING = "none"
"""What stands for a value that one of both has not."""

OF_MODELS = ("kind",)
"""MLflow puts these settings of a logged model beside the run's parameters."""

_RECENT = 50  # runs among which the highest number is looked for


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


@dataclass(frozen=True, slots=True)
class Differs:
    """What a run is called beside the ones before it, and the tags that say so."""

    name: str
    tags: Mapping[str, str]


def what_differs(
    client: MlflowClient,
    experiment_id: str,
    params: Mapping[str, str],
    git: Mapping[str, str],
    begun: int | None = None,
) -> Differs:
    """A new run's number, and which parameters differ from the last run that ended well.

    Args:
        client: of the tracking server.
        experiment_id: the stage's.
        params: the run's.
        git: its `git.commit`, if it has one.
        begun: when it began, in milliseconds; by default now.
    """
    newest = client.search_runs(
        [experiment_id], order_by=["attributes.start_time DESC"], max_results=_RECENT
    )
    number = 1 + max((int(run.data.tags.get("number", 0)) for run in newest), default=0)
    before = client.search_runs(
        [experiment_id],
        "attributes.status = 'FINISHED'"
        + (f" and attributes.start_time < {begun}" if begun else ""),
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    changed: dict[str, str] = {}
    tags = {"number": str(number)}
    if before:
        last = before[0].data.params
        changed = {key: value for key, value in params.items() if last.get(key) != value}
        gone = {key for key in last if key not in params and key not in OF_MODELS}
        for key in (*changed, *sorted(gone)):
            tags[key_of(f"changed.{key}")] = (
                f"{last.get(key, NOTHING)} → {params.get(key, NOTHING)}"
            )
    words = [f"{key}={value}" for key, value in changed.items()]
    if not words or len(words) > 3:
        words = [git["git.commit"][:7]] if "git.commit" in git else []
    return Differs(" ".join((f"#{number}", *(shortened(word, 60) for word in words))), tags)
