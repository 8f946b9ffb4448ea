"""What a training stage will do, counted from its parameters and its data; nothing of it is run."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt import estimate as shapes
from gpt.base.errors import InputError
from gpt.batches.data import IGNORED, Batch, Dataset, batch_indices, batches, take
from gpt.estimate import Memory, Shape, Tuning
from gpt.model.config import GPTConfig
from pipeline.project.params import Params, section
from pipeline.project.stage_table import STAGES

if TYPE_CHECKING:
    from gpt.train.recipe import TrainParams
    from stages import finetune_classifier, finetune_instruct, pretrain, tune_preferences

TRAINING = tuple(name for name, spec in STAGES.items() if spec.trains)
"""The stages that train, in the order of the pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A training stage as its parameters and its data make it.

    Attributes:
        train: its recipe.
        parameters: of the model.
        trained: how many of them get gradients.
        steps: optimizer steps.
        tokens: real tokens in all of them.
        passes: batches by shape, in all steps.
        step_flops: of each step, (steps,).
        largest: the batch that takes the most memory.
        flops_before: done once before the first step.
        evaluation_flops: of one evaluation's validation.
        final_flops: of what is measured behind the last step.
        memory: from the largest batch, whether products are in `bf16`, and the `kernel`.
        shapes_of: the passes of a step, counted from 0.
    """

    train: TrainParams
    parameters: int
    trained: int
    steps: int
    tokens: int
    passes: Mapping[Shape, int]
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
    tuning = _tuning(own)
    if shapes.trunk_depth(ready.config, tuning) < 0:
        base, where = next(iter(paths.values())), "lora.blocks" if tuning.lora else "blocks"
        raise InputError(
            f"{stage}.{where}: {base} has {ready.config.n_layer} blocks; use at most that"
        )
    return _PLANS[stage](own, ready, tuning)


def _tuning(params: Any) -> Tuning:
    """What a stage's parameters let be trained."""
    return Tuning(
        blocks=getattr(params, "last", None),
        lora=getattr(params, "adapters", None),
        mean=getattr(params, "pooling", "last") == "mean",
    )


def _plan_pretrain(
    params: pretrain.PretrainParams, ready: pretrain.Prepared, tuning: Tuning
) -> Plan:
    one = shapes.forward_flops(ready.config, Shape.full(1, ready.config.context_length))
    return _language_plan(
        params,
        ready,
        tuning,
        train=params.recipe,
        flops_before=0.0,
        evaluation_flops=one * len(ready.some),
        final_flops=one * sum(map(len, (ready.data["validation"], *ready.sources.values()))),
    )


def _plan_instruct(
    params: finetune_instruct.FinetuneInstructParams,
    ready: finetune_instruct.Prepared,
    tuning: Tuning,
) -> Plan:
    validation = _forward(ready.config, ready.data["validation"], params.train.batch_size)
    return _language_plan(
        params,
        ready,
        tuning,
        flops_before=validation,
        evaluation_flops=validation,
        final_flops=validation,
    )


def _plan_preferences(
    params: tune_preferences.TunePreferencesParams,
    ready: tune_preferences.Prepared,
    tuning: Tuning,
) -> Plan:
    size = params.train.batch_size
    each = {name: _forward(ready.config, data, size) for name, data in ready.data.items()}
    scored = each["validation"] + each["test"] + _forward(ready.config, ready.answers, size)
    return _language_plan(
        params,
        ready,
        tuning,
        pairs=True,
        flops_before=sum(each.values()) + scored,
        evaluation_flops=each["validation"],
        final_flops=scored,
    )


def _forward(config: GPTConfig, data: Dataset, size: int) -> float:
    """The FLOPs of going through some texts once, as an evaluation does."""
    rows = batches(data, size, by_length=True)
    return sum(shapes.forward_flops(config, _shape(batch)) for batch in rows)


def _language_plan(
    params: Any,
    ready: Any,
    tuning: Tuning,
    *,
    train: TrainParams | None = None,
    pairs: bool = False,
    **known: float,
) -> Plan:
    config, train = ready.config, train or params.train
    adapters = shapes.n_adapters(config, tuning.lora) if tuning.lora else 0
    return _plan(
        train,
        ready.data["train"],
        lambda shape: shapes.step_flops(config, shape, tuning),
        parameters=shapes.n_parameters(config) + adapters,
        trained=shapes.n_trained(config, tuning),
        memory=functools.partial(
            shapes.lm_memory,
            config,
            optimizer=train.optimizer,
            keep_best=train.keep == "best",
            cache=(len(ready.shown), max(map(len, ready.shown)) + params.sample_tokens),
            tuning=tuning,
            pairs=pairs,
        ),
        **known,
    )


def _plan_classifier(
    params: finetune_classifier.FinetuneClassifierParams,
    ready: finetune_classifier.Prepared,
    tuning: Tuning,
) -> Plan:
    from stages.finetune_classifier import ROWS_AT_ONCE

    config, classes, train = ready.config, len(ready.labels), params.train
    depth = shapes.trunk_depth(config, tuning)
    kept = depth > 0 and ready.keeps
    lengths = [int(n) for each in ready.data.values() for n in each.lengths] if kept else []
    one_vector = depth == config.n_layer and not tuning.mean  # of each text
    flops = functools.partial(
        shapes.classifier_flops, config, tuning=tuning, classes=classes, kept=kept
    )
    scored = {
        name: sum(flops(_shape(batch)) / 3 for batch in batches(each, ROWS_AT_ONCE))
        for name, each in ready.data.items()
    }
    adapters = shapes.n_adapters(config, tuning.lora, classes) if tuning.lora else 0
    return _plan(
        train,
        ready.data["train"],
        flops,
        parameters=shapes.n_parameters(config, classes) + adapters,
        trained=shapes.n_trained(config, tuning, classes),
        memory=functools.partial(
            shapes.classifier_memory,
            config,
            tuning=tuning,
            classes=classes,
            optimizer=train.optimizer,
            keep_best=train.keep == "best",
            features=len(lengths) if one_vector else sum(lengths),
        ),
        flops_before=sum(
            shapes.trunk_flops(
                config, Shape(rows=1, length=n, tokens=n, targets=1), depth, mean=tuning.mean
            )
            for n in lengths
        ),
        evaluation_flops=scored["validation"],
        final_flops=sum(scored.values()),
    )


_PLANS: dict[str, Callable[..., Plan]] = {
    "pretrain": _plan_pretrain,
    "finetune_classifier": _plan_classifier,
    "finetune_instruct": _plan_instruct,
    "tune_preferences": _plan_preferences,
}


def _plan(train: TrainParams, data: Dataset, flops: Callable[[Shape], float], **known: Any) -> Plan:
    """The steps of `gpt.train.loop.fit` over these rows, none of them taken."""
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
    passes = Counter(itertools.chain.from_iterable(each))
    return Plan(
        train=train,
        steps=steps,
        tokens=times * sum(shape.tokens * count for shape, count in passes.items()),
        passes={shape: count * times for shape, count in passes.items()},
        step_flops=np.tile([sum(map(flops, batch)) for batch in each], times),
        largest=max(passes, key=_size),
        shapes_of=shapes_of,
        **known,
    )


def _shape(batch: Batch) -> Shape:
    rows, length = batch.inputs.shape
    targets = batch.targets != IGNORED  # a pair's are those of both its answers
    return Shape(rows=rows, length=length, tokens=batch.n_tokens, targets=int(targets.sum()))
