"""The stage pretrain: whole outputs, the same bytes however often it is stopped."""

import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from gpt.base.errors import RunError
from gpt.base.events import Message, Text
from gpt.base.files import sha256_of
from gpt.batches.data import batch_indices
from gpt.text.records import RawFile, write_sources
from gpt.tokens.token_files import open_tokens, read_manifest
from stages.pretrain import PretrainParams, open_windows, pretrain
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


def of_sources(folder, tokens, parts):
    """The token folder, validated on parts of its text: (source, number of tokens) each."""
    shutil.copytree(tokens, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    ids = open_tokens(tokens, "train")[:].astype("<u2")
    assert sum(size for _, size in parts) <= len(ids)
    shards, start = [], 0
    for number, (source, size) in enumerate(parts):
        file = f"part-{number}.bin"
        part = ids[start : start + size]
        part.tofile(folder / file)
        counts = {"documents": 1, "bytes": len(part), "tokens": len(part)}
        sha256 = sha256_of(folder / file)
        shards.append({"file": file, "source": source, "sha256": sha256, "counts": counts})
        start += size
    manifest["splits"]["validation"]["shards"] = shards
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def reference_loss(model, ids, separate=None):
    """The mean loss of the windows of 32 as `transformers` has it, documents alone at an id."""
    theirs = GPT2LMHeadModel.from_pretrained(model).eval()
    total, n = 0.0, 0
    for start in range(0, len(ids) - 32, 32):
        window = torch.from_numpy(ids[start : start + 33])
        inputs, targets = window[:-1], window[1:]
        sizes = [32]
        if separate is not None:
            opens = (inputs == separate).nonzero().flatten().tolist()
            sizes = np.diff([0, *(place for place in opens if place), 32]).tolist()
        for document, wanted in zip(inputs.split(sizes), targets.split(sizes), strict=True):
            with torch.no_grad():
                logits = theirs(document[None]).logits[0]
            total += F.cross_entropy(logits, wanted, reduction="sum").item()
        n += 32
    return total / n


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
    ids = open_tokens(tokens, "validation")[:]
    assert len(ids) > 3 * 32
    expected = reference_loss(tmp_path / "model", ids)
    assert figures["validation_loss"] == pytest.approx(expected, abs=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(expected), rel=1e-3)
    n_bytes = read_manifest(tokens).splits["validation"].total.bytes
    assert figures["bits_per_byte"] == pytest.approx(
        expected / math.log(2) * len(ids) / n_bytes, rel=1e-4
    )
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert figures["parameters"] == sum(p.numel() for p in theirs.parameters())


def test_each_source_that_fills_a_window_has_its_loss(tmp_path, tokens):
    """Under the source's own name; `pipeline.tracking.keys.key_of` makes it a key of MLflow's."""
    parts = [("a", 40), ("b/c+d", 50), ("short", 20), ("a", 30), ("b/c:d", 34), ("..", 33)]
    folder = of_sources(tmp_path / "tokens", tokens, parts)
    figures = run(tmp_path / "o", params(), folder)
    sources = ("a", "b/c+d", "b/c:d", "..")
    assert {name for name in figures if "/" in name} == {f"validation_loss/{s}" for s in sources}
    for source in sources:
        ids = open_tokens(folder, "validation", source)[:]
        expected = reference_loss(tmp_path / "o/model", ids)
        assert figures[f"validation_loss/{source}"] == pytest.approx(expected, abs=1e-4)


def test_a_single_source_has_the_loss_of_all_and_no_other(tmp_path, tokens):
    figures = run(tmp_path / "o", params(train={"steps": 1}), tokens)
    assert not [name for name in figures if "/" in name]


# --- documents kept apart -------------------------------------------------------------------------


def test_documents_kept_apart_are_measured_as_if_each_were_alone(tmp_path, tokens):
    figures = run(tmp_path, params(separate_documents=True), tokens)
    ids = open_tokens(tokens, "validation")[:]
    assert (ids == 256).sum() > 3
    expected = reference_loss(tmp_path / "model", ids, separate=256)
    assert figures["validation_loss"] == pytest.approx(expected, abs=1e-4)
    assert abs(reference_loss(tmp_path / "model", ids) - expected) > 1e-3


def test_documents_kept_apart_are_learnt_from_as_such(tmp_path, tokens, everything):
    last = {"keep": "last"}
    apart = params(train=last, separate_documents=True)
    for name, chosen in (("together", params(train=last)), ("apart", apart), ("again", apart)):
        run(tmp_path / name, chosen, tokens)
    weights = {
        name: (tmp_path / name / "model/model.safetensors").read_bytes()
        for name in ("together", "apart")
    }
    assert weights["together"] != weights["apart"]
    assert everything(tmp_path / "apart") == everything(tmp_path / "again")


def test_documents_kept_apart_are_learnt_the_same_in_half_precision(tmp_path, tokens):
    losses = []
    for precision in ("fp32", "bf16"):
        chosen = params(train={"precision": precision}, separate_documents=True)
        losses.append(run(tmp_path / precision, chosen, tokens)["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]


# --- random windows -------------------------------------------------------------------------------

RANDOM = {"windows": "random", "separate_documents": True}


def test_a_stopped_run_on_random_windows_goes_on_to_the_same_bytes(
    tmp_path, tokens, everything, interrupt_at
):
    epochs = params(train={"steps": None, "epochs": 1, "accumulation": 2}, **RANDOM)
    run(tmp_path / "straight", epochs, tokens)
    state = tmp_path / "state"
    for step in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", epochs, tokens, state=state, log=interrupt_at(step))
    run(tmp_path / "stopped", epochs, tokens, state=state)
    assert everything(tmp_path / "stopped") == everything(tmp_path / "straight")


def test_epochs_of_random_windows_are_as_long_as_others_and_never_the_same(tmp_path, tokens):
    epochs = {"steps": None, "epochs": 3, "batch_size": 1}
    sliding = open_windows(params(train=epochs), tokens, None)["train"]
    chosen = params(train=epochs, windows="random")
    drawn = open_windows(chosen, tokens, None)["train"]
    assert len(drawn) == 3 * len(sliding)
    assert chosen.recipe.epochs == 1
    assert chosen.recipe.steps is None
    third = len(sliding)
    starts = [drawn.start(i) for i in range(len(drawn))]
    assert len({tuple(starts[i : i + third]) for i in (0, third, 2 * third)}) == 3
    assert len({start % 32 for start in starts}) > 20
    figures = run(tmp_path, chosen, tokens)
    assert figures["steps"] == 3 * third


def test_steps_of_random_windows_are_those_asked_for(tmp_path, tokens):
    many = params(train={"steps": 50, "batch_size": 30}, windows="random")
    assert len(open_windows(many, tokens, None)["train"]) == 1500
    assert many.recipe == many.train
    figures = run(tmp_path, params(train={"steps": 2, "batch_size": 90}, windows="random"), tokens)
    assert figures["tokens"] == 2 * 90 * 32  # more rows than there are windows without overlap


@pytest.mark.parametrize(
    "windows", [{"windows": "random"}, {"stride": 5}, {}], ids=["random", "stride", "sliding"]
)
def test_the_tokens_that_spoil_a_run_are_named(tmp_path, tokens, windows):
    hot = {"learning_rate": 1e30, "schedule": "constant", "grad_clip": 0, "batch_size": 2}
    chosen = params(train=hot, **windows)
    with pytest.raises(RunError) as caught:
        run(tmp_path, chosen, tokens)
    step = int(re.search(r"at step (\d+)", str(caught.value))[1])
    named = re.findall(r"tokens ([\d,]+) to ([\d,]+) of the training split", str(caught.value))
    found = [tuple(int(place.replace(",", "")) for place in pair) for pair in named]
    training = open_windows(chosen, tokens, None)["train"]
    rows = batch_indices(len(training), 2, chosen.train.seed, step - 1)
    ids = open_tokens(tokens, "train")
    assert [(training.start(row), training.start(row) + 32) for row in rows] == found
    for row, (start, end) in zip(rows, found, strict=True):
        assert training[row][0].tolist() == ids[start:end].tolist()


def test_the_weights_that_validated_best_are_kept(tmp_path, tokens):
    far = {"learning_rate": 3.0, "schedule": "constant", "warmup_steps": 4, "steps": 8}
    figures = run(tmp_path, params(train=far), tokens)
    losses = pd.read_csv(tmp_path / "history.csv")["validation_loss"]
    assert losses.iloc[-1] > losses.min()
    assert figures["validation_loss"] == pytest.approx(losses.min(), rel=1e-6)


def test_the_validation_split_is_never_trained_on(tmp_path, tokens, everything):
    other = tmp_path / "tokens"
    shutil.copytree(tokens, other)
    manifest = (other / "manifest.json").read_text()
    for shard in read_manifest(other).splits["validation"].shards:
        ids = np.fromfile(other / shard.file, dtype="<u2")
        ids[::-1].tofile(other / shard.file)
        manifest = manifest.replace(shard.sha256, sha256_of(other / shard.file))
    (other / "manifest.json").write_text(manifest)
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
        ({"stride": 8, "windows": "random"}, "random windows start anywhere; leave it out, or"),
        ({"windows": "overlapping"}, "windows"),
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
    raw = RawFile(
        name="v",
        file="the-verdict.txt",
        kind="documents",
        format="text",
        bytes=20479,
        sha256="0" * 64,
    )
    write_sources(corpus, [raw])
    tokenize(
        TokenizeParams(tokenizer="gpt2", validation=0.1, split="tail"),
        corpus=corpus,
        vocabulary=mirror / "gpt2",
        out=tmp_path / "tokens",
        metrics=tmp_path / "tokens.json",
        report=tmp_path / "report.json",
    )
    book = {
        "model": {"context_length": 256, "n_layer": 1, "n_embd": 8, "tie_weights": False},
        "train": {"steps": None, "epochs": 1, "batch_size": 2, "eval_interval": 9},
    }
    figures = run(tmp_path / "o", params(**book), tmp_path / "tokens")
    assert figures["steps"] == 9
    assert figures["tokens"] == 4608
    assert figures["validation_loss"] < math.log(50257)
