"""Published GPT-2 weights, in whatever form they come, to a model.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.base.errors import InputError
from gpt.base.files import read_json
from gpt.model.config import GPT2_SIZES, GPTConfig
from gpt.model.model import GPT
from gpt.model.safetensors_files import stored_in_safetensors
from gpt.model.stored import Stored
from gpt.model.weights import (
    IGNORED,
    account_for_every_name,
    architecture,
    by_plain_name,
    empty_model,
    fill,
    is_conv1d,
    read_config,
)
from gpt.published.tensorflow_files import stored_in_tensorflow
from gpt.published.torch_files import stored_in_torch, table_in_torch


@dataclass(frozen=True, slots=True)
class Published:
    """Weights that were found and checked by name, but not yet read.

    Attributes:
        path: the file, the first one's index, or the folder.
        form: what they are, for a person.
        config: of the model that they make.
        skipped: tensors that are there and not needed, by the file's names.
        tensors: the others, by the model's names.
    """

    path: Path
    form: str
    config: GPTConfig
    skipped: tuple[str, ...]
    tensors: dict[str, Stored]

    def load(self) -> GPT:
        """Read them, once, into a model on the CPU, in fp32 and in evaluation mode.

        Tensor by tensor: memory stays near the model's own size.

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
            unknown, or the configuration is of another architecture; each named.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that holds published weights")
    found = _find(folder)
    if found.tensorflow:
        return _openai(folder, found)
    if any(name.startswith(("tok_emb.", "trf_blocks.")) for name in found.tensors):
        return _book(folder, found)
    if (args := _nanogpt_args(found)) is not None:
        return _nanogpt(found, args)
    return _hugging_face(folder, found)


# --- files ----------------------------------------------------------------------------------------

_Reader = Callable[[Path], dict[str, Stored]]
_READERS: dict[str, _Reader] = {
    ".safetensors": stored_in_safetensors,
    ".bin": stored_in_torch,
    ".pth": stored_in_torch,
    ".pt": stored_in_torch,
}


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    form: str
    tensors: dict[str, Stored]
    tensorflow: bool = False


def _find(folder: Path) -> _Found:
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return _Found(whole, name, _READERS[whole.suffix](whole))
        if index.is_file():
            return _sharded(index, _READERS[whole.suffix])
    checkpoints = sorted(folder.glob("*.ckpt.index"))
    others = sorted(path for path in folder.iterdir() if path.suffix in _READERS)
    found = checkpoints + others
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
    if checkpoints:
        prefix = path.with_suffix("")
        return _Found(path, prefix.name, stored_in_tensorflow(prefix), tensorflow=True)
    return _Found(path, path.name, _READERS[path.suffix](path))


def _sharded(index: Path, reader: _Reader) -> _Found:
    """The tensors of several files, each where the index says that it is."""
    place = _read_json(index).get("weight_map")
    if not isinstance(place, dict) or not all(isinstance(file, str) for file in place.values()):
        raise InputError(f"{index}: has no weight_map of tensors and files; fetch it again")
    files = sorted(set(place.values()))
    tensors: dict[str, Stored] = {}
    for file in files:
        path = index.parent / file
        if path.name != file or "\\" in file:
            raise InputError(f"{index}: {file!r} is not the name of a file beside it")
        if not path.is_file():
            raise InputError(f"{path}: no such file, but {index.name} names it; fetch it, too")
        held = reader(path)
        here = [name for name in place if place[name] == file]
        account_for_every_name(path, held, here, ())
        tensors |= held
    return _Found(index, f"{index.name} and {len(files)} files", tensors)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(
        path,
        missing="no such file; get the one that is published beside the weights",
        remedy="fetch or make it again",
    )


# --- names ----------------------------------------------------------------------------------------


def _hugging_face(folder: Path, found: _Found) -> Published:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder / 'config.json'}: no such file; get the one that is published beside the "
            "weights"
        )
    config, _ = read_config(folder)
    return _by_plain_names(found, config, by_plain_name(found.path, found.tensors))


