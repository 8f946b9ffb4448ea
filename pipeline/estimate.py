"""Know before you run: what a training stage takes of memory and time, here or on another device.

How much there is to do is counted from the parameters and the data; memory by part comes from
`gpt.estimate`. On this machine a probe (`pipeline.probe`) measures the speed and the whole
process's memory; for a named graphics card the speed is a share of its published peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt import estimate as shapes
from gpt.data import IGNORED, Batch, Dataset, batch_indices, take
from gpt.device import pick_device
from gpt.errors import InputError
from gpt.estimate import ACCELERATORS, UTILISATION, Accelerator, Memory, Shape, Tuning
from gpt.prompts import encode_turns, last_prompt
from gpt.text import read_instructions, split_instructions, usable_parts
from gpt.token_files import read_manifest
from gpt.tokenizer import load_tokenizer
from gpt.weights import read_config
from pipeline.console import safe_console, seconds_in_words
from pipeline.params import PARAMS_FILE, Params, load_params, section
from pipeline.probe import WARM_UP, Probe, probe_stage
from pipeline.stage_table import STAGES
from pipeline.terminal import say_json

if TYPE_CHECKING:
    from gpt.config import GPTConfig
    from gpt.recipe import TrainParams
    from stages.finetune_classifier import FinetuneClassifierParams
    from stages.finetune_instruct import FinetuneInstructParams
    from stages.pretrain import PretrainParams
    from stages.tune_preferences import TunePreferencesParams

TRAINING = tuple(name for name, spec in STAGES.items() if spec.trains)
"""The stages that train, in the order of the pipeline."""


# --- how much there is to do ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A training stage as its parameters and its data make it.

    Attributes:
        stage: its name.
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
        memory: from the largest batch, whether products are in bf16, and the kernel.
        shapes_of: the passes of a step, counted from 0.
    """

    stage: str
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
    memory: Callable[[Shape, bool, shapes.Kernel], Memory]
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
        first = itertools.islice(_passes(self), steps)
        return max(itertools.chain.from_iterable(first), key=_size)


def _passes(plan: Plan) -> Iterator[list[Shape]]:
    return (plan.shapes_of(step) for step in range(plan.steps))


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
    return _PLANS[stage](own, **paths)


def _plan_pretrain(params: PretrainParams, *, tokens: Path) -> Plan:
    from gpt.config import GPTConfig
    from stages.pretrain import open_sources, open_windows

    vocabulary = read_manifest(tokens).vocab_size
    config = GPTConfig(**dataclasses.asdict(params.model), vocab_size=vocabulary)
    context = config.context_length
    windows = open_windows(params, tokens, end=None)
    validation = len(windows["validation"])
    by_source = sum(map(len, open_sources(params, tokens, end=None).values()))
    one = shapes.forward_flops(config, Shape.full(1, context))
    prompt = len(load_tokenizer(tokens).encode(params.sample_prompt))
    full = np.broadcast_to(context, len(windows["train"]))
    return _language_plan(
        "pretrain",
        params.recipe,
        config,
        _Rows(full, full, uniform=True),
        evaluation_flops=one * min(params.eval_windows or validation, validation),
        final_flops=one * (validation + by_source),
        cache=(1, prompt + params.sample_tokens),
    )


