"""The model registry: base, classifier and assistants, loadable and runnable from it alone.

A version is a pyfunc 'model from code': the model directory, the `gpt` package and
`pipeline/tracking/pyfunc.py`. The alias `candidate` stands at the newest one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpt
from gpt.base.errors import InputError, RunError, in_one_line
from pipeline.project.stage_table import MODELS
from pipeline.tracking.run import StageRun
from pipeline.tracking.version_page import CHANGED_TAG, version_page

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

SERVED = Path(__file__).with_name("pyfunc.py")
CANDIDATE = "candidate"
MD5_TAG = "md5"
_OF_GIT = ("git.commit", "git.dirty")

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
"""What `predict(..., params=…)` takes, with defaults: greedy; 0 leaves top-k and top-p off."""

_EXAMPLE_PARAMS = {"max_new_tokens": 8}
"""With the example input; MLflow runs it once when a model is logged, so it is a short one."""


def register(run: StageRun, name: str, directory: Path, md5: str) -> int:
    """Make `directory` the newest version of the registered model `name`; move `candidate` there.

    A directory that is registered already, by its md5, is not registered again: the alias moves
    to that version.

    Args:
        run: the run that made it.
        name: of the registered model.
        directory: a model directory.
        md5: its checksum as DVC computes it.

    Returns:
        The version.
    """
    client = run.client
    known = version_of(client, name, md5=md5)
    if known:
        version = int(known.version)
    else:
        ensure_registered(client, name, MODELS[name].what)
        description, told = describe(client, client.get_run(run.id), name)
        logged = _log(run, name, directory)
        run.model_id = logged.model_id
        created = client.create_model_version(
            name,
            source=logged.model_uri,
            run_id=run.id,
            model_id=logged.model_id,
            tags={MD5_TAG: md5, "dvc.stage": run.stage, **told},
            description=description,
        )
        version = int(created.version)
    client.set_registered_model_alias(name, CANDIDATE, str(version))
    return version


def ensure_registered(client: MlflowClient, name: str, description: str) -> None:
    """Let MLflow know of a registered model, though another process may do so now, too."""
    from mlflow.exceptions import MlflowException

    if client.search_registered_models(f"name = '{name}'"):
        return
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:  # another process was quicker
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def describe(client: MlflowClient, run: Run, name: str) -> tuple[str, dict[str, str]]:
    """What a new version's page says until its model card is written, and tags in short.

    Args:
        client: of the MLflow that the version will be registered in.
        run: the run that made it, of that MLflow.
        name: the registered model's.
    """
    page = version_page(client, run, name, MODELS[name].what)
    tags = {key: run.data.tags[key] for key in _OF_GIT if key in run.data.tags}
    return page.description, {**tags, **({CHANGED_TAG: page.changed} if page.changed else {})}


def version_of(
    client: MlflowClient, name: str, which: str | int = "", *, md5: str = ""
) -> ModelVersion | None:
    """A version of a registered model; None where there is none.

    Args:
        client: of the registry.
        name: the model's.
        which: an alias, or a version's number.
        md5: or its files' checksum as DVC computes it.
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
        # no such model, version or alias; whatever else went wrong says nothing about that
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    return None


def _log(run: StageRun, name: str, directory: Path) -> Any:
    """The directory as a logged model of the run."""
    import mlflow

    signature, example = _interface(name, directory)
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "gpt"
        shutil.copytree(
            Path(gpt.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__")
        )
        with mlflow.start_run(run_id=run.id, log_system_metrics=False):
            return mlflow.pyfunc.log_model(
                name=name,
                python_model=str(SERVED),
                artifacts={"model": str(directory)},
                code_paths=[str(code)],
                model_config={"kind": MODELS[name].serves},
                signature=signature,
                input_example=example,
                pip_requirements=_requirements(),
            )


def _requirements() -> list[str]:
    """The running versions, without a build's suffix such as `+cpu`."""
    return [
        f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS
    ]


def _interface(name: str, directory: Path) -> tuple[ModelSignature, Any]:
    """What goes in and comes out, and an example of what goes in."""
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
    """The model directory of a registered version, for as long as the block lasts.

    Args:
        version: of a model.
        whose: the files are, in an error.
        remedy: the end of an error's line.

    Raises:
        InputError: it cannot be fetched whole; or what is in it was refused within the block.
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
