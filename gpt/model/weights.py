"""Reads and writes model directories.

Every model is a directory in Hugging Face's GPT-2 layout: `config.json`, `model.safetensors`,
`vocab.json`, `merges.txt`, `generation_config.json`. So `transformers` and other tools for that
layout load it unchanged. Only this module handles GPT-2's `Conv1D`, which stores its matrices
input-major, and the `transformer.` prefix.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt.base.errors import InputError, shown
from gpt.base.files import read_json, whole_directory, write_json
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, INIT_STD, LAYER_NORM_EPS, GPTClassifier, Pooling
from gpt.model.tensor_files import FileTensor, tensors_in_safetensors, write_safetensors
from gpt.tokens.tokenizer import Tokenizer, load_tokenizer

_PREFIX = "transformer."
# torch.compile and DistributedDataParallel add prefixes of their own before it
_PREFIXES = re.compile(r"(?:_orig_mod\.|module\.)*(?:transformer\.)?")
_CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# causal masks in old files; the architecture implies them
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
# 8 … 1,024: vocabularies are rounded up to a multiple of such a number, for speed
_PADDED_TO = tuple(8 << n for n in range(8))
_HEADS = ("lm_head.weight", "score.weight")
_WRITTEN = {
    *("config.json", "model.safetensors", "generation_config.json", "vocab.json", "merges.txt"),
    *("prompt.json", "tokenizer_config.json", "training.json"),
}
"""Every file name that a model directory of this project may contain."""

# config.json's name -> the only value under which the architecture is the one in gpt.model.model
_FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (LAYER_NORM_EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # a matter of rounding, not of architecture
    "add_cross_attention": (False,),
}


def save_model(
    model: GPT | GPTClassifier,
    directory: Path | str,
    *,
    tokenizer: Tokenizer,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `model` and its tokenizer as a model directory, whole or not at all.

    >>> model, tokenizer = gpt.load_model(directory), gpt.load_tokenizer(directory)
    >>> gpt.save_model(model, "a-copy", tokenizer=tokenizer)
    >>> gpt.load_model("a-copy").n_params == model.n_params
    True

    Args:
        model: weights are written in their own precision.
        directory: replaced as a whole if it is one that this function wrote.
        tokenizer: saved beside the weights.
        extra: further files, name to JSON value: `prompt.json` for an assistant,
            `training.json` for the data that was held out of its training.

    Raises:
        InputError: the tokenizer's vocabulary is not the model's, or `directory` exists and was
            not written by this function.
    """
    directory = Path(directory)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{directory}: the model has {model.config.vocab_size} tokens, its tokenizer "
            f"{tokenizer.vocab_size}; use the tokenizer that the model was trained with"
        )
    if not _is_ours(directory):
        raise InputError(
            f"{directory}: is there and no model directory that was written here, or holds more; "
            "choose another name, or move it away"
        )
    with whole_directory(directory) as partial:
        weights, config_file = partial / "model.safetensors", partial / "config.json"
        write_safetensors(weights, dict(_to_file(model)), {"format": "pt"})
        write_json(config_file, _config_json(model, tokenizer.eot))
        if isinstance(model, GPT):
            write_json(
                partial / "generation_config.json",
                {
                    "bos_token_id": tokenizer.eot,
                    "eos_token_id": tokenizer.eot,
                    "pad_token_id": tokenizer.eot,
                },
            )
        tokenizer.save(partial)
        for name, value in (extra or {}).items():
            write_json(partial / name, value)


def _is_ours(directory: Path) -> bool:
    """Whether it may be replaced: it is an empty directory, or one that `save_model` wrote."""
    if not directory.is_dir():
        return not directory.exists()
    if not (names := {path.name for path in directory.iterdir()}):
        return True
    try:
        config = read_json(directory / "config.json", missing="", remedy="")
    except InputError:
        return False
    return names <= _WRITTEN and config.get("model_type") == "gpt2" and "qkv_bias" in config