def _plan_instruct(params: FinetuneInstructParams, *, base: Path, instructions: Path) -> Plan:
    from gpt.data import InstructionDataset

    config, _ = read_config(base)
    tokenizer = load_tokenizer(base)
    parts = split_instructions(read_instructions(instructions), params.split)
    longest = params.max_length or config.context_length
    if longest > config.context_length:
        raise InputError(
            f"finetune_instruct.max_length: {longest} tokens are more than the context of {base} "
            f"holds ({config.context_length}); use at most that"
        )
    rows: dict[str, _Rows] = {}
    for name in ("train", "validation"):
        turns = encode_turns(tokenizer, params.template, parts[name])
        data = InstructionDataset.of_turns(
            turns,
            end=tokenizer.eot,
            mask_prompt=params.mask_prompt,
            max_length=longest,
            row_length=config.context_length if params.rows == "packed" else None,
        )
        if not len(data):
            raise InputError(f"{instructions}: the {name} part is empty; add records")
        rows[name] = _Rows.stacked(data)
    shown = [len(last_prompt(each, tokenizer.eot)[-longest:]) for each in turns[:3]]
    by_length = rows["validation"].by_length(params.train.batch_size)
    validation = sum(shapes.forward_flops(config, shape) for shape in by_length)
    return _language_plan(
        "finetune_instruct",
        params.train,
        config,
        rows["train"],
        flops_before=validation,
        evaluation_flops=validation,
        final_flops=validation,
        cache=(len(shown), max(shown) + params.sample_tokens),
        tuning=_adapters("finetune_instruct", params, config, base),
    )


def _plan_preferences(
    params: TunePreferencesParams, *, assistant: Path, instructions: Path
) -> Plan:
    from gpt.data import InstructionDataset
    from gpt.events import discard
    from gpt.prompts import read_template
    from gpt.text import read_preferences
    from stages.tune_preferences import preference_dataset, read_training, split_of, useful_pairs

    config, _ = read_config(assistant)
    tokenizer, template = load_tokenizer(assistant), read_template(assistant)
    longest = params.max_length or config.context_length
    if longest > config.context_length:
        raise InputError(
            f"tune_preferences.max_length: {longest} tokens are more than the context of "
            f"{assistant} holds ({config.context_length}); use at most that"
        )
    records = read_preferences(instructions)
    split = split_of(assistant, read_training(assistant))
    size = params.train.batch_size
    rows: dict[str, _Rows] = {}
    for name, pairs in useful_pairs(instructions, records, split, discard).items():
        data = preference_dataset(tokenizer, template, pairs, longest)
        if not len(data):
            raise InputError(f"{instructions}: the {name} part has no pairs; add records")
        rows[name] = _Rows.stacked(data)
    told = split_instructions(records, split)["validation"]
    turns = encode_turns(tokenizer, template, told)
    answers = InstructionDataset.of_turns(turns, end=tokenizer.eot, max_length=longest)

    def forward(rows: _Rows) -> float:
        return sum(shapes.forward_flops(config, shape) for shape in rows.by_length(size))

    instruct = forward(_Rows.stacked(answers))
    measured = {name: forward(each) for name, each in rows.items()}
    scored = measured["validation"] + measured["test"] + instruct
    shown = [len(last_prompt(each, tokenizer.eot)[-longest:]) for each in turns[:3]]
    return _language_plan(
        "tune_preferences",
        params.train,
        config,
        rows["train"],
        flops_before=sum(measured.values()) + scored,
        evaluation_flops=measured["validation"],
        final_flops=scored,
        cache=(len(shown), max(shown) + params.sample_tokens),
        tuning=_adapters("tune_preferences", params, config, assistant),
        pairs=True,
    )


def _adapters(
    stage: str,
    params: FinetuneInstructParams | TunePreferencesParams,
    config: GPTConfig,
    base: Path,
) -> Tuning:
    """What a language model's parameters let be trained.

    Raises:
        InputError: more blocks than the base has.
    """
    if params.adapters is None:
        return shapes.ALL
    tuning = Tuning(lora=params.adapters)
    if shapes.trunk_depth(config, tuning) < 0:
        raise InputError(
            f"{stage}.lora.blocks: {base} has {config.n_layer} blocks; use at most that"
        )
    return tuning


