"""The registered models in MLflow's 'models from code' form.

MLflow copies this file and the `gpt` package beside the model directory and executes it when a
model is loaded, on any machine, so only `gpt` may be imported from the project. The imports are at
the top: if the process has already imported another `gpt`, loading fails, not a later prediction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

try:
    import gpt
    from gpt.engine.decode import ENGINES
    from gpt.generation import Sampling, complete_texts
    from gpt.model.model import GPT, GPTClassifier
    from gpt.prompts import read_template, render_prompt
    from gpt.tokens.tokenizer import Tokenizer
except ImportError as error:
    raise ImportError(
        f"{error}; a registered model brings the package gpt that it was made with: load it in a "
        "process that has not imported another one"
    ) from error

BATCH = 16


class _Served(PythonModel):  # type: ignore[misc]
    """A model directory (the artifact `model`), read once."""

    _model: Any
    _tokenizer: Tokenizer

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model and its tokenizer from the artifacts."""
        self._directory = Path(context.artifacts["model"])
        self._model = gpt.load_model(self._directory)
        self._tokenizer = gpt.load_tokenizer(self._directory)


class Classifier(_Served):
    """Column `text` in; `label` and a column `probability_LABEL` for each label out."""

    _model: GPTClassifier
    _longest: int

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model and the maximum text length of its training, in tokens."""
        super().load_context(context)
        training = self._directory / "training.json"
        self._longest = self._model.config.context_length
        if training.is_file():
            self._longest = json.loads(training.read_text())["max_length"]

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Classify each row."""
        texts = [str(text) for text in model_input["text"]]
        rows = gpt.classify(
            self._model, self._tokenizer, texts, max_length=self._longest, batch_size=BATCH
        ).tolist()
        labels = self._model.labels
        return pd.DataFrame(
            {
                "label": [labels[max(range(len(labels)), key=row.__getitem__)] for row in rows],
                **{
                    f"probability_{label}": [row[i] for row in rows]
                    for i, label in enumerate(labels)
                },
            },
            index=model_input.index,
        )


class _Writer(_Served):
    """Base class of the base model and the assistant: prompts in, completions out."""

    _model: GPT

    def _complete(self, prompts: list[str], params: dict[str, Any] | None) -> list[str]:
        settings = dict(params or {})
        sampling = Sampling(
            max_new_tokens=settings.get("max_new_tokens", 128),
            temperature=settings.get("temperature", 0.0),
            top_k=settings.get("top_k") or None,
            top_p=settings.get("top_p") or None,
            seed=settings.get("seed"),
        )
        return [
            text
            for start in range(0, len(prompts), BATCH)
            for text in complete_texts(
                self._model,
                self._tokenizer,
                prompts[start : start + BATCH],
                sampling,
                engine=ENGINES["auto"],
            )
        ]


class Base(_Writer):
    """Column `prompt` in, column `completion` out."""

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Continue each prompt."""
        completions = self._complete([str(text) for text in model_input["prompt"]], params)
        return pd.DataFrame({"completion": completions}, index=model_input.index)


class Assistant(_Writer):
    """Columns `instruction` and `input` in, column `response` out."""

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Answer each instruction."""
        template = read_template(self._directory)
        inputs = model_input["input"] if "input" in model_input else [""] * len(model_input)
        prompts = [
            render_prompt(template, str(instruction), "" if pd.isna(extra) else str(extra))
            for instruction, extra in zip(model_input["instruction"], inputs, strict=True)
        ]
        responses = [text.strip() for text in self._complete(prompts, params)]
        return pd.DataFrame({"response": responses}, index=model_input.index)


_KINDS = {"base": Base, "classifier": Classifier, "assistant": Assistant}

if kind := mlflow.models.ModelConfig(development_config={"kind": ""}).get("kind"):
    mlflow.models.set_model(_KINDS[kind]())
