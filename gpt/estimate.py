"""What a training takes, from the shapes alone: parameters, memory by part, FLOPs.

Nothing here is run or measured. The activations are what autograd keeps from the forward pass of
`gpt.model.model` for the backward pass, counted layer by layer; a test holds the count against the
real tensors. Korthikanti et al. (2022), "Reducing Activation Recomputation in Large Transformer
Models", section 4, count the same for another model; FLOPs as Chowdhery et al. (2022), "PaLM",
appendix B: 2 a parameter and token forward, twice that backward.

Shapes: B rows, T positions, N = real tokens of a batch, C = n_embd, H heads, V = vocab_size,
L = n_layer. All memory is in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from gpt.model.attention import BLOCK
from gpt.model.config import GPTConfig
from gpt.model.loss import CHUNK_BYTES
from gpt.tune.lora import LoraParams

Kernel = Literal["blocked", "fused"]
"""`gpt.model.attention` on a CPU, which keeps the probabilities; PyTorch's on a graphics card,
which keeps none."""
Optimizer = Literal["adamw", "muon"]

FP32, BF16, INT64 = 4, 2, 8
_LANES = 64  # gpt.model.loss pads the logits' rows to multiples of so many
_SOFTMAX_ROWS = 32  # and takes so many at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What of a model is trained.

    Attributes:
        blocks: the last so many blocks, with them the final norm, and a classifier's head; 0 is
            the head alone; None is everything.
        lora: adapters are trained in place of all that; a classifier's head without an adapter is
            trained whole.
        mean: a classifier's head sees the mean over all positions, and not the last one.
    """

    blocks: int | None = None
    lora: LoraParams | None = None
    mean: bool = False


ALL = Tuning()


# --- parameters -----------------------------------------------------------------------------------


def block_matrices(config: GPTConfig) -> int:
    """The numbers in the four matrices of one block: 12 C²."""
    return 12 * config.n_embd**2


def block_parameters(config: GPTConfig) -> int:
    """The numbers in one block: its matrices, their biases and two norms."""
    C = config.n_embd
    biases = (3 * C if config.qkv_bias else 0) + C + 4 * C + C
    return block_matrices(config) + biases + 4 * C


def n_parameters(config: GPTConfig, classes: int | None = None) -> int:
    """All parameters; a tied head is counted once, a classifier (`classes`) has its own head."""
    C = config.n_embd
    head = 0 if config.tie_weights else config.vocab_size * C
    if classes is not None:
        head = classes * C
    embeddings = (config.vocab_size + config.context_length) * C
    return embeddings + config.n_layer * block_parameters(config) + 2 * C + head


def n_trained(config: GPTConfig, tuning: Tuning = ALL, classes: int | None = None) -> int:
    """The parameters that get gradients."""
    C = config.n_embd
    head = 0 if classes is None else classes * C
    if tuning.lora is not None:
        whole = 0 if "head" in tuning.lora.layers else head
        return n_adapters(config, tuning.lora, classes) + whole
    if tuning.blocks is None:
        return n_parameters(config, classes)
    norm = 2 * C if tuning.blocks else 0
    return tuning.blocks * block_parameters(config) + norm + head


def n_adapters(config: GPTConfig, lora: LoraParams, classes: int | None = None) -> int:
    """The parameters of the adapters: rank x (inputs + outputs) of each matrix that has one."""
    blocks = config.n_layer - trunk_depth(config, Tuning(lora=lora))
    head = 0
    if "head" in lora.layers:
        head = lora.rank * (config.n_embd + (classes or config.vocab_size))
    return blocks * _block_adapters(config, lora) + head


def _block_adapters(config: GPTConfig, lora: LoraParams) -> int:
    """Those of one block."""
    C = config.n_embd
    outputs = {"attn.c_attn": 3 * C, "mlp.c_fc": 4 * C}
    total = 0
    for name, thirds in lora.in_blocks.items():
        inside = 4 * C if name == "mlp.c_proj" else C
        total += len(thirds) * 2 * C if thirds else inside + outputs.get(name, C)
    return lora.rank * total


def n_multiplied(config: GPTConfig) -> int:
    """The parameters in a matrix product: all but embeddings that are only looked up."""
    looked_up = config.context_length + (0 if config.tie_weights else config.vocab_size)
    return n_parameters(config) - looked_up * config.n_embd


