"""Several processes that train one model: who takes which rows, and what they tell each other.

Every process goes through the same steps. The rows of a step are cut into passes, which the
processes share; their gradients are summed by PyTorch's DDP (each process holds the model; Li et
al., 2020, "PyTorch Distributed") or FSDP2 (each holds a part; Zhao et al., 2023, "PyTorch FSDP").
Everything here also works in a process that is alone, where it does nothing.
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
"""So long one process waits for another before it gives up."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this process's number; the first, 0, writes artifacts and is heard.
        size: how many there are.
        local_rank: this process's number on its machine: that of its CUDA device.
        local_size: how many share its machine.
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
"""The processes' connections, held beyond `leave`.

If DDP were the last to hold them, they would be closed while it holds Python's lock, and wait for
a thread of gloo's that waits for the lock to let go of the last barrier's tensor.
"""


class Dismissed(BaseException):
    """This process has done its part: the training is over, and the first goes on alone."""


def world() -> World:
    """The processes that train with this one; one alone where `join` was not called."""
    return _world


def join(world: World, device: str, place: str | None = None) -> None:
    """Meet the other processes.

    Args:
        world: as torchrun numbers the processes.
        device: `cuda` where tensors are exchanged between graphics cards, else `cpu`.
        place: the `file://` address of a file that is not there yet, where they find each other;
            None is where torchrun's environment variables say.
    """
    global _world, _group
    # objects and the parts of a checkpoint travel by gloo also where the gradients do not
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, place, timeout=_PATIENCE, rank=world.rank, world_size=world.size
    )
    _group = dist.group.WORLD
    _world = world


def leave() -> None:
    """Part from the others once all have come here.

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


# --- what they tell each other --------------------------------------------------------------------


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
    """This process's share of `items`, and of each whether it counts.

    Every process gets as many, since a pass through a sharded model is one that all take part in:
    where the last round is not full, some get an item that another counts.
    """
    items = iter(items)
    while group := list(itertools.islice(items, _world.size)):
        yield group[min(_world.rank, len(group) - 1)], _world.rank < len(group)


def passes(rows: Sequence[int], batch_size: int) -> list[tuple[int, Sequence[int]]]:
    """This process's passes of a step: the place of the first row of each, and its rows.

    At most `batch_size` rows each, as nearly as many in each as may be, and as many passes in
    every process.

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


# --- a model that they share ----------------------------------------------------------------------


class Whole(nn.Module):
    """A model as the one module that DDP and FSDP2 want, of which every use is a forward pass.

    They act when the module's `forward` begins and ends, but a loss reaches deeper into the model
    than its logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[Any], T]) -> T:
        """What `work` gives of the model."""
        return work(self.model)


class SharedModel:
    """A model in training, by this process alone or together with the others.

    Args:
        model: on its device; where processes hold different weights, the first one's count.
        parallel: how it is shared; without others it makes no difference.

    `module` is what is trained: `model` itself, or with `fsdp` a copy whose parameters are parts
    of tensors (DTensor), while those of `model` hold nothing until `give_back`.
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
        """Add the gradient of `loss` of the model; the processes' are summed up with the `last`.

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

        Sums are made bucket by bucket: without this the first step of a run that goes on would
        add up in another order than the same step of a run that never stopped.
        """
        if _world.size > 1 and not self.sharded:
            self.backward(loss, last=True)
            self.module.zero_grad(set_to_none=True)

    def measure(self, work: Callable[[Any], T]) -> T:
        """`work` of the model, in every process at once: a sharded model is put together for it."""
        return self._trained(work) if self.sharded else work(self.module)  # type: ignore[no-any-return]

    # what of it is kept: whole tensors by name, the same however many processes share the model

    def state(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        """Weights, and the optimizers' memory of each.

        Where nothing is sharded the tensors are the live ones and change with the next step.
        """
        memory = {}
        for name, parameter in self.module.named_parameters():
            for optimizer in optimizers:
                if parameter in optimizer.state:
                    memory[name] = self.whole(optimizer.state[parameter])
        return {"model": self.whole(self.module.state_dict()), "optimizer": memory}

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with their parts put together, on the CPU; every process must ask."""
        if not self.sharded:
            return dict(tensors)
        return {name: put_together(value).cpu() for name, value in tensors.items()}

    @torch.no_grad()
    def restore(
        self, state: Mapping[str, Any] | None, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Take over what `state` gave; it is read in the first process only."""
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
        """Let the caller's model hold the trained weights; every process must come here.

        Where the model was sharded, only the first process's holds them then.
        """
        if not self.sharded:
            return
        whole = self.whole(self.module.state_dict())
        if _world.first:
            for name, parameter in self._model.named_parameters():
                parameter.data = whole[name].to(self.device)


def put_together(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie in parts (DTensor); every process must ask."""
    if _world.size == 1:
        return tensor  # without the second that importing DTensor takes
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, if `like` lies in parts."""
    if _world.size == 1:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
