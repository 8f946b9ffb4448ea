"""What a version's page in MLflow says from the moment that it is registered.

It compares its run with the run of the version before: the stage, the commit, and what changed.
The report puts the whole model card in its place later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.base.errors import first_few, shortened
from pipeline.show.markdown import escaped
from pipeline.tracking.differences import OF_MODELS, Change, changed_code, changes, profile

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHANGED_TAG = "changed"
"""The tag of a version with a summary of what changed since the version before."""

LONGEST = 5000
"""Characters that MLflow's database has for the description of a model's version."""

_INPUT = "input."
_COMMIT = 7  # digits
_MD5 = 10  # digits
_MOST = 12  # of a kind on the page
_MOST_IN_TAG = 3
_VALUE = 60  # characters of a parameter's value


@dataclass(frozen=True, slots=True)
class VersionPage:
    """The description of a new version, and the tag `changed`; empty where there is none before."""

    description: str
    changed: str


def version_page(client: MlflowClient, run: Run, name: str, what: str) -> VersionPage:
    """What is to be said of a version that is about to be registered.

    Args:
        client: of the MLflow that it will be registered in.
        run: the run that made it, of that MLflow.
        name: the registered model's; the newest version that it has is the one before.
        what: the model is, in a sentence.
    """
    said, changed = _since(client, run, name)
    return VersionPage("\n\n".join([escaped(what), _made(run), said])[:LONGEST], changed)


def _since(client: MlflowClient, run: Run, name: str) -> tuple[str, str]:
    """What changed since the version before, for the page and as a summary."""
    before = _newest(client, name)
    if before is None:
        return "The first version.", ""
    last = _run_of(client, before)
    if last is None:
        return f"MLflow no longer has the run of version {before.version}.", ""
    differs = _version_changes(client, last, run)
    link = f"[version {before.version}](#/models/{name}/versions/{before.version})"
    if not differs:
        return f"Parameters, data and code are those of {link}; the bytes differ.", "nothing"
    told = "\n".join(f"- {line}" for line in _lines(differs))
    return f"**Changed since {link}**\n\n{told}", differs.in_short


@dataclass(frozen=True, slots=True)
class _VersionChanges:
    """What changed since the version before.

    Attributes:
        params: of the stage.
        data: inputs by path, their md5; `profiles` has the figures that differ.
        profiles: by path.
        code: the files of code; None if the code may differ and the files are not known.
        commits: of both; empty where they are the same, or none is known.
    """

    params: list[Change]
    data: list[Change]
    profiles: Mapping[str, list[Change]]
    code: list[str] | None
    commits: str

    def __bool__(self) -> bool:
        return bool(self.params or self.data or self.code or self.code is None)

    @property
    def in_short(self) -> str:
        """`train.learning_rate 0.001 → 0.0005, data/raw/messages, code`."""
        params = [_shown(each) for each in self.params[:_MOST_IN_TAG]]
        if more := len(self.params[_MOST_IN_TAG:]):
            params.append(f"{more} more parameters" if more > 1 else "1 more parameter")
        code = ["code"] if self.code or self.code is None else []
        return ", ".join([*params, *(each.what for each in self.data), *code])


def _made(run: Run) -> str:
    tags = run.data.tags
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    made = f"- Made by the stage {escaped(tags.get('dvc.stage', ''))}, run [{_name(run)}]({page})"
    commit = tags.get("git.commit")
    if not commit:
        return f"{made}\n- Code: no commit is known"
    edits = ", with uncommitted changes" if tags.get("git.dirty") == "true" else ""
    return f"{made}\n- Code: commit {commit}{edits}"


def _name(run: Run) -> str:
    return escaped(run.info.run_name or run.info.run_id)


def _newest(client: MlflowClient, name: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}'")
    return max(found, key=lambda each: int(each.version), default=None)


def _run_of(client: MlflowClient, version: ModelVersion) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(version.run_id) if version.run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return None


def _version_changes(client: MlflowClient, last: Run, run: Run) -> _VersionChanges:
    before, after = last.data, run.data
    data = changes(_inputs(last), _inputs(run))
    profiles = {each.what: changes(*(profile(r, each.what) for r in (last, run))) for each in data}
    commits = [each.tags.get("git.commit", "")[:_COMMIT] for each in (before, after)]
    return _VersionChanges(
        params=changes(before.params, after.params, OF_MODELS),
        data=data,
        profiles=profiles,
        code=changed_code(client, last, run),
        commits=" → ".join(commits) if all(commits) and commits[0] != commits[1] else "",
    )


def _inputs(run: Run) -> dict[str, str]:
    tags = run.data.tags
    return {key.removeprefix(_INPUT): tags[key] for key in tags if key.startswith(_INPUT)}


def _shown(change: Change) -> str:
    """A change that is not too long for one line."""

    before, after = (each and shortened(each, _VALUE) for each in (change.before, change.after))
    return str(Change(change.what, before, after))


def _lines(differs: _VersionChanges) -> Iterator[str]:
    for each in differs.params[:_MOST]:
        yield escaped(_shown(each))
    if more := len(differs.params[_MOST:]):
        yield f"{more} more parameters: see both runs"
    for each in differs.data:
        figures = [str(figure) for figure in differs.profiles[each.what]]
        first, second = (md5 and f"{md5[:_MD5]}…" for md5 in (each.before, each.after))
        sums = str(Change("md5", first, second))
        yield escaped(f"{each.what}: {', '.join([*figures, sums])}")
    if differs.code is None:
        yield f"code{f': commit {differs.commits}' * bool(differs.commits)}"
    elif differs.code:
        files = first_few(differs.code, _MOST)
        yield escaped(f"code: {files}" + f" (commit {differs.commits})" * bool(differs.commits))
