"""MLflow's classes and exception for use by other packages: only `tracking` imports MLflow.

Import this module inside functions, not at the top of a file: MLflow takes a second to load.
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