def _language_plan(
    stage: str,
    train: TrainParams,
    config: GPTConfig,
    rows: _Rows,
    *,
    flops_before: float = 0,
    evaluation_flops: float,
    final_flops: float,
    cache: tuple[int, int],
    tuning: Tuning = shapes.ALL,
    pairs: bool = False,
) -> Plan:
    def memory(shape: Shape, bf16: bool, kernel: shapes.Kernel) -> Memory:
        return shapes.lm_memory(
            config,
            shape,
            bf16=bf16,
            kernel=kernel,
            optimizer=train.optimizer,
            keep_best=train.keep == "best",
            cache=cache,
            tuning=tuning,
            pairs=pairs,
        )

    adapters = shapes.n_adapters(config, tuning.lora) if tuning.lora else 0
    return _plan(
        stage,
        train,
        rows,
        lambda shape: shapes.step_flops(config, shape, tuning),
        parameters=shapes.n_parameters(config) + adapters,
        trained=shapes.n_trained(config, tuning),
        flops_before=flops_before,
        evaluation_flops=evaluation_flops,
        final_flops=final_flops,
        memory=memory,
    )


def _plan_classifier(params: FinetuneClassifierParams, *, base: Path, messages: Path) -> Plan:
    from stages.finetune_classifier import _KEPT_BYTES, _ROWS_AT_ONCE

    config, _ = read_config(base)
    tokenizer = load_tokenizer(base)
    frame, parts = usable_parts(messages, params.split, params.balance)
    classes = frame["label"].nunique()
    lengths: dict[str, np.ndarray] = {}
    for name in ("train", "validation"):
        encoded = tokenizer.encode_batch(parts[name]["text"].tolist())
        lengths[name] = np.array([max(1, len(ids)) for ids in encoded])
    longest = params.max_length or min(int(lengths["train"].max()), config.context_length)
    if longest > config.context_length:
        raise InputError(
            f"finetune_classifier.max_length: {longest} tokens are more than the context of "
            f"{base} holds ({config.context_length}); use at most that"
        )
    rows = {
        name: _Rows(np.minimum(each, longest), np.ones(len(each), dtype=int))
        for name, each in lengths.items()
    }
    tuning = _tuning(params, config, base)
    depth = shapes.trunk_depth(config, tuning)
    tokens = sum(int(each.lengths.sum()) for each in rows.values())
    kept = depth > 0 and tokens * config.n_embd * shapes.FP32 <= _KEPT_BYTES
    texts = sum(len(each.lengths) for each in rows.values())
    vectors = 0 if not kept else texts if depth == config.n_layer and not tuning.mean else tokens

    def scores(name: str) -> float:
        return sum(
            shapes.classifier_flops(config, shape, tuning, classes, kept=kept) / 3
            for shape in rows[name].in_order(_ROWS_AT_ONCE)
        )

    def memory(shape: Shape, bf16: bool, kernel: shapes.Kernel) -> Memory:
        return shapes.classifier_memory(
            config,
            shape,
            tuning,
            classes,
            bf16=bf16,
            kernel=kernel,
            optimizer=params.train.optimizer,
            keep_best=params.train.keep == "best",
            features=vectors,
        )

    before = 0.0
    if kept:
        before = sum(
            shapes.trunk_flops(
                config, Shape(rows=1, length=n, tokens=n, targets=1), depth, mean=tuning.mean
            )
            for each in rows.values()
            for n in each.lengths.tolist()
        )
    return _plan(
        "finetune_classifier",
        params.train,
        rows["train"],
        lambda shape: shapes.classifier_flops(config, shape, tuning, classes, kept=kept),
        parameters=shapes.n_parameters(config, classes)
        + (shapes.n_adapters(config, tuning.lora, classes) if tuning.lora else 0),
        trained=shapes.n_trained(config, tuning, classes),
        flops_before=before,
        evaluation_flops=scores("validation"),
        final_flops=scores("train") + scores("validation"),
        memory=memory,
    )


def _tuning(params: FinetuneClassifierParams, config: GPTConfig, base: Path) -> Tuning:
    """What a classifier's parameters let be trained.

    Raises:
        InputError: more blocks than the base has.
    """
    from gpt.lora import LoraParams

    mean = params.pooling == "mean"
    if params.trainable == "lora":
        tuning = Tuning(lora=params.lora or LoraParams(), mean=mean)
    else:
        blocks = {"all": None, "last_block": 1, "last_blocks": params.blocks, "head": 0}
        tuning = Tuning(blocks=blocks[params.trainable], mean=mean)
    if shapes.trunk_depth(config, tuning) < 0:
        where = "lora.blocks" if tuning.lora else "blocks"
        raise InputError(
            f"finetune_classifier.{where}: {base} has {config.n_layer} blocks; use at most that"
        )
    return tuning


