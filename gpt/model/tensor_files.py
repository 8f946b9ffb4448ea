"""Tensors in files, and safetensors files read and written, one tensor at a time.

The layout of safetensors: eight bytes with the length of the header, the header as JSON, padded
with spaces to a multiple of eight bytes, and the bytes of the tensors, little-endian and without
gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt.base.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that weights may have."""
_NAMES = dict(zip(FLOATS, ("F64", "F32", "BF16", "F16"), strict=True))  # the widest first
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_WRITTEN_BYTES = 1 << 20  # at a time


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file: what it is, and how to read it.

    Attributes:
        path: the file.
        name: what the file calls it.
        shape: as in the file.
        dtype: PyTorch's, if it is a floating-point type that weights may have; otherwise the
            file's name of the type.
        read: reads it.
        lent: whether `read` returns memory of the file, which must be copied and released.
        turned: whether it is a matrix that is stored input-major, as by GPT-2's `Conv1D`.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]
    lent: bool = False
    turned: bool = False

    def expect(self, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that does not fit a weight of `shape`, (out, in) if it is a matrix.

        Raises:
            InputError: the shape differs, or the numbers are not floating-point.
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

    The library needs all tensors contiguous and on the CPU at once, which for transposed matrices
    is a second copy of the model. Here rows are copied as they are written.

    Args:
        path: the file, which is not complete before this returns.
        tensors: floating-point ones by name, on any device; views of any kind.
        metadata: texts for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(tensors.items(), key=lambda each: (FLOATS.index(each[1].dtype), each[0]))
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            whole = tensor.detach().reshape(tensor.shape or (1,))
            rows = 1 + _WRITTEN_BYTES // max(1, whole[:1].nbytes)
            for part in torch.split(whole, rows) if whole.numel() else ():
                file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)


def tensors_in_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file, by name; none is read yet.

    Raises:
        InputError: the file is damaged or cut short.
    """

    def read(name: str) -> Tensor:
        # Opened for each tensor: pages of a mapped file count as memory until it is closed.
        with _opened(path) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    tensors = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            entry = file.get_slice(name)
            shape, kind = tuple(entry.get_shape()), entry.get_dtype()
            tensors[name] = FileTensor(
                path, name, shape, _DTYPES.get(kind, kind), functools.partial(read, name), lent=True
            )
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
