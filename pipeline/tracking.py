"""A stage's run in MLflow: its parameters, metrics, lineage and texts.

MLflow remembers; it decides nothing. One run for each stage that executed, in one experiment a
stage. Metrics are written in batches by a thread of their own, so training never waits for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import hashlib
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
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from filelock import FileLock, Timeout
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from gpt.errors import InputError, RunError
from gpt.events import Event, Message, Metrics, Text
from gpt.files import write_json
from pipeline import unsent
from pipeline.home import home
from pipeline.markdown import escaped
from pipeline.mlflow_database import database_file, database_uri, follow_move, reason_and_remedy

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from pipeline.provenance import Provenance
    from pipeline.unsent import Unsent

_T = TypeVar("_T")

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
_SEND_SECONDS = 60.0
"""So long another process may take to send a run that goes on here."""
BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits for one call
_RECENT = 50  # runs among which the highest number is looked for
_NOTHING = "none"
OF_MODELS = ("kind",)  # MLflow puts a logged model's settings beside the run's parameters
NO_RESULTS = ("system", "optimizer", "health", "throughput")  # groups of metrics
_VALUE_LENGTH = 500  # of a parameter; MLflow takes 6,000, a person reads less
_KEY = re.compile(r"[/\w.\- :]+")  # of what a key of MLflow's may be made
_KEY_LENGTH = 250  # characters
NAME_LENGTH = 250  # of a run; a database on a server takes no longer one
_SOURCE_LENGTH = 65_535  # of the JSON that says where a data set is
_DIGEST = re.compile(r"__[0-9a-f]{8}\Z")  # at the end of a key that differs from its name

NOT_CODE = (":!params.yaml", ":!dvc.lock", ":!*/dvc.lock", ":!reports")
"""For git: what the pipeline changes while it runs, or records by itself."""

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

_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|sig|signature|passw|pwd|auth|credential)[\w.-]*=)"
    r"[^\s&#'\"<>,}\])]+",
    re.IGNORECASE,
)
"""A part of an address behind its `?` that opens a door."""

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    # MLflow's own defaults try for minutes to reach a server that is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}

_REMEDY = "check that MLFLOW_TRACKING_URI answers, or unset it for the project's own mlflow.db"

_DATABASE_SERVERS = ("postgresql", "mysql")
"""How addresses begin under which MLflow's client works on a server's database by itself."""

_PROBE_SECONDS = 5.0
"""A server that says nothing for so long, twice, does not answer."""


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class TrackingParams:
    """What happens to a stage while MLflow does not answer.

    Attributes:
        unreachable: `stop`: it does not start, and one that has begun ends as a failure that the
            same command goes on from. `later`: it runs, and is logged when MLflow answers again.
    """

    unreachable: Literal["stop", "later"] = "stop"


# --- where -----------------------------------------------------------------------------------


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` if it is set, else the database `mlflow.db` of the project."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or database_uri(_own_database(root))
    # the driver that the extra `team` brings; SQLAlchemy 2.1 takes another one if none is named
    return re.sub("^postgres(ql)?://", "postgresql+psycopg2://", uri)


def _own_database(root: Path) -> Path:
    return home(root) / "mlflow.db"


def artifact_folder(root: Path, name: str) -> str | None:
    """Where a new experiment keeps its files: below `mlartifacts` if MLflow is a database alone.

    A server decides by itself: None.

    Args:
        root: the project.
        name: of the folder.
    """
    is_server = tracking_uri(root).startswith("http")
    return None if is_server else (home(root) / "mlartifacts" / name).as_uri()


def quiet_environment() -> dict[str, str]:
    """Variables under which MLflow neither phones home nor chats; what the user set, stays."""
    return {key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()}


def connect(root: Path, uri: str = "") -> MlflowClient:
    """A client of the project's MLflow, its database in place.

    Stage processes start side by side, and creating the tables twice at once fails: the first
    one does it under a lock while the others wait.

    Args:
        root: the project.
        uri: the database of an unsent run, in the place of the project's MLflow.

    Raises:
        RunError: MLflow cannot be reached or its database cannot be opened.
    """
    os.environ.update(quiet_environment())
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    of_unsent, uri = bool(uri), uri or tracking_uri(root)
    with named_failure(root, "does not answer", uri=uri, opens=True):
        check_answers(uri)
    with _unchanged_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    opening = named_failure(root, "cannot be opened", uri=uri, opens=True)
    with opening, FileLock(_lock_file(root)):
        database = database_file(uri)
        if database is not None and (of_unsent or database == _own_database(root)):
            follow_move(database)
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)  # the registry keeps its own connection
    return client


def _lock_file(root: Path) -> Path:
    """Held by who changes what the project's processes share in MLflow."""
    lock = home(root) / ".pipeline" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return lock


