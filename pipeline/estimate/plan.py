"""What a training stage will do, counted from its parameters and its data without running it."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpt import estimate as shapes
from gpt.base.errors import InputError
from gpt.batches.data import IGNORED, Batch, Dataset, batch_indices, batches, take
from gpt.estimate import Counts, Memory, Shape
from gpt.model.model import GPT, GPTClassifier
from gpt.tune.lora import wrap
from pipeline.project.params import Params, section
from pipeline.project.stage_table import STAGES

if TYPE_CHECKING:
    from gpt.train.recipe import TrainParams
    from stages import finetune_classifier

TRAINING = tuple(name for name, spec in STAGES.items() if spec.trains)
"""The stages that train, in the order of the pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A training stage with its parameters and its data, counted.

    Attributes:
        train: its recipe.
        parameters: of the model.
        trained: how many of them get gradients.
        steps: optimizer steps.
        tokens: real tokens in all of them.
        step_flops: of each step, (steps,).
        largest: the batch that takes the most memory.
        flops_before: computed once before the first step.
        evaluation_flops: of the validation loss of one evaluation.
        final_flops: of what is measured after the last step.
        memory: from the largest batch, whether products are in `bf16`, and the `kernel`.
        shapes_of: the batches of a step, counted from 0.
    """

    train: TrainParams
    parameters: int
    trained: int
    steps: int
    tokens: int
    step_flops: np.ndarray
    largest: Shape
    flops_before: float
    evaluation_flops: float
    final_flops: float
    memory: Callable[..., Memory]
    shapes_of: Callable[[int], list[Shape]]

    @property
    def evaluations(self) -> int:
        """One every `eval_interval` steps, and one at the last."""
        return -(-self.steps // int(self.train.eval_interval))

    @property
    def flops(self) -> float:
        """Of everything but the samples."""
        measured = self.evaluations * self.evaluation_flops + self.final_flops
        return float(self.step_flops.sum()) + self.flops_before + measured

    def largest_of(self, steps: int) -> Shape:
        """The largest batch of the first steps."""
        first = map(self.shapes_of, range(min(steps, self.steps)))
        return max(itertools.chain.from_iterable(first), key=_size)


def _size(shape: Shape) -> tuple[int, int]:
    return shape.rows * shape.length, shape.targets


def make_plan(stage: str, params: Params, root: Path) -> Plan:
    """Count what a stage has to do.

    Raises:
        InputError: an input is missing, or the stage would refuse it.
    """
    spec = STAGES[stage]
    own = section(params, stage)
    paths = {keyword: root / path for keyword, path in spec.input_paths(own).items()}
    for path in paths.values():
        if not path.exists():
            relative = path.relative_to(root).as_posix()
            makers = [name for name, each in STAGES.items() if relative in each.outputs.values()]
            raise InputError(
                f"{relative} is missing, and {stage} begins with it; "
                f"`gpt-pipeline run {makers[0]}` makes it"
            )
    ready = importlib.import_module(spec.function.partition(":")[0]).prepare(own, **paths)
    plan = _plan_classifier if stage == "finetune_classifier" else _plan_language_model
    return plan(own, ready)


def _plan_language_model(params: Any, ready: Any) -> Plan:
    with torch.device("meta"):
        language_model = GPT(ready.config)
        if lora := getattr(params, "adapters", None):
            wrap(language_model, lora)
    model = Counts(language_model)
    train = getattr(params, "recipe", params.train)
    pairs = hasattr(ready, "pairs")
    shown = getattr(ready, "shown", ())  # what the samples continue; a stage may take none
    cache = (len(shown), max(map(len, shown)) + params.sample_tokens) if shown else (0, 0)
    before, evaluation, final = (
        sum(_forward(model, data, train.batch_size) for data in each) for each in _measured(ready)
    )
    return _plan(
        train,
        ready.data["train"],
        model,
        functools.partial(shapes.step_flops, model),
        memory=functools.partial(shapes.lm_memory, model, train=train, cache=cache, pairs=pairs),
        flops_before=before,
        evaluation_flops=evaluation,
        final_flops=final,
    )


def _measured(ready: Any) -> tuple[list[Dataset], list[Dataset], list[Dataset]]:
    """What a language model goes through before the first step, in an evaluation and at the end."""
    data = ready.data
    if hasattr(ready, "some"):  # pretrain
        return [], [ready.some], [data["validation"], *ready.sources.values()]
    if hasattr(ready, "pairs"):  # tune_preferences
        scored = [data["validation"], data["test"], ready.answers]
        return [*data.values(), *scored], [data["validation"]], scored
    return [data["validation"]], [data["validation"]], [data["validation"]]


def _forward(model: Counts, data: Dataset, size: int) -> float:
    """The FLOPs of going through some texts once, as an evaluation does."""
    if data.lengths is None:  # windows
        return len(data) * shapes.forward_flops(model, Shape.full(1, model.config.context_length))
    rows = batches(data, size, by_length=True)
    return sum(shapes.forward_flops(model, _shape(batch)) for batch in rows)


def _plan_classifier(
    params: finetune_classifier.FinetuneClassifierParams, ready: finetune_classifier.Prepared
) -> Plan:
    from stages.finetune_classifier import ROWS_AT_ONCE, freeze

    with torch.device("meta"):
        classifier = GPTClassifier(ready.config, ready.labels, params.pooling)
        depth = freeze(classifier, params.trainable, params.blocks, params.lora)
    model = Counts(classifier)
    kept = depth > 0 and ready.keeps
    lengths = [int(n) for each in ready.data.values() for n in each.lengths] if kept else []
    one_vector = depth == ready.config.n_layer and not model.mean  # of each text
    flops = functools.partial(shapes.classifier_flops, model, kept=kept)
    scored = {
        name: sum(flops(_shape(batch)) / 3 for batch in batches(each, ROWS_AT_ONCE))
        for name, each in ready.data.items()
    }
    texts = [Shape(rows=1, length=n, tokens=n, targets=1) for n in lengths]
    return _plan(
        params.train,
        ready.data["train"],
        model,
        flops,
        memory=functools.partial(
            shapes.classifier_memory,
            model,
            train=params.train,
            features=len(lengths) if one_vector else sum(lengths),
        ),
        flops_before=sum(shapes.trunk_flops(model, text, depth) for text in texts),
        evaluation_flops=scored["validation"],
        final_flops=sum(scored.values()),
    )


def _plan(
    train: TrainParams,
    data: Dataset,
    model: Counts,
    flops: Callable[[Shape], float],
    **known: Any,
) -> Plan:
    """The steps that `gpt.train.loop.fit` would take over these rows."""
    n = len(data)
    per_step = min(train.rows, n)
    steps = train.steps or (train.epochs or 0) * (n // per_step)
    lengths = data.lengths if train.group_by_length else None
    alike = data.lengths is None  # all rows are as long, and all steps the same

    def shapes_of(step: int) -> list[Shape]:
        rows: Sequence[int] = range(per_step)
        if not alike:
            rows = batch_indices(n, per_step, train.seed, step, lengths)
        starts = range(0, per_step, train.batch_size)
        return [_shape(take(data, rows[start : start + train.batch_size])) for start in starts]

    each = [shapes_of(step) for step in range(1 if alike else steps)]
    times = steps if alike else 1
    of_steps = list(itertools.chain.from_iterable(each))
    return Plan(
        train=train,
        parameters=model.parameters,
        trained=model.trained,
        steps=steps,
        tokens=times * sum(shape.tokens for shape in of_steps),
        step_flops=np.tile([sum(map(flops, batch)) for batch in each], times),
        largest=max(of_steps, key=_size),
        shapes_of=shapes_of,
        **known,
    )


def _shape(batch: Batch) -> Shape:
    rows, length = batch.inputs.shape
    targets = batch.targets != IGNORED  # a pair's are those of both its answers
    return Shape(rows=rows, length=length, tokens=batch.n_tokens, targets=int(targets.sum()))
