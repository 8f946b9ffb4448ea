"""The model registry: base, classifier and assistants; a version can be loaded and run by itself.

A version is a pyfunc 'model from code': the model directory, the `gpt` package and
`pipeline/tracking/pyfunc.py`. The alias `candidate` points to the newest version.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpt
from gpt.base.errors import InputError, RunError, in_one_line
from pipeline.project.stage_table import MODELS
from pipeline.tracking.connection import existing_run
from pipeline.tracking.keys import is_result
from pipeline.tracking.version_page import CHANGED_TAG, version_page

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

SERVED = Path(__file__).with_name("pyfunc.py")
CANDIDATE = "candidate"
POINT_VARIABLE = "GPT_PIPELINE_POINT"
"""Set for the stages of a sweep's point, whose versions do not become the candidate."""
MD5_TAG = "md5"
_BATCH_METRICS = 1000  # MLflow's limit for one call
_OF_RUN = ("dvc.stage", "git.commit", "git.dirty")  # run tags copied to the version

_REQUIREMENTS = (
    "mlflow",
    "torch",
    "tiktoken",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "pydantic",
    "scikit-learn",
)

_SAMPLING = {"max_new_tokens": 128, "temperature": 0.0, "top_k": 0, "top_p": 0.0, "seed": 123}
"""Parameters of `predict(..., params=…)` with defaults: greedy; 0 disables top-k or top-p."""

_EXAMPLE_PARAMS = {"max_new_tokens": 8}
"""Parameters of the example input; short, as MLflow runs the example when a model is logged."""


def publish(
    client: MlflowClient,
    run_id: str,
    name: str,
    md5: str,
    folder: Path,
    when: int,
    *,
    of_point: bool = False,
) -> ModelVersion:
    """Make a model the newest version of its registered model; move `candidate` there.

    If a version with the same md5 exists, no second one is created, and the alias moves to it. The
    alias is not moved if it points to a version whose run ended later than `when`.

    Args:
        client: a client of the registry.
        run_id: the run that made the model.
        name: the name of the registered model.
        md5: the model directory's checksum as DVC computes it.
        folder: the model as written by `save_model`.
        when: the time at which the model was made, in milliseconds.
        of_point: it was made by a point of a sweep, which leaves `candidate` where it is.
    """
    version = version_of(client, name, md5=md5)
    if version is None:
        _ensure_registered(client, name)
        run = client.get_run(run_id)
        page = version_page(client, run, name, MODELS[name].what)
        tags = {key: run.data.tags[key] for key in _OF_RUN if key in run.data.tags}
        if page.changed:
            tags[CHANGED_TAG] = page.changed
        model_id = _send_model(client, run, name, md5, folder)
        version = client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            tags={**tags, MD5_TAG: md5},
            description=page.description,
        )
    now = version_of(client, name, CANDIDATE)
    newest = existing_run(client, now.run_id) if now else None
    is_newest = newest is None or (newest.info.end_time or 0) <= when
    if is_newest and not of_point:
        client.set_registered_model_alias(name, CANDIDATE, str(version.version))
    return version


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    if client.search_registered_models(f"name = '{name}'"):
        return
    try:
        client.create_registered_model(name, description=MODELS[name].what)
    except MlflowException as error:  # another process created it first
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _send_model(client: MlflowClient, run: Run, name: str, md5: str, folder: Path) -> str:
    """Log the model of a run to MLflow, or complete an earlier attempt; return the model's id."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    experiment_id, run_id = run.info.experiment_id, run.info.run_id
    begun = client.search_logged_models(
        [experiment_id],
        filter_string=f"source_run_id = '{run_id}' AND tags.`{MD5_TAG}` = '{md5}'",
    )
    if begun:
        model = begun[0]
    else:
        model = client.create_logged_model(
            experiment_id, name, run_id, tags={MD5_TAG: md5}, params=run.data.params
        )
    model_id = str(model.model_id)
    if str(model.status) != "READY":
        described = Model.load(str(folder))
        described.run_id, described.model_id, described.model_uuid = run_id, model_id, model_id
        described.artifact_path = model.artifact_location
        described.save(str(folder / "MLmodel"))
        client.log_model_artifacts(model_id, str(folder))
        client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return model_id


def show_on_model(client: MlflowClient, run_id: str, model_id: str) -> None:
    """Copy a run's results to its model: final metrics, last values of its curves, token counts."""
    from mlflow.entities import Metric

    metrics = [
        Metric(each.key, each.value, each.timestamp, each.step, model_id=model_id)
        for each in client.get_run(run_id).to_proto().data.metrics
        if is_result(each.key)
    ]
    log_metrics(client, run_id, metrics)


