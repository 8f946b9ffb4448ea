"""A stage's run in MLflow: its parameters, metrics, lineage and texts.

MLflow only records; it decides nothing. Each executed stage is one run, in one experiment per
stage. Events are written to the run's outbox, and a background thread sends them from there, so
training never waits for MLflow.
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
import shutil
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt.base.errors import RunError, shortened
from gpt.base.events import Event, Message, Metrics, Text
from gpt.base.files import write_json
from pipeline.project.secrets import without_secrets
from pipeline.show.markdown import escaped
from pipeline.tracking.connection import REMEDY, tracking_uri
from pipeline.tracking.keys import (
    EXPERIMENT_PREFIX,
    VALUE_LENGTH,
    flatten,
    flatten_metrics,
    key_of,
)
from pipeline.tracking.outbox import Outbox, held, place_of, read_outbox
from pipeline.tracking.provenance import Provenance, git_state
from pipeline.tracking.registry import POINT_VARIABLE, save_model
from pipeline.tracking.sender import Sender

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
"""The metric with the peak memory of a run's process, in megabytes."""

FLUSH_SECONDS = 2.0
_WAIT_SECONDS = 60.0
"""How long another process may take to send a run that is resumed here."""
_SOURCE_LENGTH = 65_535  # limit for the JSON with a data set's source


def machine() -> dict[str, str]:
    """Tags that describe the environment of a run: Python, packages, system, cores."""
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


def _described(data_set: DataSet) -> dict[str, Any]:
    """What MLflow's `Dataset` takes, and the context."""
    source = without_secrets(json.dumps(data_set.source))
    if len(source) > _SOURCE_LENGTH:  # too many URLs for MLflow: only the first
        one = {key: each for key, each in data_set.source.items() if not isinstance(each, list)}
        source = without_secrets(json.dumps(one))
    return {
        "name": shortened(data_set.name, VALUE_LENGTH),
        "digest": data_set.digest,
        "source_type": data_set.source_type,
        "source": source,
        "profile": json.dumps(data_set.profile) if data_set.profile else None,
        "context": data_set.context,
    }


