"""Tensors in safetensors files: read, and written, one at a time.

The layout, as its authors describe it: eight bytes that say how long the header is, the header as
JSON, filled up with spaces to a multiple of eight bytes, and the tensors' own bytes one behind the
other, little-endian and without gaps.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt.base.errors import InputError
from gpt.model.stored import FLOATS, Stored

# the widest first: so they lie in a file, those of a kind by their names
_NAMES = dict(zip(FLOATS, ("F64", "F32", "BF16", "F16"), strict=True))
_FLOATS = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNED_BYTES = 8
_AT_ONCE_BYTES = 1 << 20
_HEADER_BYTES = 100_000_000
"""The library reads no longer one."""


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors to a file, the same bytes as `safetensors.torch.save_file`.

    That one has to have all of them at once, contiguous and on the CPU. Here rows become so when
    their turn comes, so that memory holds a copy of a few of them at most.

    Args:
        path: the file, which is not whole before this returns.
        tensors: of floating point, by name; on any device, and views of any kind.
        metadata: words that the header holds before the tensors.
    """
    order = sorted(tensors, key=lambda name: (FLOATS.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            for rows in _pieces(tensors[name].detach()):
                file.write(rows.cpu().contiguous().view(torch.uint8).numpy().data)


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """Some rows at a time, none of which are so many bytes; what has no rows is one."""
    if tensor.dim() < 2 or not tensor.numel():
        return (tensor.reshape(-1),)
    row_bytes = tensor[0].numel() * tensor.itemsize
    return torch.split(tensor, max(1, _AT_ONCE_BYTES // row_bytes))


def stored_in_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name; none is read yet.

    Raises:
        InputError: the file is damaged or cut short.
    """

    def read(name: str) -> Tensor:
        # Opened for each tensor: what was touched of a mapped file counts as memory until then.
        with _damage_in(path), safe_open(path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    tensors = {}
    with _damage_in(path), safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118
            entry = file.get_slice(name)
            kind = entry.get_dtype()
            tensors[name] = Stored(
                path,
                name,
                tuple(entry.get_shape()),
                _FLOATS.get(kind, kind),
                functools.partial(read, name),
                lent=True,
            )
    return tensors


@contextlib.contextmanager
def _damage_in(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: damaged or cut short ({_missing_in(path) or error}); fetch or make it again"
        ) from error


def _missing_in(path: Path) -> str:
    """What a file lacks at its end, if its header is whole; else nothing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _HEADER_BYTES):
                return ""
            header = json.loads(file.read(length))
        ends = {
            name: int(entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ""
    missing = sorted((end, name) for name, end in ends.items() if 8 + length + end > size)
    more = f" and of {len(missing) - 1} more" if missing[1:] else ""
    return f"the bytes of {missing[0][1]}{more} are not all there" if missing else ""
