"""Tensors in files that `torch.save` wrote: `.bin`, `.pt`, `.pth`.

Such a file is a pickle with the tensors' bytes behind it. PyTorch's weights-only reader takes it
apart, which knows tensors and containers and calls nothing that the file names.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gpt.base.errors import InputError
from gpt.model.stored import FLOATS, Stored

_ZIP = b"PK\x03\x04"
_LENGTHS_AT = 26
"""In the header before each record: of its name and of what else stands there, 2 bytes each."""
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
    tensors = _state_dict(path, _load(path, path, mapped=True))
    _check_records(path, tensors)
    take = _Mapped(path).take
    return {
        name: _stored(path, name, tensor, functools.partial(take, name), lent=True)
        for name, tensor in tensors.items()
    }


def table_in_torch(path: Path, name: str) -> Mapping[Any, Any] | None:
    """A table that a training script put beside the weights in a zip file; None if it did not.

    Raises:
        InputError: the file is damaged, or holds anything but tensors and containers.
    """
    if not zipfile.is_zipfile(path):
        return None
    value = _load(path, path, mapped=True)
    table = value.get(name) if isinstance(value, Mapping) else None
    return table if isinstance(table, Mapping) else None


def _check_records(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor whose record in the zip file is shorter than it is.

    PyTorch does not while the file is mapped: it reads on, into the next record.
    """
    records = _records(path)
    starts = {  # in memory; an empty tensor has none
        tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()
    }
    starts.pop(0, None)
    short = "its records are not where its tensors are"
    for first in records if starts else ():
        # where the file's own beginning is in memory, if the first tensor is in this record
        base = min(starts) - first
        if base % mmap.PAGESIZE or any(start - base not in records for start in starts):
            continue
        missing = [
            name
            for start, name in starts.items()
            if records[start - base] < tensors[name].untyped_storage().nbytes()
        ]
        if not missing:
            return
        short = f"the bytes of {missing[0]} are not all there"
    if starts:
        raise InputError(f"{path}: damaged or cut short ({short}); fetch or make it again")


def _records(path: Path) -> dict[int, int]:
    """The places of a zip file's records and their sizes, of those that are as they are."""
    records = {}
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                file.seek(info.header_offset + _LENGTHS_AT)
                names, extra = struct.unpack("<HH", file.read(4))
                if info.compress_type == zipfile.ZIP_STORED:
                    start = info.header_offset + _LENGTHS_AT + 4 + names + extra
                    records[start] = info.file_size
    except (zipfile.BadZipFile, struct.error, OSError) as error:
        raise InputError(
            f"{path}: damaged or cut short ({error}); fetch or make it again"
        ) from None
    return records


def _stored_in_old_form(path: Path) -> dict[str, Stored]:
    """As before 1.6, the storages one behind the other: found by a reader that steps over them."""
    with path.open("rb") as file:
        steps = _Steps(file)
        try:
            tensors = _state_dict(path, _load(path, steps))
        except InputError:
            if not steps.missing:
                raise
            raise InputError(
                f"{path}: damaged or cut short ({steps.missing} bytes are missing at the end); "
                "fetch or make it again"
            ) from None
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
        # copied, though it is nobody else's memory: what is then let go is the system's again
        stored[name] = _stored(path, name, tensor, read, lent=True)
    return stored


class _Steps:
    """A file for `torch.load` that leaves large storages as they are, and notes where they begin.

    Memory that was asked for and never written to takes no place.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.places: dict[int, int] = {}
        """Where in the file the storage at an address begins."""
        self.missing = 0
        """How many bytes more the file would need to hold the last storage that was asked for."""
        self.read, self.readline = file.read, file.readline
        self.seek, self.tell = file.seek, file.tell
        self._file = file
        self._bytes = os.fstat(file.fileno()).st_size

    def readinto(self, buffer: memoryview) -> int:
        """Fill a small buffer; step over what a large one would hold."""
        n, here = len(buffer), self._file.tell()
        self.missing = max(0, here + n - self._bytes)
        if n < _SMALL_BYTES or self.missing:
            return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]
        self.places[ctypes.addressof(ctypes.c_char.from_buffer(buffer))] = here
        self._file.seek(here + n)
        return n


def _read_strided(path: Path, place: int, n_bytes: int, like: Tensor) -> Tensor:
    """The storage at `place`, seen as `like`, which has no bytes, sees it."""
    # not from the heap, which may keep for long what is let go
    storage = torch.frombuffer(mmap.mmap(-1, n_bytes), dtype=torch.uint8)
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
            self._tensors = _state_dict(self._path, _load(self._path, self._path, mapped=True))
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


def _load(path: Path, source: Any, *, mapped: bool = False) -> Any:
    try:
        return torch.load(source, map_location="cpu", mmap=mapped, weights_only=True)
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
