"""The cost of a training, computed from shapes: parameters, memory by part, FLOPs.

Nothing here is run or measured. Parameters are counted on the model itself, which may be on the
`meta` device, where it takes no memory. The activations are what autograd keeps from the forward
pass of `gpt.model.model` for the backward pass, counted layer by layer; a test compares the count
with the real tensors. Korthikanti et al. (2022), "Reducing Activation Recomputation in Large
Transformer Models", section 4, do the same count for another model. FLOPs follow Chowdhery et al.
(2022), "PaLM", appendix B: 2 per parameter and token forward, twice that backward.

Shapes: B rows, T positions, N = real tokens of a batch, C = n_embd, H heads, V = vocab_size,
L = n_layer. All memory is in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor

from gpt.model.attention import BLOCK
from gpt.model.loss import CHUNK_BYTES, LANES, SOFTMAX_ROWS
from gpt.model.model import GPT, GPTClassifier
from gpt.train.recipe import TrainParams
from gpt.tune.lora import LoraLinear, adapters

Kernel = Literal["blocked", "fused"]
"""`gpt.model.attention` on a CPU, which keeps the probabilities; PyTorch's on a graphics card,
which keeps none."""

FP32, BF16, INT64 = 4, 2, 8


# --- parameters -----------------------------------------------------------------------------------


class Counts:
    """The parameter counts of a model by their role in training.

    Args:
        model: as it is trained, with frozen parameters and adapters; on any device.

    Attributes:
        parameters: all; a tied head is counted once.
        trained: those that get gradients.
        adapters: those of the adapters.
        own: the number of trained or adapted blocks, which are the last ones.
        depth: the number of blocks before these.
        block: those of one block, without its adapters.
        block_adapters: those of the adapters of one adapted block.
        matrices: those in the trained matrices of the blocks.
        multiplied: those used in a matrix product: all but embeddings that are only looked up.
        layers: the adapted layers of one block.
        head_rank: the rank of the adapter of a classifier's head; 0 without one.
        classes: the number of a classifier's classes; 0 for a language model.
        mean: whether a classifier's head uses the mean over all positions, not the last one.
    """

    def __init__(self, model: GPT | GPTClassifier) -> None:
        block = model.h[-1]
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        looked_up = model.wpe.weight.numel()
        looked_up += 0 if model.config.tie_weights else model.wte.weight.numel()
        self.config = model.config
        self.parameters = model.n_params
        self.trained = _numbers(p for _, p in trained)
        self.adapters = _numbers(adapters(model).values())
        self.own = sum(any(p.requires_grad for p in each.parameters()) for each in model.h)
        self.depth = model.config.n_layer - self.own
        self.block_adapters = _numbers(adapters(block).values())
        self.block = _numbers(block.parameters()) - self.block_adapters
        self.matrices = _numbers(p for name, p in trained if name[:2] == "h." and p.dim() == 2)
        self.multiplied = self.parameters - looked_up
        self.layers = [each for each in block.modules() if isinstance(each, LoraLinear)]
        self.head_rank = getattr(getattr(model, "score", None), "rank", 0)
        self.classes = len(getattr(model, "labels", ()))
        self.mean = getattr(model, "pooling", "last") == "mean"


def _numbers(parameters: Iterable[Tensor]) -> int:
    return sum(each.numel() for each in parameters)


# --- FLOPs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The shape of a batch.

    Attributes:
        rows: B.
        length: T, to which all rows are padded.
        tokens: N, the real tokens among B x T.
        targets: the number of positions whose logits are computed: the targets that count, or one
            per row of a classifier.
    """

    rows: int
    length: int
    tokens: int
    targets: int

    @classmethod
    def full(cls, rows: int, length: int) -> Shape:
        """Rows without padding, each position a target."""
        return cls(rows=rows, length=length, tokens=rows * length, targets=rows * length)

    @property
    def positions(self) -> int:
        """B x T."""
        return self.rows * self.length


