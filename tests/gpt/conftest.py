"""Small models for the tests of the core."""

from collections.abc import Callable

import pytest
import torch

from gpt.config import GPTConfig
from gpt.model import GPT

MakeModel = Callable[..., GPT]


@pytest.fixture
def make_model() -> MakeModel:
    """A function from changes of the architecture to a small model with random weights.

    The weights are larger than at initialization, so that the model has opinions.
    """

    def make(seed: int = 0, **changes: object) -> GPT:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 257, "context_length": 48, "n_layer": 2, "n_head": 4, "n_embd": 32}
        model = GPT(GPTConfig(**{**sizes, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model.eval()

    return make
