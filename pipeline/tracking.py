"""A stage's run in MLflow: its parameters, metrics, lineage and texts.

MLflow remembers; it decides nothing. One run for each stage that executed, in one experiment a
stage. Metrics are written in batches by a thread of their own, so training never waits for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import resource
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from filelock import FileLock

from gpt.errors import RunError
from gpt.events import Event, Metrics, Text
from gpt.files import write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Status = Literal["FINISHED", "FAILED", "KILLED"]

EXPERIMENT_PREFIX = "gpt-pipeline/"
DEFAULT_UI = "http://127.0.0.1:5000"
PAGES = "workflowType=machine_learning"
"""In an address: MLflow's pages for training and models; it would show those for agents."""

PACKAGES = (
    "torch",
    "tiktoken",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "dvc",
    "mlflow",
    "prefect",
)

PEAK_MEMORY = "system/process_peak_memory_megabytes"
"""The metric of a run that holds the most memory its process had, in megabytes."""

FLUSH_SECONDS = 2.0
_BATCH = 1000  # MLflow's limit for one call
_VALUE_LENGTH = 500  # of a parameter; MLflow takes 6,000, a person reads less

# what the loop calls a value -> what MLflow shows: the part before the slash groups the charts
STEP_METRICS = {
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "param_norm": "optimizer/param_norm",
    "update_ratio": "optimizer/update_ratio",
    "loss_spike": "health/loss_spike",
    "tokens": "throughput/tokens",
    "tokens_per_second": "throughput/tokens_per_second",
}

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


