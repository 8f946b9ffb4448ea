"""What is one thing here and another there (parameters, packages, checksums), and a run named after
what it does otherwise than the last one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.base.errors import shortened
from pipeline.tracking.connection import artifact
from pipeline.tracking.keys import key_of
from pipeline.tracking.provenance import CODE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

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


def profile(run: Run, path: str) -> dict[str, str]:
    """What a run says of an input in figures, as `rows`: `1,300`; nothing of what is no data."""
    for each in run.inputs.dataset_inputs if run.inputs else ():
        if each.dataset.name == path and each.dataset.profile:
            return {key: f"{n:,}" for key, n in json.loads(each.dataset.profile).items()}
    return {}


def changed_code(client: MlflowClient, last: Run, run: Run) -> list[str] | None:
    """The files of code that differ; None where that cannot be told."""
    tags = last.data.tags, run.data.tags
    one, other = (each.get("code") for each in tags)
    if one and one == other:
        return []
    first, second = (_recorded_code(client, each) for each in (last, run))
    if first and second:
        return [each.what for each in changes(first, second)]
    commit = tags[0].get("git.commit")
    same = bool(commit) and commit == tags[1].get("git.commit")
    return [] if same and not any(each.get("git.dirty") == "true" for each in tags) else None


def _recorded_code(client: MlflowClient, run: Run) -> dict[str, str]:
    """Path -> md5 of the code that a stage ran; empty where its run does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        content = artifact(client, run.info.run_id, f"lineage/{CODE}")
        return dict(json.loads(content)) if content else {}
    except (MlflowException, OSError, ValueError):  # no reason not to register what was made
        return {}


def number_and_changes(
    client: MlflowClient,
    experiment_id: str,
    params: Mapping[str, str],
    git: Mapping[str, str],
    begun: int,
) -> tuple[str, dict[str, str]]:
    """What a new run is called, and tags that say what changed since the last one that ended well.

    Args:
        client: of the tracking server.
        experiment_id: the stage's.
        params: the run's.
        git: its `git.commit`, if it has one.
        begun: when it began, in milliseconds.
    """
    newest = client.search_runs(
        [experiment_id], order_by=["attributes.start_time DESC"], max_results=_RECENT
    )
    number = 1 + max((int(run.data.tags.get("number", 0)) for run in newest), default=0)
    before = client.search_runs(
        [experiment_id],
        f"attributes.status = 'FINISHED' and attributes.start_time < {begun}",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    changed = changes(before[0].data.params, params, OF_MODELS) if before else []
    tags = {
        key_of(f"changed.{each.what}"): str(each).removeprefix(f"{each.what} ") for each in changed
    }
    words = [f"{each.what}={each.after}" for each in changed if each.after is not None]
    if not words or len(words) > 3:
        words = [git["git.commit"][:7]] if "git.commit" in git else []
    name = " ".join((f"#{number}", *(shortened(word, 60) for word in words)))
    return name, {**tags, "number": str(number)}
