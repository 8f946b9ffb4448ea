"""Several processes that train one model: how rows are distributed, and their communication.

Every process runs the same steps. The rows of a step are split into passes, which are distributed
over the processes. Gradients are summed by PyTorch's DDP (each process holds the model; Li et
al., 2020, "PyTorch Distributed") or FSDP2 (each holds a part; Zhao et al., 2023, "PyTorch FSDP").
Everything here also works in a single process, where it has no effect.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt.base.errors import InputError

T = TypeVar("T")

_PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for another before it fails."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this process's number; only the first, 0, writes artifacts and logs.
        size: the number of processes.
        local_rank: this process's number on its machine, also that of its CUDA device.
        local_size: the number of processes on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0


_world = World()
_group: dist.ProcessGroup | None = None
"""The processes' connections, kept alive after `leave`.

Otherwise DDP would close them while it holds the GIL, and deadlock: closing waits for a gloo
thread, which waits for the GIL to release the last barrier's tensor.
"""


class Dismissed(BaseException):
    """The training is over and this process must end; only the first process continues."""


def world() -> World:
    """The processes that train together; a single one if `join` was not called."""
    return _world


def join(world: World, device: str, place: str | None = None) -> None:
    """Connect to the other processes.

    Args:
        world: the processes as numbered by torchrun.
        device: `cuda` if tensors are exchanged between graphics cards, otherwise `cpu`.
        place: the `file://` address of a file that does not exist yet, for the rendezvous; None
            uses torchrun's environment variables.
    """
    global _world, _group
    # objects and parts of a checkpoint always use gloo, whatever the gradients use
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, place, timeout=_PATIENCE, rank=world.rank, world_size=world.size
    )
    _group = dist.group.WORLD
    _world = world


def leave() -> None:
    """Disconnect, once all processes have reached this point.

    Raises:
        Dismissed: in every process but the first.
    """
    global _world
    if not dist.is_initialized():
        return
    rank = _world.rank
    dist.barrier()
    dist.destroy_process_group()
    _world = World()
    if rank:
        raise Dismissed


# --- communication --------------------------------------------------------------------------------


def add_up(tensor: Tensor) -> Tensor:
    """Replace `tensor` in every process by the sum over all."""
    if _world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """The `value` of every process, by rank: small objects only."""
    if _world.size == 1:
        return [value]
    values: list[Any] = [None] * _world.size
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The first process's `value` in every process: small objects only."""
    return gather(value)[0]


