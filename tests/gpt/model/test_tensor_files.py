"""A model's file, written whole or not at all."""

import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.model.model import GPTClassifier
from gpt.model.tensor_files import write_safetensors
from gpt.model.weights import save_model
from gpt.tokens.tokenizer import byte_tokenizer

FORMAT = {"format": "pt"}


def test_any_tensors_give_the_bytes_of_the_library(tmp_path):
    """Its order is by type and name; what is a view here is contiguous there."""
    torch.manual_seed(0)
    tensors = {
        "z": torch.randn(3, 5),
        "a.turned": torch.randn(700, 500).t(),
        "half": torch.randn(7).half(),
        "bf": torch.randn(4, 3, 2).bfloat16().transpose(0, 2),
        "double": torch.randn(2, 2).double(),
        "one": torch.tensor(3.5),
        "repeated": torch.zeros(1).expand(300, 2000),
        "none": torch.zeros(0, 4),
        'öde "quoted" \\ name': torch.randn(1),
    }
    write_safetensors(tmp_path / "ours", tensors, FORMAT)
    packed = {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(packed, tmp_path / "theirs", FORMAT)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


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
