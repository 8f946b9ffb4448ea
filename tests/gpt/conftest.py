"""Small models for the tests of the core."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.base.errors import RunError
from gpt.engine import compiling, decode
from gpt.model.config import GPTConfig
from gpt.model.model import GPT

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


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the compiled engine; without a compiler its tests are skipped."""
    folder = tmp_path_factory.mktemp("cache") / "gpt-pipeline"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiling.CACHE_VARIABLE, str(folder))
        try:
            compiling.compile_and_wait(decode.SOURCE)
        except RunError as error:
            if _compiles_openmp(tmp_path_factory.mktemp("probe")):
                raise  # the compiler works: the source does not
            pytest.skip(f"no C++ compiler with OpenMP: {error}")
    return folder


def _compiles_openmp(folder: Path) -> bool:
    source = folder / "probe.cpp"
    source.write_text("#include <omp.h>\nint n() { return omp_get_max_threads(); }\n")
    try:
        command = [
            *compiling._compiler(),
            *compiling._FLAGS,
            "-o",
            str(folder / "probe.so"),
            str(source),
        ]
    except compiling.UnavailableError:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def compiled(compiled_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiled engine is in the cache, and this process has not looked yet."""
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(compiled_cache))
    decode._library.cache_clear()
    monkeypatch.setattr(decode, "_started", False)
    return compiled_cache
