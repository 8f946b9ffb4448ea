"""A tensor that waits in a file until its turn comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.base.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What weights may come in."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: what it is, and a way to have it when its turn comes.

    Attributes:
        path: the file.
        name: what the file calls it.
        shape: as in the file.
        dtype: PyTorch's where it is one of floating point that weights come in, else the file's
            own word.
        read: gives it.
        lent: what `read` gives is the file's own memory, to be copied and let go.
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