def log_metrics(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
    """Log metrics in batches no larger than MLflow's limit for one call."""
    for start in range(0, len(metrics), _BATCH_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH_METRICS])


def version_of(
    client: MlflowClient, name: str, which: str | int = "", *, md5: str = ""
) -> ModelVersion | None:
    """A version of a registered model; None if there is none.

    Args:
        client: a client of the registry.
        name: the registered model's name.
        which: an alias, or a version's number.
        md5: instead of `which`, the checksum of its files as DVC computes it.
    """
    from mlflow.exceptions import MlflowException

    if md5:
        known = client.search_model_versions(f"name = '{name}' and tags.`{MD5_TAG}` = '{md5}'")
        return known[0] if known else None
    try:
        if isinstance(which, int):
            return client.get_model_version(name, str(which))
        return client.get_model_version_by_alias(name, which)
    except MlflowException as error:
        # only these mean that there is no such model, version or alias
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    return None


def save_model(name: str, directory: Path, folder: Path) -> None:
    """Write a model directory in MLflow's format, with the code that runs it.

    Args:
        name: the registered model's name.
        directory: the model directory.
        folder: where to write it; existing content is replaced.
    """
    import mlflow

    signature, example = _interface(name, directory)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as code:
        package = Path(gpt.__file__).parent
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, Path(code) / package.name, ignore=ignored)
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(SERVED),
            artifacts={"model": str(directory)},
            code_paths=[str(Path(code) / package.name)],
            model_config={"kind": MODELS[name].serves},
            signature=signature,
            input_example=example,
            pip_requirements=_requirements(),
        )


def _requirements() -> list[str]:
    """The installed package versions, without build suffixes such as `+cpu`."""
    return [
        f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS
    ]


def _interface(name: str, directory: Path) -> tuple[ModelSignature, Any]:
    """The model's signature, and an input example."""
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    from gpt.model.weights import read_labels

    def text(column: str, required: bool = True) -> ColSpec:
        return ColSpec(DataType.string, column, required)

    if name == "classifier":
        labels = read_labels(directory)
        probabilities = [ColSpec(DataType.double, f"probability_{label}") for label in labels]
        signature = ModelSignature(Schema([text("text")]), Schema([text("label"), *probabilities]))
        return signature, pd.DataFrame({"text": ["Shall we meet for lunch tomorrow?"]})

    kinds = {int: DataType.long, float: DataType.double}
    params = ParamSchema(
        [ParamSpec(key, kinds[type(value)], value) for key, value in _SAMPLING.items()]
    )
    if name == "base":
        signature = ModelSignature(Schema([text("prompt")]), Schema([text("completion")]), params)
        return signature, (pd.DataFrame({"prompt": ["Once upon a time"]}), _EXAMPLE_PARAMS)
    signature = ModelSignature(
        Schema([text("instruction"), text("input", required=False)]),
        Schema([text("response")]),
        params,
    )
    question = pd.DataFrame({"instruction": ["Name a colour."], "input": [""]})
    return signature, (question, _EXAMPLE_PARAMS)


CHAMPION, PREVIOUS = "champion", "previous"


@contextlib.contextmanager
def files_of(version: ModelVersion, whose: str = "its", remedy: str = "") -> Iterator[Path]:
    """Download the model directory of a registered version for the duration of the block.

    Args:
        version: a version of a registered model.
        whose: the owner of the files in error messages.
        remedy: the end of an error message.

    Raises:
        InputError: it cannot be downloaded completely, or its content was refused in the block.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = f"models:/{version.name}/{version.version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetched = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
            (directory,) = (fetched / "artifacts").iterdir()
        except (MlflowException, OSError, ValueError) as error:
            why = in_one_line(error)
            raise InputError(
                f"{uri}: {whose} files are gone or cannot be fetched ({why}){remedy}"
            ) from None
        try:
            yield directory
        except (InputError, RunError) as error:
            if folder not in str(error):
                raise
            why = str(error).replace(str(directory), "").lstrip("/")
            raise InputError(f"{uri}: {whose} files are damaged ({why}){remedy}") from None
