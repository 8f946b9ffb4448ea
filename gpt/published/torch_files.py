"""Tensors in files that `torch.save` wrote: `.bin`, `.pt`, `.pth`.

Such a file is a pickle with the tensors' bytes behind it. PyTorch's weights-only reader takes it
apart, which knows tensors and containers and calls nothing that the file names.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.base.errors import InputError, in_one_line, shortened
from gpt.model.tensor_files import FLOATS, FileTensor

# where training scripts put the weights, the optimizer's state beside them
_NESTED = ("model_state_dict", "state_dict", "model")
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")


def tensors_in_torch(path: Path) -> tuple[dict[str, FileTensor], Mapping[Any, Any]]:
    """The tensors of a state dict in a file, by name, and the table that it lies in.

    They are read at once, and each is let go when it has become a weight.

    Raises:
        InputError: the file is damaged or cut short, or holds anything but tensors.
    """
    table = _load(path)
    tensors: dict[str, FileTensor] = {}
    storages: set[int] = set()
    for name, tensor in _state_dict(path, table).items():
        kind = tensor.dtype if tensor.dtype in FLOATS else str(tensor.dtype).removeprefix("torch.")
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in storages or storage.nbytes() > tensor.nbytes
        storages.add(storage.data_ptr())
        tensors[name] = FileTensor(path, name, tuple(tensor.shape), kind, tensor.detach, shared)
    return tensors, table


def _state_dict(path: Path, table: Mapping[Any, Any]) -> Mapping[str, Tensor]:
    tensors = next((table[k] for k in _NESTED if isinstance(table.get(k), Mapping)), table)
    for name, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        odd = plain and (tensor.is_quantized or tensor.is_nested or tensor.is_meta)
        if not isinstance(name, str) or not plain or odd:
            raise InputError(
                f"{path}: {str(name)[:100]!r} is no plain tensor ({type(tensor).__name__}); "
                "get a state dict of nothing but weights"
            )
    return tensors  # type: ignore[no-any-return]


def _load(path: Path) -> Mapping[Any, Any]:
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises is anyone's guess
        reason = shortened(in_one_line(error), 200)
        if isinstance(error, pickle.UnpicklingError):
            if forbidden := _FORBIDDEN.search(str(error)):
                raise InputError(
                    f"{path}: asks for {forbidden[1]}; a pickle is never executed, get a file of "
                    "nothing but weights (safetensors)"
                ) from None
            # the rest of PyTorch's message is how to execute it after all
            reason = "no table of tensors"
        raise InputError(
            f"{path}: damaged or cut short ({reason}); fetch or make it again"
        ) from None
    if not isinstance(table, Mapping):
        raise InputError(
            f"{path}: holds a {type(table).__name__}, not a table of tensors; get a state dict"
        )
    return table