class StageRun:
    """One stage's run in MLflow, open from construction until `close`; until then it is a `Log`.

    Args:
        root: the project.
        stage: its name in `dvc.yaml`; the experiment is named after it.
        params: the stage's parameters.
        inputs: path relative to `root` -> md5 as DVC computes it.
        state: the resume state's folder, for a stage that can be resumed. The run's id is noted
            there too, so that an interrupted stage, even one killed by SIGKILL, continues the same
            run, with no step missing or logged twice.
        description: what the stage does, for the experiment's page.
        data_sets: the inputs as data sets, for the run's page.
        made_of: the stage's provenance; without it only the commit is recorded.
        unreachable: what to do if MLflow does not answer: see `TrackingParams`.

    Attributes:
        notices: messages for the user, to be shown by the caller.

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
        self.stage = stage
        self.inputs = dict(inputs)
        self.notices: deque[Message] = deque()
        self._later = unreachable == "later"
        self._resumable = state is not None
        self._gone = False
        self._turn = threading.Lock()
        self._held = contextlib.ExitStack()
        noted = _noted(state)
        name = noted.get("outbox") or noted.get("unsent") or f"{stage}-{uuid.uuid4().hex[:12]}"
        if not self._held.enter_context(held(root, name, _WAIT_SECONDS)):
            raise RunError(
                f"{stage}: another process still sends its run to MLflow; try again when that has "
                "ended"
            )
        resumed = noted.get("resumed", 0) + 1 if noted else 0
        outbox = read_outbox(root, name)
        new = outbox is None
        if outbox is None:
            made_of = made_of or Provenance(tags=git_state(root))
            outbox = Outbox(
                folder=place_of(root, name),
                root=root.resolve(),
                stage=stage,
                begun=noted.get("begun", _now()),
                description=description,
                params=flatten(params),
                tags=_tags(stage, made_of, inputs),
                data_sets=[_described(each) for each in data_sets],
                run_id=noted.get("run_id", ""),
            )
            lineage = outbox.files / "lineage"
            for path, content in made_of.files.items():
                lineage.mkdir(parents=True, exist_ok=True)
                (lineage / path).write_bytes(content)
            outbox.save()
        if resumed:
            outbox.write("resume", resumed)
        self._outbox = outbox
        self._sender = Sender(outbox)
        try:
            self._send()
        except RunError:
            if new and not self._sender.run_id:
                outbox.remove()
            self._held.close()
            raise
        if state is not None:
            note = {"outbox": name, "resumed": resumed, "begun": outbox.begun}
            write_json(state / "run.json", note)
        self._system = _SystemSampler(tracking_uri(root))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Record an event, to be sent later; events without a counterpart in MLflow are dropped."""
        if isinstance(event, Metrics):
            values = {key_of(key): float(value) for key, value in event.values.items()}
            self._outbox.write("metrics", event.step, values, _now())
        elif isinstance(event, Text):
            file = self._outbox.files / event.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(event.text, encoding="utf-8")
            self._outbox.write("artifact", event.name)

    @property
    def id(self) -> str:
        """The run's id in MLflow; the name of its outbox before MLflow has the run."""
        return self._sender.run_id or self._outbox.name

    @property
    def experiment_id(self) -> str:
        """The id of the stage's experiment; empty before MLflow has the run."""
        return self._sender.experiment_id

    @property
    def name(self) -> str:
        """The run's name in MLflow, which numbers the runs."""
        return self._sender.name or "kept"

    @property
    def url(self) -> str:
        """The run's page; empty before MLflow has the run."""
        return self._sender.url

    @property
    def facts(self) -> dict[str, str]:
        """The content of the run's note."""
        return {
            "run_id": self.id,
            "name": self.name,
            "experiment_id": self.experiment_id,
            "experiment": EXPERIMENT_PREFIX + self.stage,
            "url": self.url,
        }

    @property
    def client(self) -> MlflowClient:
        """A client of the project's MLflow, if it answers."""
        assert self._sender.client is not None
        return self._sender.client

    def add_file(self, path: Path, to: str) -> None:
        """Add a file, or a folder with its content, to the run.

        Args:
            path: the file or folder; it is copied, so it may be changed or deleted afterwards.
            to: its path on the run's page, such as `plots/loss.png`.
        """
        copy = self._outbox.files / to
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, copy)
        self._outbox.write("artifact", to)

    def add_data_sets(self, data_sets: Iterable[DataSet]) -> None:
        """Add data sets that the stage found or made."""
        self._outbox.write("data_sets", [_described(each) for each in data_sets])

    def add_model(self, name: str, directory: Path, md5: str) -> int | None:
        """Make `directory` the newest version of a registered model; move `candidate` there.

        If a version with the same md5 is registered, no new one is created, and the alias moves to
        that version.

        Args:
            name: `base`, `classifier`, `assistant` or `preferred`.
            directory: a model directory.
            md5: its checksum as DVC computes it.

        Returns:
            The version; None if MLflow does not answer, in which case it is registered later.

        Raises:
            RunError: MLflow refuses it.
        """
        save_model(name, directory, self._outbox.model)
        self._outbox.write("model", name, md5, _now(), POINT_VARIABLE in os.environ)
        self._send()
        return self._sender.version

    def close(
        self,
        status: Status,
        *,
        metrics: Mapping[str, Any] | None = None,
        outputs: Mapping[str, str] | None = None,
        error: str = "",
    ) -> None:
        """Send all remaining events and end the run.

        Args:
            status: how the stage ended.
            metrics: the final metrics, nested or not.
            outputs: path relative to the root -> md5.
            error: the one-line error that the user saw.

        Raises:
            RunError: MLflow refuses something.
        """
        if read_outbox(self._outbox.project, self._outbox.name) is None:
            return  # stopped after its end was sent
        self._stop.set()
        self._thread.join()
        tags = {key_of(f"output.{path}"): md5 for path, md5 in (outputs or {}).items()}
        if torch := sys.modules.get("torch"):
            tags["machine.threads"] = str(torch.get_num_threads())
        if error:
            tags |= {"error": error, "mlflow.note.content": escaped(error)}
        final = {key_of(name): value for name, value in flatten_metrics(metrics or {}).items()}
        self._outbox.write("final", final, _now())
        self._sample({**self._system.sample(), PEAK_MEMORY: _peak_memory()})
        self._outbox.write("end", status, tags, _now())
        if self._send():
            self._outbox.remove()
        self._held.close()

    def _send(self) -> bool:
        """Send the outbox; False if MLflow does not answer and the outbox may be sent later."""
        with self._turn:
            try:
                self._sender.send()
            except RunError as error:
                gone = isinstance(error.__cause__, ConnectionError) or self._sender.client is None
                before, self._gone = self._gone, gone
                if self._gone and not before:
                    self._tell_gone(error)
                if not (self._gone and self._later):
                    raise
                return False
            if self._gone:
                self.notices.append(Message("MLflow answers again"))
            self._gone = False
            return True

    def _tell_gone(self, error: RunError) -> None:
        what = f"{str(error).partition(f'; {REMEDY}')[0]}: {self.stage} goes on"
        if self._later:
            what += ", and what is missing is logged later, by the next run or `gpt-pipeline sync`"
        else:
            what += ", but cannot end well before it answers"
            what += "; the state is kept" if self._resumable else ""
        self.notices.append(Message(what, "warning"))

    def _work(self) -> None:
        started = sampled = time.monotonic()
        while not self._stop.wait(FLUSH_SECONDS):
            now = time.monotonic()
            # often at first, so that a short run has a curve; every 10 s in a long one
            if now - sampled >= min(10.0, (now - started) / 10):
                with contextlib.suppress(OSError):  # the disk is full, say
                    self._sample(self._system.sample())
                sampled = now
            with contextlib.suppress(Exception):  # `close` tries again and reports
                self._send()

    def _sample(self, values: Mapping[str, float]) -> None:
        """Log system metrics, with the run's elapsed seconds as the step."""
        now = _now()
        self._outbox.write("metrics", (now - self._outbox.begun) // 1000, values, now)


def _tags(stage: str, made_of: Provenance, inputs: Mapping[str, str]) -> dict[str, str]:
    return {
        "dvc.stage": stage,
        "mlflow.source.name": f"python -m pipeline stage {stage}",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        **made_of.tags,
        **machine(),
        **{key_of(f"input.{path}"): md5 for path, md5 in inputs.items()},
    }


def _now() -> int:
    return int(time.time() * 1000)


def _peak_memory() -> float:
    """The peak memory of this process, in megabytes (2^20 bytes)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)  # macOS: bytes, else KiB


class _SystemSampler:
    """Samples MLflow's system monitors (CPU, memory, disk, network, GPU) on request."""

    def __init__(self, uri: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor("", tracking_uri=uri)
        self.sample()  # CPU use is measured since the previous call: the first value is always 0

    def sample(self) -> dict[str, float]:
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in values.items()}


def _noted(state: Path | None) -> dict[str, Any]:
    """The note of the run that the stage's earlier process used; empty if there is none."""
    if state is not None:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((state / "run.json").read_text()))
    return {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in a container
        return "unknown"
