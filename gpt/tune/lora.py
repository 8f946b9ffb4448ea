"""Low-rank adapters: a frozen matrix plus the product of two small trained ones.

Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models": W x + (alpha / rank) B A x.
A is random and B zero, so the adapters have no effect at first. After training the product is
added to W (`merge`), and a plain model is saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.base.errors import InputError
from gpt.model.config import Positive

LayerName = Literal[
    "query", "key", "value", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "head"
]
"""A linear layer of every block by GPT-2's name, a third of `attn.c_attn` by what it makes, or the
model's head."""

PARTS: tuple[LayerName, ...] = ("query", "key", "value")
"""The thirds of `attn.c_attn`, in its order."""

IN_BLOCKS: tuple[LayerName, ...] = (*PARTS, "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Every linear layer of a block."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class LoraParams:
    """Which layers are adapted, and how; the defaults are those of the book's appendix E.

    Raises:
        pydantic.ValidationError (a ValueError): an impossible value, no layer, or one given twice.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapters' input, in training."""
    layers: tuple[LayerName, ...] = (*IN_BLOCKS, "head")
    """`query`, `key` and `value` are adapted apart, `attn.c_attn` is all three as one matrix."""
    blocks: Positive | None = None
    """Adapt only this many of the last blocks; None adapts all."""

    @model_validator(mode="after")
    def _possible(self) -> LoraParams:
        if not self.layers:
            raise ValueError("layers: name at least one layer to adapt")
        if twice := [each for each in self.layers if self.layers.count(each) > 1]:
            raise ValueError(f"layers: {twice[0]} is named twice; name it once")
        if "attn.c_attn" in self.layers and (apart := set(PARTS) & set(self.layers)):
            raise ValueError(
                f"layers: attn.c_attn holds {min(apart)} already; name attn.c_attn, or "
                "query, key and value"
            )
        return self

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied by."""
        return self.alpha / self.rank

    @property
    def in_blocks(self) -> Mapping[str, tuple[int, ...]]:
        """The layers of a block that are adapted, by name: which of their thirds, () for whole."""
        found: dict[str, tuple[int, ...]] = {
            name: () for name in self.layers if name not in (*PARTS, "head")
        }
        thirds = tuple(i for i, part in enumerate(PARTS) if part in self.layers)
        return {"attn.c_attn": thirds, **found} if thirds else found


def _in_blocks(given: Any) -> Any:
    return {"layers": IN_BLOCKS, **given} if isinstance(given, dict) else given


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class LanguageModelTuning:
    """What of a language model is fine-tuned; the parameters of a stage that does so extend it.

    Raises:
        pydantic.ValidationError (a ValueError): adapters that are not trained.
    """

    trainable: Literal["all", "lora"] = "all"
    """The whole model, or adapters beside frozen layers, which are merged after training."""
    lora: Annotated[LoraParams | None, BeforeValidator(_in_blocks)] = None
    """Which adapters, with `trainable: lora`; by default beside every layer of the blocks: GPT-2's
    head is the embedding."""

    @model_validator(mode="after")
    def _belong_together(self) -> LanguageModelTuning:
        if self.lora is not None and self.trainable != "lora":
            raise ValueError(f"lora: has no say with trainable: {self.trainable}; set it to lora")
        return self

    @property
    def adapters(self) -> LoraParams | None:
        """The adapters that are trained; None where everything is."""
        if self.trainable == "all":
            return None
        return self.lora or LoraParams(layers=IN_BLOCKS)


class LoraLinear(nn.Module):
    """A linear layer with adapters beside it.

    Args:
        base: the layer, left frozen; `merge` puts it back in its place.
        params: rank, alpha and dropout.
        thirds: which thirds of the layer's outputs have an adapter each; () for one of them all.

    `lora_a` holds the matrices A of all adapters one below the other, (adapters x rank, in),
    `lora_b` their matrices B likewise, (adapted outputs, rank).
    """

    def __init__(self, base: nn.Linear, params: LoraParams, thirds: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.scale, self.dropout = params.rank, params.scale, params.dropout
        width = base.out_features // 3 if thirds else base.out_features
        self.slices = [slice(i * width, (i + 1) * width) for i in thirds or (0,)]
        like = base.weight
        adapters = len(self.slices)
        self.lora_a = nn.Parameter(like.new_empty(adapters * self.rank, base.in_features))
        self.lora_b = nn.Parameter(like.new_zeros(adapters * width, self.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear is, and LoRA's A

    @property
    def weight(self) -> Tensor:
        """The layer's matrix with what the adapters add to it, (out, in); gradients flow back."""
        n = len(self.slices)
        pairs = zip(self.lora_a.chunk(n), self.lora_b.chunk(n), strict=True)
        added = torch.zeros_like(self.base.weight)
        for own, (a, b) in zip(self.slices, pairs, strict=True):
            added[own] = b @ a
        return self.base.weight + self.scale * added

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.base(x) + self._added(x)  # type: ignore[no-any-return]

    def some(self, x: Tensor, outputs: slice) -> Tensor:
        """What `forward` gives at these outputs, and nothing else."""
        return self.base.some(x, outputs) + self._added(x)[..., outputs]  # type: ignore[operator, no-any-return]

    def _added(self, x: Tensor) -> Tensor:
        """What the adapters add, (..., out): nothing in a third that has none."""
        n = len(self.slices)
        x = F.dropout(x, self.dropout, self.training)
        thin = F.linear(x, self.lora_a)  # (..., adapters x rank)
        parts = [
            F.linear(each, b)
            for each, b in zip(thin.chunk(n, -1), self.lora_b.chunk(n), strict=True)
        ]
        if n == 1 and parts[0].shape[-1] == self.base.out_features:
            return self.scale * parts[0]
        added = x.new_zeros(*x.shape[:-1], self.base.out_features, dtype=parts[0].dtype)
        for own, part in zip(self.slices, parts, strict=True):
            added[..., own] = part
        return self.scale * added

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The layer with what the adapters learnt added to its own matrix, in place."""
        self.base.weight.copy_(self.weight)
        return self.base


def wrap(model: nn.Module, params: LoraParams) -> int:
    """Freeze a model and put adapters beside its layers, in place.

    Args:
        model: a `gpt.model.model.GPT` or `GPTClassifier`, on its device.
        params: which layers, and how; the adapters are drawn from PyTorch's generator.

    Returns:
        How many of the model's blocks come before the first adapter.

    Raises:
        InputError: fewer blocks than are to be adapted, or `head` of a model whose head is its
            embedding.
    """
    blocks: nn.ModuleList = model.h  # type: ignore[assignment]
    own = len(blocks) if params.blocks is None else params.blocks
    if own > len(blocks):
        raise InputError(
            f"lora.blocks: {own} blocks are to be adapted, the model has {len(blocks)}; "
            "use at most that"
        )
    model.requires_grad_(False)
    inside = params.in_blocks
    depth = len(blocks) - (own if inside else 0)
    for block in blocks[depth:]:
        for name, thirds in inside.items():
            _replace(block, name, LoraLinear(block.get_submodule(name), params, thirds))  # type: ignore[arg-type]
    if "head" in params.layers:
        name = "score" if hasattr(model, "score") else "lm_head"
        head = getattr(model, name)
        if head is None:
            raise InputError(
                "lora.layers: the head of this model is its embedding (tie_weights), and cannot be "
                "adapted alone; leave head out"
            )
        _replace(model, name, LoraLinear(head, params))
    return depth


def merge(model: nn.Module) -> None:
    """Add the adapters' products to the layers' own matrices, and remove the adapters.

    In place; the result is a plain model with the same logits up to rounding. A part of it that
    was obtained before (`GPTClassifier.top`) must be obtained again.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            _replace(model, name, layer.merge())


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name; empty where nothing is wrapped."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in ("lora_a", "lora_b")
    }


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
