"""Loads published GPT-2 weights in any of these forms:

| files | tensors' names |
| --- | --- |
| `model.safetensors`, or several and `model.safetensors.index.json` | Hugging Face's, the book's |
| `pytorch_model.bin`, or several and `pytorch_model.bin.index.json` | Hugging Face's, the book's |
| one `.safetensors`, `.pth`, `.pt` or `.bin` of any name | Hugging Face's, the book's |
| nanoGPT's `ckpt.pt` | Hugging Face's, matrices output-major |
| `model.ckpt.index` and `.data-…`, with `hparams.json` | OpenAI's (TensorFlow) |

The book is Raschka's "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt.base.errors import InputError
from gpt.base.files import read_json
from gpt.model.config import GPT2_SIZES, GPTConfig
from gpt.model.model import GPT
from gpt.model.tensor_files import FileTensor, tensors_in_safetensors
from gpt.model.weights import (
    account_for_every_name,
    architecture,
    by_plain_name,
    empty_model,
    fill,
    is_conv1d,
    read_config,
    without_a_place,
)
from gpt.published.tensorflow_files import tensors_in_tensorflow
from gpt.published.torch_files import tensors_in_torch


@dataclass(frozen=True, slots=True)
class Published:
    """Weights that were found and checked by name, but not yet read.

    Attributes:
        path: the file, the index of several files, or the folder.
        form: a description of the format for messages.
        config: of the model.
        skipped: tensors that are not needed, by the file's names.
        tensors: the others, by the model's names.
    """

    path: Path
    form: str
    config: GPTConfig
    skipped: tuple[str, ...]
    tensors: dict[str, FileTensor]

    def load(self) -> GPT:
        """Read them, once, into a model on the CPU, in fp32 and in evaluation mode.

        Tensors are read one at a time, so memory stays near the model's own size, or the file's if
        `torch.save` wrote it.

        Raises:
            InputError: as `fill`.
        """
        model = empty_model(self.path, self.config, None, len(self.tensors))
        assert isinstance(model, GPT)
        fill(model, self.tensors)
        return model.eval()


def open_published(folder: Path) -> Published:
    """Find the weights in a folder and account for every tensor in them.

    Args:
        folder: holds files in one of this module's forms, and `config.json` beside Hugging
            Face's. Beside the book's, it is needed only for sizes that were not published.

    Raises:
        InputError: no weights, or several; a file is missing or damaged; a tensor is missing or
            unknown, or the configuration is of another architecture. The message names it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that holds published weights")
    found = _find(folder)
    if found.path.name.endswith(".ckpt.index"):
        return _openai(folder, found)
    if any(name.startswith(("tok_emb.", "trf_blocks.")) for name in found.tensors):
        return _book(folder, found)
    if isinstance(args := found.beside.get("model_args"), Mapping):
        return _nanogpt(found, args)
    return _hugging_face(folder, found)


# --- files ----------------------------------------------------------------------------------------

_Reader = Callable[[Path], tuple[dict[str, FileTensor], Mapping[Any, Any]]]
_READERS: dict[str, _Reader] = {
    ".safetensors": lambda path: (tensors_in_safetensors(path), {}),
    ".bin": tensors_in_torch,
    ".pth": tensors_in_torch,
    ".pt": tensors_in_torch,
    ".index": lambda path: (tensors_in_tensorflow(path.with_suffix("")), {}),
}


@dataclass(frozen=True, slots=True)
class _WeightFiles:
    """The tensors of a folder's weights by the files' names, and the data stored beside them."""

    path: Path
    form: str
    tensors: dict[str, FileTensor]
    beside: Mapping[Any, Any]


def _find(folder: Path) -> _WeightFiles:
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return _WeightFiles(whole, name, *_READERS[whole.suffix](whole))
        if index.is_file():
            return _sharded(index, _READERS[whole.suffix])
    found = [*folder.glob("*.ckpt.index"), *folder.iterdir()]
    found = sorted({path for path in found if path.suffix in _READERS})
    if not found:
        raise InputError(
            f"{folder}: holds no weights; put model.safetensors, pytorch_model.bin, the book's "
            ".pth or OpenAI's model.ckpt.* there"
        )
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds {found[0].name} and {found[1].name}; keep one of them, or add the "
            "index that is published with files that belong together"
        )
    (path,) = found
    return _WeightFiles(path, path.name.removesuffix(".index"), *_READERS[path.suffix](path))


