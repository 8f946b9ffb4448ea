"""The stage pretrain: whole outputs, the same bytes however often it is stopped."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from gpt.data import open_tokens
from gpt.errors import RunError
from gpt.events import Message, Text
from gpt.text import RawFile, write_sources
from stages.pretrain import PretrainParams, pretrain
from stages.tokenize import TokenizeParams, tokenize

MODEL = {"context_length": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1}
TRAIN = {
    "device": "cpu",
    "threads": 1,
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "eval_interval": 2,
}


def params(train=(), model=(), **changes):
    return TypeAdapter(PretrainParams).validate_python(
        {
            "model": {**MODEL, **dict(model)},
            "sample_tokens": 4,
            "train": {**TRAIN, **dict(train)},
            **changes,
        }
    )


def run(folder, params, tokens, **options):
    figures = pretrain(
        params,
        tokens=tokens,
        out=folder / "model",
        metrics=folder / "metrics.json",
        history=folder / "history.csv",
        **options,
    )
    assert json.loads((folder / "metrics.json").read_text()) == figures
    return figures


def test_it_writes_its_outputs_and_nothing_else(tmp_path, tokens, everything):
    figures = run(tmp_path, params(), tokens)
    model = ("config.json", "generation_config.json", "merges.txt", "model.safetensors")
    assert list(everything(tmp_path)) == [
        "history.csv",
        "metrics.json",
        *(f"model/{name}" for name in (*model, "vocab.json")),
    ]
    history = pd.read_csv(tmp_path / "history.csv")
    assert list(history) == [
        "step",
        "tokens",
        "train_loss",
        "validation_loss",
        "learning_rate",
        "grad_norm",
        "param_norm",
        "update_ratio",
    ]
    assert history["step"].tolist() == [2, 4, 6]
    assert history["tokens"].tolist() == [2 * 4 * 32, 4 * 4 * 32, 6 * 4 * 32]
    assert figures["tokens"] == 6 * 4 * 32
    assert figures["train_loss"] == pytest.approx(history["train_loss"].iloc[-1])
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "model" / name).read_bytes() == (tokens / name).read_bytes()


def test_equal_runs_give_equal_bytes_and_another_seed_does_not(tmp_path, tokens, everything):
    for name in ("one", "other"):
        run(tmp_path / name, params(), tokens)
        torch.rand(3)  # what the generators held before is of no consequence
    run(tmp_path / "seed", params(train={"seed": 4}), tokens)
    assert everything(tmp_path / "one") == everything(tmp_path / "other")
    weights = {
        name: (tmp_path / name / "model/model.safetensors").read_bytes() for name in ("one", "seed")
    }
    assert weights["one"] != weights["seed"]


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, tokens, everything, interrupt_at):
    run(tmp_path / "straight", params(), tokens)
    state = tmp_path / "state"
    for step in (1, 4, 6):  # between evaluations, at one, and at the very end
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", params(), tokens, state=state, log=interrupt_at(step))
        assert not (tmp_path / "stopped").exists()
    heard = []
    run(tmp_path / "stopped", params(), tokens, state=state, log=heard.append)
    assert Message("pretrain: continuing from step 6 of 6") in heard
    assert everything(tmp_path / "stopped") == everything(tmp_path / "straight")


def test_transformers_reads_the_model_and_finds_the_same_loss(tmp_path, tokens):
    """The final figures are over the whole validation split, whatever was looked at meanwhile."""
    figures = run(tmp_path, params(eval_windows=2), tokens)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    ids = open_tokens(tokens, "validation")[:]
    total, n = 0.0, 0
    for start in range(0, len(ids) - 32, 32):
        window = ids[start : start + 33]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        n += 32
    assert n > 2 * 32
    assert figures["validation_loss"] == pytest.approx(total / n, abs=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-3)
    n_bytes = json.loads((tokens / "manifest.json").read_text())["splits"]["validation"]["total"]
    assert figures["bits_per_byte"] == pytest.approx(
        total / n / math.log(2) * len(ids) / n_bytes["bytes"], rel=1e-4
    )
    assert figures["parameters"] == sum(p.numel() for p in theirs.parameters())


def test_the_weights_that_validated_best_are_kept(tmp_path, tokens):
    far = {"learning_rate": 3.0, "schedule": "constant", "warmup_steps": 4, "steps": 8}
    figures = run(tmp_path, params(train=far), tokens)
    losses = pd.read_csv(tmp_path / "history.csv")["validation_loss"]
    assert losses.iloc[-1] > losses.min()
    assert figures["validation_loss"] == pytest.approx(losses.min(), rel=1e-6)


def test_the_validation_split_is_never_trained_on(tmp_path, tokens, everything):
    other = tmp_path / "tokens"
    shutil.copytree(tokens, other)
    ids = np.fromfile(other / "validation.bin", dtype="<u2")
    ids[::-1].tofile(other / "validation.bin")
    last = params(train={"keep": "last"})
    one = run(tmp_path / "one", last, tokens)
    changed = run(tmp_path / "changed", last, other)
    assert one["validation_loss"] != changed["validation_loss"]
    assert everything(tmp_path / "one/model") == everything(tmp_path / "changed/model")


def test_samples_continue_the_prompt_at_each_evaluation(tmp_path, tokens):
    heard = []
    run(tmp_path, params(sample_prompt="Document "), tokens, log=heard.append)
    texts = [event for event in heard if isinstance(event, Text)]
    assert [event.name for event in texts] == [f"samples/step-{i:06d}.txt" for i in (2, 4, 6)]
    assert all(event.text.startswith("Document ") for event in texts)


# --- what is refused ------------------------------------------------------------------------------


def test_a_corpus_shorter_than_one_context_is_refused(tmp_path, tokens, refused):
    context = {"model": {"context_length": 600}}
    with refused(r"tokens: the validation split has \d+ tokens, fewer than one context .*lower "):
        run(tmp_path / "o", params(**context), tokens)
    context["model"]["context_length"] = 5000
    with refused(r"the train split has \d+ tokens, .*pretrain\.model\.context_length"):
        run(tmp_path / "o", params(**context), tokens)


def test_token_files_that_are_not_there_are_refused(tmp_path, tokens, refused):
    with refused(r"nowhere/manifest\.json: no such file; run the stage tokenize first"):
        run(tmp_path / "o", params(), tmp_path / "nowhere")
    shutil.copytree(tokens, tmp_path / "tokens")
    (tmp_path / "tokens/vocab.json").unlink()
    with refused(r"tokens: no vocab\.json"):
        run(tmp_path / "o", params(), tmp_path / "tokens")


def test_a_run_that_diverges_leaves_nothing(tmp_path, tokens, refused):
    hot = params(train={"learning_rate": 1e30, "schedule": "constant", "grad_clip": 0})
    with refused("the loss is .* at step .*; lower the learning rate", RunError):
        run(tmp_path / "o", hot, tokens)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": {"n_head": 3}}, "3 heads do not divide the width n_embd = 16"),
        ({"model": {"n_layer": "many"}}, "n_layer"),
        ({"model": {"context": 32}}, "context"),
        ({"train": {"steps": 0}}, "steps"),
        ({"train": {"epochs": 2}}, "give exactly one of the two"),
        ({"train": {"learning_rate": "fast"}}, "learning_rate"),
        ({"stride": 0}, "stride"),
        ({"sample_prompt": ""}, "sample_prompt"),
    ],
)
def test_impossible_parameters_are_refused(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        params(**changes)


# --- the published data ---------------------------------------------------------------------------


def test_the_verdict_gives_nine_steps_an_epoch_at_context_256(tmp_path, mirror):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    shutil.copy(mirror / "the-verdict.txt", corpus)
    raw = RawFile(name="v", file="the-verdict.txt", format="text", bytes=20479, sha256="0" * 64)
    write_sources(corpus, [raw])
    tokenize(
        TokenizeParams(tokenizer="gpt2", validation=0.1, split="tail"),
        corpus=corpus,
        vocabulary=mirror / "gpt2",
        out=tmp_path / "tokens",
        metrics=tmp_path / "tokens.json",
    )
    book = {
        "model": {"context_length": 256, "n_layer": 1, "n_embd": 8, "tie_weights": False},
        "train": {"steps": None, "epochs": 1, "batch_size": 2, "eval_interval": 9},
    }
    figures = run(tmp_path / "o", params(**book), tmp_path / "tokens")
    assert figures["steps"] == 9
    assert figures["tokens"] == 4608
    assert figures["validation_loss"] < math.log(50257)