def forward_flops(model: Counts, shape: Shape) -> float:
    """A language model's forward pass; the head is computed only for targets that count."""
    head = 2 * model.config.vocab_size * model.config.n_embd * shape.targets
    return model.config.n_layer * _block_flops(model, shape) + head


def _block_flops(model: Counts, shape: Shape) -> float:
    """One block's forward pass; attention's two products as if every position saw all others."""
    attention = 4 * model.config.n_embd * shape.length
    return (2 * model.block + attention) * shape.positions


def step_flops(model: Counts, shape: Shape) -> float:
    """Forward and backward of a language model, trained as a whole or with adapters.

    A frozen matrix beside adapters costs one product backward instead of two.
    """
    everything = forward_flops(model, shape)
    if not model.adapters:
        return 3 * everything
    frozen = model.depth * _block_flops(model, shape)
    of_adapters = 6 * model.own * model.block_adapters * shape.positions
    # no gradient flows back through the first c_attn
    first = 6 * model.config.n_embd**2 * shape.positions if model.own else 0
    return frozen + 2 * (everything - frozen) + of_adapters - first


def trunk_flops(model: Counts, shape: Shape, depth: int) -> float:
    """Forward through a classifier's first `depth` blocks; in its last block only the pooled
    position is computed."""
    if model.mean:
        return depth * _block_flops(model, shape)
    C = model.config.n_embd
    last = 4 * C**2 * shape.tokens + shape.rows * (20 * C**2 + 4 * C * shape.length)
    whole = min(depth, model.config.n_layer - 1)
    return whole * _block_flops(model, shape) + (depth - whole) * last


def classifier_flops(model: Counts, shape: Shape, *, kept: bool) -> float:
    """A step of a classifier: forward through all of it, backward through the trained part.

    A frozen matrix beside adapters costs one product backward instead of two.

    Args:
        model: the parameter counts.
        shape: of the batch.
        kept: whether the frozen blocks' output is computed once in advance.
    """
    frozen = trunk_flops(model, shape, model.depth)
    head = 2 * model.config.n_embd * model.classes * shape.rows
    own = trunk_flops(model, shape, model.config.n_layer) - frozen + head
    before = 0 if kept else frozen
    if not model.adapters:
        return before + 3 * own
    return before + 2 * own + 6 * model.own * model.block_adapters * shape.positions


# --- memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """The bytes of each part of a training's memory; the parts do not all peak at the same time."""

    weights: int = 0
    copies: int = 0
    """bf16 copies of the matrices, made once a step under autocast."""
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """What autograd keeps from the forward pass."""
    loss: int = 0
    """A chunk of logits, and the gradients that are computed along with it."""
    best: int = 0
    """A copy of the weights with the lowest validation loss."""
    kv_cache: int = 0
    """Keys and values while a sample is generated."""
    features: int = 0
    """The output of a classifier's frozen blocks for the texts."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def sharded(self, devices: int) -> Memory:
        """One device's share if weights, gradients and optimizer are sharded over `devices`.

        As in FSDP: each device processes its own rows and holds everything they need. It also
        gathers one block's weights at a time, which is ignored here.
        """
        spread = ("weights", "gradients", "optimizer", "best")
        return replace(self, **{part: -(-getattr(self, part) // devices) for part in spread})


def optimizer_bytes(model: Counts, train: TrainParams) -> int:
    """AdamW keeps two numbers per parameter, Muon one per parameter of the blocks' matrices."""
    return FP32 * (2 * model.trained - (model.matrices if train.optimizer == "muon" else 0))


def kv_cache_bytes(model: Counts, rows: int, length: int) -> int:
    """Keys and values of all layers for `rows` of up to `length` positions, in fp32."""
    config = model.config
    return 2 * FP32 * config.n_layer * config.n_embd * rows * min(length, config.context_length)


def attention_probabilities(length: int) -> int:
    """The probabilities that the blocked kernel keeps for one head of one row: about T² / 2."""
    ends = [min(length, start + BLOCK) for start in range(0, length, BLOCK)]
    return sum((end - start * BLOCK) * end for start, end in enumerate(ends))


