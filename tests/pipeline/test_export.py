"""Exported models are the same models in another precision."""

import json

import pytest
import torch

from gpt.config import GPTConfig
from gpt.errors import InputError
from gpt.model import GPT
from gpt.tokenizer import byte_tokenizer
from gpt.weights import load_model, save_model
from pipeline.export import export


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, context_length=16, n_layer=1, n_head=2, n_embd=16))
    extra = {"prompt.json": {"template": "phi3"}}
    save_model(model, tmp_path / "source", tokenizer=byte_tokenizer(), extra=extra)
    return tmp_path / "source"


def test_half_precision_halves_the_file_and_keeps_the_model(source, tmp_path):
    whole = export(source, tmp_path / "whole", "float32")
    half = export(source, tmp_path / "half", "float16")
    assert 1.7 < whole / half < 2.1
    idx = torch.randint(0, 257, (1, 16))
    assert torch.allclose(load_model(tmp_path / "half")(idx), load_model(source)(idx), atol=1e-2)
    assert json.loads((tmp_path / "half" / "prompt.json").read_text()) == {"template": "phi3"}
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()


def test_nothing_but_a_model_is_written_over(source, tmp_path):
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="no model directory; choose another target"):
        export(source, other, "float16")
    assert (other / "letter.txt").read_text() == "dear"
    with pytest.raises(InputError, match="dtype: 'int3' is not known; use one of float32"):
        export(source, tmp_path / "new", "int3")