# --- FLOPs ----------------------------------------------------------------------------------------


def flops_per_token(config: GPTConfig, length: int) -> float:
    """What a step computes for a token: 6 a parameter, and attention over `length` positions.

    Forward 2 and backward 4 for each parameter in a matrix product, all but the position
    embeddings in a model whose head is tied; attention's two products as if every position saw
    all others, as is usual (Chowdhery et al., 2022, "PaLM", appendix B).
    """
    return 6 * n_multiplied(config) + 12 * config.n_layer * config.n_embd * length


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The shape of a batch.

    Attributes:
        rows: B.
        length: T, to which all rows are padded.
        tokens: N, the real tokens among B x T.
        targets: how many logits are made: next tokens that count; of a classifier its rows.
    """

    rows: int
    length: int
    tokens: int
    targets: int

    @classmethod
    def full(cls, rows: int, length: int) -> Shape:
        """Rows without padding, each position a target."""
        return cls(rows=rows, length=length, tokens=rows * length, targets=rows * length)


def forward_flops(config: GPTConfig, shape: Shape) -> float:
    """A language model's forward pass; the head is computed where a target counts."""
    head = 2 * config.vocab_size * config.n_embd * shape.targets
    return config.n_layer * _block_flops(config, shape) + head


def _block_flops(config: GPTConfig, shape: Shape) -> float:
    """One block's forward pass."""
    positions = shape.rows * shape.length
    attention = 4 * config.n_embd * shape.length * positions
    return 2 * block_parameters(config) * positions + attention


def step_flops(config: GPTConfig, shape: Shape, tuning: Tuning = ALL) -> float:
    """Forward and backward of a language model: all of it is trained, or adapters (`lora`) are.

    A frozen matrix beside adapters costs one product backward and not two.
    """
    everything = forward_flops(config, shape)
    if tuning.lora is None:
        return 3 * everything
    depth = trunk_depth(config, tuning)
    frozen = depth * _block_flops(config, shape)
    n = shape.rows * shape.length
    adapters = (config.n_layer - depth) * _block_adapters(config, tuning.lora)
    # nothing goes back through the first block's c_attn
    first = 2 * 3 * config.n_embd**2 * n if depth < config.n_layer else 0
    return frozen + 2 * (everything - frozen) + 3 * 2 * adapters * n - first


def trunk_flops(config: GPTConfig, shape: Shape, depth: int, *, mean: bool = False) -> float:
    """Forward through a classifier's first `depth` blocks; of the last one only the last place.

    `mean`: all places of the last block are wanted too.
    """
    C = config.n_embd
    block = _block_flops(config, shape)
    if mean:
        return depth * block
    last = 4 * C**2 * shape.tokens + shape.rows * (20 * C**2 + 4 * C * shape.length)
    whole = min(depth, config.n_layer - 1)
    return whole * block + (last if depth == config.n_layer else 0)


def classifier_flops(
    config: GPTConfig, shape: Shape, tuning: Tuning, classes: int, *, kept: bool
) -> float:
    """A step of a classifier: forward all of it, backward what is trained.

    A frozen matrix beside adapters costs one product backward and not two.

    Args:
        config: the architecture.
        shape: of the batch.
        tuning: what of it is trained.
        classes: of the head.
        kept: what the frozen blocks make of the texts was computed before.
    """
    depth = trunk_depth(config, tuning)
    everything = trunk_flops(config, shape, config.n_layer, mean=tuning.mean)
    frozen = trunk_flops(config, shape, depth, mean=tuning.mean)
    head = 2 * config.n_embd * classes * shape.rows
    own = everything - frozen + head
    before = 0 if kept else frozen
    if tuning.lora is None:
        return before + 3 * own
    adapters = (config.n_layer - depth) * _block_adapters(config, tuning.lora)
    return before + 2 * own + 3 * 2 * adapters * shape.rows * shape.length


def trunk_depth(config: GPTConfig, tuning: Tuning) -> int:
    """How many blocks come before what is trained."""
    own = config.n_layer if tuning.blocks is None else tuning.blocks
    if tuning.lora is not None:
        own = (tuning.lora.blocks or config.n_layer) if tuning.lora.in_blocks else 0
    return config.n_layer - own


