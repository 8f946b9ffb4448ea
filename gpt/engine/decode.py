"""The compiled decoding step: loads or compiles `decode.cpp` and runs it on a model's own weights.

It is an engine (`gpt.generation.Engine`). For a few rows on a CPU, one token at a time, it is
several times as fast as the model itself. Results are equal up to rounding: both sum in fp32, but
in a different order. With bf16 weights its activations stay in fp32, while PyTorch rounds each to
bf16. Weights of 8 bits (`gpt.engine.int8`) are read without conversion.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gpt.base.errors import RunError
from gpt.engine import compiling
from gpt.engine.int8 import Int8Embedding, Int8GPT, Int8Linear
from gpt.generation import Engine, NewStep
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, LAYER_NORM_EPS, KVCache, QueryKeyValue
from gpt.model.weights import empty_model

SOURCE = Path(__file__).with_name("decode.cpp")

MOST_ROWS = 32
"""Up to this many, the compiled step was measured to be faster; the step itself accepts more."""

_KNOWN = (nn.Linear, QueryKeyValue, nn.LayerNorm, nn.Embedding, Int8Linear, Int8Embedding)
_FUNCTIONS = {
    torch.float32: "decode_float",
    torch.bfloat16: "decode_bfloat16",
    torch.int8: "decode_int8",
}


# The structs of decode.cpp, with the same field names.
_LAYER_WEIGHTS = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)
_LAYER_SCALES = ("attn.c_attn.scale", "attn.c_proj.scale", "mlp.c_fc.scale", "mlp.c_proj.scale")
_LAYER = (*_LAYER_WEIGHTS, *_LAYER_SCALES)
_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = [(name.replace(".", "_"), _pointer) for name in _LAYER]


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, _int) for name in ("n_layer", "n_head", "n_embd", "vocab_size")],
        ("epsilon", ctypes.c_double),
        *[(name, _pointer) for name in ("wte", "wpe", "ln_f_weight", "ln_f_bias", "head")],
        *[(name, _pointer) for name in ("wte_scale", "head_scale")],
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _int) for name in ("n_rows", "used", "cache_rows", "cache_length", "n_threads")],
        *[(name, _pointer) for name in ("rows", "tokens", "padding")],
        *[(name, _pointer) for name in ("keys", "values", "logits", "scratch")],
    ]


_started = False  # a background compilation, by this process


def why_not(model: GPT) -> str | None:
    """Why the compiled step cannot be used with this model now; None if it can."""
    if (reason := _unsupported(model)) is not None:
        return reason
    try:
        _library()
    except compiling.UnavailableError as error:
        return str(error)
    return None


def ready(model: GPT) -> bool:
    """Whether the compiled step can be used with this model now. If only the library is missing, a
    background process is started that compiles it for a later call.
    """
    global _started
    if (reason := why_not(model)) is not None and not _started and _unsupported(model) is None:
        _started = True
        with contextlib.suppress(compiling.UnavailableError):
            compiling.compile_in_background(SOURCE)
    return reason is None


def require(model: GPT) -> None:
    """Make sure that the compiled step can be used with this model; waits for the compiler.

    Raises:
        RunError: it cannot be used.
    """
    if (reason := _unsupported(model)) is not None:
        raise RunError(f"the compiled engine cannot serve this model: {reason}; use another engine")
    compiling.compile_and_wait(SOURCE)


@functools.cache
def _library() -> ctypes.CDLL:
    return compiling.find(SOURCE)


def _unsupported(model: GPT) -> str | None:
    """What the compiled step does not support about the model; None if it supports all."""
    if type(model) not in (GPT, Int8GPT):
        return f"a {type(model).__name__} may compute something else than a GPT"
    if model.training and model.config.dropout:
        return "dropout, in training mode"
    dtype = model.wte.weight.dtype
    if dtype not in _FUNCTIONS:
        return f"weights in {str(dtype).removeprefix('torch.')}, not float32, bfloat16 or int8"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "a module with hooks"
        own = next(module.parameters(recurse=False), next(module.buffers(recurse=False), None))
        if own is not None and type(module) not in _KNOWN:
            return f"a {type(module).__name__} with weights of its own"
    found = _weights(model)
    wanted = _shapes(model.config, dtype == torch.int8)
    if found.keys() != wanted.keys():
        return f"other weights than GPT-2's: {min(found.keys() ^ wanted.keys())}"
    for name, weight in found.items():
        if type(weight) not in (nn.Parameter, Tensor) or tuple(weight.shape) != wanted[name]:
            return f"{name} is no plain tensor of the shape {wanted[name]}"
        if weight.device.type != "cpu":
            return f"weights on {weight.device.type}, not in the CPU's memory"
        if weight.dtype != _dtype(name, dtype) or not weight.is_contiguous():
            return f"{name} is laid out in another way than the others"
    return None


def _weights(model: GPT) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one weight in a model whose matrices are in `dtype`."""
    if dtype != torch.int8:
        return dtype
    matrix = name.endswith(".weight") and "ln_" not in name and name != "wpe.weight"
    return torch.int8 if matrix else torch.float32


