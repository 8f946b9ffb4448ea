"""The description that a version's page in MLflow has when it is registered.

It compares the version's run with that of the previous version: the stage, the commit, the changes.
The report later replaces it by the full model card.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.base.errors import first_few, shortened
from pipeline.show.documents import fill
from pipeline.tracking.connection import existing_run
from pipeline.tracking.differences import OF_MODELS, Change, changed_code, changes, profile

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHANGED_TAG = "changed"
"""The tag of a version that summarizes the changes since the previous version."""

LONGEST = 5000
"""MLflow's limit for the description of a model version, in characters."""

_INPUT = "input."
_COMMIT = 7  # digits
_MD5 = 10  # digits
_MOST = 12  # per kind of change
_MOST_IN_TAG = 3
_VALUE = 60  # characters of a parameter's value


@dataclass(frozen=True, slots=True)
class VersionPage:
    """The description of a new version, and the tag `changed`; empty for the first version."""

    description: str
    changed: str


def version_page(client: MlflowClient, run: Run, name: str, what: str) -> VersionPage:
    """Describe a version that is about to be registered.

    Args:
        client: a client of the MLflow that it will be registered in.
        run: the run that made it, in that MLflow.
        name: the registered model's name; its newest version is the previous one.
        what: a description of the model in one sentence.
    """
    before = _newest(client, name)
    last = existing_run(client, before.run_id) if before else None
    params: list[str] = []
    data: list[Change] = []
    files: str | None = ""
    commits = changed = ""
    if last:
        params = [_shown(each) for each in changes(last.data.params, run.data.params, OF_MODELS)]
        data = changes(_inputs(last), _inputs(run))
        code = changed_code(client, last, run)
        files = None if code is None else first_few(code, _MOST)
        summary = params[:_MOST_IN_TAG]
        if more := len(params[_MOST_IN_TAG:]):
            summary.append(f"{more} more parameters" if more > 1 else "1 more parameter")
        summary += [*(each.what for each in data), *([] if files == "" else ["code"])]
        changed = ", ".join(summary) or "nothing"
        both = [each.data.tags.get("git.commit", "")[:_COMMIT] for each in (last, run)]
        commits = " → ".join(both) if all(both) and both[0] != both[1] else ""
    text = fill(
        Path(__file__).with_suffix(".md"),
        what=what,
        name=name,
        run=run.info,
        tags=run.data.tags,
        before=before,
        changed=changed,
        params=params[:_MOST],
        more=len(params[_MOST:]),
        data=[_data_line(last, run, each) for each in data if last],
        files=files,
        commits=commits,
    )
    return VersionPage(text.strip()[:LONGEST], changed)


def _data_line(last: Run, run: Run, change: Change) -> str:
    """The line for a changed input: its figures and md5."""
    figures = changes(profile(last, change.what), profile(run, change.what))
    first, second = (md5 and f"{md5[:_MD5]}…" for md5 in (change.before, change.after))
    return f"{change.what}: {first_few([*figures, Change('md5', first, second)], _MOST)}"


def _newest(client: MlflowClient, name: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}'")
    return max(found, key=lambda each: int(each.version), default=None)


def _inputs(run: Run) -> dict[str, str]:
    tags = run.data.tags
    return {key.removeprefix(_INPUT): tags[key] for key in tags if key.startswith(_INPUT)}


def _shown(change: Change) -> str:
    """A change, shortened to one line."""
    before, after = (each and shortened(each, _VALUE) for each in (change.before, change.after))
    return str(Change(change.what, before, after))
