"""Tensors in a TensorFlow checkpoint, read by TensorFlow, which is an optional extra."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from gpt.base.errors import InputError, in_one_line, shortened
from gpt.model.tensor_files import FileTensor

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}


def tensors_in_tensorflow(prefix: Path) -> dict[str, FileTensor]:
    """The variables of a checkpoint, by name; none is read yet.

    GPT-2's matrices are kernels of convolutions of length 1 there: (1, in, out) is (in, out) here.

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

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        try:
            return torch.from_numpy(reader.get_tensor(name)).reshape(shape)
        except Exception as error:
            raise _damaged(prefix, error, f"{name}: ") from None

    tensors = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
        kind = _FLOATS.get(kinds[name].name, kinds[name].name)
        tensors[name] = FileTensor(prefix, name, shape, kind, functools.partial(read, name, shape))
    return tensors


def _damaged(prefix: Path, error: Exception, where: str = "") -> InputError:
    return InputError(
        f"{prefix}: {where}damaged or cut short ({shortened(in_one_line(error), 200)}); "
        "fetch or make it again"
    )
