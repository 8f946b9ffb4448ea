"""Tensors in a TensorFlow checkpoint, read by TensorFlow, which is an optional extra."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from gpt.base.errors import InputError
from gpt.model.stored import Stored

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}


def stored_in_tensorflow(prefix: Path) -> dict[str, Stored]:
    """The variables of a checkpoint, by name; none is read yet.

    Args:
        prefix: what its files' names begin with: `model.ckpt` for `model.ckpt.index` and
            `model.ckpt.data-00000-of-00001`.

    Raises:
        InputError: TensorFlow is not installed, or the checkpoint is damaged or cut short.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it greets everyone otherwise
    try:
        import tensorflow
    except ImportError as error:
        raise InputError(
            f"{prefix}.index: a TensorFlow checkpoint is read by TensorFlow, which is missing "
            f"here ({error}); run: pip install 'gpt-pipeline[tensorflow]'"
        ) from None

    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        shapes = reader.get_variable_to_shape_map()
        kinds = reader.get_variable_to_dtype_map()
    except Exception as error:  # TensorFlow's own errors, and plain ones out of its C++
        raise _damaged(prefix, error) from None

    def read(name: str) -> Tensor:
        try:
            return torch.from_numpy(reader.get_tensor(name))
        except Exception as error:
            raise _damaged(prefix, error, name) from None

    return {
        name: Stored(
            prefix,
            name,
            tuple(shapes[name]),
            _FLOATS.get(kinds[name].name, kinds[name].name),
            functools.partial(read, name),
        )
        for name in sorted(shapes)
    }


def _damaged(prefix: Path, error: Exception, name: str = "") -> InputError:
    first = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    return InputError(
        f"{prefix}: {name}{': ' * bool(name)}damaged or cut short ({first}); fetch or make it again"
    )