# --- memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """The bytes of each part of a training's memory; not all of them are full at one moment."""

    weights: int = 0
    copies: int = 0
    """bf16 copies of the matrices, made once a step under autocast."""
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """What autograd keeps of the forward pass."""
    loss: int = 0
    """A chunk of logits, and the gradients that are taken while it is there."""
    best: int = 0
    """A copy of the weights that validated best."""
    kv_cache: int = 0
    """Keys and values while a sample is written."""
    features: int = 0
    """What a classifier's frozen blocks made of the texts."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def sharded(self, devices: int) -> Memory:
        """One device's share where weights, gradients and optimizer are spread over `devices`.

        As FSDP does it: each device has rows of its own and holds whole what they need, and one
        block's weights at a time, which is left out here.
        """

        def share(size: int) -> int:
            return -(-size // devices)

        return replace(
            self,
            weights=share(self.weights),
            gradients=share(self.gradients),
            optimizer=share(self.optimizer),
            best=share(self.best),
        )


def optimizer_bytes(
    config: GPTConfig,
    tuning: Tuning = ALL,
    classes: int | None = None,
    optimizer: Optimizer = "adamw",
) -> int:
    """AdamW keeps two numbers a parameter, Muon one for each in a block's matrices."""
    numbers = 2 * n_trained(config, tuning, classes)
    if optimizer == "muon":
        lora = tuning.lora
        one = block_matrices(config) if lora is None else _block_adapters(config, lora)
        numbers -= (config.n_layer - trunk_depth(config, tuning)) * one
    return FP32 * numbers


def kv_cache_bytes(config: GPTConfig, rows: int, length: int) -> int:
    """Keys and values of all layers for `rows` of up to `length` positions, in fp32."""
    return 2 * FP32 * config.n_layer * config.n_embd * rows * min(length, config.context_length)


def attention_probabilities(length: int) -> int:
    """The probabilities that the blocked kernel keeps for one head of one row: about T² / 2."""
    return sum(
        (min(length, start + BLOCK) - start) * min(length, start + BLOCK)
        for start in range(0, length, BLOCK)
    )


def _block_activations(
    config: GPTConfig, rows: int, length: int, bf16: bool, kernel: Kernel
) -> int:
    """What one block keeps for its backward pass, where all of it is trained.

    In numbers a position: the inputs of both norms (2 C, fp32 always, with mean and deviation),
    of the four matrices (C, C, C and 4 C), queries, keys and values (3 C) and the input of GELU
    (4 C), in the precision of the products.
    """
    C, H = config.n_embd, config.n_head
    n = rows * length
    size = BF16 if bf16 else FP32
    kept = n * (2 * C * FP32 + 4 * FP32 + 14 * C * size)
    cpu = kernel == "blocked"
    if cpu:
        probabilities = rows * H * attention_probabilities(length)
        kept += probabilities * size
        if config.dropout:
            kept += probabilities  # which were dropped, a byte each
    else:
        kept += rows * H * length * FP32  # the logarithm of each query's sum
    if config.dropout:  # after both projections; a CPU keeps factors, a graphics card bytes
        kept += 2 * n * C * (size if cpu else 1)
    return kept


def _adapter_activations(
    config: GPTConfig, lora: LoraParams, rows: int, length: int, bf16: bool, kernel: Kernel
) -> int:
    """What one block keeps more with adapters than where all of it is trained; below 0 if less.

    A frozen matrix keeps no input. Its adapters do, and what their first matrix makes of it; with
    dropout also which of it was dropped.
    """
    C, n, size = config.n_embd, rows * length, BF16 if bf16 else FP32
    numbers, dropped = -7 * C, 0
    for name, thirds in lora.in_blocks.items():
        inside = 4 * C if name == "mlp.c_proj" else C
        numbers += inside + (len(thirds) or 1) * lora.rank
        dropped += inside if lora.dropout else 0
    return n * numbers * size + n * dropped * (size if kernel == "blocked" else 1)


