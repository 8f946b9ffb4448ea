"""The connection to MLflow: its address, whether it answers, error messages for its failures, and
look-ups of experiments, runs and artifacts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from gpt.base.errors import InputError, RunError
from pipeline.project.folders import shared_folder
from pipeline.project.secrets import without_credentials, without_secrets
from pipeline.tracking.database import database_file, database_uri, follow_move, reason_and_remedy
from pipeline.tracking.keys import EXPERIMENT_PREFIX, key_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULT_UI = "http://127.0.0.1:5000"
PAGES = "workflowType=machine_learning"
"""URL part that selects MLflow's pages for model training instead of those for GenAI."""

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

REMEDY = "check that MLFLOW_TRACKING_URI answers, or unset it for the project's own mlflow.db"
_DATABASE_SERVERS = ("postgresql", "mysql")
"""URL schemes for which MLflow's client accesses a database server directly."""

_PROBE_SECONDS = 5.0
"""Timeout of one attempt; after two of them the server counts as unreachable."""


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` if it is set, else the database `mlflow.db` of the project."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or database_uri(_own_database(root))
    # the driver installed by the extra `team`; without a name SQLAlchemy 2.1 uses another one
    return re.sub("^postgres(ql)?://", "postgresql+psycopg2://", uri)


def _own_database(root: Path) -> Path:
    return shared_folder(root) / "mlflow.db"


def artifact_folder(root: Path, name: str) -> str | None:
    """The artifact folder of a new experiment: below `mlartifacts` if there is no MLflow server.

    None with a server, which chooses the location itself.

    Args:
        root: the project.
        name: the name of the folder.
    """
    is_server = tracking_uri(root).startswith("http")
    return None if is_server else (shared_folder(root) / "mlartifacts" / name).as_uri()


def quiet_environment() -> dict[str, str]:
    """Environment variables that turn off MLflow's telemetry and chatter; the user's are kept."""
    return {key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()}


def load_mlflow() -> None:
    """Import what a stage's run needs of MLflow, so that `estimate` can measure the cost."""
    os.environ.update(quiet_environment())
    import mlflow
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def connect(root: Path) -> MlflowClient:
    """A client of the project's MLflow; creates the database if necessary.

    Stage processes may start at the same time, and concurrent creation of the tables fails, so the
    first process creates them under a lock while the others wait.

    Args:
        root: the project.

    Raises:
        RunError: MLflow cannot be reached or its database cannot be opened.
    """
    os.environ.update(quiet_environment())
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = tracking_uri(root)
    check_reachable(root)
    with _unchanged_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    opening = named_failure(root, "cannot be opened", opens=True)
    with opening, FileLock(lock_file(root)):
        if database_file(uri) == _own_database(root):
            follow_move(_own_database(root))
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)  # the registry uses a separate connection
    return client


def lock_file(root: Path) -> Path:
    """The lock to hold while changing what the project's processes share in MLflow."""
    lock = shared_folder(root) / ".pipeline" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return lock


def reachable(root: Path) -> bool:
    """Whether the project's MLflow answers; takes at most about 10 seconds."""
    try:
        if tracking_uri(root).startswith("http"):
            os.environ.update(quiet_environment())
            check_reachable(root)
        else:
            connect(root)
    except (RunError, OSError):
        return False
    return True


def check_reachable(root: Path) -> None:
    """Check that the project's MLflow answers.

    Raises:
        RunError: it does not answer; the cause is a `ConnectionError`.
    """
    with named_failure(root, "does not answer", opens=True):
        _check_answers(tracking_uri(root))


def _check_answers(uri: str) -> None:
    """Check that a server answers; a database file is not checked.

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
    """Open one connection; MLflow itself would retry silently for 100 seconds."""
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
    """Undo changes of the environment: MLflow's setters write there, as if the user had."""
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
    *,
    opens: bool = False,
) -> Iterator[None]:
    """Turn MLflow's exceptions into a one-line error that names the address and the remedy.

    Args:
        root: the project.
        what: what MLflow failed to do.
        kind: the exceptions to convert; others do not come from MLflow.
        opens: the block opens the connection, so an error concerns the address.
    """
    try:
        yield
    except (InputError, RunError):  # already clear
        raise
    except kind as error:  # MLflow does not wrap database and network errors
        uri = tracking_uri(root)
        reason, remedy = reason_and_remedy(error, database_file(uri))
        if not opens and getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
            remedy = "it answers, and refuses this name or value: change that one"
        if remedy and os.environ.get("MLFLOW_TRACKING_URI") == uri:
            remedy += ", or name another place in MLFLOW_TRACKING_URI"
        told = without_credentials(f"{uri} {what}: {reason}")
        raise RunError(f"MLflow at {told}; {remedy or REMEDY}") from error


def artifact(client: MlflowClient, run_id: str, path: str) -> bytes | None:
    """An artifact of a run; None if the run has none of that name."""
    # check first: each kind of store raises a different error for a missing file
    listed = client.list_artifacts(run_id, path.rpartition("/")[0])
    if path not in [each.path for each in listed]:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()


def existing_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run with that id; None if it does not exist or was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return None


def run_that_made(
    client: MlflowClient, stage: str, run_id: str | None, outputs: Mapping[str, str]
) -> Run | None:
    """The run that made a stage's current outputs: the last run, unless DVC restored the outputs
    of an earlier one.

    Args:
        client: a client of the tracking server.
        stage: the stage's name in `dvc.yaml`.
        run_id: the id of its last run, if known.
        outputs: path -> md5, as in `dvc.lock`; if empty, outputs are not compared.

    Returns:
        The run; None if it does not exist or was deleted.
    """

    def made(run: Run, *, if_not_told: bool) -> bool:
        tags = run.data.tags
        told = ((tags.get(key_of(f"output.{path}")), md5) for path, md5 in outputs.items())
        return all(if_not_told if tag is None else tag == md5 for tag, md5 in told)

    last = existing_run(client, run_id)
    if last is not None and made(last, if_not_told=True):
        return last
    experiment = client.get_experiment_by_name(EXPERIMENT_PREFIX + stage)
    if experiment is None or not outputs:
        return None
    found = client.search_runs(
        [experiment.experiment_id],
        "attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    return next((run for run in found if made(run, if_not_told=False)), None)


def run_url(root: Path, experiment_id: str, run_id: str) -> str:
    """The URL of a run's page on the tracking server, or on the server that `make ui` starts."""
    uri = tracking_uri(root)
    if not uri.startswith("http"):
        uri = DEFAULT_UI
        with contextlib.suppress(OSError, ValueError, KeyError):
            uri = json.loads((shared_folder(root) / ".pipeline" / "ui.json").read_text())["mlflow"]
    return f"{without_secrets(uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{PAGES}"


def experiment_of(client: MlflowClient, stage: str, folder: str | None, description: str) -> str:
    """The id of a stage's experiment, which is created if it does not exist.

    Args:
        client: a client of the tracking server.
        stage: the stage's name in `dvc.yaml`.
        folder: the artifact folder of a new experiment; None leaves it to the server.
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
    except MlflowException as error:  # another process created it first
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(client.get_experiment_by_name(name).experiment_id)
