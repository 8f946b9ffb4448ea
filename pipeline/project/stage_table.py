"""The table of stages: what each one is called with, reads, writes and is."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """What a stage is called with.

    Args:
        function: `module:function`, imported only when the stage runs.
        inputs: keyword -> path relative to the project; `{name}` stands for the stage's
            parameter of that name.
        outputs: keyword -> path relative to the project.
        scratch: keyword -> path relative to the project, of what is kept between runs and no
            output depends on.
        trains: it has a `train` section, and several processes may share its work.
        evaluates: it asks models on an accelerator where there is one, as a training does.
        continues: it can be cut off and continued, and takes a `state` folder for that.
        model: under which name its model is registered; none if it makes no model to serve.
        makes_data: the data report is written anew after it.
    """

    function: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str]
    scratch: Mapping[str, str] = field(default_factory=dict)
    trains: bool = False
    evaluates: bool = False
    continues: bool = False
    model: str | None = None
    makes_data: bool = False

    @property
    def accelerated(self) -> bool:
        """It works on an accelerator where there is one."""
        return self.trains or self.evaluates

    def load(self) -> Callable[..., dict[str, Any]]:
        """The stage's function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), name)
        return function

    def input_paths(self, params: Any) -> dict[str, str]:
        """The inputs under these parameters."""
        values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
        return {keyword: path.format_map(values) for keyword, path in self.inputs.items()}


STAGES: dict[str, StageSpec] = {
    "download": StageSpec(
        function="stages.download:download",
        inputs={"local": "{local}"},
        outputs={
            "corpus": "data/raw/corpus",
            "messages": "data/raw/messages",
            "instructions": "data/raw/instructions",
            "gpt2": "data/raw/gpt2",
            "metrics": "reports/download/metrics.json",
        },
        scratch={"cache": ".pipeline/downloads"},
        makes_data=True,
    ),
    "tokenize": StageSpec(
        function="stages.tokenize:tokenize",
        inputs={"corpus": "data/raw/corpus", "vocabulary": "data/raw/gpt2"},
        outputs={
            "out": "data/tokens",
            "metrics": "reports/tokenize/metrics.json",
            "report": "reports/tokenize/corpus.json",
        },
        continues=True,
        makes_data=True,
    ),
    "pretrain": StageSpec(
        function="stages.pretrain:pretrain",
        inputs={"tokens": "data/tokens"},
        outputs={
            "out": "models/pretrain",
            "metrics": "reports/pretrain/metrics.json",
            "history": "reports/pretrain/history.csv",
        },
        trains=True,
        continues=True,
        model="base",
    ),
    "load_gpt2": StageSpec(
        function="stages.load_gpt2:load_gpt2",
        inputs={"weights": "data/raw/gpt2"},
        outputs={"out": "models/gpt2", "metrics": "reports/load_gpt2/metrics.json"},
    ),
    "finetune_classifier": StageSpec(
        function="stages.finetune_classifier:finetune_classifier",
        inputs={"base": "models/{base}", "messages": "data/raw/messages"},
        outputs={
            "out": "models/classifier",
            "metrics": "reports/finetune_classifier/metrics.json",
            "history": "reports/finetune_classifier/history.csv",
        },
        trains=True,
        continues=True,
        model="classifier",
    ),
    "finetune_instruct": StageSpec(
        function="stages.finetune_instruct:finetune_instruct",
        inputs={"base": "models/{base}", "instructions": "data/raw/instructions"},
        outputs={
            "out": "models/assistant",
            "metrics": "reports/finetune_instruct/metrics.json",
            "history": "reports/finetune_instruct/history.csv",
        },
        trains=True,
        continues=True,
        model="assistant",
    ),
    "evaluate": StageSpec(
        function="stages.evaluate:evaluate",
        inputs={
            "pretrain": "models/pretrain",
            "gpt2": "models/gpt2",
            "classifier": "models/classifier",
            "assistant": "models/assistant",
            "tokens": "data/tokens",
            "messages": "data/raw/messages",
            "instructions": "data/raw/instructions",
        },
        outputs={
            "predictions": "reports/evaluation/predictions",
            "metrics": "reports/evaluation/metrics.json",
        },
        evaluates=True,
    ),
    "tune_preferences": StageSpec(
        function="stages.tune_preferences:tune_preferences",
        inputs={"assistant": "models/assistant", "instructions": "data/raw/instructions"},
        outputs={
            "out": "models/preferred",
            "metrics": "reports/tune_preferences/metrics.json",
            "history": "reports/tune_preferences/history.csv",
        },
        trains=True,
        continues=True,
        model="preferred",
    ),
}


MAIN_METRICS: dict[str, dict[str, str]] = {
    "download": {"corpus_documents": "documents", "messages_rows": "messages"},
    "tokenize": {"tokens": "tokens", "bytes_per_token": "bytes a token"},
    "pretrain": {"validation_loss": "validation loss", "perplexity": "perplexity"},
    "load_gpt2": {"parameters": "parameters", "perplexity": "perplexity"},
    "finetune_classifier": {
        "validation_loss": "validation loss",
        "validation_accuracy": "accuracy",
    },
    "finetune_instruct": {"validation_loss": "validation loss", "perplexity": "perplexity"},
    "evaluate": {"classifier/accuracy": "accuracy", "assistant/loss": "assistant loss"},
    "tune_preferences": {
        "validation_loss": "loss",
        "validation_reward_accuracy": "reward accuracy",
    },
}
"""The metrics that a line has room for, and what they are called there; of other stages, the first.
"""
