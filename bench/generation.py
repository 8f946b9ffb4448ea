"""Greedy generation, one stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Comparison, Machine, Settings, alternate
from bench.peers import transformers_copy
from gpt.config import GPT2_SIZES, GPTConfig
from gpt.generate import generate
from gpt.model import GPT


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """Our decoding against that of `transformers`; both must give the same tokens."""
    name, config, prompt, new = "124M", GPT2_SIZES["124M"], 32, 100
    if settings.quick:
        name, prompt, new = "tiny", 8, 24
        config = GPTConfig(vocab_size=4096, context_length=64, n_layer=4, n_head=4, n_embd=256)
    torch.manual_seed(0)
    model = GPT(config).eval()
    peer = transformers_copy(model).eval()  # type: ignore[no-untyped-call]
    idx = torch.randint(config.vocab_size, (1, prompt))
    mask = torch.ones_like(idx)
    seconds = alternate(
        {
            "ours": lambda: generate(model, idx, new),
            "transformers": lambda: peer.generate(
                idx, attention_mask=mask, max_new_tokens=new, do_sample=False
            ),
        },
        settings.rounds,
        agree=torch.equal,
        peak=machine.memory,
    )
    yield Comparison(
        title=f"Greedy generation, {name}, one stream, {prompt} + {new} tokens, fp32",
        work=new,
        unit="tokens",
        seconds=seconds,
        peak=machine.memory,
        cost=bytes_per_token(model, prompt + new / 2),
    )


def bytes_per_token(model: GPT, length: float) -> float:
    """What must be read for a token of one stream with `length` positions before it.

    Every weight but the position embeddings (the head being the token embeddings), and the keys
    and values of each layer.
    """
    config = model.config
    n_params = model.n_params - model.wpe.weight.numel()
    return model.wte.weight.element_size() * (
        n_params + 2 * config.n_layer * config.n_embd * length
    )
