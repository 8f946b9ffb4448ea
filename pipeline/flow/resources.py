"""The resources that parallel stages share: job slots, CPU cores, GPUs, an agent's slots.

No output depends on how they are shared: a stage always gets the number of threads that its
parameters set, and waits until they are free. A GPU serves one stage at a time, machine-wide.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.base.errors import InputError
from pipeline.project.params import PARAMS_FILE, read_params

SLOTS_VARIABLE = "GPT_PIPELINE_SLOT_COUNT"
"""How many stages may use an accelerator at the same time on an agent's machine."""

_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Need:
    """The resources that a stage needs.

    Attributes:
        threads: the number of CPU threads, all assumed busy.
        devices: the number of accelerators; 0 for none, None for all of them.
    """

    threads: int = 1
    devices: int | None = 0


def needs(root: Path, name: str, accelerated: bool) -> Need:
    """The resources that a stage needs, from its section of `params.yaml` if that is readable.

    Args:
        root: the project.
        name: the stage's name.
        accelerated: whether it uses an accelerator if there is one.
    """
    if not accelerated:
        return Need()
    section: Mapping[str, Any] = {}
    with contextlib.suppress(InputError, AttributeError, TypeError, ValueError):
        own = read_params(root / PARAMS_FILE).get(name) or {}
        section = dict(own.get("train", own) or {})
    threads, devices = section.get("threads", 0), section.get("devices", 1)
    if section.get("device") == "cpu":
        devices = 0
    elif not isinstance(devices, int) or devices < 0:
        devices = None
    return Need(threads if isinstance(threads, int) and threads > 0 else cores(), devices)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cards() -> list[str]:
    """The NVIDIA GPUs that stages may use, named as in `CUDA_VISIBLE_DEVICES`."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        # like CUDA: the list ends at -1, which usually stands for none
        listed = (each.strip() for each in named.split(","))
        return [each for each in itertools.takewhile(lambda each: each != "-1", listed) if each]
    if shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i, _ in enumerate(x for x in found.stdout.splitlines() if "GPU" in x)]


class StoppedWaitingError(Exception):
    """The flow was stopped while a stage waited for resources."""


class Resources:
    """Allocates a machine's resources to the stages of one flow run.

    Args:
        jobs: how many stages run at the same time.
        stopping: set when no further stage may start.
    """

    def __init__(self, jobs: int, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._changed = threading.Condition()
        self._places, self._cores = jobs, cores()
        self._working: list[int] = []
        """The number of threads of each running stage."""
        self._cards = cards()
        slots = int(os.environ.get(SLOTS_VARIABLE) or 0)
        self._slots = self._cards[: slots or None] or [f"slot-{i}" for i in range(slots)]

    @contextlib.contextmanager
    def held(self, need: Need, say: Callable[[str], None]) -> Iterator[dict[str, str]]:
        """Hold the resources of a stage within the block.

        Args:
            need: the resources of the stage.
            say: called with the reason if the stage has to wait.

        Yields:
            Environment variables for the stage's process.

        Raises:
            StoppedWaitingError: the flow was stopped in the meantime.
        """
        with self._some_slots(need, say) as environment, self._place(need.threads):
            yield environment

    @contextlib.contextmanager
    def _place(self, threads: int) -> Iterator[None]:
        with self._changed:
            while not self._fits(threads) and not self._stopping.is_set():
                self._changed.wait(_LOOK_SECONDS)
            if self._stopping.is_set():
                raise StoppedWaitingError
            self._working.append(threads)
        try:
            yield
        finally:
            with self._changed:
                self._working.remove(threads)
                self._changed.notify_all()

    def _fits(self, threads: int) -> bool:
        """Whether a stage may start. The threads of one stage wait for each other, so they do not
        share cores with other stages; single-threaded stages do, so that no core is idle."""
        if len(self._working) >= self._places:
            return False
        alone = threads == 1 and all(each == 1 for each in self._working)
        room = self._cores * 3 // 2 if alone else self._cores
        return not self._working or sum(self._working) + threads <= room

    @contextlib.contextmanager
    def _some_slots(self, need: Need, say: Callable[[str], None]) -> Iterator[dict[str, str]]:
        """Hold as many GPUs as the stage needs, or agent slots on a machine without GPUs."""
        if not self._slots or need.devices == 0:
            yield {}
            return
        wanted = min(len(self._slots), need.devices or len(self._slots))
        folder = Path(tempfile.gettempdir()) / f"gpt-pipeline-cards-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        told = False
        while not self._stopping.is_set():
            with contextlib.ExitStack() as locks:
                held: list[str] = []
                for slot in self._slots:
                    with contextlib.suppress(Timeout):
                        locks.enter_context(FileLock(folder / f"{slot}.lock", blocking=False))
                        held.append(slot)
                    if len(held) == wanted:
                        yield {"CUDA_VISIBLE_DEVICES": ",".join(held)} if self._cards else {}
                        return
            if not told:
                what = "cards" if self._cards else "slots"
                say(f"waits for {wanted} of {len(self._slots)} {what}, which other runs hold")
                told = True
            self._stopping.wait(_LOOK_SECONDS)
        raise StoppedWaitingError