def reachable(root: Path) -> bool:
    """Whether the project's MLflow answers; known within some 10 seconds."""
    try:
        if tracking_uri(root).startswith("http"):
            os.environ.update(quiet_environment())
            check_answers(tracking_uri(root))
        else:
            connect(root)
    except (RunError, OSError):
        return False
    return True


def check_answers(uri: str) -> None:
    """Ask a server whether it is there; of a file nothing is asked.

    Raises:
        ConnectionError: it does not answer; the message says why.
    """
    if uri.startswith(_DATABASE_SERVERS):
        _check_database(uri)
    if not uri.startswith("http"):
        return
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            max_retries=1,
            timeout=_PROBE_SECONDS,
            raise_on_status=False,
            params={"max_results": 1},
        )
    except (MlflowException, OSError) as error:
        text = str(error)
        said = re.search(r"\[Errno -?\d+\] ([^\"')]+)", text)
        slow = f"nothing within {_PROBE_SECONDS:.0f} s" if "timed out" in text.lower() else ""
        reason = said[1] if said else slow or next(iter(text.splitlines()), "no reason given")
        raise ConnectionError(reason) from None
    if answer.status_code >= 500:
        raise ConnectionError(f"status {answer.status_code}")


def _check_database(uri: str) -> None:
    """Open one connection: MLflow itself tries for 100 seconds, and says nothing meanwhile."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError
    from sqlalchemy.pool import NullPool

    try:
        wait = {"connect_timeout": int(_PROBE_SECONDS)}
        with create_engine(uri, poolclass=NullPool, connect_args=wait).connect():
            pass
    except ImportError as error:
        what = f"{error.name} is not installed; `pip install 'gpt-pipeline[team]'` brings it"
        raise ConnectionError(what) from None
    except (SQLAlchemyError, TypeError) as error:
        said = error.orig if isinstance(error, DBAPIError) else error
        reason = next(iter(str(said).strip().splitlines()), "no reason given")
        raise ConnectionError(reason) from None


@contextlib.contextmanager
def _unchanged_environment(*names: str) -> Iterator[None]:
    """MLflow writes its setters into the environment, where they would count as the user's wish."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def named_failure(
    root: Path,
    what: str,
    kind: type[Exception] = Exception,
    uri: str = "",
    *,
    opens: bool = False,
) -> Iterator[None]:
    """Turn whatever MLflow raises into one line that names the place and the remedy.

    Args:
        root: the project.
        what: what MLflow did not do.
        kind: of errors; others are none of MLflow's.
        uri: another MLflow than the project's.
        opens: MLflow is looked for; what it says is of its address.
    """
    try:
        yield
    except (InputError, RunError):  # they say by themselves what is wrong
        raise
    except kind as error:  # MLflow passes on its database's and network's own errors
        uri = uri or tracking_uri(root)
        reason, remedy = reason_and_remedy(error, database_file(uri))
        if not opens and getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
            remedy = "it answers, and refuses this name or value: change that one"
        if remedy and os.environ.get("MLFLOW_TRACKING_URI") == uri:
            remedy += ", or name another place in MLFLOW_TRACKING_URI"
        told = without_credentials(f"{uri} {what}: {reason}")
        raise RunError(f"MLflow at {told}; {remedy or _REMEDY}") from error


def artifact(client: MlflowClient, run_id: str, path: str) -> bytes | None:
    """A file that MLflow keeps with a run; None where it keeps none of that name."""
    # asked first: what is not there is another error for each kind of store
    listed = client.list_artifacts(run_id, path.rpartition("/")[0])
    if path not in [each.path for each in listed]:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()


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
        told = ((tags.get(key_of(f"output.{path}")), md5) for path, md5 in outputs.items())
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


def without_secrets(text: str) -> str:
    """A text whose addresses name no user and no password, and no token behind their `?`.

    Unlike `without_credentials` it leaves an address whole that holds none.
    """
    return _SECRET.sub(r"\1***", re.sub(r"(?<=://)[^\s/?#@'\"]*@", "", text))


def run_url(root: Path, experiment_id: str, run_id: str) -> str:
    """The page of a run: on the tracking server, else on the one that `make ui` started or will."""
    uri = tracking_uri(root)
    if not uri.startswith("http"):
        uri = DEFAULT_UI
        with contextlib.suppress(OSError, ValueError, KeyError):
            uri = json.loads((home(root) / ".pipeline" / "ui.json").read_text())["mlflow"]
    return f"{without_secrets(uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{PAGES}"


# --- what ------------------------------------------------------------------------------------


