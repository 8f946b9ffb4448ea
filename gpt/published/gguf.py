"""A model as GGUF: one file that llama.cpp and the runtimes built on it read.

The architecture is llama.cpp's `gpt2`, with the keys and the names of tensors that its own
converter gives them. As there, matrices are in the requested type, and small or sensitive tensors
(norms, biases, position embeddings) stay in fp32. A tied head is not written twice: readers use
the token embeddings if there is no `output.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from gpt.base.errors import InputError
from gpt.base.files import whole_file
from gpt.model.model import GPT, LAYER_NORM_EPS
from gpt.tokens.tokenizer import END_OF_TEXT, Tokenizer

GGUFType = Literal["f16", "q8_0"]
"""Of the matrices: half precision, or 8 bits and a scale in half precision for every 32 numbers."""

_KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0}
_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_QUANTIZATION_VERSION = 2
_WRITER = "gpt-pipeline"
_HIGHEST = float(np.finfo(np.float16).max)
# what a type can hold: of q8_0 it is the scale, a 127th of the greatest of its block
_LIMITS = {
    Kind.F32: float(np.finfo(np.float32).max),
    Kind.F16: _HIGHEST,
    Kind.Q8_0: 127 * _HIGHEST,
}


def write_gguf(
    model: GPT, path: Path, *, tokenizer: Tokenizer, type: GGUFType, name: str | None = None
) -> None:
    """Write `model` and its tokenizer as one GGUF file, whole or not at all.

    Memory holds the model and the file's content, which is at most half as large.

    Args:
        model: a language model, in any precision.
        path: the file to write; one that is there is replaced, whatever it is.
        tokenizer: the model's own.
        type: of the matrices; one whose rows are no multiple of 32 is `f16` in a `q8_0` file.
        name: what the file says it holds; by default its own name.

    Raises:
        InputError: the tokenizer's vocabulary is not the model's, or a weight is not finite or
            beyond what the type can hold.
    """
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{path}: the model has {model.config.vocab_size} tokens, its tokenizer "
            f"{tokenizer.vocab_size}; use the tokenizer that the model was trained with"
        )
    with whole_file(path) as partial:
        writer = gguf.GGUFWriter(partial, "gpt2")
        try:
            _describe(writer, model, type, name or path.stem)
            _add_tokenizer(writer, tokenizer)
            for each, tensor in _tensors(model):
                kind = _kind(each, tensor, type)
                writer.add_tensor(each, _packed(path, each, tensor, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def is_ours(path: Path) -> bool:
    """Whether a file is one that `write_gguf` wrote."""
    try:
        field = gguf.GGUFReader(path).fields[gguf.Keys.General.QUANTIZED_BY]
        return bool(field.contents() == _WRITER)
    except Exception:  # whatever it is, it says that the file is none
        return False


@torch.no_grad()
def read_back(path: Path, model: GPT) -> None:
    """Put the weights of a file that `write_gguf` wrote in the place of the model's own.

    They are what a runtime computes with: rounded to the file's types, here widened again.

    Args:
        path: the file.
        model: the one that it was written from, or another of the same architecture.

    Raises:
        InputError: the file holds other tensors than the model.
    """
    wanted = dict(_tensors(model))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != wanted.keys():
        raise InputError(
            f"{path}: {min(found.keys() ^ wanted.keys())} is in the file or the model alone; "
            "they do not belong together"
        )
    for name, target in wanted.items():
        values = gguf.dequantize(found[name].data, found[name].tensor_type)
        if values.shape != tuple(target.shape):
            raise InputError(
                f"{path}: {name} has the shape {values.shape}, the model's {tuple(target.shape)}; "
                "they do not belong together"
            )
        target.copy_(torch.from_numpy(values.copy()))


def _describe(writer: gguf.GGUFWriter, model: GPT, type: GGUFType, name: str) -> None:
    config = model.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantized_by(_WRITER)
    writer.add_file_type(_FILE_TYPES[type])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    types = [gguf.TokenType.NORMAL] * tokenizer.vocab_size
    types[tokenizer.eot] = gguf.TokenType.CONTROL
    # There must be merges, of which plain bytes have none: this one can never be made.
    merges = tokenizer.merges or [(END_OF_TEXT, END_OF_TEXT)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # how text is cut into words before merging
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)  # no text was trained on with one before it


def _tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, (out, in) as GGUF has them too, by GGUF's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for name, tensor in model.state_dict().items():
        prefix = "" if name.startswith("lm_head") else "transformer."
        theirs = names.get_name(prefix + name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None
        yield theirs, tensor
    if not model.config.qkv_bias:  # the format has no place without one: zeros change nothing
        for layer in range(model.config.n_layer):
            yield f"blk.{layer}.attn_qkv.bias", torch.zeros(3 * model.config.n_embd)


def _kind(name: str, tensor: Tensor, type: GGUFType) -> Kind:
    if tensor.dim() == 1 or name.startswith("position_embd"):
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[_KINDS[type]]
    return _KINDS[type] if tensor.shape[-1] % block == 0 else Kind.F16


def _packed(path: Path, name: str, tensor: Tensor, kind: Kind) -> np.ndarray:
    wide = tensor.detach().float().cpu()
    highest = wide.abs().max().item()
    if not highest <= _LIMITS[kind]:  # so is NaN
        raise InputError(
            f"{path}: {name} holds {highest:g}, which {kind.name.lower()} cannot; "
            "the model is damaged, or needs the range of a model directory's float32"
        )
    return gguf.quantize(wide.numpy(), kind)  # type: ignore[no-any-return]
