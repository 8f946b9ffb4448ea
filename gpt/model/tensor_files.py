"""Tensors that lie in a file, and safetensors files: read, and written, one tensor at a time.

The layout, as its authors describe it: eight bytes that say how long the header is, the header as
JSON, filled up with spaces to a multiple of eight bytes, and the tensors' own bytes one behind the
other, little-endian and without gaps.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt.base.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that weights may have, the widest first: so they lie in a safetensors file."""
_NAMES = dict(zip(FLOATS, ("F64", "F32", "BF16", "F16"), strict=True))
_FLOATS = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNED_BYTES = 8
_AT_ONCE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file: what it is, and how to read it.

    Attributes:
        path: the file.
        name: what the file calls it.
        shape: as in the file.
        dtype: PyTorch's where it is one of floating point that weights come in, else the file's
            own word.
        read: reads it.
        lent: what `read` returns is the file's own memory, to be copied and let go.
        turned: a matrix that is input-major, as GPT-2's `Conv1D` keeps it.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]
    lent: bool = False
    turned: bool = False

    def expect(self, shape: tuple[int, ...]) -> None:
        """Refuse what does not fit into a weight of `shape`, (out, in) where it is a matrix.

        Raises:
            InputError: the shape is another, or the numbers are not floating-point ones.
        """
        expected = shape[::-1] if self.turned else shape
        if self.shape != expected:
            raise InputError(
                f"{self.path}: {self.name} has the shape {self.shape}, the configuration asks for "
                f"{expected}; the weights and their configuration do not belong together"
            )
        if self.dtype not in FLOATS:
            raise InputError(
                f"{self.path}: {self.name} holds {self.dtype}, not floating-point weights; "
                "get the unquantized file"
            )


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


def tensors_in_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file, by name; none is read yet.

    Raises:
        InputError: the file is damaged or cut short.
    """

    def read(name: str) -> Tensor:
        # Opened for each tensor: what was touched of a mapped file counts as memory until then.
        with _opened(path) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    tensors = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            entry = file.get_slice(name)
            shape, kind = tuple(entry.get_shape()), entry.get_dtype()
            reads = functools.partial(read, name)
            tensors[name] = FileTensor(path, name, shape, _FLOATS.get(kind, kind), reads, lent=True)
    return tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: damaged or cut short ({error}); fetch or make it again"
        ) from error