def dvc_md5(path: Path) -> str:
    """The md5 under which DVC knows a file or (ending in `.dir`) a directory: as in `dvc.lock`."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import localfs

    cache = HashFileDB(localfs, os.devnull)  # never touched: a dry run only computes
    _, _, built = build(cache, str(path.resolve()), localfs, "md5", dry_run=True)
    return str(built.hash_info.value)


def packages_of(tags: Mapping[str, str]) -> dict[str, str]:
    """Package -> version, as the tags of a run say (`machine` makes them)."""
    pairs = (each.rpartition(" ") for each in tags.get("packages", "").split(", ") if " " in each)
    return {name: version for name, _, version in pairs}


def flatten(params: Any) -> dict[str, str]:
    """A stage's parameters as MLflow's flat strings: `train.learning_rate` -> `0.0005`.

    Lists stay one entry: scalars joined by commas, records by their name or their first value.
    """
    flat = _flatten(dataclasses.asdict(params))
    return {key_of(key): short(without_secrets(text), _VALUE_LENGTH) for key, text in flat}


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


def short(text: str, most: int = NAME_LENGTH) -> str:
    """A text, or of a longer one its beginning; by default as long as a run's name may be."""
    return text if len(text) <= most else text[: most - 1] + "…"


def key_of(name: str) -> str:
    """The key under which MLflow keeps what has this name: a metric, a parameter or a tag.

    Labels, sources and paths may hold any character, and have any length. A name that MLflow takes
    is its own key. Of another one, what MLflow refuses is replaced, and a digest of the name keeps
    names apart that then look alike: one name has one key, in every run.
    """
    taken = _KEY.fullmatch(name) and not _DIGEST.search(name)
    if taken and len(name) <= _KEY_LENGTH and not any(map(_is_path, name.split("/"))):
        return name
    parts = re.sub(r"[^/\w.\- ]", "_", name).split("/")
    shown = "/".join(f"_{part}" if _is_path(part) else part for part in parts)
    digest = f"__{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return shown[: _KEY_LENGTH - len(digest)] + digest


def _is_path(part: str) -> bool:
    """Whether a part between slashes leads elsewhere: `a//b`, `./a`, `../a`."""
    return part in ("", ".") or part.startswith("..")


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

    Each `dvc.lock` and `reports/` change while the pipeline runs and say nothing about the code;
    `params.yaml` says what is done with it, and a run keeps the whole of that by itself.
    """

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(root), *arguments)
        # a hook of git that starts us says which repository it is at work on
        own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *NOT_CODE)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {
        "mlflow.source.git.commit": commit,
        "git.commit": commit,
        "git.dirty": str(bool(changes)).lower(),
    }


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


# --- the run ---------------------------------------------------------------------------------


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
        for name, value in flatten_metrics(metrics or {}).items():
            name = key_of(name)
            self._last[name] = (value, now, 0)
            if 0 not in self._seen.get(name, ()):  # else logged by one killed right after it
                self._metrics.append((name, value, now, 0))
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
            gone = str(error).partition(f"; {_REMEDY}")[0]
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
            name = STEP_METRICS.get(key, key)
            seen = self._seen.setdefault(name, set())
            self._last[name] = (float(value), when, step)
            if step not in seen:
                seen.add(step)
                new[name] = float(value)
                self._metrics.append((name, new[name], when, step))
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
        with FileLock(_lock_file(self.root)):  # else two that begin together have one number
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
                    short(each.name, _VALUE_LENGTH),
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


def experiment_of(client: MlflowClient, stage: str, folder: str | None, description: str) -> str:
    """The id of a stage's experiment, which is made if it is not there.

    Args:
        client: of the tracking server.
        stage: its name in `dvc.yaml`.
        folder: where a new one keeps its files; None leaves it to the server.
        description: what the stage does.
    """
    from mlflow.exceptions import MlflowException

    name = EXPERIMENT_PREFIX + stage
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    if found is not None:
        return str(found.experiment_id)
    tags = {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": description,
    }
    try:
        return str(client.create_experiment(name, folder, tags))
    except MlflowException as error:  # another process was quicker
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(client.get_experiment_by_name(name).experiment_id)


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
                f"{last.get(key, _NOTHING)} → {params.get(key, _NOTHING)}"
            )
    words = [f"{key}={value}" for key, value in changed.items()]
    if not words or len(words) > 3:
        words = [git["git.commit"][:7]] if "git.commit" in git else []
    return Differs(" ".join((f"#{number}", *(short(word, 60) for word in words))), tags)


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
        Metric(name, *entry, model_id=model_id)
        for name, entry in last.items()
        if name == STEP_METRICS["tokens"] or name.partition("/")[0] not in NO_RESULTS
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
