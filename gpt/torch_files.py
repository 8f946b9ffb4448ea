"""Tensors in files that `torch.save` wrote: `.bin`, `.pt`, `.pth`.

Such a file is a pickle with the tensors' bytes behind it. PyTorch's weights-only reader takes it
apart, which knows tensors and containers and calls nothing that the file names.
"""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.errors import InputError
from gpt.weights import FLOATS, Stored

_ZIP = b"PK\x03\x04"
# where training scripts put the weights, the optimizer's state beside them
_NESTED = ("model_state_dict", "state_dict", "model")
_AT_ONCE = 1 / 25
"""How much of a mapped file may have been read before it is let go and mapped anew."""
_AT_LEAST_BYTES = 8 << 20
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")


def stored_in_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a state dict in a file, by name.

    A zip file (PyTorch 1.6 and later) is mapped, and none of them is read yet; the older form has
    no way but to read it whole, and each tensor is let go once it has been taken.

    Raises:
        InputError: the file is damaged or cut short, or holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            mapped = file.read(len(_ZIP)) == _ZIP
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    tensors = _state_dict(path, mapped)
    if mapped:
        take = _Mapped(path).take
        return {
            name: _stored(path, name, tensor, functools.partial(take, name), lent=True)
            for name, tensor in tensors.items()
        }
    return {
        name: _stored(path, name, tensor, functools.partial(_itself, tensor), lent=False)
        for name, tensor in tensors.items()
    }


class _Mapped:
    """A mapped file; what was read of it counts as memory until the mapping is let go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._limit = max(_AT_LEAST_BYTES, int(path.stat().st_size * _AT_ONCE))
        self._tensors: dict[str, Tensor] = {}
        self._taken = 0

    def take(self, name: str) -> Tensor:
        if not self._tensors or self._taken > self._limit:
            self._tensors.clear()  # before the next mapping is made
            self._tensors, self._taken = _state_dict(self._path, mapped=True), 0
        tensor = self._tensors[name]
        self._taken += tensor.nbytes
        return tensor


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _stored(path: Path, name: str, tensor: Tensor, read: Any, *, lent: bool) -> Stored:
    kind = tensor.dtype if tensor.dtype in FLOATS else str(tensor.dtype).removeprefix("torch.")
    return Stored(path, name, tuple(tensor.shape), kind, read, lent)


def _state_dict(path: Path, mapped: bool) -> dict[str, Tensor]:
    value = _load(path, mapped)
    if isinstance(value, Mapping):
        value = next((value[k] for k in _NESTED if isinstance(value.get(k), Mapping)), value)
    if not isinstance(value, Mapping):
        raise InputError(
            f"{path}: holds a {type(value).__name__}, not a table of tensors; get a state dict"
        )
    for name, tensor in value.items():
        if (
            not isinstance(name, str)
            or not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.is_quantized
        ):
            raise InputError(
                f"{path}: {str(name)[:100]!r} is no plain tensor ({type(tensor).__name__}); "
                "get a state dict of nothing but weights"
            )
    return dict(value)


def _load(path: Path, mapped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # what a damaged pickle raises is anyone's guess
        said = str(error)
        if isinstance(error, pickle.UnpicklingError):
            if forbidden := _FORBIDDEN.search(said):
                raise InputError(
                    f"{path}: asks for {forbidden[1]}; a pickle is never executed, get a file of "
                    "nothing but weights (safetensors)"
                ) from None
            # the rest of what PyTorch says is how to execute it after all
            said = said.partition("WeightsUnpickler error:")[2].strip() or "no table of tensors"
        first = next(iter(said.splitlines()), type(error).__name__)[:200]
        raise InputError(
            f"{path}: damaged or cut short ({first}); fetch or make it again"
        ) from None
