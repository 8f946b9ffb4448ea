"""What stages that run side by side share: places, cores, cards, and the slots of an agent.

Who gets how much changes no output: a stage has the threads that its parameters say, and waits
until they are free. A card serves one stage at a time, on the whole machine.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
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

from gpt.base.errors import InputError, RunError
from pipeline.project.params import PARAMS_FILE, read_params

SLOTS_VARIABLE = "GPT_PIPELINE_SLOTS"
"""The Prefect concurrency limit of the agent's machine; a stage on an accelerator holds slots."""

_LEASE_SECONDS = 60.0
"""A slot whose holder is gone is free again after this."""
_ASK_SECONDS = 5.0
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage needs to run.

    Attributes:
        threads: CPU threads that work all the time.
        devices: accelerators; 0 for a stage that uses none, None for all there are.
    """

    threads: int = 1
    devices: int | None = 0


def needs(root: Path, name: str, accelerated: bool) -> Need:
    """What a stage needs by its section of `params.yaml`, as far as that can be read.

    Args:
        root: the project.
        name: the stage's.
        accelerated: whether it works on an accelerator where there is one.
    """
    if not accelerated:
        return Need()
    section: Mapping[str, Any] = {}
    with contextlib.suppress(InputError, AttributeError):
        own = read_params(root / PARAMS_FILE).get(name) or {}
        section = own.get("train", own)
    threads, devices = section.get("threads", 0), section.get("devices", 1)
    if section.get("device") == "cpu":
        devices = 0
    elif not isinstance(devices, int):
        devices = None
    return Need(threads if isinstance(threads, int) and threads > 0 else cores(), devices)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cards() -> list[str]:
    """The NVIDIA cards that stages may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        # as CUDA does: at -1, the usual word for none, the list ends
        listed = (each.strip() for each in named.split(","))
        return [each for each in itertools.takewhile(lambda each: each != "-1", listed) if each]
    if shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i, _ in enumerate(x for x in found.stdout.splitlines() if "GPU" in x)]


def _no_wait(record: logging.LogRecord) -> bool:
    return "failed to process item" not in str(record.msg)


def _give_back(slots: contextlib.AbstractContextManager[None]) -> None:
    """A lease that nobody renews ends by itself: a server that restarts now fails no stage."""
    with contextlib.suppress(Exception):
        slots.__exit__(None, None, None)


class Resources:
    """Gives out what a machine has to the stages of one flow run.

    Args:
        jobs: so many stages run at the same time.
        stopping: set when none are to begin any more.
    """

    def __init__(self, jobs: int, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._changed = threading.Condition()
        self._places, self._cores = jobs, cores()
        self._working: list[int] = []
        """Threads of each running stage."""
        self._cards = cards()

    @contextlib.contextmanager
    def held(self, need: Need, say: Callable[[str], None]) -> Iterator[dict[str, str] | None]:
        """Within the block the stage has what it needs.

        Args:
            need: of the stage.
            say: told what it waits for, if it has to.

        Yields:
            Variables for its process; None when the flow is stopped meanwhile.
        """
        with contextlib.ExitStack() as stack:
            if not (
                self._hold_slots(need, stack, say)
                and self._hold_place(need, stack)
                and (environment := self._hold_cards(need, stack, say)) is not None
            ):
                yield None
                return
            yield environment

    def _hold_slots(
        self, need: Need, stack: contextlib.ExitStack, say: Callable[[str], None]
    ) -> bool:
        """Prefect's slots on the agent's machine: seen, and waited for, across flow runs."""
        limit = os.environ.get(SLOTS_VARIABLE)
        if not limit or need.devices == 0:
            return True
        import httpx
        from prefect.concurrency.sync import concurrency

        # to wait is no fault of Prefect's service, which would tell it every few seconds; these
        # loggers of its heed no level
        logging.getLogger("prefect._internal.concurrency").addFilter(_no_wait)
        wanted = max(1, len(self._cards)) if need.devices is None else need.devices
        told = False
        while not self._stopping.is_set():
            slots = concurrency(
                limit,
                occupy=wanted,
                timeout_seconds=_ASK_SECONDS,
                lease_duration=_LEASE_SECONDS,
                strict=True,
                # a server that restarts is no reason to stop a training; the cards stay locked
                raise_on_lease_renewal_failure=False,
            )
            try:
                slots.__enter__()
            except TimeoutError:
                if not told:
                    say(f"waits for {wanted} of the slots {limit!r}, which other runs hold")
                    told = True
                continue
            except Exception as error:  # Prefect's own, whatever they are
                if isinstance(error.__cause__, httpx.TransportError):  # a server that restarts, say
                    self._stopping.wait(_ASK_SECONDS)
                    continue
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise RunError(
                    f"the slots {limit!r} cannot be had ({reason}); start `gpt-pipeline agent`"
                ) from error
            stack.callback(_give_back, slots)
            return True
        return False

    def _hold_place(self, need: Need, stack: contextlib.ExitStack) -> bool:
        with self._changed:
            while not self._fits(need.threads):
                if self._stopping.is_set():
                    return False
                self._changed.wait(_LOOK_SECONDS)
            if self._stopping.is_set():
                return False
            self._working.append(need.threads)
        stack.callback(self._leave, need.threads)
        return True

    def _fits(self, threads: int) -> bool:
        """Threads of one stage that wait for each other suffer from any other on their core; stages
        of one thread share theirs, so that no core is idle at the end."""
        if len(self._working) >= self._places:
            return False
        if not self._working:
            return True
        busy = sum(self._working)
        alone = threads == 1 and all(each == 1 for each in self._working)
        return busy + threads <= (self._cores * 3 // 2 if alone else self._cores)

    def _leave(self, threads: int) -> None:
        with self._changed:
            self._working.remove(threads)
            self._changed.notify_all()

    def _hold_cards(
        self, need: Need, stack: contextlib.ExitStack, say: Callable[[str], None]
    ) -> dict[str, str] | None:
        """As many cards as it needs, which nobody else on this machine works on."""
        if not self._cards or need.devices == 0:
            return {}
        wanted = min(len(self._cards), need.devices or len(self._cards))
        folder = Path(tempfile.gettempdir()) / f"gpt-pipeline-cards-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        told = False
        while not self._stopping.is_set():
            with contextlib.ExitStack() as mine:
                held: list[str] = []
                for card in self._cards:
                    with contextlib.suppress(Timeout):
                        mine.enter_context(
                            FileLock(folder / f"{card}.lock").acquire(blocking=False)
                        )
                        held.append(card)
                    if len(held) == wanted:
                        stack.push(mine.pop_all())
                        return {"CUDA_VISIBLE_DEVICES": ",".join(held)}
            if not told:
                say(f"waits for {wanted} of {len(self._cards)} cards, which other runs hold")
                told = True
            self._stopping.wait(_LOOK_SECONDS)
        return None
