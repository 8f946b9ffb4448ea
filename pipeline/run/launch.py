"""A training stage in several processes, through torchrun's engine, started by the stage itself.

`python -m pipeline stage NAME` with `train.devices: 4` starts four workers with the same command
and waits for them. If one worker dies, all are restarted and resume from the last saved state. On
one machine the processes rendezvous through a file and communicate over loopback only.

Training on several machines is configured by torchrun's environment variables: set `PET_NNODES=2`
and `PET_MASTER_ADDR` on all of them, and `PET_NODE_RANK` to 0 on one. That one runs the pipeline as
usual, the others run `gpt-pipeline stage NAME`. All files are written by the first worker of the
first machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.base.errors import InputError, RunError

RESTARTS = 3
"""How many times the workers of a run are restarted."""
_GRACE_SECONDS = 60
"""How long a worker may take, once asked to stop, to finish its pass and save."""

_LAUNCHER = "GPT_PIPELINE_LAUNCHER"
"""The variable that tells a worker the process that started it."""
_MEETING = "GPT_PIPELINE_MEETING"
"""The variable that tells the workers the folder of their rendezvous file."""


def is_worker() -> bool:
    """Whether this process is one of several that torchrun's engine started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process is the one that writes files; a single process always is."""
    return int(os.environ.get("RANK", 0)) == 0


def restarts() -> int:
    """How many times the workers of this run were restarted."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_launched() -> bool:
    """Whether the stage itself started this worker."""
    return _LAUNCHER in os.environ


def n_machines() -> int:
    """The number of machines, from torchrun's `PET_NNODES`; 1 if it is not set.

    Raises:
        InputError: it is not a number.
    """
    return max(1, _number("PET_NNODES", 1))


def n_processes(train: Any) -> int:
    """How many processes a stage with these `TrainParams` uses on this machine.

    Raises:
        InputError: this machine does not have the named device.
    """
    if train.devices != "auto":
        return int(train.devices)
    import torch

    from gpt.model.device import pick_device

    return torch.cuda.device_count() if pick_device(train.device).type == "cuda" else 1


def meet(train: Any) -> None:
    """In a worker: join the process group, and stop if the process that started it ends.

    Raises:
        InputError: this machine has fewer CUDA devices than processes, or lacks the named device.
    """
    import torch

    from gpt.model.device import pick_device
    from gpt.model.parallel import World, join

    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    device = pick_device(train.device).type
    if device == "cuda" and torch.cuda.device_count() < local_size:
        raise InputError(
            f"train.devices: {local_size} processes but {torch.cuda.device_count()} CUDA devices "
            "here; use at most that many, or 'auto'"
        )
    place = None
    if folder := os.environ.get(_MEETING):
        # a new file for every start: a used one still lists the dead workers
        place = (Path(folder) / f"start-{restarts()}").as_uri()
    with _ended_by_sigterm():
        join(World(rank, size, local_rank, local_size), device, place)
    if launcher := os.environ.get(_LAUNCHER):
        threading.Thread(target=_stop_with, args=(int(launcher),), daemon=True).start()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the process: a handler would not run while it waits."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_lost(error: Exception) -> bool:
    """Whether this error means that another worker is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in text.lower() or "NCCL" in text)


def _stop_with(launcher: int) -> None:
    """If the launcher is killed, make this worker save and stop, as on SIGTERM."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def launch(stage: str, root: Path, n: int) -> None:
    """Run a stage in `n` processes on this machine and wait for them.

    Other machines run their own share of the processes.

    Raises:
        RunError: workers died after the last allowed restart. An error of the stage itself has
            been reported by its first worker, also in `.pipeline/exit`.
        KeyboardInterrupt: SIGINT or SIGTERM arrived (its number is in `signal`), and the workers
            have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each has a separate level
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported by us
    with tempfile.TemporaryDirectory(dir=root / ".pipeline", prefix="meeting-") as folder:
        config = LaunchConfig(
            min_nodes=n_machines(),
            max_nodes=n_machines(),
            nproc_per_node=n,
            run_id=stage,
            max_restarts=RESTARTS,
            shutdown_timeout=_GRACE_SECONDS,
        )
        os.environ[_LAUNCHER] = str(os.getpid())
        if n_machines() == 1:
            config.rdzv_backend = "c10d"
            config.rdzv_endpoint = str(Path(folder) / "agents")
            config.rdzv_configs["store_type"] = "file"
            config.local_addr = "127.0.0.1"
            os.environ[_MEETING] = folder
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", _loopback())
        else:
            config.rdzv_backend = "static"
            config.rdzv_endpoint = _master(stage)
            config.rdzv_configs["rank"] = _number("PET_NODE_RANK", 0)
        try:
            elastic_launch(config, sys.executable)("-m", "pipeline", "stage", stage)
        except SignalException as error:
            stopped = KeyboardInterrupt(f"{stage} was stopped by {error.sigval.name}")
            stopped.signal = int(error.sigval)  # type: ignore[attr-defined]
            raise stopped from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            how = (
                f"was ended by {failure.signal_name()}"
                if failure.exitcode < 0
                else f"ended with exit code {failure.exitcode}"
            )
            raise RunError(
                f"{stage}: process {rank} of {n} {how}, after {RESTARTS} restarts; what it said is "
                "above, and the same command goes on from the last saved state"
            ) from None
        finally:
            for name in (_LAUNCHER, _MEETING):
                os.environ.pop(name, None)


def _loopback() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def _master(stage: str) -> str:
    """The rendezvous address of the machines of a training."""
    address = os.environ.get("PET_MASTER_ADDR")
    if not address:
        raise InputError(
            f"{stage}: PET_NNODES is {n_machines()} but PET_MASTER_ADDR is not set; set it to the "
            "name of the machine whose PET_NODE_RANK is 0"
        )
    return f"{address}:{_number('PET_MASTER_PORT', 29500)}"


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise InputError(f"{variable}: {text!r} is not a whole number; correct or unset it")
    return int(text)