def load_model(
    directory: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> GPT | GPTClassifier:
    """Read a model directory.

    Tensors are read one at a time, so memory stays near the model's own size.

    >>> model = gpt.load_model(directory)
    >>> type(model).__name__, model.config.n_layer
    ('GPT', 5)

    Args:
        directory: in Hugging Face's GPT-2 layout, with or without the `transformer.` prefix.
        device: the model's device.
        dtype: the precision of its weights; None is fp32, to which narrower weights are widened.

    Returns:
        `GPTClassifier` where the file holds a classification head, `GPT` otherwise; in
        evaluation mode.

    Raises:
        InputError: a file is missing or damaged, the configuration is of another architecture,
            or a tensor is missing, unknown, of the wrong shape or not finite; the message names it.
    """
    directory = Path(directory)
    config, labels = read_config(directory)
    path = directory / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model directory holds its weights there")
    tensors = by_plain_name(path, tensors_in_safetensors(path))
    if (score := tensors.get("score.weight")) is None:
        labels = None
    elif labels is None:  # transformers' own default; a wrong shape is refused below
        n_classes = score.shape[0] if score.shape[1:] == (config.n_embd,) else 1
        labels = [f"LABEL_{i}" for i in range(n_classes)]
    pooling = _read_pooling(directory) if labels is not None else "last"
    model = empty_model(path, config, labels, len(tensors), pooling)
    account_for_every_name(path, tensors, model.state_dict(), without_a_place(config, tensors))
    fill(model, tensors, device, dtype)
    return model.eval()


def load_base(directory: Path) -> tuple[GPT, Tokenizer]:
    """Read a language model and its own tokenizer, on the CPU in fp32.

    Raises:
        InputError: as `load_model` and `load_tokenizer`; or the directory holds a classifier, or
            a tokenizer whose vocabulary is not the model's.
    """
    model, tokenizer = load_pair(directory)
    if not isinstance(model, GPT):
        raise InputError(
            f"{directory}: holds a classifier; a language model is needed, from the stages "
            "pretrain, load_gpt2 or finetune_instruct"
        )
    return model, tokenizer


def read_base(directory: Path, stage: str, max_length: int | None) -> tuple[GPTConfig, Tokenizer]:
    """The architecture and the tokenizer of what `load_base` reads, without reading weights.

    Raises:
        InputError: as `read_config` and `load_tokenizer_of`; or the stage's `max_length` is above
            the context.
    """
    config, _ = read_config(directory)
    tokenizer = load_tokenizer_of(directory, config)
    if max_length is not None and max_length > config.context_length:
        raise InputError(
            f"{stage}.max_length: {max_length} tokens are more than the context of {directory} "
            f"holds ({config.context_length}); use at most that"
        )
    return replace(config, vocab_size=tokenizer.vocab_size), tokenizer


def load_classifier(directory: Path) -> tuple[GPTClassifier, Tokenizer]:
    """Read a classifier and its own tokenizer, on the CPU in fp32.

    Raises:
        InputError: as `load_model` and `load_tokenizer`; or the directory holds no classification
            head, or a tokenizer whose vocabulary is not the model's.
    """
    model, tokenizer = load_pair(directory)
    if not isinstance(model, GPTClassifier):
        raise _no_classifier(directory)
    return model, tokenizer


def read_labels(directory: Path) -> list[str]:
    """The labels of a classifier, in the order of its classes.

    Raises:
        InputError: as `read_config`; or the directory holds no classification head.
    """
    _, labels = read_config(directory)
    if labels is None:
        raise _no_classifier(directory)
    return labels


def _no_classifier(directory: Path) -> InputError:
    return InputError(
        f"{directory}: holds no classification head; a classifier is needed, from the stage "
        "finetune_classifier"
    )


def load_pair(
    directory: Path, dtype: torch.dtype | None = None
) -> tuple[GPT | GPTClassifier, Tokenizer]:
    """Read a model, on the CPU, and its own tokenizer; rows that pad the vocabulary are dropped.

    Raises:
        InputError: as `load_model` and `load_tokenizer_of`.
    """
    model = load_model(directory, dtype=dtype)
    tokenizer = load_tokenizer_of(directory, model.config)
    cut_vocabulary(model, tokenizer.vocab_size)
    return model, tokenizer


def cut_vocabulary(model: GPT | GPTClassifier, n: int) -> None:
    """Drop the embedding and head rows beyond the tokenizer's n tokens: they encode no text."""
    if model.config.vocab_size == n:
        return
    model.config = replace(model.config, vocab_size=n)
    model.wte.num_embeddings = n
    for name, table in model.state_dict().items():
        if name in ("wte.weight", "lm_head.weight"):
            _assign(model, name, table[:n].clone())


def load_tokenizer_of(directory: Path, config: GPTConfig) -> Tokenizer:
    """Read the tokenizer in a model's directory.

    Raises:
        InputError: as `load_tokenizer`; or the model's vocabulary is neither the tokenizer's nor
            that padded to a round number.
    """
    tokenizer = load_tokenizer(directory)
    n = tokenizer.vocab_size
    if config.vocab_size not in (n, *(-(-n // step) * step for step in _PADDED_TO)):
        raise InputError(
            f"{directory}: the model has {config.vocab_size} tokens, its vocab.json {n}; "
            "take both from the same place"
        )
    return tokenizer


def read_config(directory: Path) -> tuple[GPTConfig, list[str] | None]:
    """Read a model directory's `config.json`: the architecture, and a classifier's labels.

    Raises:
        InputError: no such file, not JSON, or not GPT-2's architecture.
    """
    raw = _read_config_file(directory)
    path = directory / "config.json"
    for key, allowed in _FIXED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise InputError(
                f"{path}: {key} is {shown(raw[key])}; this is GPT-2's architecture, with "
                f"{allowed[0]!r}"
            )
    positions = "n_positions" if "n_positions" in raw else "n_ctx"
    names = _CONFIG_NAMES | {positions: "context_length"}
    config = architecture(path, raw, names, optional=_CONFIG_DEFAULTS)
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise InputError(
            f"{path}: n_inner is {shown(raw['n_inner'])}; GPT-2's MLP is 4 x n_embd wide"
        )
    return config, _labels(path, raw.get("id2label"))


# config.json's names of GPTConfig's fields, except the context, which has two
_CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "resid_pdrop": "dropout",
    "qkv_bias": "qkv_bias",
    "tie_word_embeddings": "tie_weights",
}
_CONFIG_DEFAULTS = ("resid_pdrop", "qkv_bias", "tie_word_embeddings")


def architecture(
    path: Path, raw: Mapping[str, Any], names: Mapping[str, str], optional: Sequence[str] = ()
) -> GPTConfig:
    """The architecture that a file describes.

    Args:
        path: the file.
        raw: what it holds.
        names: the file's name of each field -> `GPTConfig`'s.
        optional: names that may be missing in the file.

    Raises:
        InputError: a field is missing, of the wrong type, or impossible; the message uses the
            file's name of it.
    """
    remedy = f"get the model's own {path.name}"
    if missing := [key for key in names if key not in raw and key not in optional]:
        raise InputError(f"{path}: lacks {missing[0]!r}; {remedy}")
    values = {own: raw[key] for key, own in names.items() if key in raw}
    try:  # as JSON, so that `true`, "12" and 12.0 are not accepted as integers
        return TypeAdapter(GPTConfig).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        field = next(iter(problem["loc"]), None)
        key = next((f"{key}: " for key, own in names.items() if own == field), "")
        got = f" (got {shown(problem['input'])})" if key else ""
        raise InputError(f"{path}: {key}{problem['msg']}{got}; {remedy}") from None


def _labels(path: Path, named: Any) -> list[str] | None:
    """The labels of `id2label`, in the order of the classes; None if it has none."""
    if named is None or named == {}:
        return None
    classes = named if isinstance(named, dict) else {}
    labels: list[Any] = [classes.get(str(i)) for i in range(len(classes))]
    if not labels or not all(isinstance(label, str) for label in labels):
        raise InputError(
            f"{path}: id2label must hold the classes' names under 0, 1, 2 and so on "
            f"(got {shown(named)}); get the model's own config.json"
        )
    if len(set(labels)) < len(labels):
        raise InputError(f"{path}: id2label gives two classes one name; rename one of them")
    return labels


def _read_config_file(directory: Path) -> dict[str, Any]:
    return read_json(
        directory / "config.json",
        missing=f"no such file; {directory} is no model directory, run the stage that makes it",
        remedy="fetch or make it again",
    )


def _read_pooling(directory: Path) -> Pooling:
    """A classifier's pooling from `config.json`; the layout's default is the last position."""
    pooling = _read_config_file(directory).get("pooling", "last")
    if pooling not in get_args(Pooling):
        raise InputError(
            f"{directory / 'config.json'}: pooling is {shown(pooling)}; it is one of "
            f"{', '.join(get_args(Pooling))}"
        )
    return pooling  # type: ignore[no-any-return]


class _SkipInit(TorchFunctionMode):
    """Skips the initialization of weights that are about to be read.

    Even on the meta device it costs 1.5 s, because PyTorch imports its compiler for it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


# --- tensors and names ----------------------------------------------------------------------------


def by_plain_name(path: Path, tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """Map tensors with Hugging Face's names to the model's own names, which have no prefix.

    Raises:
        InputError: a tensor occurs both with and without the prefix.
    """
    plain: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        short = _PREFIXES.sub("", name, count=1)
        if short in plain:
            raise InputError(
                f"{path}: holds {short} with and without {_PREFIX!r}; get a file with one of them"
            )
        plain[short] = replace(tensor, turned=is_conv1d(short))
    return plain


def without_a_place(config: GPTConfig, names: Iterable[str]) -> set[str]:
    """The names of tensors in files that a model of this architecture does not use."""
    return {
        name
        for name in names
        if _MASKS.fullmatch(name)
        or (config.tie_weights and name == "lm_head.weight")  # a copy of wte.weight
        or (not config.qkv_bias and name.endswith("attn.c_attn.bias"))  # zeros
    }


def is_conv1d(name: str) -> bool:
    """Whether GPT-2's own files keep this matrix (the model's name) input-major."""
    return _CONV1D.fullmatch(name) is not None


def empty_model(
    path: Path,
    config: GPTConfig,
    labels: list[str] | None,
    n_tensors: int,
    pooling: Pooling = "last",
) -> GPT | GPTClassifier:
    """A model without weights, on the meta device, for the `n_tensors` in `path`.

    Raises:
        InputError: the configuration has more layers than there are tensors.
    """
    if config.n_layer > n_tensors:
        raise InputError(
            f"{path}: {n_tensors} tensors cannot be {config.n_layer} layers; the weights and "
            "their configuration do not belong together"
        )
    with torch.device("meta"), _SkipInit():
        return GPT(config) if labels is None else GPTClassifier(config, labels, pooling)


def account_for_every_name(
    path: Path, there: Iterable[str], wanted: Iterable[str], ignored: Iterable[str]
) -> None:
    """Refuse a file that lacks a tensor, or has one that is neither wanted nor ignored.

    Raises:
        InputError: there are such tensors; the message names them.
    """
    there, wanted = set(there), list(wanted)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise InputError(
            f"{path}: lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; "
            "get a complete file of this architecture"
        )
    unknown = sorted(there.difference(wanted, ignored))
    if unknown:
        raise InputError(
            f"{path}: holds {', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''}, which "
            "GPT-2's architecture does not have; config.json and the weights do not belong together"
        )


def fill(
    model: GPT | GPTClassifier,
    tensors: dict[str, FileTensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Load the weights of an empty model one by one; all are checked before the first is read.

    Args:
        model: on the meta device.
        tensors: by the model's names; emptied, so that no tensor is held longer than needed.
        device: of the weights.
        dtype: of the weights; None for fp32.

    Raises:
        InputError: a tensor has the wrong shape, is not floating-point, cannot be read, or has a
            value that is not finite in `dtype`.
    """
    wanted = {name: tuple(empty.shape) for name, empty in model.state_dict().items()}
    for name, shape in wanted.items():
        tensors[name].expect(shape)
    waiting = {name: tensors[name] for name in wanted}
    tensors.clear()
    # The largest first: the reader's extra copy is small by the time that the model is large.
    for name in sorted(wanted, key=lambda name: math.prod(wanted[name]), reverse=True):
        _assign(model, name, _weight(waiting.pop(name), device, dtype or torch.float32))


def _weight(source: FileTensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    value = source.read()
    if source.turned:
        value = value.t()
    if source.lent:  # one copy that moves, widens and transposes
        weight = torch.empty(value.shape, device=device, dtype=dtype).copy_(value)
    else:
        weight = value.to(device=device, dtype=dtype).contiguous()
    if weight.sum(dtype=torch.float32).isfinite():  # the fastest check of all values
        return weight
    highest = value.abs().max().item()
    if not math.isfinite(highest):
        raise InputError(
            f"{source.path}: {source.name} holds what is no finite number; the file is damaged or "
            "its training failed, fetch or make it again"
        )
    if highest > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{source.path}: {source.name} holds {highest:g}, which {kind} cannot; use bfloat16 "
            "or float32"
        )
    return weight


def _assign(model: torch.nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value))


def _to_file(model: GPT | GPTClassifier) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        target = name if name in _HEADS else _PREFIX + name
        yield target, tensor.t() if is_conv1d(name) else tensor
    if not model.config.qkv_bias:  # the layout has no place without one: zeros change nothing
        for layer in range(model.config.n_layer):
            yield (
                f"{_PREFIX}h.{layer}.attn.c_attn.bias",
                torch.zeros(3 * model.config.n_embd, dtype=model.wte.weight.dtype),
            )


def _config_json(model: GPT | GPTClassifier, eot: int) -> dict[str, Any]:
    config = model.config
    result: dict[str, Any] = {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "initializer_range": INIT_STD,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "qkv_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }
    if isinstance(model, GPT):
        return result | {"architectures": ["GPT2LMHeadModel"]}
    if model.pooling != "last":
        # not part of the layout: transformers ignores it, and uses the last position
        result["pooling"] = model.pooling
    return result | {
        "architectures": ["GPT2ForSequenceClassification"],
        "pad_token_id": eot,  # transformers takes the last other token as the last real one
        "id2label": {str(i): label for i, label in enumerate(model.labels)},
        "label2id": {label: i for i, label in enumerate(model.labels)},
        "problem_type": "single_label_classification",
    }
