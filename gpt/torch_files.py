"""Tensors in files that `torch.save` wrote: `.bin`, `.pt`, `.pth`.

Such a file is a pickle with the tensors' bytes behind it. PyTorch's weights-only reader takes it
apart, which knows tensors and containers and calls nothing that the file names.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

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
_SMALL_BYTES = 1 << 10
"""Of the old form, storages below this are read at once: so is what stands between them."""
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")


def stored_in_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a state dict in a file, by name.

    None of the large ones is read yet, be the file a zip file (PyTorch 1.6 and later) or of the
    older form.

    Raises:
        InputError: the file is damaged or cut short, or holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            mapped = file.read(len(_ZIP)) == _ZIP
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not mapped:
        return _stored_in_old_form(path)
    take = _Mapped(path).take
    return {
        name: _stored(path, name, tensor, functools.partial(take, name), lent=True)
        for name, tensor in _state_dict(path, _load(path, path, mmap=True)).items()
    }


def _stored_in_old_form(path: Path) -> dict[str, Stored]:
    """As before 1.6, the storages one behind the other: found by a reader that steps over them."""
    with path.open("rb") as file:
        steps = _Steps(file)
        tensors = _state_dict(path, _load(path, steps))
    stored = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        place = steps.places.get(storage.data_ptr())
        read = functools.partial(_itself, tensor)  # so small that it was read
        if place is not None:
            whole = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
            like = whole.view(tensor.dtype).as_strided(
                tensor.size(), tensor.stride(), tensor.storage_offset()
            )
            read = functools.partial(_read_strided, path, place, storage.nbytes(), like)
        # copied, though it is nobody else's memory: what is then let go is what the next one takes
        stored[name] = _stored(path, name, tensor, read, lent=True)
    return stored


class _Steps:
    """A file for `torch.load` that leaves large storages as they are, and notes where they begin.

    Memory that was asked for and never written to takes no place.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.places: dict[int, int] = {}
        """Where in the file the storage at an address begins."""
        self.read, self.readline = file.read, file.readline
        self.seek, self.tell = file.seek, file.tell
        self._file = file
        self._bytes = os.fstat(file.fileno()).st_size

    def readinto(self, buffer: memoryview) -> int:
        """Fill a small buffer; step over what a large one would hold."""
        n, here = len(buffer), self._file.tell()
        if n < _SMALL_BYTES:
            return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]
        if here + n > self._bytes:
            raise EOFError(f"{here + n - self._bytes} bytes are missing at the end")
        self.places[ctypes.addressof(ctypes.c_char.from_buffer(buffer))] = here
        self._file.seek(here + n)
        return n


def _read_strided(path: Path, place: int, n_bytes: int, like: Tensor) -> Tensor:
    """The storage at `place`, seen as `like`, which has no bytes, sees it."""
    storage = torch.empty(n_bytes, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(place)
        if file.readinto(storage.numpy().data) != n_bytes:
            raise InputError(f"{path}: changed while it was read; load it again")
    view = storage.view(like.dtype)
    return view.as_strided(like.size(), like.stride(), int(like.storage_offset()))


class _Mapped:
    """A mapped file; what was read of it counts as memory until the mapping is let go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._limit = max(_AT_LEAST_BYTES, int(path.stat().st_size * _AT_ONCE))
        self._tensors: dict[str, Tensor] = {}
        self._taken = 0

    def take(self, name: str) -> Tensor:
        if not self._tensors:
            self._tensors = _state_dict(self._path, _load(self._path, self._path, mmap=True))
            self._taken = 0
        tensor = self._tensors[name]
        self._taken += tensor.nbytes
        if self._taken > self._limit:  # this one alone holds the mapping until it is let go
            self._tensors = {}
        return tensor


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _stored(path: Path, name: str, tensor: Tensor, read: Any, *, lent: bool) -> Stored:
    kind = tensor.dtype if tensor.dtype in FLOATS else str(tensor.dtype).removeprefix("torch.")
    return Stored(path, name, tuple(tensor.shape), kind, read, lent)


def _state_dict(path: Path, value: Any) -> dict[str, Tensor]:
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


def _load(path: Path, source: Any, *, mmap: bool = False) -> Any:
    try:
        return torch.load(source, map_location="cpu", mmap=mmap, weights_only=True)
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
