"""Every known run of every stage: its inputs, its outputs and its commit.

MLflow holds a run each; each `dvc.lock` that git has holds, for each stage, the run that made what
lay there. Both name inputs and outputs by DVC's md5, and that is what joins them: never the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.base.errors import InputError, RunError
from pipeline.dag.dvc_files import lock_files
from pipeline.dag.lock import LockEntry, parse_lock, read_lock
from pipeline.project.git import git
from pipeline.tracking.connection import artifact, connect, named_failure, tracking_uri
from pipeline.tracking.database import database_file
from pipeline.tracking.keys import EXPERIMENT_PREFIX

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import MlflowClient, ModelVersion, Run

_RUNS_PER_PAGE = 1000
_INPUT, _OUTPUT = "input.", "output."


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """One run of a stage.

    Attributes:
        stage: its name in `dvc.yaml`.
        inputs: path -> md5 of what it read; code too where only `dvc.lock` tells of it.
        outputs: path -> md5 of what it wrote.
        run: in MLflow; None where no run is known.
        commits: those whose `dvc.lock` records it, the oldest first.
        here: the `dvc.lock` that lies here records it.
        params: its parameters as `dvc.lock` has them; empty where only MLflow tells of it.
        code: path -> md5, as `dvc.lock` has it.
    """

    stage: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    run: Run | None = None
    commits: tuple[str, ...] = ()
    here: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def started(self) -> int:
        """Start time in milliseconds; 0 without a run in MLflow."""
        return int(self.run.info.start_time or 0) if self.run else 0

    @property
    def run_id(self) -> str:
        """The id of the run in MLflow; empty without one."""
        return str(self.run.info.run_id) if self.run else ""

    @property
    def number(self) -> str:
        """`#4`: its number among the runs of its stage."""
        return f"#{self.tags.get('number', '?')}"

    @property
    def logged(self) -> Mapping[str, str]:
        """Its parameters as MLflow has them; empty without a run in MLflow."""
        return self.run.data.params if self.run else {}

    @property
    def tags(self) -> Mapping[str, str]:
        """The tags of the run in MLflow."""
        return self.run.data.tags if self.run else {}

    @property
    def deleted(self) -> bool:
        """Whether the run was deleted in MLflow, which still lists it."""
        return bool(self.run and self.run.info.lifecycle_stage == "deleted")


def of_run(run: Run) -> Execution:
    """A run in MLflow as an execution; a run that did not finish has no outputs."""
    tags = run.data.tags
    return Execution(
        stage=tags["dvc.stage"],
        inputs=_below(tags, _INPUT),
        outputs=_below(tags, _OUTPUT) if run.info.status == "FINISHED" else {},
        run=run,
    )


def _below(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {
        key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)
    }


@dataclass(slots=True)
class RunHistory:
    """Everything that MLflow, git and `dvc.lock` know of a project's runs.

    Attributes:
        root: the project.
        client: of MLflow; None if MLflow is missing or does not answer.
        without: why there is no client; empty if there is one.
        is_asked: MLflow answered, or has no database yet; otherwise it may know more.
        executions: the runs of MLflow, the newest first, then what only a `dvc.lock` records.
        versions: of registered models, the newest first.
        aliases: (model, version) -> its aliases.
    """

    root: Path
    client: MlflowClient | None
    without: str
    executions: list[Execution]
    versions: list[ModelVersion]
    aliases: dict[tuple[str, str], list[str]]
    is_asked: bool = True

    def not_known(self, line: str) -> InputError | RunError:
        """The error for what is unknown `without` MLflow: bad input if there is no database yet."""
        kind = InputError if self.is_asked else RunError
        return kind(f"{line}: {self.without}")

    def makers(self, path: str, md5: str) -> list[Execution]:
        """The runs that wrote these bytes to the path, the newest first."""
        return [each for each in self.executions if each.outputs.get(path) == md5]

    def readers(self, path: str, md5: str) -> list[Execution]:
        """The runs that read these bytes from the path, the oldest first."""
        found = [
            each for each in self.executions if md5 in (each.inputs.get(path), each.code.get(path))
        ]
        return found[::-1]

    def maker(self, path: str, md5: str, before: int = 0) -> Execution | None:
        """The run that wrote bytes that were read: of several, the last one before the reading.

        Args:
            path: relative to the project.
            md5: of the bytes.
            before: when they were read, in milliseconds; 0 where that is not known.
        """
        made = self.makers(path, md5)
        in_mlflow = [each for each in made if each.run is not None]
        in_mlflow.sort(key=lambda each: each.deleted)  # deleted runs last
        earlier = [each for each in in_mlflow if not before or each.started <= before]
        return next(iter(earlier or in_mlflow[::-1] or made), None)

    def by_run(self, run_id: str | None) -> Execution | None:
        """The execution of a run in MLflow."""
        return next((each for each in self.executions if run_id and each.run_id == run_id), None)

    def kept(self, run: Execution, name: str) -> bytes | None:
        """A file that MLflow keeps with a run; None where it keeps none of that name.

        Raises:
            RunError: MLflow does not say.
        """
        if self.client is None or run.run is None:
            return None
        with named_failure(self.root, f"does not give {name} of run {run.run_id}"):
            return artifact(self.client, run.run_id, name)

    def aliases_of(self, version: ModelVersion) -> list[str]:
        """The aliases of a registered version."""
        return self.aliases.get((version.name, str(version.version)), [])

    def registered(self, md5: str) -> list[ModelVersion]:
        """The registered versions of a model directory."""
        return [each for each in self.versions if each.tags.get("md5") == md5]


def run_history(root: Path) -> RunHistory:
    """Ask MLflow, git and `dvc.lock`. Nothing is written; MLflow may be missing."""
    client, without = None, ""
    runs: list[Execution] = []
    versions: list[ModelVersion] = []
    aliases: dict[tuple[str, str], list[str]] = {}
    database, is_asked = database_file(tracking_uri(root)), True
    if database is not None and not database.is_file():
        without = f"there is no {database.name} here, so no run and no registered model is known"
    else:
        try:
            client = connect(root)
            with named_failure(root, "does not list its runs"):
                runs = [of_run(run) for run in _runs(client)]
                versions = list(_pages(client.search_model_versions))
                for model in client.search_registered_models():
                    for alias, version in model.aliases.items():
                        aliases.setdefault((model.name, str(version)), []).append(alias)
        except RunError as error:
            client, is_asked = None, False
            without = f"no run and no registered model is known: {error}"
    versions.sort(key=lambda each: int(each.version), reverse=True)
    executions = _joined(runs, _recorded(root))
    return RunHistory(root, client, without, executions, versions, aliases, is_asked)


def _runs(client: MlflowClient) -> Iterator[Run]:
    """The stages' runs, deleted ones too, the newest first."""
    from pipeline.tracking.mlflow_classes import ViewType

    experiments = [
        each.experiment_id
        for each in client.search_experiments()
        if each.name.startswith(EXPERIMENT_PREFIX)
    ]
    if experiments:
        search = partial(
            client.search_runs,
            experiments,
            run_view_type=ViewType.ALL,
            order_by=["attributes.start_time DESC"],
        )
        yield from (run for run in _pages(search) if "dvc.stage" in run.data.tags)


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Everything that a search of MLflow's client finds, page by page."""
    token = None
    while True:
        page = search(max_results=_RUNS_PER_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


# --- what dvc.lock records ------------------------------------------------------------------------


def _recorded(root: Path) -> Iterator[Execution]:
    """The entries of the present `dvc.lock`, then those of all commits, the oldest first."""
    for each in _executions(read_lock(root)):
        yield replace(each, here=True)
    locks = [each.relative_to(root).as_posix() for each in lock_files(root)]
    for commit, blob in _commits_of(root, locks):
        for each in _executions(parse_lock(git(root, "cat-file", "blob", blob))):
            yield replace(each, commits=(commit,))


def _executions(entries: Mapping[str, LockEntry]) -> list[Execution]:
    return [
        Execution(
            stage=name,
            inputs=each.inputs,
            outputs=each.outputs,
            params=each.params,
            code=each.code,
        )
        for name, each in entries.items()
    ]


def _commits_of(root: Path, locks: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each commit that changed a `dvc.lock`, the oldest first, and the blob that it put there."""
    try:
        said = git(
            root,
            *("log", "--all", "--reverse", "--format=commit %H", "--raw", "--no-abbrev"),
            *("--no-renames", "--diff-filter=AM", "--", *locks),
        )
    except RunError:  # a source archive has no git
        return
    commit = ""
    for line in said.splitlines():
        if line.startswith("commit "):
            commit = line.split()[1]
        elif line.startswith(":"):
            yield commit, line.split()[3]


def _joined(runs: Sequence[Execution], recorded: Iterable[Execution]) -> list[Execution]:
    """The runs with their entries in `dvc.lock`; then the entries without a run.

    An entry belongs to every run of its stage that read and wrote the same bytes.
    """
    executions = list(runs)
    by_outcome: dict[tuple[Any, ...], list[int]] = {}
    for i, each in enumerate(runs):
        if each.outputs:
            by_outcome.setdefault(_outcome(each), []).append(i)
    for record in recorded:
        alike = by_outcome.setdefault(_outcome(record), [])
        same = [
            i
            for i in alike
            if executions[i].inputs.items() <= record.inputs.items()
            and (executions[i].run or executions[i].code == record.code)
        ]
        for i in same:
            each = executions[i]
            executions[i] = replace(
                each,
                commits=tuple(dict.fromkeys((*each.commits, *record.commits))),
                here=each.here or record.here,
                params=each.params or record.params,
                code=each.code or record.code,
            )
        if not same:
            alike.append(len(executions))
            executions.append(record)
    return executions[: len(runs)] + executions[len(runs) :][::-1]


def _outcome(each: Execution) -> tuple[Any, ...]:
    return each.stage, tuple(sorted(each.outputs.items()))
