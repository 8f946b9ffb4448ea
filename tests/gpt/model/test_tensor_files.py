"""A model's file, written whole or not at all."""

import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.model.model import GPTClassifier
from gpt.model.weights import save_model
from gpt.tokens.tokenizer import byte_tokenizer

FORMAT = {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["tied", "untied, no bias", "classifier"])
def test_a_models_file_has_the_bytes_of_the_library(make_model, tmp_path, kind, dtype):
    model = make_model(tie_weights=kind != "untied, no bias", qkv_bias=kind != "untied, no bias")
    if kind == "classifier":
        model = GPTClassifier(model.config, ["ham", "spam"])
    save_model(model.to(dtype), tmp_path / "m", tokenizer=byte_tokenizer())
    path = tmp_path / "m" / "model.safetensors"
    save_file(load_file(path), tmp_path / "theirs", FORMAT)
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_model_that_cannot_be_written_whole_leaves_the_old_one(make_model, tmp_path):
    """It fails at the last tensor, when most of the file is there."""
    save_model(make_model(), tmp_path / "m", tokenizer=byte_tokenizer())
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    broken = make_model(seed=1)
    broken.wte.weight = torch.nn.Parameter(torch.empty(257, 32, device="meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        save_model(broken, tmp_path / "m", tokenizer=byte_tokenizer())
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_others_may_read_the_file_as_they_may_the_rest(make_model, tmp_path):
    save_model(make_model(), tmp_path / "m", tokenizer=byte_tokenizer())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()}
    assert len(modes) == 1