def _block_activations(model: Counts, shape: Shape, size: int, kernel: Kernel) -> int:
    """What one trained or adapted block keeps for its backward pass.

    Numbers per position: the inputs of both norms (2 C, always fp32, with mean and deviation), of
    the four matrices (C, C, C and 4 C), queries, keys and values (3 C) and the input of GELU
    (4 C). All but the norms' are in the precision of the products, `size` bytes per number.

    A frozen matrix keeps no input. Its adapters keep it, and the output of their first matrix;
    with dropout also the dropout mask.
    """
    C, H, n = model.config.n_embd, model.config.n_head, shape.positions
    blocked = kernel == "blocked"
    mark = size if blocked else 1  # dropout masks: factors on a CPU, bytes on a graphics card
    kept = n * (2 * C * FP32 + 4 * FP32 + 14 * C * size)
    if blocked:
        probabilities = shape.rows * H * attention_probabilities(shape.length)
        kept += probabilities * (size + (model.config.dropout > 0))  # dropped ones, a byte each
    else:
        kept += H * n * FP32  # the log-sum-exp of each query
    if model.config.dropout:  # after both projections
        kept += 2 * n * C * mark
    if model.layers:
        wide = sum(layer.base.in_features for layer in model.layers)
        thin = sum(len(layer.lora_a) for layer in model.layers)
        kept += n * (wide + thin - 7 * C) * size
        kept += n * wide * mark if model.layers[0].dropout else 0
    return kept


def lm_activations(model: Counts, shape: Shape, *, bf16: bool, kernel: Kernel) -> int:
    """What autograd keeps from a language model's forward pass, without its loss.

    Nothing is kept before the first adapter.
    """
    n, C = shape.positions, model.config.n_embd
    kept = model.own * _block_activations(model, shape, BF16 if bf16 else FP32, kernel)
    if shape.targets < n:
        kept += 2 * INT64 * shape.targets  # where the targets are
    if model.adapters:  # the final norm keeps its input and the first one, frozen, does not
        return kept if model.own else 0
    kept += n * ((C + 2) * FP32 + INT64)  # the input of the final norm, the ids
    return kept + _dropped_embeddings(model, shape, kernel)


def _dropped_embeddings(model: Counts, shape: Shape, kernel: Kernel) -> int:
    """The dropout mask of the embeddings."""
    number = FP32 if kernel == "blocked" else 1
    return shape.positions * model.config.n_embd * number if model.config.dropout else 0


def classifier_activations(model: Counts, shape: Shape, *, bf16: bool, kernel: Kernel) -> int:
    """What autograd keeps from a classifier's forward pass.

    Nothing is kept from the frozen part before the trained one, computed in advance or not.
    """
    B, C, N = shape.rows, model.config.n_embd, shape.tokens
    size = BF16 if bf16 else FP32
    kept = B * (C + model.head_rank) * size + 2 * INT64 * B  # the head's input, the classes
    if not model.own:
        return kept
    embeds = model.trained == model.parameters
    if embeds:
        kept += shape.positions * INT64 + _dropped_embeddings(model, shape, kernel)
    whole = model.own if model.mean else model.own - 1
    if whole:
        kept += whole * _block_activations(model, shape, size, kernel)
        kept += 2 * INT64 * N  # where the real positions are
    if model.adapters:  # the first norm is frozen, and nothing before it is trained
        kept -= (C + 2) * FP32 * (shape.positions if whole else N)
    if model.mean:
        return kept + N * (C + 2) * FP32 + B * INT64
    if embeds or model.own > 1:
        kept += N * INT64
    kept += N * size * sum(layer.rank for layer in model.layers)
    kept += B * (C + 2) * FP32  # the final norm behind the last block
    return kept + _last_activations(model, shape, size)