def share_out(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield this process's share of `items`, each with whether it counts.

    Every process gets the same number, since all must take part in a pass through a sharded model.
    If the last round is not full, some get an item that counts in another process.
    """
    items = iter(items)
    while group := list(itertools.islice(items, _world.size)):
        yield group[min(_world.rank, len(group) - 1)], _world.rank < len(group)


def passes(rows: Sequence[int], batch_size: int) -> list[tuple[int, Sequence[int]]]:
    """This process's passes of a step: the index of the first row of each, and its rows.

    Each has at most `batch_size` rows. The passes are as equal in size as possible, and every
    process has the same number of them.

    Raises:
        InputError: fewer rows than processes.
    """
    size, rank = _world.size, _world.rank
    count = -(-len(rows) // (batch_size * size)) * size
    if len(rows) < count:
        raise InputError(
            f"train.devices: a step of {len(rows)} rows cannot be shared by {size} devices; "
            "raise batch_size or accumulation, or use fewer devices"
        )
    starts = [index * len(rows) // count for index in range(count + 1)]
    mine = range(rank * count // size, (rank + 1) * count // size)
    return [(starts[i], rows[starts[i] : starts[i + 1]]) for i in mine]


# --- a shared model -------------------------------------------------------------------------------


class Whole(nn.Module):
    """Wraps a model for DDP and FSDP2, so that every use of it is a forward pass of this module.

    They hook into the module's `forward`, but our losses also call other methods of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[Any], T]) -> T:
        """The result of `work` on the model."""
        return work(self.model)


class SharedModel:
    """A model in training, by this process alone or together with the others.

    Args:
        model: on its device; if the processes' weights differ, those of the first are used.
        parallel: how it is shared; no effect in a single process.

    `module` is trained: it is `model` itself, or with `fsdp` a copy with sharded parameters
    (DTensor), and `model` has no weights until `give_back`.
    """

    def __init__(self, model: nn.Module, parallel: Literal["ddp", "fsdp"] = "ddp") -> None:
        self.module = self._model = model
        self.device = next(model.parameters()).device
        self.sharded = _world.size > 1 and parallel == "fsdp"
        self._trained: nn.Module = self._shard() if self.sharded else Whole(model)
        if _world.size > 1 and not self.sharded:
            self._trained = nn.parallel.DistributedDataParallel(self._trained)

    def _shard(self) -> Whole:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        self.module = copy.deepcopy(self._model)
        for parameter in self.module.parameters():
            dist.broadcast(parameter.detach(), src=0)
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(0)
        mesh = init_device_mesh(self.device.type, (_world.size,))
        whole = Whole(self.module)
        for block in getattr(self.module, "h", ()):
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "last")
        fully_shard(whole, mesh=mesh)
        return whole

    def backward(self, loss: Callable[[Any], Tensor], last: bool) -> Tensor:
        """Add the gradient of `loss`; gradients are summed over the processes in the `last` pass.

        Returns:
            The loss of this process, detached.
        """
        summed: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self._trained, nn.parallel.DistributedDataParallel):
            summed = summed if last else self._trained.no_sync()
        elif self.sharded:
            self._trained.set_requires_gradient_sync(last)  # type: ignore[operator]
        with summed:
            value: Tensor = self._trained(loss)
            # DDP and FSDP2 take the mean over the processes where the sum is wanted
            with torch.autocast(self.device.type, enabled=False):
                (value * _world.size if _world.size > 1 else value).backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def settle(self, loss: Callable[[Any], Tensor]) -> None:
        """Let DDP order its buckets by when gradients come, which it does after the first pass.

        Sums are computed bucket by bucket: without this, the first step of a resumed run would add
        up in a different order than the same step of an uninterrupted run.
        """
        if _world.size > 1 and not self.sharded:
            self.backward(loss, last=True)
            self.module.zero_grad(set_to_none=True)

    def measure(self, work: Callable[[Any], T]) -> T:
        """The result of `work`, called in every process at once; a sharded model is gathered."""
        return self._trained(work) if self.sharded else work(self.module)  # type: ignore[no-any-return]

    # what of it is kept: whole tensors by name, the same however many processes share the model

    def state(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        """The weights and the optimizers' state.

        Unless the model is sharded, the tensors are not copied and change with the next step.
        """
        memory = {}
        for name, parameter in self.module.named_parameters():
            for optimizer in optimizers:
                if parameter in optimizer.state:
                    memory[name] = self.whole(optimizer.state[parameter])
        return {"model": self.whole(self.module.state_dict()), "optimizer": memory}

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors gathered on the CPU; every process must call this."""
        if not self.sharded:
            return dict(tensors)
        return {name: put_together(value).cpu() for name, value in tensors.items()}

    @torch.no_grad()
    def restore(
        self, state: Mapping[str, Any] | None, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Load what `state` returned; only the first process's argument is used."""
        kept = state["optimizer"] if state else {}
        self.fill(self.module.state_dict(), state["model"] if state else None)
        shapes = from_first({n: {k: t.shape for k, t in each.items()} for n, each in kept.items()})
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for optimizer in optimizers:
            for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                if (name := names[parameter]) in shapes:
                    memory = {
                        key: torch.zeros_like(parameter)
                        if shape == parameter.shape
                        else torch.zeros(shape, device=self.device)
                        for key, shape in shapes[name].items()
                    }
                    self.fill(memory, kept.get(name))
                    optimizer.state[parameter] = memory

    @torch.no_grad()
    def fill(self, targets: Mapping[str, Tensor], values: Mapping[str, Tensor] | None) -> None:
        """Copy whole tensors of the same names into `targets`; read in the first process only."""
        for name, target in targets.items():
            whole = torch.empty(target.shape, dtype=target.dtype, device=self.device)
            if values is not None and _world.first:
                whole.copy_(values[name])
            if _world.size > 1:
                dist.broadcast(whole, src=0)
            target.copy_(part(whole, target))

    @torch.no_grad()
    def give_back(self) -> None:
        """Put the trained weights into the caller's model; every process must call this.

        If the model was sharded, only the first process's model gets them.
        """
        if not self.sharded:
            return
        whole = self.whole(self.module.state_dict())
        if _world.first:
            for name, parameter in self._model.named_parameters():
                parameter.data = whole[name].to(self.device)


def put_together(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (DTensor); every process must call this."""
    if _world.size == 1:
        return tensor  # avoids importing DTensor, which takes a second
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, if `like` is sharded."""
    if _world.size == 1:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