def _by_plain_names(
    found: _Found, config: GPTConfig, tensors: dict[str, Stored], owner: str = "Hugging Face"
) -> Published:
    if "score.weight" in tensors:
        raise InputError(f"{found.path}: holds a classifier; a language model is needed")
    wanted = _wanted(found, config)
    skipped = {name for name in tensors if IGNORED.fullmatch(name)}
    if config.tie_weights and (head := tensors.get("lm_head.weight")) is not None:
        skipped.add("lm_head.weight")
        if (wte := tensors.get("wte.weight")) is not None and not _equal(head, wte):
            raise InputError(
                f"{head.path}: {head.name} is no copy of {wte.name}, but config.json ties them; "
                "the weights and their configuration do not belong together"
            )
    if not config.qkv_bias:
        skipped |= {name for name in tensors if name.endswith("attn.c_attn.bias")}  # zeros
    account_for_every_name(found.path, tensors, wanted, skipped)
    return Published(
        found.path,
        f"{found.form}, {owner}'s names",
        config,
        tuple(sorted(tensors[name].name for name in skipped)),
        {name: tensors[name] for name in wanted},
    )


_NANOGPT_ARGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def _nanogpt_args(found: _Found) -> Mapping[Any, Any] | None:
    """What nanoGPT's `ckpt.pt` says of the architecture; None for any other file."""
    torch_file = _READERS.get(found.path.suffix) is stored_in_torch
    return table_in_torch(found.path, "model_args") if torch_file else None


def _nanogpt(found: _Found, args: Mapping[Any, Any]) -> Published:
    """nanoGPT's matrices are those of `nn.Linear`, and it may do without all biases."""
    config = architecture(found.path, args, _NANOGPT_ARGS)
    tensors = {
        name: replace(stored, turned=False)
        for name, stored in by_plain_name(found.path, found.tensors).items()
    }
    if args.get("bias") is False:
        for name, shape in _shapes(found, config).items():
            if name.endswith(".bias"):
                zeros = functools.partial(torch.zeros, shape)
                tensors[name] = Stored(found.path, name, shape, torch.float32, zeros)
    return _by_plain_names(found, config, tensors, "nanoGPT")


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
    "attn.c_proj.weight": "att.out_proj.weight",
    "attn.c_proj.bias": "att.out_proj.bias",
    "ln_2.weight": "norm2.scale",
    "ln_2.bias": "norm2.shift",
    "mlp.c_fc.weight": "ff.layers.0.weight",
    "mlp.c_fc.bias": "ff.layers.0.bias",
    "mlp.c_proj.weight": "ff.layers.2.weight",
    "mlp.c_proj.bias": "ff.layers.2.bias",
}
_BOOK_ATTENTION = ("W_query", "W_key", "W_value")  # what c_attn holds one below the other
_BOOK_MASK = re.compile(r"trf_blocks\.\d+\.att\.mask")
_BOOK_QKV_BIAS = re.compile(r"trf_blocks\.\d+\.att\.W_(query|key|value)\.bias")
_BLOCK = re.compile(r"h\.(\d+)\.(.+)")


def _book_names(name: str) -> tuple[str, ...]:
    """What the book calls the model's `name`: one tensor, or the three that it is made of."""
    block = _BLOCK.fullmatch(name)
    if block is None:
        return (_BOOK[name],)
    layer, rest = f"trf_blocks.{block[1]}", block[2]
    if rest.startswith("attn.c_attn."):
        leaf = rest.rpartition(".")[2]
        return tuple(f"{layer}.att.{part}.{leaf}" for part in _BOOK_ATTENTION)
    return (f"{layer}.{_BOOK_BLOCK[rest]}",)


def _book(folder: Path, found: _Found) -> Published:
    config = _book_config(folder, found)
    wanted = {name: _book_names(name) for name in _wanted(found, config)}
    skipped = {name for name in found.tensors if _BOOK_MASK.fullmatch(name)}
    if config.tie_weights:
        skipped |= found.tensors.keys() & {"out_head.weight"}  # a copy of tok_emb.weight
    account_for_every_name(
        found.path, found.tensors, [each for names in wanted.values() for each in names], skipped
    )
    return Published(
        found.path,
        f"{found.form}, the book's names",
        config,
        tuple(sorted(skipped)),
        {
            name: _joined([found.tensors[each] for each in names], config.n_embd)
            for name, names in wanted.items()
        },
    )


