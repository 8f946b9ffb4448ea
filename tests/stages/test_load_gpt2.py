"""The stage load_gpt2: published files in, a checked model directory out."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.base.events import Message, Text
from gpt.model.config import GPT2_SIZES, GPTConfig
from gpt.model.model import GPTClassifier
from gpt.model.weights import save_model
from gpt.tokens.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from stages.load_gpt2 import HELD_OUT, LoadGPT2Params, load_gpt2

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


def test_the_sample_model_is_far_better_than_random_weights(tmp_path):
    heard = []
    nano = Path(__file__).resolve().parents[2] / "samples" / "gpt2-nano"
    figures = run(tmp_path / "one", PARAMS, nano, log=heard.append)
    assert figures["perplexity"] < figures["perplexity_random"] / 10
    assert figures["perplexity_random"] > 4096
    assert not any(isinstance(each, Message) and each.level == "warning" for each in heard)


def test_a_model_no_better_than_random_weights_is_told(tmp_path, published):
    path = published / "model.safetensors"
    save_file({name: value * 20 for name, value in load_file(path).items()}, path)
    heard = []
    run(tmp_path / "one", PARAMS, published, log=heard.append)
    warnings = [e.text for e in heard if isinstance(e, Message) and e.level == "warning"]
    assert len(warnings) == 1
    assert "no better than random weights" in warnings[0]


def test_a_pytorch_file_gives_the_same_bytes_and_what_is_skipped_is_said(tmp_path, published):
    """With the causal mask and the copied head that old files carry along."""
    run(tmp_path / "one", PARAMS, published)
    model = GPT2LMHeadModel.from_pretrained(published, dtype=torch.float32)
    (published / "model.safetensors").unlink()
    state = {**model.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32)}
    torch.save(state, published / "pytorch_model.bin")
    heard = []
    run(tmp_path / "other", PARAMS, published, log=heard.append)
    name = "model/model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    said = [event.text for event in heard if isinstance(event, Message)]
    assert any("skipped" in text and "transformer.h.0.attn.bias" in text for text in said)


def _tokenizer(vocab_size):
    """As many tokens as wanted: those of the held-out text, then pairs of bytes."""
    learnt = train_bpe([HELD_OUT], 1000)
    *tokens, end = learnt.tokens
    pairs = product(byte_tokenizer().tokens[:-1], repeat=2)
    known = set(tokens)
    unused = (pair for pair in pairs if "".join(pair) not in known)
    more = list(islice(unused, vocab_size - learnt.vocab_size))
    tokens += [*map("".join, more), end]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, learnt.merges + more)


@pytest.mark.slow
def test_the_whole_stage_takes_little_more_memory_than_124m(tmp_path):
    """Loading, a second model of random weights, both perplexities, the sample and the writing.

    The process has run the stage on a small model before.
    """
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(tmp_path / "124M")
    _tokenizer(50257).save(tmp_path / "124M")
    program = Path(__file__).with_name("loading_stage.py")
    root = program.parents[2]
    done = subprocess.run(
        [sys.executable, program, root / "samples" / "gpt2-nano", tmp_path / "124M"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests/gpt/published")]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1 < json.loads(done.stdout)["ratio"] <= 1.1


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


def test_rows_that_pad_the_vocabulary_are_left_out(tmp_path, published):
    path = published / "model.safetensors"
    tensors = load_file(path)
    padded = F.pad(tensors["transformer.wte.weight"], (0, 0, 0, 320 - 257))
    save_file(tensors | {"transformer.wte.weight": padded.contiguous()}, path)
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"vocab_size": 320}))
    assert run(tmp_path / "o", PARAMS, published)["vocab_size"] == 257


def test_weights_that_are_no_numbers_are_refused(tmp_path, published, refused):
    path = published / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.bias"][3] = float("nan")
    save_file(tensors, path)
    with refused(r"model\.safetensors: transformer\.ln_f\.bias holds what is no finite number"):
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
