"""A GPT-2 core: tensors and text, nothing of the tools that run it.

The public names are resolved on first use, so that importing one module of the core
never imports (or makes a caller depend on) the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.config import GPTConfig as GPTConfig
    from gpt.errors import InputError as InputError
    from gpt.generate import generate as generate
    from gpt.model import GPT as GPT
    from gpt.model import GPTClassifier as GPTClassifier
    from gpt.tokenizer import Tokenizer as Tokenizer
    from gpt.tokenizer import load_tokenizer as load_tokenizer
    from gpt.weights import load_model as load_model
    from gpt.weights import save_model as save_model

_HOME = {
    "GPT": "gpt.model",
    "GPTClassifier": "gpt.model",
    "GPTConfig": "gpt.config",
    "InputError": "gpt.errors",
    "Tokenizer": "gpt.tokenizer",
    "generate": "gpt.generate",
    "load_model": "gpt.weights",
    "load_tokenizer": "gpt.tokenizer",
    "save_model": "gpt.weights",
}
__all__ = [
    "GPT",
    "GPTClassifier",
    "GPTConfig",
    "InputError",
    "Tokenizer",
    "generate",
    "load_model",
    "load_tokenizer",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