def _sharded(index: Path, reader: _Reader) -> _WeightFiles:
    """The tensors of several files, located by the index."""
    place = _read_json(index).get("weight_map")
    if not isinstance(place, dict) or not all(isinstance(file, str) for file in place.values()):
        raise InputError(f"{index}: has no weight_map of tensors and files; fetch it again")
    files = sorted(set(place.values()))
    tensors: dict[str, FileTensor] = {}
    for file in files:
        path = index.parent / file
        if path.name != file or "\\" in file:
            raise InputError(f"{index}: {file!r} is not the name of a file beside it")
        if not path.is_file():
            raise InputError(f"{path}: no such file, but {index.name} names it; fetch it, too")
        held, _ = reader(path)
        account_for_every_name(path, held, [name for name in place if place[name] == file], ())
        tensors |= held
    return _WeightFiles(index, f"{index.name} and {len(files)} files", tensors, {})


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(
        path,
        missing="no such file; get the one that is published beside the weights",
        remedy="fetch or make it again",
    )


# --- names ----------------------------------------------------------------------------------------


def _publish(
    found: _WeightFiles,
    owner: str,
    config: GPTConfig,
    skipped: Iterable[str],
    names: Callable[[str], tuple[str, ...]],
    *,
    input_major: bool = False,
) -> Published:
    """Map the tensors from `owner`'s names to the model's; refuses missing and unknown ones.

    `names` gives the owner's names for one of the model's tensors: one, or several to be joined.
    """
    wanted = {name: names(name) for name in _shapes(found, config)}
    tensors = found.tensors
    account_for_every_name(
        found.path, tensors, [each for parts in wanted.values() for each in parts], skipped
    )
    parts_of = {name: [tensors[each] for each in parts] for name, parts in wanted.items()}
    return Published(
        found.path,
        f"{found.form}, {owner}'s names",
        config,
        tuple(sorted(tensors[name].name for name in skipped)),
        {
            name: replace(_joined(parts, config.n_embd), turned=input_major and is_conv1d(name))
            for name, parts in parts_of.items()
        },
    )


def _shapes(found: _WeightFiles, config: GPTConfig) -> dict[str, tuple[int, ...]]:
    empty = empty_model(found.path, config, None, len(found.tensors))
    return {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}


def _joined(parts: list[FileTensor], width: int) -> FileTensor:
    """Query, key and value, (C, C) or (C,) each, concatenated; a single part is unchanged."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts:
        part.expect((width,) * (2 if part.name.endswith(".weight") else 1))
    shape = (len(parts) * width, *first.shape[1:])
    return replace(
        first, shape=shape, read=lambda: torch.cat([part.read() for part in parts]), lent=False
    )


def _hugging_face(folder: Path, found: _WeightFiles) -> Published:
    _read_json(folder / "config.json")  # for its own message if it is missing
    config, _ = read_config(folder)
    return _plain(found, "Hugging Face", config, input_major=True)


def _plain(
    found: _WeightFiles, owner: str, config: GPTConfig, *, input_major: bool = False
) -> Published:
    """Weights under the model's own names, with or without a prefix."""
    tensors = by_plain_name(found.path, found.tensors)
    if "score.weight" in tensors:
        raise InputError(f"{found.path}: holds a classifier; a language model is needed")
    head, wte = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if config.tie_weights and head and wte and not _equal(head, wte):
        raise InputError(
            f"{head.path}: {head.name} is no copy of {wte.name}, but config.json ties them; "
            "the weights and their configuration do not belong together"
        )
    skipped = without_a_place(config, tensors)
    found = replace(found, tensors=tensors)
    return _publish(found, owner, config, skipped, lambda name: (name,), input_major=input_major)


_NANOGPT_ARGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def _nanogpt(found: _WeightFiles, args: Mapping[Any, Any]) -> Published:
    """nanoGPT's weights: matrices as in `nn.Linear`, possibly without any biases."""
    config = architecture(found.path, args, _NANOGPT_ARGS)
    tensors = dict(found.tensors)
    if args.get("bias") is False:
        for name, shape in _shapes(found, config).items():
            if name.endswith(".bias"):
                zeros = functools.partial(torch.zeros, shape)
                tensors[name] = FileTensor(found.path, name, shape, torch.float32, zeros)
    return _plain(replace(found, tensors=tensors), "nanoGPT", config)


