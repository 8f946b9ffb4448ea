"""`transformers`' GPT-2 with our weights, so that both can be seen to do the same work."""

from __future__ import annotations

import os

# before the import: nothing is fetched, nothing is reported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from gpt.model.model import GPT

# advice to users, which would stand between the tables
logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@torch.no_grad()
def transformers_copy(model: GPT) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` with the weights of `model`; as there, no token ends a text."""
    config = model.config
    copy = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            tie_word_embeddings=config.tie_weights,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    ours = dict(model.named_parameters())
    transposed = {
        f"{name}.weight" for name, module in copy.named_modules() if isinstance(module, Conv1D)
    }
    for name, parameter in copy.named_parameters():
        weight = ours[name.removeprefix("transformer.")]
        parameter.copy_(weight.t() if name in transposed else weight)
    return copy