def _book_config(folder: Path, found: _Found) -> GPTConfig:
    """The architecture that the tensors have, and from elsewhere the heads, which do not show."""
    tensors = found.tensors
    n_layer = 1 + max(
        (int(name.split(".")[1]) for name in tensors if re.match(r"trf_blocks\.\d{1,4}\.", name)),
        default=0,
    )
    account_for_every_name(found.path, tensors, ("tok_emb.weight", "pos_emb.weight"), tensors)
    tokens, positions = tensors["tok_emb.weight"], tensors["pos_emb.weight"]
    head = tensors.get("out_head.weight")
    own = {
        "qkv_bias": any(_BOOK_QKV_BIAS.fullmatch(name) for name in tensors),
        "tie_weights": head is None or _equal(head, tokens),
    }
    if (folder / "config.json").is_file():
        return replace(read_config(folder)[0], **own)
    for each in (tokens, positions):
        if len(each.shape) != 2 or 0 in each.shape:
            raise InputError(f"{each.path}: {each.name} has the shape {each.shape}, is no table")
    width = tokens.shape[1]
    for size in GPT2_SIZES.values():
        if (size.n_layer, size.n_embd) == (n_layer, width):
            return replace(
                size, vocab_size=tokens.shape[0], context_length=positions.shape[0], **own
            )
    raise InputError(
        f"{found.path}: {n_layer} layers of width {width} are no published size, and these "
        "files do not say how many heads they have; put a config.json beside them"
    )


def _joined(parts: list[Stored], width: int) -> Stored:
    """Query, key and value, (C, C) or (C,) each, one below the other; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts:
        part.expect((width,) * (2 if part.name.endswith(".weight") else 1))

    def read() -> Tensor:
        return torch.cat([part.read() for part in parts])

    shape = (len(parts) * width, *first.shape[1:])
    return replace(first, shape=shape, read=read, lent=False)


def _openai(folder: Path, found: _Found) -> Published:
    config = _openai_config(folder / "hparams.json")
    wanted = {name: _openai_name(name) for name in _wanted(found, config)}
    account_for_every_name(found.path, found.tensors, wanted.values(), ())
    return Published(
        found.path,
        f"{found.form}, OpenAI's names",
        config,
        (),
        {
            name: _without_first(found.tensors[theirs])
            if is_conv1d(name)
            else found.tensors[theirs]
            for name, theirs in wanted.items()
        },
    )


def _openai_name(name: str) -> str:
    """`h.0.attn.c_attn.weight` is `model/h0/attn/c_attn/w` there."""
    *path, leaf = name.split(".")
    if path[0] in ("wte", "wpe"):
        return f"model/{path[0]}"
    if path[0] == "h":
        path[:2] = [f"h{path[1]}"]
    if leaf == "weight":
        leaf = "gain" if path[-1].startswith("ln_") else "weight"
    return "/".join(["model", *path, leaf[0]])


def _without_first(stored: Stored) -> Stored:
    """A matrix that is the kernel of a convolution of length 1: (1, in, out) to (in, out)."""
    if len(stored.shape) != 3 or stored.shape[0] != 1:
        return replace(stored, turned=True)  # its shape is refused when it is compared
    read = functools.partial(_first, stored.read)
    return replace(stored, shape=stored.shape[1:], read=read, turned=True)


def _first(read: Callable[[], Tensor]) -> Tensor:
    return read()[0]


def _openai_config(path: Path) -> GPTConfig:
    return architecture(path, _read_json(path), _OPENAI_HPARAMS)


_OPENAI_HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def _wanted(found: _Found, config: GPTConfig) -> list[str]:
    return list(_shapes(found, config))


def _shapes(found: _Found, config: GPTConfig) -> dict[str, tuple[int, ...]]:
    empty = empty_model(found.path, config, None, len(found.tensors))
    return {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}


def _equal(one: Stored, other: Stored) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(
        one.read(), other.read()
    )
