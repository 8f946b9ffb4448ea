"""A GGUF file holds the model and its tokenizer as llama.cpp expects them."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gpt.base.errors import InputError
from gpt.model.weights import load_base
from gpt.published.gguf import read_back, write_gguf
from gpt.tokens.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe

SAMPLES = Path(__file__).resolve().parents[3] / "samples"


def contents(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_the_architecture_and_the_tokenizer_are_under_llama_cpps_keys(make_model, tmp_path):
    tokenizer = train_bpe(["the cat and the hat and the bat " * 20], 270)
    model = make_model(vocab_size=tokenizer.vocab_size)
    write_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer, type="q8_0", name="tiny")
    held = contents(tmp_path / "m.gguf")
    for key, value in {
        "general.architecture": "gpt2",
        "general.name": "tiny",
        "general.file_type": 7,
        "gpt2.context_length": 48,
        "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer.eot,
        "tokenizer.ggml.add_bos_token": False,
    }.items():
        assert held[key] == value, key
    tokens, types = held["tokenizer.ggml.tokens"], held["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == tokenizer.vocab_size
    assert tokens[tokenizer.eot] == END_OF_TEXT
    assert [i for i, kind in enumerate(types) if kind != 1] == [tokenizer.eot]
    assert types[tokenizer.eot] == gguf.TokenType.CONTROL
    assert tokens[tokenizer.encode("the")[0]] == "the"
    assert held["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer.merges]


def test_every_tensor_has_the_name_that_llama_cpps_converter_gives_it(make_model, tmp_path):
    """By the table of the `gguf` package, which that converter goes by."""
    model = make_model(tie_weights=False, n_layer=3)
    write_gguf(model, tmp_path / "m.gguf", tokenizer=byte_tokenizer(), type="f16")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 3)
    held = tensors(tmp_path / "m.gguf")
    for ours, tensor in model.state_dict().items():
        theirs = ours if ours.startswith("lm_head") else f"transformer.{ours}"
        named = held.pop(table.get_name(theirs, try_suffixes=(".weight", ".bias")))
        back = gguf.dequantize(named.data, named.tensor_type)
        assert np.allclose(back, tensor.numpy(), atol=2e-3), ours
    assert not held


def test_the_tokenizer_comes_back_whole(tmp_path):
    """Text that is encoded with the file's own tokens and merges alone gets the same ids."""
    folder = SAMPLES / "gpt2-nano"
    model, tokenizer = load_base(folder)
    write_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer, type="q8_0")
    held = contents(tmp_path / "m.gguf")
    tokens = held["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in held["tokenizer.ggml.merges"]]
    again = Tokenizer({token: i for i, token in enumerate(tokens)}, merges)
    assert again.hash == tokenizer.hash
    for key in ("bos", "eos"):
        assert tokens[held[f"tokenizer.ggml.{key}_token_id"]] == END_OF_TEXT
    assert held["gpt2.vocab_size"] == len(tokens) == model.config.vocab_size


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_llama_cpp_finds_every_tensor_that_it_asks_for(make_model, tmp_path, qkv_bias, tie_weights):
    """It asks for all of these; a head of its own may be missing."""
    model = make_model(qkv_bias=qkv_bias, tie_weights=tie_weights)
    write_gguf(model, tmp_path / "m.gguf", tokenizer=byte_tokenizer(), type="f16")
    norms = {f"{kind}_norm.{leaf}" for kind in ("attn", "ffn") for leaf in ("weight", "bias")}
    layers = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    matrices = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    wanted = {f"blk.{i}.{name}" for i in range(2) for name in norms | matrices}
    wanted |= {"token_embd.weight", "position_embd.weight"}
    wanted |= {"output_norm.weight", "output_norm.bias"}
    held = tensors(tmp_path / "m.gguf")
    assert held.keys() == wanted | (set() if tie_weights else {"output.weight"})
    assert list(held["blk.0.attn_qkv.weight"].shape) == [32, 96]  # GGUF's order: the inner first
    assert held["blk.1.attn_qkv.bias"].data.any() == qkv_bias
    head = held.get("output.weight", held["token_embd.weight"]).data
    assert np.array_equal(head, model.head_weight.detach().half().numpy())


def test_what_is_read_back_is_what_was_written_to_the_types_precision(make_model, tmp_path):
    model = make_model(n_embd=64)
    for kind in ("f16", "q8_0"):
        write_gguf(model, tmp_path / "m.gguf", tokenizer=byte_tokenizer(), type=kind)
        copy = make_model(seed=1, n_embd=64)
        read_back(tmp_path / "m.gguf", copy)
        for name, tensor in model.state_dict().items():
            back = copy.state_dict()[name]
            if tensor.dim() == 1 or name == "wpe.weight":
                assert torch.equal(back, tensor), name
            elif kind == "f16":
                assert torch.equal(back, tensor.half().float()), name
            else:
                blocks = tensor.reshape(-1, 32)
                half_a_step = blocks.abs().amax(1, keepdim=True) / 127 / 2
                # the scale is in half precision: 127 of them are off by up to 127 / 2048 of a step
                bound = half_a_step * (1 + 2 * 127 / 2048)
                assert ((back.reshape(-1, 32) - blocks).abs() <= bound).all(), name
                assert not torch.equal(back, tensor), name


def test_rows_that_eight_bits_cannot_divide_are_in_half_precision(make_model, tmp_path):
    model = make_model(n_embd=20)  # 20 is no multiple of 32, an MLP's 80 neither
    write_gguf(model, tmp_path / "m.gguf", tokenizer=byte_tokenizer(), type="q8_0")
    kinds = {tensor.tensor_type for tensor in tensors(tmp_path / "m.gguf").values()}
    assert kinds == {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}


def test_a_tokenizer_without_merges_has_one_that_never_happens(make_model, tmp_path):
    """llama.cpp refuses a file without merges, the `gguf` package to write none."""
    write_gguf(make_model(), tmp_path / "m.gguf", tokenizer=byte_tokenizer(), type="f16")
    merges = contents(tmp_path / "m.gguf")["tokenizer.ggml.merges"]
    assert merges == [f"{END_OF_TEXT} {END_OF_TEXT}"]


@pytest.mark.parametrize(("value", "kind"), [(1e5, "f16"), (float("nan"), "q8_0")])
def test_what_the_type_cannot_hold_is_refused_and_the_old_file_stays(
    make_model, tmp_path, value, kind
):
    model = make_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 3] = value
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds"):
        write_gguf(model, tmp_path / "m.gguf", tokenizer=byte_tokenizer(), type=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF"


def test_a_tokenizer_of_another_model_is_refused(make_model, tmp_path):
    with pytest.raises(InputError, match="the model has 300 tokens, its tokenizer 257"):
        write_gguf(
            make_model(vocab_size=300), tmp_path / "m", tokenizer=byte_tokenizer(), type="f16"
        )


def test_another_models_file_is_not_read_back(make_model, tmp_path):
    write_gguf(make_model(), tmp_path / "m.gguf", tokenizer=byte_tokenizer(), type="f16")
    for other, what in (({"n_layer": 3}, "blk.2"), ({"context_length": 8}, "position_embd")):
        with pytest.raises(InputError, match=f"{what}.*do not belong together"):
            read_back(tmp_path / "m.gguf", make_model(**other))
