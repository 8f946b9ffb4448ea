"""The stage load_gpt2: published files in, a checked model directory out."""

import json
import shutil

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.config import GPT2_SIZES, GPTConfig
from gpt.events import Text
from gpt.model import GPTClassifier
from gpt.tokenizer import byte_tokenizer
from gpt.weights import save_model
from stages.load_gpt2 import LoadGPT2Params, load_gpt2

SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2}
PARAMS = LoadGPT2Params(sample_prompt="Once", sample_tokens=5)


@pytest.fixture
def published(tmp_path):
    """A folder as it is published: written by transformers, in half precision."""
    folder = tmp_path / "published"
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=32, **SIZES)).save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    byte_tokenizer().save(folder)
    return folder


def run(folder, params, weights, **options):
    figures = load_gpt2(
        params,
        weights=weights,
        out=folder / "model",
        metrics=folder / "metrics.json",
        **options,
    )
    assert json.loads((folder / "metrics.json").read_text()) == figures
    return figures


def test_the_model_is_that_of_the_files_in_fp32(tmp_path, published, everything):
    figures = run(tmp_path / "one", PARAMS, published)
    assert list(everything(tmp_path / "one")) == [
        "metrics.json",
        "model/config.json",
        "model/generation_config.json",
        "model/merges.txt",
        "model/model.safetensors",
        "model/vocab.json",
    ]
    before, after = (
        GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (published, tmp_path / "one/model")
    )
    idx = torch.randint(0, 257, (2, 32))
    assert torch.allclose(after(idx).logits, before(idx).logits, atol=1e-4)
    written = load_file(tmp_path / "one/model/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert figures == {
        "parameters": sum(p.numel() for p in before.parameters()),
        "n_layer": 2,
        "n_embd": 16,
        "context_length": 32,
        "vocab_size": 257,
        "perplexity": figures["perplexity"],
        "perplexity_random": figures["perplexity_random"],
    }


def test_equal_runs_give_equal_bytes(tmp_path, published, everything):
    run(tmp_path / "one", PARAMS, published)
    run(tmp_path / "other", PARAMS, published)
    assert everything(tmp_path / "one") == everything(tmp_path / "other")


def test_a_greedy_continuation_shows_that_the_files_work(tmp_path, published):
    heard = []
    run(tmp_path / "one", PARAMS, published, log=heard.append)
    (sample,) = (event for event in heard if isinstance(event, Text))
    theirs = GPT2LMHeadModel.from_pretrained(published, dtype=torch.float32).eval()
    ids = byte_tokenizer().encode("Once")
    for _ in range(5):
        ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    assert sample == Text("samples/greedy.txt", byte_tokenizer().decode(ids))


# --- what is refused ------------------------------------------------------------------------------


def test_files_of_another_size_than_asked_for_are_refused(
    tmp_path, published, refused, monkeypatch
):
    monkeypatch.setitem(GPT2_SIZES, "124M", GPTConfig(vocab_size=257, context_length=32, **SIZES))
    run(tmp_path / "small", LoadGPT2Params(size="124M", sample_tokens=1), published)
    with refused(
        r"published: 2 layers of width 16, but load_gpt2\.size is 355M \(24 of 1024\); "
        r"correct download\.gpt2 or load_gpt2\.size"
    ):
        run(tmp_path / "o", LoadGPT2Params(size="355M"), published)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def add_a_token(folder):
    path = folder / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ab": 257}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (shutil.rmtree, r"published: no such folder; name one that holds published weights"),
        (lambda folder: (folder / "vocab.json").unlink(), r"no vocab\.json or encoder\.json here"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"published: holds no weights; put model\.safetensors",
        ),
        (truncate, r"model\.safetensors: damaged or cut short .*; fetch or make it again"),
        (add_a_token, r"the model has 257 tokens, its vocab\.json 258; take both from the same"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: not a JSON obj"),
    ],
    ids=["folder", "vocabulary", "weights", "truncated", "another vocabulary", "config"],
)
def test_damaged_files_are_refused(tmp_path, published, refused, damage, complaint):
    damage(published)
    with refused(complaint):
        run(tmp_path / "o", PARAMS, published)


def test_a_classifier_is_no_base(tmp_path, refused):
    config = GPTConfig(vocab_size=257, context_length=32, **SIZES)
    save_model(GPTClassifier(config, ["a", "b"]), tmp_path / "c", tokenizer=byte_tokenizer())
    with refused("holds a classifier; a language model is needed"):
        run(tmp_path / "o", PARAMS, tmp_path / "c")


@pytest.mark.parametrize("wrong", [{"size": "7B"}, {"sample_tokens": 0}, {"sample_prompt": ""}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(LoadGPT2Params).validate_python(wrong)