_BOOK = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
_BOOK_BLOCK = {
    "ln_1.weight": "norm1.scale",
    "ln_1.bias": "norm1.shift",
    "attn.c_attn.weight": "att.W_{}.weight",
    "attn.c_attn.bias": "att.W_{}.bias",
    "attn.c_proj.weight": "att.out_proj.weight",
    "attn.c_proj.bias": "att.out_proj.bias",
    "ln_2.weight": "norm2.scale",
    "ln_2.bias": "norm2.shift",
    "mlp.c_fc.weight": "ff.layers.0.weight",
    "mlp.c_fc.bias": "ff.layers.0.bias",
    "mlp.c_proj.weight": "ff.layers.2.weight",
    "mlp.c_proj.bias": "ff.layers.2.bias",
}
_BOOK_MASK = re.compile(r"trf_blocks\.\d+\.att\.mask")
_BOOK_LAYER = re.compile(r"trf_blocks\.(\d{1,4})\.")


def _book_names(name: str) -> tuple[str, ...]:
    if name in _BOOK:
        return (_BOOK[name],)
    _, layer, rest = name.split(".", 2)
    theirs = f"trf_blocks.{layer}.{_BOOK_BLOCK[rest]}"
    # concatenated in c_attn
    return tuple(dict.fromkeys(theirs.format(part) for part in ("query", "key", "value")))


def _book(folder: Path, found: _WeightFiles) -> Published:
    config = _book_config(folder, found)
    skipped = {name for name in found.tensors if _BOOK_MASK.fullmatch(name)}
    if config.tie_weights:
        skipped |= found.tensors.keys() & {"out_head.weight"}  # a copy of tok_emb.weight
    return _publish(found, "the book", config, skipped, _book_names)


def _book_config(folder: Path, found: _WeightFiles) -> GPTConfig:
    """The architecture, from the tensors' shapes; these do not show the number of heads."""
    tensors = found.tensors
    account_for_every_name(found.path, tensors, ("tok_emb.weight", "pos_emb.weight"), tensors)
    tokens, positions = tensors["tok_emb.weight"], tensors["pos_emb.weight"]
    head = tensors.get("out_head.weight")
    own = {
        "qkv_bias": any(re.search(r"\.att\.W_\w+\.bias$", name) for name in tensors),
        "tie_weights": head is None or _equal(head, tokens),
    }
    if (folder / "config.json").is_file():
        return replace(read_config(folder)[0], **own)
    for each in (tokens, positions):
        if len(each.shape) != 2 or 0 in each.shape:
            raise InputError(f"{each.path}: {each.name} has the shape {each.shape}, is no table")
    layers = [int(layer[1]) for name in tensors if (layer := _BOOK_LAYER.match(name))]
    n_layer, width = 1 + max(layers, default=-1), tokens.shape[1]
    for size in GPT2_SIZES.values():
        if (size.n_layer, size.n_embd) == (n_layer, width):
            return replace(
                size, vocab_size=tokens.shape[0], context_length=positions.shape[0], **own
            )
    raise InputError(
        f"{found.path}: {n_layer} layers of width {width} are no published size, and these "
        "files do not say how many heads they have; put a config.json beside them"
    )


_OPENAI_HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
_OPENAI_NAMES = (
    (r"^(wte|wpe)\.weight$", r"\1"),
    (r"^h\.(\d+)", r"h\1"),
    (r"(ln_\w)\.weight$", r"\1.g"),
    (r"\.weight$", ".w"),
    (r"\.bias$", ".b"),
    (r"\.", "/"),
)


def _openai_names(name: str) -> tuple[str, ...]:
    """`h.0.attn.c_attn.weight` is `model/h0/attn/c_attn/w` there."""
    for pattern, theirs in _OPENAI_NAMES:
        name = re.sub(pattern, theirs, name)
    return (f"model/{name}",)


def _openai(folder: Path, found: _WeightFiles) -> Published:
    hparams = folder / "hparams.json"
    config = architecture(hparams, _read_json(hparams), _OPENAI_HPARAMS)
    return _publish(found, "OpenAI", config, (), _openai_names, input_major=True)


def _equal(one: FileTensor, other: FileTensor) -> bool:
    same = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same and torch.equal(one.read(), other.read())
