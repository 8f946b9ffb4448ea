"""Know before you run: what a training stage takes of memory and time, here or on another device.

How much there is to do is counted from the stage's parameters and its data; memory by part comes
from `gpt.estimate`. On this machine a probe (`pipeline.estimate.probe`) measures the speed and the
memory of the whole process; for a named graphics card the speed is a share of its published peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt import estimate as shapes
from gpt.base.errors import InputError
from gpt.batches.data import IGNORED, Batch, Dataset, batch_indices, batches, take
from gpt.estimate import ACCELERATORS, UTILISATION, Accelerator, Counts, Memory, Shape
from gpt.model.device import pick_device
from gpt.model.model import GPT, GPTClassifier
from gpt.train.recipe import TrainParams
from gpt.tune.lora import wrap
from pipeline.estimate.probe import EVALUATE_AFTER, WARM_UP, Probe, probe_stage
from pipeline.project.params import PARAMS_FILE, Params, load_params, preset_file, section
from pipeline.project.stage_table import STAGES
from pipeline.show.console import safe_console, seconds_in_words
from pipeline.show.terminal import say_json

# --- how much there is to do ----------------------------------------------------------------------

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
        flops_before: computed once before the first step.
        evaluation_flops: of the validation loss of one evaluation.
        final_flops: of what is measured after the last step.
        memory: from the largest batch, whether products are in `bf16`, and the `kernel`.
        batches: of each step; where all steps are alike, of the first one alone.
    """

    train: TrainParams
    parameters: int
    trained: int
    steps: int
    tokens: int
    step_flops: np.ndarray
    flops_before: float
    evaluation_flops: float
    final_flops: float
    memory: Callable[..., Memory]
    batches: list[list[Shape]]

    @property
    def evaluations(self) -> int:
        """One every `eval_interval` steps, and one at the last."""
        return -(-self.steps // int(self.train.eval_interval))

    @property
    def flops(self) -> float:
        """Of everything but the samples."""
        measured = self.evaluations * self.evaluation_flops + self.final_flops
        return float(self.step_flops.sum()) + self.flops_before + measured

    def largest(self, steps: int | None = None) -> Shape:
        """The batch that takes the most memory, of all steps or of the first ones."""
        shapes_of_steps = itertools.chain.from_iterable(self.batches[:steps])
        return max(shapes_of_steps, key=lambda shape: (shape.positions, shape.targets))


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


def _plan_classifier(params: Any, ready: Any) -> Plan:
    from stages.finetune_classifier import ROWS_AT_ONCE, freeze

    with torch.device("meta"):
        classifier = GPTClassifier(ready.config, ready.labels, params.pooling)
        depth = freeze(classifier, params.last, params.adapters)
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
    return Plan(
        train=train,
        parameters=model.parameters,
        trained=model.trained,
        steps=steps,
        tokens=times * sum(shape.tokens for batch in each for shape in batch),
        step_flops=np.tile([sum(map(flops, batch)) for batch in each], times),
        batches=each,
        **known,
    )


def _shape(batch: Batch) -> Shape:
    rows, length = batch.inputs.shape
    targets = batch.targets != IGNORED  # a pair's are those of both its answers
    return Shape(rows=rows, length=length, tokens=batch.n_tokens, targets=int(targets.sum()))


# --- what it takes --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a stage takes.

    Attributes:
        plan: what there is to do.
        memory: its parts.
        peak: the process's memory as measured, and on a graphics card; else the sum of the parts.
        libraries: what is no part: Python and its libraries, or a device's own.
        seconds: the time by part (`TIMES`); empty for a named device.
        total_seconds: in all.
        devices: how many of a named device are needed, None for none that would do.
    """

    plan: Plan
    memory: Memory
    peak: int
    libraries: int
    device_peak: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    total_seconds: float
    devices: int | None = None

    @property
    def flops_per_token(self) -> float:
        """Of all steps, evaluations left out."""
        return float(self.plan.step_flops.sum()) / self.plan.tokens

    def as_json(self) -> dict[str, Any]:
        """All figures under plain names: bytes, seconds, FLOPs."""
        plan = self.plan
        return {
            "parameters": plan.parameters,
            "trained": plan.trained,
            "steps": plan.steps,
            "tokens": plan.tokens,
            "evaluations": plan.evaluations,
            "flops_per_token": self.flops_per_token,
            "flops": plan.flops,
            "memory_bytes": {
                **dataclasses.asdict(self.memory),
                "libraries": self.libraries,
                "peak": self.peak,
                "device_peak": self.device_peak,
            },
            "seconds": {**self.seconds, "total": self.total_seconds},
            "devices": self.devices,
        }


def here(plan: Plan, probe: Probe) -> Estimate:
    """On this machine, from what a probe saw."""
    local = pick_device(plan.train.device)
    bf16 = _in_bf16(plan, gpu=local.type == "cuda")
    kernel: shapes.Kernel = "blocked" if local.type == "cpu" else "fused"
    memory = plan.memory(plan.largest(), bf16=bf16, kernel=kernel)
    seen = plan.memory(plan.largest(len(probe.steps)), bf16=bf16, kernel=kernel)
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
        total_seconds=sum(time.values()),
    )


def seconds(plan: Plan, probe: Probe) -> dict[str, float]:
    """The whole stage's time from its first steps, which are weighed by their FLOPs."""
    timed = probe.steps[WARM_UP:] or probe.steps
    flops = [float(plan.step_flops[step.number - 1]) for step in probe.steps]
    rate = sum(step.seconds for step in timed) / sum(flops[-len(timed) :])
    training = rate * float(plan.step_flops.sum())
    for step, own in zip(probe.steps[:WARM_UP], flops, strict=False):
        training += step.seconds - rate * own
    # between two steps: the listeners to their events
    interval = min(EVALUATE_AFTER, int(plan.train.eval_interval))
    gaps = [
        after.end - after.seconds - before.end
        for before, after in itertools.pairwise(probe.steps)
        if before.number % interval and after.number == before.number + 1
    ]
    training += plan.steps * max(0.0, float(np.median(gaps)) if gaps else 0.0)
    if probe.evaluations:
        whole = float(np.mean([each.whole for each in probe.evaluations]))
        validation = float(np.mean([each.validation for each in probe.evaluations]))
    else:  # a forward pass costs as much as it does in a step
        whole = validation = rate * plan.evaluation_flops
    final = validation * plan.final_flops / plan.evaluation_flops
    return {
        "start": probe.start,
        "training": training,
        "evaluations": plan.evaluations * whole,
        "end": final + probe.finish,
    }


def on_device(plan: Plan, device: Accelerator) -> Estimate:
    """On a named graphics card, at the assumed share of its peak."""
    bf16 = _in_bf16(plan, gpu=True) and device.bf16 is not None
    memory = plan.memory(plan.largest(), bf16=bf16, kernel="fused")
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
        preset: use its parameters instead of `params.yaml`, with the data that is there.
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
    file = preset_file(root, preset) if preset else root / PARAMS_FILE
    params = load_params(file)
    console = safe_console(console)
    results: dict[str, Estimate] = {}
    missing: dict[str, str] = {}
    notes = [] if device else _busy()
    for name in [stage] if stage else TRAINING:
        try:
            plan = make_plan(name, params, root)
            if device:
                results[name] = on_device(plan, ACCELERATORS[device])
                continue
            measuring = console.status(f"measuring {name} …")
            with contextlib.nullcontext() if as_json else measuring:
                weights = shapes.FP32 * plan.parameters
                results[name] = here(plan, probe_stage(name, root, file, weights))
            if (devices := plan.train.devices) != 1:
                notes.append(f"{name}: measured on one device; train.devices is {devices}.")
        except InputError as error:
            missing[name] = str(error)
    if not results:
        raise InputError(next(iter(missing.values())))
    if as_json:
        data = {name: each.as_json() for name, each in results.items()}
        say_json({"preset": preset, "device": device, "stages": data, "missing": missing})
        return results
    if preset:
        notes.append(
            f"With the parameters of presets/{preset}.yaml, and data and base models as they are "
            "in the project now."
        )
    notes = [*_basis(device), *(f"{name}: {why}." for name, why in missing.items()), *notes]
    console.print()
    console.print(_table(results, device))
    console.print()
    for line in notes:
        console.print(Text(line, style="dim"), soft_wrap=False)
    return results


def _busy() -> list[str]:
    """Says that other processes used the machine, which a measured time cannot leave out."""
    cores = os.cpu_count() or 1
    if (load := os.getloadavg()[0]) < cores:
        return []
    return [
        f"The machine was busy (load {load:.1f} on {cores} cores): the times are those of a busy "
        "machine, and hold as long as it is."
    ]


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


TIMES = {
    "start": "start and data",
    "training": "all steps",
    "evaluations": "evaluations",
    "end": "last evaluation, saving",
}


def _table(results: Mapping[str, Estimate], device: str | None) -> Table:
    each = list(results.values())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")

    def row(label: str, value: Callable[[Estimate], str], style: str = "") -> None:
        table.add_row(label, *(Text(value(result), style=style) for result in each), style=style)

    row("parameters", lambda r: f"{r.plan.parameters:,}")
    row(
        "  trained",
        lambda r: "all" if r.plan.trained == r.plan.parameters else f"{r.plan.trained:,}",
    )
    row("steps", lambda r: f"{r.plan.steps:,}")
    row("tokens", lambda r: f"{r.plan.tokens:,}")
    row("FLOPs a token", lambda r: _flops(r.flops_per_token))
    row("FLOPs in all", lambda r: _flops(r.plan.flops))
    table.add_section()
    for part, label in _PARTS.items():
        if any(getattr(result.memory, part) for result in each):
            row(label, lambda r, part=part: _bytes(getattr(r.memory, part)))  # type: ignore[misc]
    if any(result.device_peak is not None for result in each):
        row("on the graphics card", lambda r: _bytes(r.device_peak or 0), "bold")
        row("in the machine's memory", lambda r: _bytes(r.peak), "bold")
    else:
        row("CUDA itself" if device else "Python and libraries", lambda r: _bytes(r.libraries))
        row("memory", lambda r: _bytes(r.peak), "bold")
    table.add_section()
    if device:
        row("fits on", lambda r: _devices(r.devices))
    else:
        for part, label in TIMES.items():
            row(label, lambda r, part=part: _time(r.seconds[part]))  # type: ignore[misc]
    row("time", lambda r: _time(r.total_seconds), "bold")
    return table


def _basis(device: str | None) -> list[str]:
    """What the figures rest on."""
    if device is None:
        return [
            "Time and memory of each stage by itself, as a process of its own: its first steps "
            "were run here.",
            "The parts are counted; what they leave of the measured memory is Python, its "
            "libraries and what the allocator keeps.",
        ]
    card = ACCELERATORS[device]
    rate = f"{card.bf16 / 1e12:g} TFLOP/s in bf16" if card.bf16 else "no bf16"
    return [
        f"{card.name}: {card.memory / 1e9:.1f} GB, {rate}, {card.fp32 / 1e12:g} in fp32 "
        f"({card.source}).",
        f"Time: that {UTILISATION:.0%} of the peak is reached is assumed, not measured; small "
        "models reach less. Start-up, samples and saving are not in it.",
        f"Memory: the sum of the parts, and {_bytes(shapes.CONTEXT_BYTES)} assumed for CUDA itself."
        " More than one device as FSDP shards them, each with batches as large as here.",
    ]


def _time(seconds: float) -> str:
    return seconds_in_words(seconds) if seconds >= 0.05 else "under 0.1 s"


def _devices(needed: int | None) -> str:
    if needed is None:
        return "none: lower batch_size"
    return "1 device" if needed == 1 else f"{needed} devices (FSDP)"


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