def _last_activations(config: GPTConfig, shape: Shape, bf16: bool, *, feeds_back: bool) -> int:
    """What the last block of a classifier keeps: keys and values everywhere, one query a row.

    `feeds_back`: something before it is trained too.
    """
    C, B, T, N = config.n_embd, shape.rows, shape.length, shape.tokens
    size = BF16 if bf16 else FP32
    # the norm's input and its deviation, the input of keys and values, both of them padded
    kept = N * (C + 2) * FP32 + N * C * size + 2 * B * T * C * size
    mask = B * T * size if bf16 else B * T  # which positions are real
    rows = B * (2 * C * FP32 + 16 * C * size)
    if config.dropout:
        mask += B * config.n_head * T * (FP32 + size)
        rows += 2 * B * C * size
    return kept + mask + rows + (N * INT64 if feeds_back else 0)


def lm_activations(
    config: GPTConfig, shape: Shape, *, bf16: bool, kernel: Kernel, tuning: Tuning = ALL
) -> int:
    """What autograd keeps of a language model's forward pass, without its loss.

    All of it is trained, or adapters (`lora`) are: before the first of them nothing is kept.
    """
    n, C = shape.rows * shape.length, config.n_embd
    block = _block_activations(config, shape.rows, shape.length, bf16, kernel)
    kept = n * (C + 2) * FP32  # the input of the final norm
    if shape.targets < n:
        kept += 2 * INT64 * shape.targets  # where the targets are
    if tuning.lora is not None:
        own = config.n_layer - trunk_depth(config, tuning)
        block += _adapter_activations(config, tuning.lora, shape.rows, shape.length, bf16, kernel)
        # the first norm is frozen, and nothing before it is trained
        return kept + own * block - ((C + 2) * FP32 * n if own else kept)
    kept += config.n_layer * block + n * INT64  # the ids
    if config.dropout:
        kept += n * C * (FP32 if kernel == "blocked" else 1)
    return kept


def classifier_activations(
    config: GPTConfig, shape: Shape, tuning: Tuning, *, bf16: bool, kernel: Kernel
) -> int:
    """What autograd keeps of a classifier's forward pass.

    Before what is trained nothing is kept, whether or not it was computed beforehand.
    """
    B, C = shape.rows, config.n_embd
    size = BF16 if bf16 else FP32
    head = B * C * size + 2 * INT64 * B  # its input, the classes
    if tuning.lora is not None and "head" in tuning.lora.layers:
        head += B * tuning.lora.rank * size
    own = config.n_layer - trunk_depth(config, tuning)
    if not own:
        return head
    embeds = tuning.lora is None and tuning.blocks is None
    n = B * shape.length
    kept = n * INT64 if embeds else 0
    if embeds and config.dropout:
        kept += n * C * (FP32 if kernel == "blocked" else 1)
    block = _block_activations(config, B, shape.length, bf16, kernel)
    if tuning.lora is not None:
        block += _adapter_activations(config, tuning.lora, B, shape.length, bf16, kernel)
    whole = own if tuning.mean else own - 1
    kept += whole * block
    if tuning.lora is not None:  # the first norm is frozen, and nothing before it is trained
        kept -= (C + 2) * FP32 * (n if whole else shape.tokens)
    if whole:
        kept += 2 * INT64 * shape.tokens  # where the real positions are
    if tuning.mean:
        return kept + shape.tokens * (C + 2) * FP32 + B * INT64 + head
    ends = B * (C + 2) * FP32 + head  # the final norm before it
    kept += _last_activations(config, shape, bf16, feeds_back=embeds or own > 1)
    if tuning.lora is not None:
        kept += shape.tokens * tuning.lora.rank * size * len(tuning.lora.in_blocks)
    return kept + ends


def lm_loss_kept(config: GPTConfig, targets: int) -> int:
    """What the chunked loss keeps for the backward pass: both gradients, in fp32."""
    return FP32 * config.n_embd * (targets + _padded(config.vocab_size))


