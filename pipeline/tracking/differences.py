"""Differences between two runs (parameters, packages, checksums), and run names that show how a
run differs from the previous one."""

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
"""Placeholder for a value that one side does not have."""

OF_MODELS = ("kind",)
"""Settings of a logged model that MLflow stores among the run's parameters."""

_RECENT = 50  # runs searched for the highest run number


@dataclass(frozen=True, slots=True)
class Change:
    """One difference; a side without the value is None."""

    what: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        before, after = (NOTHING if v is None else v for v in (self.before, self.after))
        return f"{self.what} {before} → {after}"


def changes(
    before: Mapping[str, str], after: Mapping[str, str], without: Iterable[str] = ()
) -> list[Change]:
    """The differences, in the order of `after`, followed by keys that only `before` has.

    Args:
        before: the earlier values.
        after: the later values.
        without: keys to ignore.
    """
    keys = [key for key in dict.fromkeys((*after, *before)) if key not in set(without)]
    pairs = (Change(key, before.get(key), after.get(key)) for key in keys)
    return [each for each in pairs if each.before != each.after]


def profile(run: Run, path: str) -> dict[str, str]:
    """The figures that a run records of an input, such as `rows`: `1,300`; empty for non-data."""
    for each in run.inputs.dataset_inputs if run.inputs else ():
        if each.dataset.name == path and each.dataset.profile:
            return {key: f"{n:,}" for key, n in json.loads(each.dataset.profile).items()}
    return {}


def changed_code(client: MlflowClient, last: Run, run: Run) -> list[str] | None:
    """The code files that differ; None if that cannot be determined."""
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
    """Path -> md5 of the code that a stage ran; empty if its run did not record it."""
    from mlflow.exceptions import MlflowException

    try:
        content = artifact(client, run.info.run_id, f"lineage/{CODE}")
        return dict(json.loads(content)) if content else {}
    except (MlflowException, OSError, ValueError):  # must not prevent registration
        return {}


def number_and_changes(
    client: MlflowClient,
    experiment_id: str,
    params: Mapping[str, str],
    git: Mapping[str, str],
    begun: int,
) -> tuple[str, dict[str, str]]:
    """The name of a new run, and tags with the changes since the last successful one.

    Args:
        client: a client of the tracking server.
        experiment_id: the id of the stage's experiment.
        params: the run's parameters.
        git: the run's `git.commit`, if it has one.
        begun: the run's start time in milliseconds.
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