def _last_activations(model: Counts, shape: Shape, size: int) -> int:
    """What a classifier's last block keeps: all keys and values, but one query per row."""
    C, B, T = model.config.n_embd, shape.rows, shape.length
    # the norm's input and its deviation, the input of keys and values, both of them padded
    kept = shape.tokens * ((C + 2) * FP32 + C * size) + 2 * B * T * C * size
    kept += B * T * (size if size == BF16 else 1)  # the mask: which positions are real
    kept += B * (2 * C * FP32 + 16 * C * size)
    if model.config.dropout:
        kept += B * model.config.n_head * T * (FP32 + size) + 2 * B * C * size
    return kept


def lm_loss_kept(model: Counts, targets: int) -> int:
    """What the chunked loss keeps for the backward pass: both gradients, in fp32."""
    return FP32 * model.config.n_embd * (targets + _padded(model.config.vocab_size))


def lm_loss_bytes(model: Counts, targets: int, *, bf16: bool) -> int:
    """The peak of the chunked loss: what it keeps, one chunk of logits and its softmax."""
    row = _padded(model.config.vocab_size) * (BF16 if bf16 else FP32)
    rows = -(-targets // max(1, -(-targets * row // CHUNK_BYTES)))
    softmax = 2 * FP32 * min(rows, SOFTMAX_ROWS) * model.config.vocab_size
    return lm_loss_kept(model, targets) + rows * row + softmax


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // LANES) * LANES


def pair_loss_kept(model: Counts, targets: int, *, bf16: bool) -> int:
    """What the loss of preference tuning keeps: every target's log-probabilities in fp32.

    If the head is trained, also its input (`gpt.tune.preference`).
    """
    head = model.config.n_embd * (BF16 if bf16 else FP32)
    return targets * (FP32 * model.config.vocab_size + head + 3 * INT64)


def pair_loss_bytes(model: Counts, targets: int, *, bf16: bool) -> int:
    """The peak of that loss, in the backward pass: two more gradients of the same size."""
    gradients = 2 * FP32 + (BF16 if bf16 else 0)
    kept = pair_loss_kept(model, targets, bf16=bf16)
    return kept + gradients * targets * model.config.vocab_size


def lm_memory(
    model: Counts,
    shape: Shape,
    *,
    train: TrainParams,
    bf16: bool,
    kernel: Kernel,
    cache: tuple[int, int] = (0, 0),
    pairs: bool = False,
) -> Memory:
    """A language model's training.

    Args:
        model: what of it is trained.
        shape: of the largest batch.
        train: the recipe.
        bf16: products in bf16 under autocast.
        kernel: of the attention.
        cache: rows and length of a sample, (0, 0) for none.
        pairs: the loss is that of preference tuning.
    """
    weights = FP32 * model.parameters
    copied = model.multiplied
    if model.adapters:  # the matrices that gradients flow back through
        C = model.config.n_embd
        first = 3 * C**2 if model.own else 0  # none through the first c_attn
        copied = model.own * 12 * C**2 - first + model.config.vocab_size * C + model.adapters
    return Memory(
        weights=weights,
        copies=BF16 * copied if bf16 else 0,
        gradients=FP32 * model.trained,
        optimizer=optimizer_bytes(model, train),
        activations=lm_activations(model, shape, bf16=bf16, kernel=kernel),
        loss=(pair_loss_bytes if pairs else lm_loss_bytes)(model, shape.targets, bf16=bf16),
        best=weights if train.keep == "best" else 0,
        kv_cache=kv_cache_bytes(model, *cache),
    )


def classifier_memory(
    model: Counts,
    shape: Shape,
    *,
    train: TrainParams,
    bf16: bool,
    kernel: Kernel,
    features: int = 0,
) -> Memory:
    """A classifier's training.

    Args:
        model: what of it is trained.
        shape: of the largest batch.
        train: the recipe.
        bf16: products in bf16 under autocast.
        kernel: of the attention.
        features: the number of vectors that the frozen blocks computed in advance, 0 if none. With
            them, `fit` sees and copies only the part after those blocks.
    """
    C = model.config.n_embd
    # the part after the frozen blocks: trained, or with adapters
    top = model.own * model.block + (2 + model.classes) * C + model.adapters
    multiplied = top if model.own else model.trained
    if model.layers:
        multiplied -= 3 * C**2  # no gradient flows back through the first c_attn
    best = top if features else model.parameters
    return Memory(
        weights=FP32 * model.parameters,
        copies=BF16 * multiplied if bf16 else 0,
        gradients=FP32 * model.trained,
        optimizer=optimizer_bytes(model, train),
        activations=classifier_activations(model, shape, bf16=bf16, kernel=kernel),
        best=FP32 * best if train.keep == "best" else 0,
        features=features * C * (BF16 if bf16 else FP32),
    )


# --- devices --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """A graphics card, by its manufacturer's specification.

    Attributes:
        name: the display name.
        memory: in bytes.
        fp32: peak of products in fp32, FLOP/s, without tensor cores (PyTorch's default).
        bf16: peak of dense products in bf16, summed in fp32; None without bf16 support.
        source: the page or paper with these figures.
    """

    name: str
    memory: int
    fp32: float
    bf16: float | None
    source: str

    def peak(self, *, bf16: bool) -> float:
        """The peak of products in that precision, FLOP/s."""
        return self.bf16 if bf16 and self.bf16 else self.fp32


_GA102 = (
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)

ACCELERATORS: dict[str, Accelerator] = {
    # the paper gives the 3090's rate (71 for 328 tensor cores at 1.695 GHz); 112 at 1.777 GHz
    "rtx-3060": Accelerator(
        name="GeForce RTX 3060",
        memory=12 << 30,
        fp32=12.7e12,
        bf16=25.5e12,
        source=_GA102,
    ),
    "rtx-3090": Accelerator(
        name="GeForce RTX 3090",
        memory=24 << 30,
        fp32=35.6e12,
        bf16=71.0e12,
        source=_GA102,
    ),
    "rtx-4090": Accelerator(
        name="GeForce RTX 4090",
        memory=24 << 30,
        fp32=82.6e12,
        bf16=165.2e12,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
        "nvidia-ada-gpu-architecture.pdf",
    ),
    "t4": Accelerator(
        name="T4",
        memory=16 << 30,
        fp32=8.1e12,
        bf16=None,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/"
        "t4-tensor-core-datasheet-951643.pdf",
    ),
    "l4": Accelerator(
        name="L4",
        memory=24 << 30,
        fp32=30.3e12,
        bf16=121.0e12,
        source="https://www.nvidia.com/en-us/data-center/l4/",
    ),
    "a10": Accelerator(
        name="A10",
        memory=24 << 30,
        fp32=31.2e12,
        bf16=125.0e12,
        source="https://www.nvidia.com/en-us/data-center/products/a10-gpu/",
    ),
    "a100-40": Accelerator(
        name="A100 40 GB",
        memory=40 << 30,
        fp32=19.5e12,
        bf16=312.0e12,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "a100-80": Accelerator(
        name="A100 80 GB",
        memory=80 << 30,
        fp32=19.5e12,
        bf16=312.0e12,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "h100": Accelerator(
        name="H100 SXM",
        memory=80 << 30,
        fp32=67.0e12,
        bf16=989.4e12,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h200": Accelerator(
        name="H200 SXM",
        memory=141 * 10**9,
        fp32=67.0e12,
        bf16=989.4e12,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
}
"""Graphics cards by the name that a user gives; dense rates, without sparsity."""

UTILISATION = 0.35
"""The share of its peak that a training is assumed to reach: an assumption, not a measurement."""
CONTEXT_BYTES = 700 * 10**6
"""The device memory that CUDA and its libraries are assumed to take."""


def devices_needed(memory: Memory, device: Accelerator) -> int | None:
    """The fewest devices whose memory suffices for a training; None if no number does.

    More than one shard it as FSDP does. If the unsharded part is too large, the batch must be
    smaller.
    """
    room = device.memory - CONTEXT_BYTES
    counts = [*range(1, 8), *range(8, 1025, 8)]
    return next((n for n in counts if memory.sharded(n).total <= room), None)