_PLANS: dict[str, Callable[..., Plan]] = {
    "pretrain": _plan_pretrain,
    "finetune_classifier": _plan_classifier,
    "finetune_instruct": _plan_instruct,
    "tune_preferences": _plan_preferences,
}


@dataclass(frozen=True, slots=True)
class _Rows:
    """The items of a part.

    Attributes:
        lengths: tokens of each.
        targets: of each.
        uniform: all are as long.
        batch: of some of them, where its shape cannot be told from theirs: packed rows, pairs.
    """

    lengths: np.ndarray
    targets: np.ndarray
    uniform: bool = False
    batch: Callable[[Sequence[int]], Batch] | None = None

    @classmethod
    def stacked(cls, data: Dataset) -> _Rows:
        """Of a dataset, whose batches are made to see their shape."""
        assert data.lengths is not None
        return cls(data.lengths, np.empty(0), batch=functools.partial(take, data))

    def shape(self, indices: Sequence[int]) -> Shape:
        """Of the batch of these rows."""
        if self.batch is not None:
            batch = self.batch(indices)
            rows, length = batch.inputs.shape
            targets = int((batch.targets != IGNORED).sum())
            return Shape(rows=rows, length=length, tokens=batch.n_tokens, targets=targets)
        lengths = self.lengths[indices]
        return Shape(
            rows=len(indices),
            length=int(lengths.max()),
            tokens=int(lengths.sum()),
            targets=int(self.targets[indices].sum()),
        )

    def in_order(self, size: int) -> Iterator[Shape]:
        """All rows as they come."""
        return self._cut(range(len(self.lengths)), size)

    def by_length(self, size: int) -> Iterator[Shape]:
        """All rows, the longest first."""
        return self._cut(np.argsort(-self.lengths, kind="stable").tolist(), size)

    def _cut(self, order: Sequence[int], size: int) -> Iterator[Shape]:
        for start in range(0, len(order), size):
            yield self.shape(list(order[start : start + size]))


