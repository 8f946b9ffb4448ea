"""A GPT-2 core: tensors and text, nothing of the tools that run it.

The public names are resolved on first use, so that importing one module of the core
never imports (or makes a caller depend on) the others.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.base.errors import InputError, RunError
    from gpt.inference import Score, classify, generate, score
    from gpt.model.config import GPTConfig
    from gpt.model.model import GPT, GPTClassifier
    from gpt.model.weights import load_model, save_model
    from gpt.tokens.tokenizer import Tokenizer, load_tokenizer

# No name here is a module's: once that module is imported, the package's attribute is the module.
_MODULE_OF = {
    "GPT": "gpt.model.model",
    "GPTClassifier": "gpt.model.model",
    "GPTConfig": "gpt.model.config",
    "InputError": "gpt.base.errors",
    "RunError": "gpt.base.errors",
    "Score": "gpt.inference",
    "Tokenizer": "gpt.tokens.tokenizer",
    "classify": "gpt.inference",
    "generate": "gpt.inference",
    "load_model": "gpt.model.weights",
    "load_tokenizer": "gpt.tokens.tokenizer",
    "save_model": "gpt.model.weights",
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
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


_MOVED = {
    "gpt.checkpoint": "gpt.train.checkpoint",
    "gpt.config": "gpt.model.config",
    "gpt.data": "gpt.batches.data",
    "gpt.decode": "gpt.engine.decode",
    "gpt.errors": "gpt.base.errors",
    "gpt.generate": "gpt.generation",
    "gpt.metrics": "gpt.batches.metrics",
    "gpt.tokenizer": "gpt.tokens.tokenizer",
    "gpt.weights": "gpt.model.weights",
}


class _MovedModules:
    """The last finder of modules that Python asks: says where a module is that has moved."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in _MOVED:
            raise ModuleNotFoundError(
                f"{name} is {_MOVED[name]} now; a model that was registered before brings its own "
                "gpt: load it in a process that has not imported this one"
            )


sys.meta_path.append(_MovedModules)
