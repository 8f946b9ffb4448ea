"""A stage's run in MLflow: its parameters, metrics, lineage and texts.

MLflow remembers; it decides nothing. One run for each stage that executed, in one experiment a
stage. Metrics are written in batches by a thread of their own, so training never waits for them.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from filelock import FileLock, Timeout

from gpt.base.errors import RunError, shortened
from gpt.base.events import Event, Message, Metrics, Text
from gpt.base.files import write_json
from pipeline.project.secrets import without_credentials, without_secrets
from pipeline.show.markdown import escaped
from pipeline.tracking import unsent
from pipeline.tracking.connection import (
    REMEDY,
    artifact_folder,
    check_answers,
    connect,
    experiment_of,
    lock_file,
    named_failure,
    run_url,
    tracking_uri,
)
from pipeline.tracking.differences import Differs, what_differs
from pipeline.tracking.keys import (
    EXPERIMENT_PREFIX,
    VALUE_LENGTH,
    flatten,
    flatten_metrics,
    is_result,
    key_of,
)
from pipeline.tracking.provenance import Provenance, git_state
from pipeline.tracking.unsent import Unsent

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_T = TypeVar("_T")

Status = Literal["FINISHED", "FAILED", "KILLED"]

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
_SEND_SECONDS = 60.0
"""So long another process may take to send a run that goes on here."""
BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits for one call
_SOURCE_LENGTH = 65_535  # of the JSON that says where a data set is


def machine() -> dict[str, str]:
    """The tags that say on what a run ran: Python, packages, system, cores."""
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


def _place_of(data_set: DataSet) -> str:
    """Where it is, as JSON; of more addresses than MLflow takes, the first."""
    said = without_secrets(json.dumps(data_set.source))
    if len(said) <= _SOURCE_LENGTH:
        return said
    one = {key: value for key, value in data_set.source.items() if not isinstance(value, list)}
    return without_secrets(json.dumps(one))


class StageRun:
    """One stage's run in MLflow, open from construction until `close`; a `Log` in between.

    Args:
        root: the project.
        stage: its name in `dvc.yaml`; the experiment is named after it.
        params: the stage's parameters.
        inputs: path relative to `root` -> md5 as DVC computes it.
        state: where a stage that can be resumed keeps its state. The run's id, its step metrics
            and its texts are noted there too, so that a run that is cut off, by SIGKILL even, goes
            on as the same run, with no step missing and none logged twice.
        description: what the stage does, for the experiment's page.
        data_sets: what the inputs are, for the run's page.
        made_of: what else it is made of; without it, the commit.
        unreachable: what happens where MLflow does not answer: see `TrackingParams`.

    Attributes:
        unsent: where the run is kept while MLflow does not answer; mostly None.
        notices: what a person should know of it, to be told by who made this.
        model_id: the run's model in MLflow; its page shows the run's metrics, too.

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
        *,
        made_of: Provenance | None = None,
        unreachable: Literal["stop", "later"] = "stop",
    ) -> None:
        self.root = root
        self.stage = stage
        self.inputs = dict(inputs)
        self.experiment = EXPERIMENT_PREFIX + stage
        self.unsent: Unsent | None = None
        self.notices: deque[Message] = deque()
        self.model_id: str | None = None
        self._params = flatten(params)
        self._tags = dict(made_of.tags) if made_of else git_state(root)
        self._files = dict(made_of.files) if made_of else {}
        self._description = description
        self._state = state
        self._later = unreachable == "later"
        self._seen: dict[str, set[int]] = {}
        self._last: dict[str, tuple[float, int, int]] = {}  # name -> value, ms, step
        self._metrics: deque[tuple[str, float, int, int]] = deque()  # name, value, ms, step
        self._texts: deque[Text] = deque()
        self._journal: TextIO | None = None
        self._silent = False
        self._telling = threading.Lock()
        self._turn = threading.Lock()  # a batch of metrics goes to one place, not half to another
        self.resumed = self._begin(data_sets)
        of_server = self.unsent is None
        self.url = run_url(root, self.experiment_id, self.id) if of_server else ""
        if state is not None:
            self._journal = self._open_journal(state)
        self._stop = threading.Event()
        self._system = _SystemSampler(self.id, self._uri)
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
            if self._journal:
                self._journal.write(json.dumps([event.name, event.text]) + "\n")

    @property
    def known_as(self) -> str:
        """The run's id in MLflow, as far as it has one; else that of where it is kept."""
        return (self.unsent and self.unsent.continues) or self.id

    def keep(self, what: str, action: Callable[[], _T]) -> _T:
        """Give MLflow something of the run.

        Args:
            what: the words for a failure.
            action: what is done, with the `client` and `id` as they are then; it may be done twice,
                where MLflow was gone in between.

        Raises:
            RunError: MLflow does not take it.
        """
        if self.unsent is None:
            try:
                with self._named(what):
                    check_answers(self._uri)
                    return action()
            except RunError:
                if not self._later:
                    raise
                try:
                    check_answers(self._uri)
                except ConnectionError as error:
                    self._go_on_unsent(str(error))
        with self._named(what):
            return action()

    def add_picture(self, path: Path) -> None:
        """Keep a picture under `plots/`."""
        self._add("did not take a picture", path, "plots")

    def add_tables(self, folder: Path) -> None:
        """Keep a folder of CSV tables under `predictions/`."""
        self.keep(
            "did not take the predictions",
            lambda: self.client.log_artifacts(self.id, str(folder), "predictions"),
        )

    def add_data_sets(self, data_sets: Iterable[DataSet]) -> None:
        """Name data sets that the stage found or made."""
        found = list(data_sets)
        self.keep("did not take the data sets", lambda: self._log_data_sets(found))

    def add_report(self, page: Path, pictures: Sequence[Path]) -> None:
        """Keep a page under `data/`, and its pictures where it links to them."""
        self._add("did not take the data report", page, "data")
        for picture in pictures:
            folder = picture.relative_to(page.parent).parent
            self._add("did not take the data report", picture, f"data/{folder.as_posix()}")

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
        tags = {key_of(f"output.{path}"): md5 for path, md5 in (outputs or {}).items()}
        if torch := sys.modules.get("torch"):
            tags["machine.threads"] = str(torch.get_num_threads())
        if error:
            tags |= {"error": error, "mlflow.note.content": escaped(error)}
        now = int(time.time() * 1000)
        # one step after the curves: of a metric's values MLflow shows the one of the highest step
        curves = [step for key, (_, _, step) in self._last.items() if is_result(key)]
        final = {key_of(name): value for name, value in flatten_metrics(metrics or {}).items()}
        self._take(max(curves, default=-1) + 1, final, now)
        self._sample_system()
        self._metrics.append((PEAK_MEMORY, _peak_memory(), now, 0))

        def end() -> None:
            self._write()
            if self.model_id:
                show_on_model(self.client, self.id, self.model_id, self._last)
            self._tag(tags)
            self.client.set_terminated(self.id, status)

        try:
            self.keep("did not take the end of a run", end)
        finally:
            if self.unsent:
                self._held.release()

    def _begin(self, data_sets: Sequence[DataSet]) -> bool:
        """Open the run where it can be; whether it goes on with one that was cut off."""
        noted, gone = _noted(self._state), ""
        try:
            self.client = connect(self.root)
        except RunError as error:
            if not self._later:
                raise
            gone = str(error).partition(f"; {REMEDY}")[0]
        # one that could not be sent goes on where it is
        kept = unsent.find(self.root, noted.folder) if noted.folder else None
        if kept is not None and not self._hold(kept):  # sent meanwhile: its new id is noted now
            kept, noted = None, _noted(self._state)
        if kept is None and gone:
            kept = unsent.begin(self.root, self.stage, self._state, noted.run_id)
            noted = _Noted()
            self._hold(kept)
        if kept is not None:
            self.unsent = kept
            gone = gone or f"MLflow at {self._place} did not take the beginning of this run"
            self._tell(
                f"{gone}: {self.stage} runs all the same and is logged later, by the next run or "
                "`gpt-pipeline sync`"
            )
        with self._named("does not take a run"):
            self.experiment_id = self._experiment()
            resumed = self._reopen(noted.run_id)
            self.id = resumed or self._create()
            if not resumed:
                self._log_data_sets(data_sets)
        return resumed is not None or (self.unsent is not None and bool(self.unsent.continues))

    def _go_on_unsent(self, reason: str) -> None:
        """MLflow is gone in the middle: what it has not got goes into a database of its own."""
        with self._turn:
            self.unsent = unsent.begin(
                self.root, self.stage, self._state, self.id, model_id=self.model_id
            )
            self.model_id = None
            self._hold(self.unsent)
            with self._named("does not take a run"):
                self.id = self._create(self._experiment())
        self._tell_once(reason)

    def _hold(self, kept: Unsent) -> bool:
        """Write to this from now on; False if it was sent meanwhile and has gone."""
        try:
            held = kept.take(_SEND_SECONDS)
        except Timeout:
            raise RunError(
                f"{self.stage}: another process still sends its run to MLflow; try again when "
                "that has ended"
            ) from None
        if held is None:
            return False
        self._held = held
        self.client = connect(self.root, kept.uri)
        return True

    @property
    def _uri(self) -> str:
        return self.unsent.uri if self.unsent else tracking_uri(self.root)

    @property
    def _place(self) -> str:
        return without_credentials(tracking_uri(self.root))

    def _named(self, what: str) -> contextlib.AbstractContextManager[None]:
        return named_failure(self.root, what, uri=self._uri)

    def _tell(self, text: str) -> None:
        self.notices.append(Message(text, "warning"))

    def _tell_once(self, reason: str) -> None:
        """MLflow is gone: said by the one of our two threads that finds out first."""
        with self._telling:
            told, self._silent = self._silent, True
        if told:
            return
        what = f"MLflow at {self._place} does not answer ({reason}): {self.stage} goes on"
        if self._later:
            what += ", and what is missing is logged later, by the next run or `gpt-pipeline sync`"
        else:
            what += ", but cannot end well before it answers"
            what += "; the state is kept" if self._state else ""
        self._tell(what)

    def _add(self, what: str, path: Path, folder: str) -> None:
        self.keep(what, lambda: self.client.log_artifact(self.id, str(path), folder))

    def _take(self, step: int, values: Mapping[str, float], when: int) -> dict[str, float]:
        """Queue the values that the run does not have yet, and return them."""
        new: dict[str, float] = {}
        for key, value in values.items():
            seen = self._seen.setdefault(key, set())
            self._last[key] = (float(value), when, step)
            if step not in seen:
                seen.add(step)
                new[key] = float(value)
                self._metrics.append((key, new[key], when, step))
        return new

    def _open_journal(self, state: Path) -> TextIO:
        """Take in what a process that was cut off noted but had not written; go on noting."""
        folder = self.unsent.folder.name if self.unsent else None
        write_json(state / "run.json", {"run_id": self.id, "unsent": folder})
        path = state / "metrics.jsonl"
        noted = path.read_text().splitlines() if self.resumed and path.is_file() else []
        for line in noted:
            with contextlib.suppress(ValueError):  # the last line may be cut
                match json.loads(line):
                    case [int(step), values, when]:
                        self._take(step, values, when)
                    case [str(name), text]:
                        self._texts.append(Text(name, text))
        # line by line: what is handed to the system survives the end of the process
        journal = path.open("a" if self.resumed else "w", buffering=1)
        journal.write("\n")  # ends a line that was cut
        return journal

    def _experiment(self) -> str:
        if self.unsent:
            folder: str | None = self.unsent.artifacts.as_uri()
        else:
            folder = artifact_folder(self.root, self.stage)
        return experiment_of(self.client, self.stage, folder, self._description)

    def _create(self, experiment_id: str = "") -> str:
        from mlflow.entities import Param

        experiment_id = experiment_id or self.experiment_id
        with FileLock(lock_file(self.root)):  # else two that begin together have one number
            differs = what_differs(self.client, experiment_id, self._params, self._tags)
            self.name = differs.name
            made = self._create_named(experiment_id, differs)
        run_id = str(made.info.run_id)
        params = [Param(key, value) for key, value in self._params.items()]
        for start in range(0, len(params), BATCH_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + BATCH_PARAMS])
        if self._files:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in self._files.items():
                    (Path(folder) / name).write_bytes(content)
                self.client.log_artifacts(run_id, folder, "lineage")
        return run_id

    def _create_named(self, experiment_id: str, differs: Differs) -> Run:
        tags = {
            **differs.tags,
            "dvc.stage": self.stage,
            "mlflow.source.name": f"python -m pipeline stage {self.stage}",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
            **self._tags,
            **machine(),
            **{key_of(f"input.{path}"): md5 for path, md5 in self.inputs.items()},
        }
        return self.client.create_run(experiment_id, tags=tags, run_name=differs.name)

    def _log_data_sets(self, data_sets: Sequence[DataSet]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    shortened(each.name, VALUE_LENGTH),
                    each.digest,
                    each.source_type,
                    _place_of(each),
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
        self.name = str(run.info.run_name)
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
                self._look_whether_it_answers()
                self._write()

    def _look_whether_it_answers(self) -> None:
        """Say once that MLflow is gone, and once that it is back."""
        if self.unsent:
            return
        try:
            check_answers(self._uri)
        except ConnectionError as error:
            self._tell_once(str(error))
            raise
        if self._silent:
            self.notices.append(Message(f"MLflow at {self._place} answers again"))
        self._silent = False

    def _sample_system(self) -> None:
        values = self._system.sample()
        seen = self._seen.get(next(iter(values)), set())
        self._take(max(seen, default=-1) + 1, values, int(time.time() * 1000))

    def _write(self) -> None:
        from mlflow.entities import Metric

        with self._turn:
            while self._metrics:
                batch = [self._metrics[i] for i in range(min(BATCH_METRICS, len(self._metrics)))]
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


def show_on_model(
    client: MlflowClient,
    run_id: str,
    model_id: str,
    last: Mapping[str, tuple[float, int, int]],
) -> None:
    """Show a run's results on its model: what it came to, the end of its curves, its tokens.

    Args:
        client: of the tracking server.
        run_id: the run that made the model.
        model_id: the model, as MLflow calls it.
        last: the run's metrics -> value, milliseconds and step of the last entry.
    """
    from mlflow.entities import Metric

    metrics = [
        Metric(name, *entry, model_id=model_id) for name, entry in last.items() if is_result(name)
    ]
    for start in range(0, len(metrics), BATCH_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH_METRICS])


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


@dataclass(frozen=True, slots=True)
class _Noted:
    """The run that the stage's earlier process worked in: its id, and where it is unsent."""

    run_id: str | None = None
    folder: str | None = None


def _noted(state: Path | None) -> _Noted:
    if state is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads((state / "run.json").read_text())
            return _Noted(str(said["run_id"]), said.get("unsent"))
    return _Noted()


def mark_killed(root: Path, run_id: str) -> None:
    """End a run that a killed process left RUNNING; nothing happens if it is not there any more."""
    from mlflow.exceptions import MlflowException

    client = connect(root)
    with contextlib.suppress(MlflowException):
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