def _plan(
    stage: str, train: TrainParams, rows: _Rows, flops: Callable[[Shape], float], **known: Any
) -> Plan:
    """The steps of `gpt.train.fit` over these rows, none of them taken."""
    n = len(rows.lengths)
    per_step = min(train.rows, n)
    steps = train.steps or (train.epochs or 0) * (n // per_step)
    lengths = rows.lengths if train.group_by_length and not rows.uniform else None

    def shapes_of(step: int) -> list[Shape]:
        if rows.uniform:
            indices = list(range(per_step))
        else:
            indices = batch_indices(n, per_step, train.seed, step, lengths)
        starts = range(0, per_step, train.batch_size)
        return [rows.shape(indices[start : start + train.batch_size]) for start in starts]

    passes: Counter[Shape] = Counter()
    if rows.uniform:
        first = shapes_of(0)
        passes.update({shape: count * steps for shape, count in Counter(first).items()})
        step_flops = np.full(steps, sum(map(flops, first)))
    else:
        each = [shapes_of(step) for step in range(steps)]
        passes.update(itertools.chain.from_iterable(each))
        step_flops = np.array([sum(map(flops, batch)) for batch in each])
    return Plan(
        stage=stage,
        train=train,
        steps=steps,
        tokens=sum(shape.tokens * count for shape, count in passes.items()),
        passes=passes,
        step_flops=step_flops,
        largest=max(passes, key=_size),
        shapes_of=shapes_of,
        **known,
    )


# --- what it takes --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """The time of a stage by part."""

    start: float
    training: float
    evaluations: float
    end: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.start + self.training + self.evaluations + self.end


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a stage takes.

    Attributes:
        plan: what there is to do.
        memory: its parts.
        peak: the process's memory as measured, and on a graphics card; else the sum of the parts.
        libraries: what is no part: Python and its libraries, or a device's own.
        seconds: the time by part; for a named device only in all.
        total_seconds: in all.
        devices: how many of a named device are needed, None for none that would do.
    """

    plan: Plan
    memory: Memory
    peak: int
    libraries: int
    device_peak: int | None = None
    seconds: Seconds | None = None
    total_seconds: float
    devices: int | None = None

    def as_json(self) -> dict[str, Any]:
        """All figures under plain names: bytes, seconds, FLOPs."""
        plan = self.plan
        return {
            "parameters": plan.parameters,
            "trained": plan.trained,
            "steps": plan.steps,
            "tokens": plan.tokens,
            "evaluations": plan.evaluations,
            "flops_per_token": float(plan.step_flops.sum()) / plan.tokens,
            "flops": plan.flops,
            "memory_bytes": {
                **dataclasses.asdict(self.memory),
                "libraries": self.libraries,
                "peak": self.peak,
                "device_peak": self.device_peak,
            },
            "seconds": {
                **(dataclasses.asdict(self.seconds) if self.seconds else {}),
                "total": self.total_seconds,
            },
            "devices": self.devices,
        }


def here(plan: Plan, probe: Probe) -> Estimate:
    """On this machine, from what a probe saw."""
    local = pick_device(plan.train.device)
    bf16 = _in_bf16(plan, gpu=local.type == "cuda")
    kernel: shapes.Kernel = "blocked" if local.type == "cpu" else "fused"
    memory = plan.memory(plan.largest, bf16, kernel)
    seen = plan.memory(plan.largest_of(len(probe.steps)), bf16, kernel)
    # the largest batch may come later
    later = max(0, memory.activations + memory.loss - seen.activations - seen.loss)
    if not probe.evaluations:
        later += memory.best + memory.kv_cache
    on_host = probe.device_peak is None
    peak = probe.peak + (later if on_host else 0)
    time = seconds(plan, probe)
    return Estimate(
        plan=plan,
        memory=memory,
        peak=peak,
        libraries=max(0, peak - memory.total) if on_host else probe.peak,
        device_peak=None if probe.device_peak is None else probe.device_peak + later,
        seconds=time,
        total_seconds=time.total,
    )


def seconds(plan: Plan, probe: Probe) -> Seconds:
    """The whole stage's time from its first steps, which are weighed by their FLOPs."""
    timed = probe.timed
    rate = sum(step.seconds for step in timed) / sum(_flops_of(plan, step.number) for step in timed)
    training = rate * float(plan.step_flops.sum())
    for step in probe.steps[:WARM_UP]:
        training += step.seconds - rate * _flops_of(plan, step.number)
    # between two steps: what listens to them
    gaps = [
        after.end - after.seconds - before.end
        for before, after in itertools.pairwise(probe.steps)
        if before.number % _probe_interval(plan) and after.number == before.number + 1
    ]
    training += plan.steps * max(0.0, float(np.median(gaps)) if gaps else 0.0)
    if probe.evaluations:
        whole = float(np.mean([each.whole for each in probe.evaluations]))
        validation = float(np.mean([each.validation for each in probe.evaluations]))
    else:  # a forward pass costs as much as it does in a step
        whole = validation = rate * plan.evaluation_flops
    final = validation * plan.final_flops / plan.evaluation_flops
    return Seconds(
        start=probe.start,
        training=training,
        evaluations=plan.evaluations * whole,
        end=final + probe.finish,
    )


def _probe_interval(plan: Plan) -> int:
    from pipeline.probe import EVALUATE_AFTER

    return min(EVALUATE_AFTER, int(plan.train.eval_interval))


def _flops_of(plan: Plan, number: int) -> float:
    return float(plan.step_flops[number - 1])


def on_device(plan: Plan, device: Accelerator) -> Estimate:
    """On a named graphics card, at the assumed share of its peak."""
    bf16 = _in_bf16(plan, gpu=True) and device.bf16 is not None
    memory = plan.memory(plan.largest, bf16, "fused")
    needed = shapes.devices_needed(memory, device)
    total = plan.flops / (UTILISATION * device.peak(bf16=bf16) * (needed or 1))
    return Estimate(
        plan=plan,
        memory=memory,
        peak=memory.total + shapes.CONTEXT_BYTES,
        libraries=shapes.CONTEXT_BYTES,
        total_seconds=total,
        devices=needed,
    )


def _in_bf16(plan: Plan, *, gpu: bool) -> bool:
    precision = plan.train.precision
    return bool(precision == "bf16" or (precision == "auto" and gpu))


# --- the command ----------------------------------------------------------------------------------


def estimate(
    root: Path,
    stage: str | None = None,
    *,
    preset: str | None = None,
    device: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> dict[str, Estimate]:
    """Print what the training stages take, or one of them.

    Args:
        root: the project.
        stage: one that trains; None is all of them for which there is data.
        preset: take its parameters in place of `params.yaml`, with the data that is there.
        device: a name of `ACCELERATORS`; None measures this machine.
        as_json: print JSON and nothing else.
        console: where to print to.

    Returns:
        The estimates by stage.

    Raises:
        InputError: a name that is not known, a parameter that is wrong, or no data yet.
        RunError: a stage could not be measured.
    """
    if stage is not None and stage not in TRAINING:
        trains = "trains nothing" if stage in STAGES else "no such stage"
        raise InputError(f"{stage}: {trains}; use one of {', '.join(TRAINING)}")
    if device is not None and device not in ACCELERATORS:
        raise InputError(f"--device {device}: not known; use one of {', '.join(ACCELERATORS)}")
    file = _params_file(root, preset)
    params = load_params(file)
    console = safe_console(console)
    results: dict[str, Estimate] = {}
    missing: dict[str, str] = {}
    busy = None if device else _busy()
    for name in [stage] if stage else TRAINING:
        try:
            plan = make_plan(name, params, root)
            if device:
                results[name] = on_device(plan, ACCELERATORS[device])
                continue
            with _status(console, f"measuring {name} …", quiet=as_json):
                weights = shapes.FP32 * plan.parameters
                results[name] = here(plan, probe_stage(name, root, file, weights))
        except InputError as error:
            missing[name] = str(error)
    if not results:
        raise InputError(next(iter(missing.values())))
    if as_json:
        data = {name: each.as_json() for name, each in results.items()}
        whole = {"preset": preset, "device": device, "stages": data, "missing": missing}
        say_json(whole)
        return results
    notes = [f"{name}: {why}." for name, why in missing.items()]
    notes += [
        f"{name}: measured on one device; train.devices is {each.plan.train.devices}."
        for name, each in results.items()
        if device is None and each.plan.train.devices != 1
    ]
    if busy:
        notes.append(busy)
    if preset:
        notes.append(
            f"With the parameters of presets/{preset}.yaml, and data and base models as they are "
            "in the project now."
        )
    _print(console, results, device, notes)
    return results


def _busy() -> str | None:
    """Says that others were at work here, which a measured time cannot leave out."""
    cores = os.cpu_count() or 1
    if not hasattr(os, "getloadavg") or (load := os.getloadavg()[0]) < cores:
        return None
    return (
        f"The machine was busy (load {load:.1f} on {cores} cores): the times are those of a busy "
        "machine, and hold as long as it is."
    )


def _status(
    console: Console, text: str, *, quiet: bool
) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if quiet else console.status(text)


def _params_file(root: Path, preset: str | None) -> Path:
    if preset is None:
        return root / PARAMS_FILE
    file = root / "presets" / f"{preset}.yaml"
    known = sorted(path.stem for path in (root / "presets").glob("*.yaml"))
    if preset not in known:
        raise InputError(f"{preset}: no such preset; there are {', '.join(known) or 'none'}")
    return file


_PARTS = {
    "weights": "weights",
    "copies": "bf16 copies of them",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss and its logits",
    "best": "the best weights so far",
    "kv_cache": "KV cache of samples",
    "features": "frozen blocks' vectors",
}


def _print(
    console: Console, results: Mapping[str, Estimate], device: str | None, notes: Iterable[str]
) -> None:
    each = list(results.values())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")

    def row(label: str, value: Callable[[Estimate], str], style: str = "") -> None:
        table.add_row(label, *(Text(value(result), style=style) for result in each), style=style)

    row("parameters", lambda r: f"{r.plan.parameters:,}")
    row("  trained", lambda r: _share(r.plan.trained, r.plan.parameters))
    row("steps", lambda r: f"{r.plan.steps:,}")
    row("tokens", lambda r: f"{r.plan.tokens:,}")
    row("FLOPs a token", lambda r: _flops(float(r.plan.step_flops.sum()) / r.plan.tokens))
    row("FLOPs in all", lambda r: _flops(r.plan.flops))
    table.add_section()
    for part, label in _PARTS.items():
        if any(getattr(result.memory, part) for result in each):
            row(label, lambda r, part=part: _bytes(getattr(r.memory, part)))  # type: ignore[misc]
    if device is None and any(result.device_peak is not None for result in each):
        row("on the graphics card", lambda r: _bytes(r.device_peak or 0), "bold")
        row("in the machine's memory", lambda r: _bytes(r.peak), "bold")
    else:
        row("CUDA itself" if device else "Python and libraries", lambda r: _bytes(r.libraries))
        row("memory", lambda r: _bytes(r.peak), "bold")
    table.add_section()
    if device is None:
        for label, part in (
            ("start and data", "start"),
            ("all steps", "training"),
            ("evaluations", "evaluations"),
            ("last evaluation, saving", "end"),
        ):
            row(label, lambda r, part=part: _time(getattr(r.seconds, part)))  # type: ignore[misc]
    else:
        row("fits on", lambda r: _devices(r.devices))
    row("time", lambda r: _time(r.total_seconds), "bold")
    console.print()
    console.print(table)
    console.print()
    for line in [*_basis(device), *notes]:
        console.print(Text(line, style="dim"), soft_wrap=False)


def _basis(device: str | None) -> Iterator[str]:
    """What the figures rest on."""
    if device is None:
        yield (
            "Time and memory of each stage by itself, as a process of its own: its first steps "
            "were run here."
        )
        yield (
            "The parts are counted; what they leave of the measured memory is Python, its "
            "libraries and what the allocator keeps."
        )
        return
    card = ACCELERATORS[device]
    rate = f"{card.bf16 / 1e12:g} TFLOP/s in bf16" if card.bf16 else "no bf16"
    yield (
        f"{card.name}: {card.memory / 1e9:.1f} GB, {rate}, {card.fp32 / 1e12:g} in fp32 "
        f"({card.source})."
    )
    yield (
        f"Time: that {UTILISATION:.0%} of the peak is reached is assumed, not measured; small "
        "models reach less. Start-up, samples and saving are not in it."
    )
    yield (
        f"Memory: the sum of the parts, and {_bytes(shapes.CONTEXT_BYTES)} assumed for CUDA itself."
        " More than one device as FSDP shards them, each with batches as large as here."
    )


def _time(seconds: float) -> str:
    return seconds_in_words(seconds) if seconds >= 0.05 else "under 0.1 s"


def _devices(needed: int | None) -> str:
    if needed is None:
        return "none: lower batch_size"
    return "1 device" if needed == 1 else f"{needed} devices (FSDP)"


def _share(trained: int, parameters: int) -> str:
    return "all" if trained == parameters else f"{trained:,}"


def _bytes(size: int) -> str:
    if not size:
        return "-"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            value = size / unit
            return f"{value:,.1f} {name}" if value < 99.95 else f"{value:,.0f} {name}"
    return f"{size} B"


def _flops(value: float) -> str:
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,.0f}"
