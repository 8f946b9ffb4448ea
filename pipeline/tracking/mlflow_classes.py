"""MLflow's own classes and error, as the other wings name them: only this wing imports MLflow.

Import this module where MLflow is at work, not at the top of a file: MLflow takes a second to load.
"""

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

__all__ = [
    "Metric",
    "MlflowClient",
    "MlflowException",
    "ModelVersion",
    "Param",
    "Run",
    "RunTag",
    "ViewType",
]
