"""The device and the number of threads for tensor work."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from typing import Literal

import torch

from gpt.base.errors import InputError
from gpt.model.parallel import world

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, then Apple's GPU, then the CPU.

    Raises:
        InputError: the named device is not on this machine.
    """
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, present in here.items() if present))
    if not here.get(name, False):
        raise InputError(
            f"device: {name!r} is not on this machine; use 'auto' or one of "
            f"{', '.join(kind for kind, present in here.items() if present)}"
        )
    return torch.device(name)


def prepare_device(device: str = "auto", threads: int = 0) -> torch.device:
    """Pick the device and make results repeatable on it.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`.
        threads: CPU threads for tensor work; 0 means every core, shared with the processes that
            train together with this one on this machine. The number is part of what makes two
            runs equal to the byte: sums are split by thread.
    """
    picked = pick_device(device)
    keep_freed_memory()
    here = world()
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // here.local_size))
    if picked.type == "cuda":
        picked = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(picked)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # `use_deterministic_algorithms` is this and the compiler's own switch, for which it imports the
    # compiler: seconds, wherever nothing is compiled; what compiles sets both
    torch.set_deterministic_debug_mode("warn")
    # a guard against reads of uninitialized memory, which costs a tenth of a training step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return picked


@functools.cache
def keep_freed_memory() -> None:
    """Let the process keep freed memory and reuse it without system calls.

    By default glibc maps new memory for each larger tensor and unmaps it afterwards, and the system
    zeroes each page at first touch. That takes up to a quarter of a training step on a CPU. Two
    of `mallopt`'s settings (see its manual page) prevent it. With other C libraries this has no
    effect.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(
    device: torch.device, precision: Precision, *, keep_casts: bool = True
) -> contextlib.AbstractContextManager[None]:
    """Mixed precision: `auto` is bf16 on CUDA and fp32 elsewhere.

    Within it the cast of a weight is cached; the cache must be off if weights are replaced.
    """
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=keep_casts)
    return contextlib.nullcontext()
