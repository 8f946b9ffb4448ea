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
    from gpt.errors import RunError as RunError
    from gpt.inference import Score as Score
    from gpt.inference import classify as classify
    from gpt.inference import generate as generate
    from gpt.inference import score as score
    from gpt.model import GPT as GPT
    from gpt.model import GPTClassifier as GPTClassifier
    from gpt.tokenizer import Tokenizer as Tokenizer
    from gpt.tokenizer import load_tokenizer as load_tokenizer
    from gpt.weights import load_model as load_model
    from gpt.weights import save_model as save_model

# No name here is a module's: once that module is imported, the package's attribute is the module.
_HOME = {
    "GPT": "gpt.model",
    "GPTClassifier": "gpt.model",
    "GPTConfig": "gpt.config",
    "InputError": "gpt.errors",
    "RunError": "gpt.errors",
    "Score": "gpt.inference",
    "Tokenizer": "gpt.tokenizer",
    "classify": "gpt.inference",
    "generate": "gpt.inference",
    "load_model": "gpt.weights",
    "load_tokenizer": "gpt.tokenizer",
    "save_model": "gpt.weights",
    "score": "gpt.inference",
}
__all__ = [
    "GPT",
    "GPTClassifier",
    "GPTConfig",
    "InputError",
    "RunError",
    "Score",
    "Tokenizer",
    "classify",
    "generate",
    "load_model",
    "load_tokenizer",
    "save_model",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