def lm_loss_bytes(config: GPTConfig, targets: int, *, bf16: bool) -> int:
    """The chunked loss at its largest: what it keeps, one chunk of logits and its softmax."""
    size = BF16 if bf16 else FP32
    width = _padded(config.vocab_size)
    chunks = max(1, -(-targets * width * size // CHUNK_BYTES))
    rows = -(-targets // chunks)
    softmax = 2 * FP32 * min(rows, _SOFTMAX_ROWS) * config.vocab_size
    return lm_loss_kept(config, targets) + rows * width * size + softmax


def pair_loss_kept(config: GPTConfig, targets: int, *, bf16: bool) -> int:
    """What the loss of preference tuning keeps: every target's log-probabilities in fp32.

    And the head's input, where the head is trained (`gpt.tune.preference`).
    """
    head = targets * config.n_embd * (BF16 if bf16 else FP32)
    return FP32 * targets * config.vocab_size + head + 3 * INT64 * targets


def pair_loss_bytes(config: GPTConfig, targets: int, *, bf16: bool) -> int:
    """That loss at its largest, in the backward pass: two gradients of the same size beside it."""
    gradients = 2 * FP32 + (BF16 if bf16 else 0)
    kept = pair_loss_kept(config, targets, bf16=bf16)
    return kept + gradients * targets * config.vocab_size


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // _LANES) * _LANES


def lm_memory(
    config: GPTConfig,
    shape: Shape,
    *,
    bf16: bool,
    kernel: Kernel,
    optimizer: Optimizer = "adamw",
    keep_best: bool = True,
    cache: tuple[int, int] = (0, 0),
    tuning: Tuning = ALL,
    pairs: bool = False,
) -> Memory:
    """A language model's training.

    Args:
        config: the architecture.
        shape: of the largest batch.
        bf16: products in bf16 under autocast.
        kernel: of the attention.
        optimizer: by name.
        keep_best: whether the weights of the best validation are kept.
        cache: rows and length of a sample, (0, 0) for none.
        tuning: everything of it is trained, or adapters are.
        pairs: the loss is that of preference tuning.
    """
    adapters = 0 if tuning.lora is None else n_adapters(config, tuning.lora)
    weights = FP32 * (n_parameters(config) + adapters)
    loss = pair_loss_bytes if pairs else lm_loss_bytes
    return Memory(
        weights=weights,
        copies=BF16 * _copied(config, tuning) if bf16 else 0,
        gradients=FP32 * n_trained(config, tuning),
        optimizer=optimizer_bytes(config, tuning, optimizer=optimizer),
        activations=lm_activations(config, shape, bf16=bf16, kernel=kernel, tuning=tuning),
        loss=loss(config, shape.targets, bf16=bf16),
        best=weights if keep_best else 0,
        kv_cache=kv_cache_bytes(config, *cache),
    )


def _copied(config: GPTConfig, tuning: Tuning) -> int:
    """The numbers of a language model that are held in bf16 as well: what is gone back through."""
    if tuning.lora is None:
        return n_multiplied(config)
    blocks = config.n_layer - trunk_depth(config, tuning)
    first = 3 * config.n_embd**2 if blocks else 0  # nothing goes back through its c_attn
    matrices = blocks * block_matrices(config) - first
    return matrices + config.vocab_size * config.n_embd + n_adapters(config, tuning.lora)


def classifier_memory(
    config: GPTConfig,
    shape: Shape,
    tuning: Tuning,
    classes: int,
    *,
    bf16: bool,
    kernel: Kernel,
    optimizer: Optimizer = "adamw",
    keep_best: bool = True,
    features: int = 0,
) -> Memory:
    """A classifier's training.

    Args:
        config: the architecture of the base.
        shape: of the largest batch.
        tuning: what of the model is trained.
        classes: of the head.
        bf16: products in bf16 under autocast.
        kernel: of the attention.
        optimizer: by name.
        keep_best: whether the weights of the best validation are kept.
        features: vectors that the frozen blocks made beforehand, 0 where nothing is kept; then
            `fit` sees, and copies, only what comes after those blocks.
    """
    own = n_trained(config, tuning, classes)
    everything = n_parameters(config, classes)
    blocks = config.n_layer - trunk_depth(config, tuning)
    # what comes after the frozen blocks: trained, or with adapters beside it
    top = blocks * block_parameters(config) + (2 + classes) * config.n_embd
    if tuning.lora is not None:
        added = n_adapters(config, tuning.lora, classes)
        everything, top = everything + added, top + added
    multiplied = top if blocks else own
    if tuning.lora is not None and blocks:
        multiplied -= 3 * config.n_embd**2  # nothing goes back through the first c_attn
    return Memory(
        weights=FP32 * everything,
        copies=BF16 * multiplied if bf16 else 0,
        gradients=FP32 * own,
        optimizer=optimizer_bytes(config, tuning, classes, optimizer),
        activations=classifier_activations(config, shape, tuning, bf16=bf16, kernel=kernel),
        best=FP32 * (top if features else everything) if keep_best else 0,
        features=features * config.n_embd * (BF16 if bf16 else FP32),
    )


# --- devices --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """A graphics card as its maker describes it.

    Attributes:
        name: in words.
        memory: in bytes.
        fp32: peak of products in fp32, FLOP/s, without tensor cores (PyTorch's default).
        bf16: peak of dense products in bf16, summed in fp32; None where there is no bf16.
        source: the page or paper that says so.
    """

    name: str
    memory: int
    fp32: float
    bf16: float | None
    source: str

    def peak(self, *, bf16: bool) -> float:
        """Of products in that precision."""
        return self.bf16 if bf16 and self.bf16 else self.fp32


_TERA, _GIB = 1e12, 1 << 30
_GA102 = (
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)

ACCELERATORS: dict[str, Accelerator] = {
    # the paper gives the 3090's rate (71 for 328 tensor cores at 1.695 GHz); 112 at 1.777 GHz
    "rtx-3060": Accelerator(
        name="GeForce RTX 3060",
        memory=12 * _GIB,
        fp32=12.7 * _TERA,
        bf16=25.5 * _TERA,
        source=_GA102,
    ),
    "rtx-3090": Accelerator(
        name="GeForce RTX 3090",
        memory=24 * _GIB,
        fp32=35.6 * _TERA,
        bf16=71.0 * _TERA,
        source=_GA102,
    ),
    "rtx-4090": Accelerator(
        name="GeForce RTX 4090",
        memory=24 * _GIB,
        fp32=82.6 * _TERA,
        bf16=165.2 * _TERA,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
        "nvidia-ada-gpu-architecture.pdf",
    ),
    "t4": Accelerator(
        name="T4",
        memory=16 * _GIB,
        fp32=8.1 * _TERA,
        bf16=None,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/"
        "t4-tensor-core-datasheet-951643.pdf",
    ),
    "l4": Accelerator(
        name="L4",
        memory=24 * _GIB,
        fp32=30.3 * _TERA,
        bf16=121.0 * _TERA,
        source="https://www.nvidia.com/en-us/data-center/l4/",
    ),
    "a10": Accelerator(
        name="A10",
        memory=24 * _GIB,
        fp32=31.2 * _TERA,
        bf16=125.0 * _TERA,
        source="https://www.nvidia.com/en-us/data-center/products/a10-gpu/",
    ),
    "a100-40": Accelerator(
        name="A100 40 GB",
        memory=40 * _GIB,
        fp32=19.5 * _TERA,
        bf16=312.0 * _TERA,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "a100-80": Accelerator(
        name="A100 80 GB",
        memory=80 * _GIB,
        fp32=19.5 * _TERA,
        bf16=312.0 * _TERA,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "h100": Accelerator(
        name="H100 SXM",
        memory=80 * _GIB,
        fp32=67.0 * _TERA,
        bf16=989.4 * _TERA,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h200": Accelerator(
        name="H200 SXM",
        memory=141 * 10**9,
        fp32=67.0 * _TERA,
        bf16=989.4 * _TERA,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
}
"""Graphics cards by the name they are asked for; dense rates, without sparsity."""

UTILISATION = 0.35
"""The share of its peak that a training is assumed to reach: an assumption, not a measurement."""
CONTEXT_BYTES = 700 * 10**6
"""What CUDA and its libraries are assumed to take of a device's memory."""


def devices_needed(memory: Memory, device: Accelerator, most: int = 1024) -> int | None:
    """The fewest devices that hold a training; None where no number does.

    More than one as FSDP shards; where what is not sharded is too large, a smaller batch is needed.
    """
    room = device.memory - CONTEXT_BYTES
    return next((n for n in _counts(most) if memory.sharded(n).total <= room), None)


def _counts(most: int) -> Sequence[int]:
    return [n for n in (1, 2, 3, 4, 5, 6, 7, *range(8, most + 1, 8)) if n <= most]
