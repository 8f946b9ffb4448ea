"""What each of our changes gains in a training step: with it, and with it alone switched off."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bench.gpt.training import compare_steps, large_shape, our_job
from bench.harness import Comparison, Machine, Settings
from bench.worker import Alternative, as_ours
from gpt.model.attention import Documents, heads
from gpt.model.device import Precision


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """The step at 124M, each change by itself, in each precision; and bf16 against fp32."""
    shape = large_shape(settings)
    for precision in settings.precisions:
        for change, switched_off in CHANGES.items():
            yield compare_steps(
                f"Our training step, {shape.title}: {change}, {precision}",
                {
                    "with": Alternative(our_job, (shape, precision), as_ours),
                    "without": Alternative(our_job, (shape, precision), switched_off),
                },
                shape,
                precision,
                settings,
                machine,
            )
    each: dict[str, Precision] = {"bf16": "bf16", "fp32": "fp32"}
    against_fp32 = compare_steps(
        f"Our training step, {shape.title}: bf16 in the place of fp32",
        {
            name: Alternative(our_job, (shape, precision), as_ours)
            for name, precision in each.items()
        },
        shape,
        "bf16",
        settings,
        machine,
    )
    yield replace(against_fp32, peak=None)  # each has a peak of its own


# --- in the workers: our setting, with something else in the place of a change --------------------


def default_allocator(threads: int) -> None:
    """glibc's own thresholds: large blocks are mapped, and unmapped when they are freed."""
    _replace("gpt.model.device", "keep_freed_memory", lambda: None)
    as_ours(threads)


def library_attention(threads: int) -> None:
    """PyTorch's fused kernel."""
    as_ours(threads)
    _replace("gpt.model.model", "causal_attention", _library_attention)


def _library_attention(
    qkv: Tensor, n_head: int, dropout: float = 0.0, documents: Documents | None = None
) -> Tensor:
    assert documents is None, "only whole windows are measured"
    q, k, v = heads(qkv, 3, n_head)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return y.transpose(1, 2).flatten(2)


def whole_logits(threads: int) -> None:
    """All logits at once, and PyTorch's loss of them."""
    as_ours(threads)
    _replace("gpt.batches.metrics", "linear_cross_entropy", _whole_cross_entropy)


def _whole_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _replace(module: str, name: str, value: Any) -> None:
    holder = importlib.import_module(module)
    assert hasattr(holder, name), f"{module}.{name} is gone: nothing would be switched off"
    setattr(holder, name, value)


CHANGES: dict[str, Callable[[int], None]] = {
    "an allocator that keeps its memory": default_allocator,
    "attention in blocks": library_attention,
    "the loss in pieces": whole_logits,
}
"""What can be taken back, by the setting that does it; one more is one more line and function."""