@functools.lru_cache(maxsize=8)
def _shapes(config: GPTConfig, eight_bits: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that the compiled step reads."""
    empty = empty_model(SOURCE, config, None, config.n_layer)
    shapes = {name: tuple(weight.shape) for name, weight in empty.state_dict().items()}
    matrices = {n: s for n, s in shapes.items() if len(s) == 2 and n != "wpe.weight"}
    scales = {n.removesuffix("weight") + "scale": s[:1] for n, s in matrices.items()}
    return shapes | scales if eight_bits else shapes


class CompiledStep:
    """The compiled step on one model's weights and one cache.

    Args:
        model: one that `ready` or `require` accepted. Its weights are read in place, not copied.
        cache: the positions seen before; each call adds one.
        padding: the number of padding positions on the left of each row, (B,).
    """

    def __init__(self, model: GPT, cache: KVCache, padding: Sequence[int]) -> None:
        library = _library()
        config = model.config
        self._cache = cache
        self._run = library[_FUNCTIONS[model.wte.weight.dtype]]
        # held so that the addresses stay valid if the model is moved or freed
        self._weights = {name: weight.detach() for name, weight in _weights(model).items()}
        address = {name: weight.data_ptr() for name, weight in self._weights.items()}
        layers = (_Layer * config.n_layer)()
        for i in range(config.n_layer):
            for name, (field, *_) in zip(_LAYER, _Layer._fields_, strict=True):
                setattr(layers[i], field, address.get(f"h.{i}.{name}"))
        self._model = _Model(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            epsilon=LAYER_NORM_EPS,
            wte=address["wte.weight"],
            wpe=address["wpe.weight"],
            ln_f_weight=address["ln_f.weight"],
            ln_f_bias=address["ln_f.bias"],
            head=address.get("lm_head.weight", address["wte.weight"]),
            wte_scale=address.get("wte.scale"),
            head_scale=address.get("lm_head.scale", address.get("wte.scale")),
            layers=layers,
        )
        B = len(padding)
        self._numbers = torch.zeros(3, B, dtype=torch.int64)  # rows, tokens, padding
        self._padding = torch.tensor(padding)
        self.logits = torch.zeros(B, config.vocab_size)
        self._step = _Step(
            n_rows=B,
            n_threads=torch.get_num_threads(),
            cache_rows=cache.keys.shape[1],
            cache_length=cache.length,
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            logits=self.logits.data_ptr(),
        )
        self._step.rows, self._step.tokens, self._step.padding = (
            row.data_ptr() for row in self._numbers
        )
        library.decode_scratch.restype = ctypes.c_int64
        room = library.decode_scratch(ctypes.byref(self._model), ctypes.byref(self._step))
        self._scratch = torch.empty(room)
        self._step.scratch = self._scratch.data_ptr()

    def __call__(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits (B, V) fp32 after one more token in some rows; those of other rows are unchanged.

        Args:
            rows: which rows, without repetition.
            tokens: the token of each.

        Returns:
            The logits, in the same buffer on every call.
        """
        n = len(rows)
        assert 0 < n == len(tokens)
        assert self._cache.used < self._cache.length
        self._numbers[:, :n] = torch.tensor([rows, tokens, rows])
        self._numbers[2, :n] = self._padding[self._numbers[0, :n]]
        self._step.n_rows = n
        self._step.used = self._cache.used
        self._run(ctypes.byref(self._model), ctypes.byref(self._step))
        self._cache.used += 1
        return self.logits


# --- the engines, by the name that a user gives ---------------------------------------------------


def _auto(model: GPT, n_rows: int) -> NewStep | None:
    fits = n_rows <= MOST_ROWS and ready(model)
    return functools.partial(CompiledStep, model) if fits else None


def _compiled(model: GPT, n_rows: int) -> NewStep:
    require(model)
    return functools.partial(CompiledStep, model)


EngineName = Literal["auto", "plain", "compiled"]
"""`plain` is the model itself. `auto` uses the compiled step if it is available; otherwise it
starts compiling in the background for a later call. `compiled` waits for the compiler, and raises
RunError if the step cannot be used."""

ENGINES: Mapping[EngineName, Engine | None] = {"auto": _auto, "plain": None, "compiled": _compiled}
