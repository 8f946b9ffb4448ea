"""The table of stages: their functions, inputs, outputs and properties.

Everything that the pipeline knows about a stage is defined here; docs/extending.md adds a stage.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredModel:
    """The model that a stage makes, as the registry and the model card show it.

    Args:
        name: of the registered model.
        serves: how MLflow calls it: `base` continues prompts, `classifier` returns a label and
            probabilities, `assistant` answers instructions.
        what: what it is, in one sentence.
        use: what it is for, and what it is not for.
    """

    name: str
    serves: Literal["base", "classifier", "assistant"]
    what: str
    use: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """What a stage is called with, and what is said of it.

    Args:
        title: the heading of its plots.
        function: `module:function`, imported only when the stage runs.
        inputs: keyword -> path relative to the project; `{name}` stands for the stage's
            parameter of that name.
        outputs: keyword -> path relative to the project.
        scratch: keyword -> path relative to the project, of what is kept between runs and no
            output depends on.
        trains: it has a `train` section, and several processes may share its work.
        evaluates: it asks models on an accelerator where there is one, as a training does.
        continues: it can be cut off and continued, and takes a `state` folder for that.
        headline: the metrics shown where a line has room for few; without any, the first one.
        model: the model that it registers; None if it makes none to serve.
        makes_data: the data report is rewritten after it.
    """

    title: str
    function: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str]
    scratch: Mapping[str, str] = field(default_factory=dict)
    trains: bool = False
    evaluates: bool = False
    continues: bool = False
    headline: tuple[str, ...] = ()
    model: RegisteredModel | None = None
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
        title="Downloading",
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
        headline=("corpus_documents", "messages_rows"),
    ),
    "tokenize": StageSpec(
        title="Tokenizing",
        function="stages.tokenize:tokenize",
        inputs={"corpus": "data/raw/corpus", "vocabulary": "data/raw/gpt2"},
        outputs={
            "out": "data/tokens",
            "metrics": "reports/tokenize/metrics.json",
            "report": "reports/tokenize/corpus.json",
        },
        continues=True,
        makes_data=True,
        headline=("tokens", "bytes_per_token"),
    ),
    "pretrain": StageSpec(
        title="Pretraining",
        function="stages.pretrain:pretrain",
        inputs={"tokens": "data/tokens"},
        outputs={
            "out": "models/pretrain",
            "metrics": "reports/pretrain/metrics.json",
            "history": "reports/pretrain/history.csv",
        },
        trains=True,
        continues=True,
        model=RegisteredModel(
            name="base",
            serves="base",
            what="A GPT (GPT-2's architecture) pretrained on raw text: it continues a prompt.",
            use=(
                "To be fine-tuned, and to study pretraining. It answers no questions and "
                "follows no instructions."
            ),
        ),
        headline=("validation_loss", "perplexity"),
    ),
    "load_gpt2": StageSpec(
        title="Loading published weights",
        function="stages.load_gpt2:load_gpt2",
        inputs={"weights": "data/raw/gpt2"},
        outputs={"out": "models/gpt2", "metrics": "reports/load_gpt2/metrics.json"},
        headline=("parameters", "perplexity"),
    ),
    "finetune_classifier": StageSpec(
        title="Fine-tuning the classifier",
        function="stages.finetune_classifier:finetune_classifier",
        inputs={"base": "models/{base}", "messages": "data/raw/messages"},
        outputs={
            "out": "models/classifier",
            "metrics": "reports/finetune_classifier/metrics.json",
            "history": "reports/finetune_classifier/history.csv",
        },
        trains=True,
        continues=True,
        model=RegisteredModel(
            name="classifier",
            serves="classifier",
            what=(
                "A GPT with a classification head: the class of a short message, and the "
                "probability of each class."
            ),
            use=(
                "To sort messages like those it was trained on, with a person behind it. Not "
                "for decisions about people, and not for other kinds of text."
            ),
        ),
        headline=("validation_loss", "validation_accuracy"),
    ),
    "finetune_instruct": StageSpec(
        title="Fine-tuning the assistant",
        function="stages.finetune_instruct:finetune_instruct",
        inputs={"base": "models/{base}", "instructions": "data/raw/instructions"},
        outputs={
            "out": "models/assistant",
            "metrics": "reports/finetune_instruct/metrics.json",
            "history": "reports/finetune_instruct/history.csv",
        },
        trains=True,
        continues=True,
        model=RegisteredModel(
            name="assistant",
            serves="assistant",
            what="A GPT fine-tuned to follow instructions.",
            use=(
                "To study instruction tuning. Not for advice and not for decisions: what it "
                "says may be wrong, and sounds no less sure then."
            ),
        ),
        headline=("validation_loss", "perplexity"),
    ),
    "evaluate": StageSpec(
        title="Evaluating",
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
        headline=("classifier/accuracy", "assistant/loss"),
    ),
    "tune_preferences": StageSpec(
        title="Tuning towards preferences",
        function="stages.tune_preferences:tune_preferences",
        inputs={"assistant": "models/assistant", "instructions": "data/raw/instructions"},
        outputs={
            "out": "models/preferred",
            "metrics": "reports/tune_preferences/metrics.json",
            "history": "reports/tune_preferences/history.csv",
        },
        trains=True,
        continues=True,
        model=RegisteredModel(
            name="preferred",
            serves="assistant",
            what=(
                "An assistant tuned towards the better of two answers (direct preference "
                "optimization)."
            ),
            use=(
                "To study preference tuning. Not for advice and not for decisions: what it "
                "says may be wrong, and sounds no less sure then."
            ),
        ),
        headline=("validation_loss", "validation_reward_accuracy"),
    ),
}


MODELS = {spec.model.name: spec.model for spec in STAGES.values() if spec.model}
"""The registered models by name."""