# --- where -----------------------------------------------------------------------------------


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` if it is set, else the database `mlflow.db` of the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def quiet_environment() -> dict[str, str]:
    """Variables under which MLflow neither phones home nor chats; what the user set, stays."""
    return {key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()}


def connect(root: Path) -> MlflowClient:
    """A client of the project's MLflow, its database in place.

    Stage processes start side by side, and creating the tables twice at once fails: the first
    one does it under a lock while the others wait.

    Raises:
        RunError: MLflow cannot be reached or its database cannot be opened.
    """
    os.environ.update(quiet_environment())
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = tracking_uri(root)
    with _unchanged_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    lock = root / ".pipeline" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with named_failure(root, "cannot be opened"), FileLock(lock):
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)  # the registry keeps its own connection
    return client


@contextlib.contextmanager
def _unchanged_environment(*names: str) -> Iterator[None]:
    """MLflow writes its setters into the environment, where they would count as the user's wish."""
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def named_failure(root: Path, what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Turn whatever MLflow raises into one line that names the place and the remedy.

    Args:
        root: the project.
        what: what MLflow did not do.
        kind: of errors; others are none of MLflow's.
    """
    try:
        yield
    except kind as error:  # MLflow passes on its database's and network's own errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"MLflow at {without_credentials(f'{tracking_uri(root)} {what}: {reason}')}; "
            "check that MLFLOW_TRACKING_URI answers, or unset it for the project's own mlflow.db"
        ) from error


def run_that_made(
    client: MlflowClient, stage: str, run_id: str | None, outputs: Mapping[str, str]
) -> Run | None:
    """The run of a stage that wrote what lies there now: the last one, unless DVC brought back what
    an earlier one wrote.

    Args:
        client: of the tracking server.
        stage: its name in `dvc.yaml`.
        run_id: of its last run, as far as it is known.
        outputs: path -> md5, as `dvc.lock` has it; empty: whatever was written.

    Returns:
        The run; None where there is none, or none any more.
    """
    from mlflow.exceptions import MlflowException

    def made(run: Run, *, if_not_told: bool) -> bool:
        tags = run.data.tags
        told = ((tags.get(f"output.{path}"), md5) for path, md5 in outputs.items())
        return all(if_not_told if tag is None else tag == md5 for tag, md5 in told)

    if run_id is not None:
        try:
            last = client.get_run(run_id)
            if made(last, if_not_told=True):
                return last
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    experiment = client.get_experiment_by_name(EXPERIMENT_PREFIX + stage)
    if experiment is None or not outputs:
        return None
    found = client.search_runs(
        [experiment.experiment_id],
        "attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    return next((run for run in found if made(run, if_not_told=False)), None)


def without_credentials(text: str) -> str:
    """A text in which no address names a user and a password, or what stands behind its `?`."""
    text = re.sub(r"(?<=://)\S*@(?=[^@\s]*)", "", text)
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1", text)


def run_url(root: Path, experiment_id: str, run_id: str) -> str:
    """The page of a run: on the tracking server, else on the one that `make ui` started or will."""
    uri = tracking_uri(root)
    if not uri.startswith("http"):
        uri = DEFAULT_UI
        with contextlib.suppress(OSError, ValueError, KeyError):
            uri = json.loads((root / ".pipeline" / "ui.json").read_text())["mlflow"]
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{PAGES}"


# --- what ------------------------------------------------------------------------------------


def dvc_md5(path: Path) -> str:
    """The md5 under which DVC knows a file or (ending in `.dir`) a directory: as in `dvc.lock`."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import localfs

    cache = HashFileDB(localfs, os.devnull)  # never touched: a dry run only computes
    _, _, built = build(cache, str(path.resolve()), localfs, "md5", dry_run=True)
    return str(built.hash_info.value)


def flatten(params: Any) -> dict[str, str]:
    """A stage's parameters as MLflow's flat strings: `train.learning_rate` -> `0.0005`.

    Lists stay one entry: scalars joined by commas, records by their name or their first value.
    """
    return {key: _short(text) for key, text in _flatten(dataclasses.asdict(params))}


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        yield path, ", ".join(_summary(item) for item in value)
    else:
        yield path, str(value)


def _summary(item: Any) -> str:
    if isinstance(item, Mapping):
        return str(item.get("name") or next(iter(item.values()), ""))
    return str(item)


def _short(text: str) -> str:
    return text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 1] + "…"


def flatten_metrics(metrics: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Final metrics as flat numbers: nested keys joined by a slash; what is no number, left out."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping):
            flat |= flatten_metrics(value, name)
        elif isinstance(value, int | float):  # a truth value counts as 0 or 1
            flat[name] = float(value)
    return flat


def git_state(root: Path) -> dict[str, str]:
    """The commit and whether the code differs from it; empty where there is no git repository.

    Each `dvc.lock` and `reports/` change while the pipeline runs and say nothing about the code.
    """

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(root), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        ours = (":!dvc.lock", ":!*/dvc.lock", ":!reports")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *ours)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {
        "mlflow.source.git.commit": commit,
        "git.commit": commit,
        "git.dirty": str(bool(changes)).lower(),
    }


def _machine() -> dict[str, str]:
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in PACKAGES
        if importlib.util.find_spec(name)
    ]
    return {
        "python": platform.python_version(),
        "packages": ", ".join(versions),
        "machine": platform.platform(),
        "machine.cores": str(os.cpu_count()),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A data set that a run worked with, as its page names it under "Datasets used".

    Attributes:
        name: what it is called.
        digest: of its bytes, at most 36 characters. What MLflow knows by name and digest already,
            it does not take anew.
        context: what the run did with it: `raw`, `train`, `training` or `input`.
        source_type: `http` or `local`.
        source: where it is: `url` or `uri`.
        profile: what is in it, in figures.
    """

    name: str
    digest: str
    context: Literal["raw", "train", "training", "input"]
    source_type: Literal["http", "local"]
    source: Mapping[str, Any]
    profile: Mapping[str, Any] = field(default_factory=dict)


# --- the run ---------------------------------------------------------------------------------


class StageRun:
    """One stage's run in MLflow, open from construction until `close`; a `Log` in between.

    Args:
        root: the project.
        stage: its name in `dvc.yaml`; the experiment is named after it.
        params: the stage's parameters.
        inputs: path relative to `root` -> md5 as DVC computes it.
        state: where a stage that can be resumed keeps its state. The run's id and its step metrics
            are noted there too, so that a run that is cut off, by SIGKILL even, goes on as the
            same run, with no step missing and none logged twice.
        description: what the stage does, for the experiment's page.
        data_sets: what the inputs are, for the run's page.

    Raises:
        RunError: MLflow cannot be reached.
    """

    def __init__(
        self,
        root: Path,
        stage: str,
        params: Any,
        inputs: Mapping[str, str],
        state: Path | None = None,
        description: str = "",
        data_sets: Sequence[DataSet] = (),
    ) -> None:
        self.root = root
        self.stage = stage
        self.inputs = dict(inputs)
        self.experiment = EXPERIMENT_PREFIX + stage
        self.client = connect(root)
        with named_failure(root, "does not take a run"):
            self.experiment_id = self._experiment(description)
            self._seen: dict[str, set[int]] = {}
            resumed = self._reopen(_noted_id(state))
            self.id = resumed or self._create(flatten(params), inputs)
            if not resumed:
                self._log_data_sets(data_sets)
        self.resumed = resumed is not None
        self.url = run_url(root, self.experiment_id, self.id)
        self._metrics: deque[tuple[str, float, int, int]] = deque()  # name, value, ms, step
        self._texts: deque[Text] = deque()
        self._journal: TextIO | None = None
        if state is not None:
            self._journal = self._open_journal(state)
        self._stop = threading.Event()
        self._system = _SystemSampler(self.id, tracking_uri(root))
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Take an event in; it is written later. What MLflow has no place for is let go."""
        if isinstance(event, Metrics):
            when = int(time.time() * 1000)
            new = self._take(event.step, event.values, when)
            if new and self._journal:
                self._journal.write(json.dumps([event.step, new, when]) + "\n")
        elif isinstance(event, Text):
            self._texts.append(event)

    def add_picture(self, path: Path) -> None:
        """Keep a picture under `plots/`."""
        with named_failure(self.root, "did not take a picture"):
            self.client.log_artifact(self.id, str(path), "plots")

    def add_tables(self, folder: Path) -> None:
        """Keep a folder of CSV tables under `predictions/`."""
        with named_failure(self.root, "did not take the predictions"):
            self.client.log_artifacts(self.id, str(folder), "predictions")

    def add_data_sets(self, data_sets: Iterable[DataSet]) -> None:
        """Name data sets that the stage found or made."""
        with named_failure(self.root, "did not take the data sets"):
            self._log_data_sets(list(data_sets))

    def add_report(self, page: Path, pictures: Sequence[Path]) -> None:
        """Keep a page under `data/`, and its pictures where it links to them."""
        with named_failure(self.root, "did not take the data report"):
            self.client.log_artifact(self.id, str(page), "data")
            for picture in pictures:
                folder = picture.relative_to(page.parent).parent
                self.client.log_artifact(self.id, str(picture), f"data/{folder.as_posix()}")

    def close(
        self,
        status: Status,
        *,
        metrics: Mapping[str, Any] | None = None,
        outputs: Mapping[str, str] | None = None,
        error: str = "",
    ) -> None:
        """Write what is left and end the run.

        Args:
            status: how the stage ended.
            metrics: the final metrics, nested or not.
            outputs: path relative to the root -> md5.
            error: the one line that the user saw.

        Raises:
            RunError: MLflow does not take it.
        """
        self._stop.set()
        self._thread.join()
        if self._journal:
            self._journal.close()
            self._journal = None
        tags = {f"output.{path}": md5 for path, md5 in (outputs or {}).items()}
        if torch := sys.modules.get("torch"):
            tags["machine.threads"] = str(torch.get_num_threads())
        if error:
            tags["error"] = tags["mlflow.note.content"] = error
        with named_failure(self.root, "did not take the end of a run"):
            now = int(time.time() * 1000)
            for name, value in flatten_metrics(metrics or {}).items():
                if 0 not in self._seen.get(name, ()):  # else logged by one killed right after it
                    self._metrics.append((name, value, now, 0))
            self._sample_system()
            self._metrics.append((PEAK_MEMORY, _peak_memory(), now, 0))
            self._write()
            self._tag(tags)
            self.client.set_terminated(self.id, status)

    def _take(self, step: int, values: Mapping[str, float], when: int) -> dict[str, float]:
        """Queue the values that the run does not have yet, and return them."""
        new: dict[str, float] = {}
        for key, value in values.items():
            name = STEP_METRICS.get(key, key)
            seen = self._seen.setdefault(name, set())
            if step not in seen:
                seen.add(step)
                new[name] = float(value)
                self._metrics.append((name, new[name], when, step))
        return new

    def _open_journal(self, state: Path) -> TextIO:
        """Take in what a process that was cut off noted but had not written; go on noting."""
        write_json(state / "run.json", {"run_id": self.id})
        path = state / "metrics.jsonl"
        noted = path.read_text().splitlines() if self.resumed and path.is_file() else []
        for line in noted:
            with contextlib.suppress(ValueError):  # the last line may be cut
                self._take(*json.loads(line))
        # line by line: what is handed to the system survives the end of the process
        journal = path.open("a" if self.resumed else "w", buffering=1)
        journal.write("\n")  # ends a line that was cut
        return journal

    def _experiment(self, description: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        if found is not None:
            return str(found.experiment_id)
        local = tracking_uri(self.root).startswith("sqlite:")
        folder = (self.root.resolve() / "mlartifacts" / self.stage).as_uri() if local else None
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.note.content": description,
        }
        try:
            return str(self.client.create_experiment(self.experiment, folder, tags))
        except MlflowException:  # another process was quicker
            return str(self.client.get_experiment_by_name(self.experiment).experiment_id)

    def _create(self, params: dict[str, str], inputs: Mapping[str, str]) -> str:
        from mlflow.entities import Param

        git = git_state(self.root)
        last = self.client.search_runs(
            [self.experiment_id], order_by=["attributes.start_time DESC"], max_results=1
        )
        number = int(last[0].data.tags.get("number", 0)) + 1 if last else 1
        name = _run_name(number, params, last[0].data.params if last else None, git)
        tags = {
            "number": str(number),
            "dvc.stage": self.stage,
            "mlflow.source.name": f"python -m pipeline stage {self.stage}",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
            **git,
            **_machine(),
            **{f"input.{path}": md5 for path, md5 in inputs.items()},
        }
        run_id = str(
            self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id
        )
        self.client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
        return run_id

    def _log_data_sets(self, data_sets: Sequence[DataSet]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    _short(each.name),
                    each.digest,
                    each.source_type,
                    json.dumps(each.source),
                    profile=json.dumps(each.profile) if each.profile else None,
                ),
                [InputTag("mlflow.data.context", each.context)],
            )
            for each in data_sets
        ]
        if inputs:
            self.client.log_inputs(self.id, inputs)

    def _reopen(self, run_id: str | None) -> str | None:
        """Go on with a run that was cut off; None if MLflow no longer has it."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self.client.get_run(run_id)
        except MlflowException:
            return None
        if run.info.lifecycle_stage != "active" or run.info.experiment_id != self.experiment_id:
            return None
        for key in run.data.metrics:
            history = self.client.get_metric_history(run_id, key)
            self._seen[key] = {metric.step for metric in history}
        self.client.update_run(run_id, status="RUNNING")
        self.client.set_tag(run_id, "resumed", str(int(run.data.tags.get("resumed", 0)) + 1))
        return run_id

    def _work(self) -> None:
        started = sampled = time.monotonic()
        while not self._stop.wait(FLUSH_SECONDS):
            now = time.monotonic()
            # often at first, so that a short run has a curve; every 10 s in a long one
            if now - sampled >= min(10.0, (now - started) / 10):
                self._sample_system()
                sampled = now
            # what was not taken stays in the queue; `close` tries last and tells
            with contextlib.suppress(Exception):
                self._write()

    def _sample_system(self) -> None:
        values = self._system.sample()
        seen = self._seen.get(next(iter(values)), set())
        self._take(max(seen, default=-1) + 1, values, int(time.time() * 1000))

    def _write(self) -> None:
        from mlflow.entities import Metric

        while self._metrics:
            batch = [self._metrics[i] for i in range(min(_BATCH, len(self._metrics)))]
            self.client.log_batch(self.id, metrics=[Metric(*entry) for entry in batch])
            for _ in batch:
                self._metrics.popleft()
        while self._texts:
            text = self._texts[0]
            self.client.log_text(self.id, text.text, text.name)
            self._texts.popleft()

    def _tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])


def _peak_memory() -> float:
    """The most memory that this process ever had, in megabytes (2^20 bytes)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else kilobytes


class _SystemSampler:
    """MLflow's own monitors (CPU, memory, disk, network, GPU), asked when we want an answer."""

    def __init__(self, run_id: str, uri: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
        self.sample()  # CPU use is measured since the call before: the first answer is always 0

    def sample(self) -> dict[str, float]:
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in values.items()}


def _noted_id(state: Path | None) -> str | None:
    """The MLflow run that the stage's earlier process worked in."""
    if state is None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((state / "run.json").read_text())["run_id"])
    return None


def mark_killed(root: Path, run_id: str) -> None:
    """End a run that a killed process left RUNNING; nothing happens if it is not there any more."""
    from mlflow.exceptions import MlflowException

    client = connect(root)
    with contextlib.suppress(MlflowException):
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")


def _run_name(
    number: int, params: Mapping[str, str], last: Mapping[str, str] | None, git: Mapping[str, str]
) -> str:
    """`#4 train.learning_rate=0.0005`: the number, and what differs from the run before."""
    changed = [f"{key}={value}" for key, value in params.items() if last and last.get(key) != value]
    if not changed or len(changed) > 3:
        changed = [git["git.commit"][:7]] if git else []
    return " ".join((f"#{number}", *(_short_word(word) for word in changed)))


def _short_word(word: str) -> str:
    return word if len(word) <= 60 else word[:59] + "…"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
