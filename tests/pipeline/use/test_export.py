"""Exported models are the same models in another precision."""

import errno
import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel
from typer.testing import CliRunner

from gpt.base.errors import InputError, RunError
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import load_model, save_model
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.cli import app
from pipeline.use.export import export, export_gguf

SAMPLES = Path(__file__).resolve().parent.parent.parent.parent / "samples"


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


@pytest.mark.parametrize("config", [None, {"port": 8080}, {"model_type": "gpt2"}, "ours"])
def test_only_what_was_written_here_is_replaced(config, source, tmp_path):
    target = tmp_path / "letters"
    target.mkdir()
    if config == "ours":
        export(source, target, "float32")
        export(source, target, "float32")
        (target / "letter.txt").write_text("dear")
    elif config:
        (target / "config.json").write_text(json.dumps(config))
        (target / "vocab.json").touch()
    else:
        (target / "model.safetensors").touch()
    before = sorted(target.iterdir())
    with pytest.raises(InputError, match="choose another name, or move it away"):
        export(source, target, "float16")
    assert sorted(target.iterdir()) == before


def test_a_target_that_cannot_be_written_is_one_line(source, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.use.export.save_model", full)
    monkeypatch.setattr("pipeline.use.export.write_gguf", full)
    with pytest.raises(RunError, match="No space left on device; make room"):
        export(source, tmp_path / "new", "float16")
    with pytest.raises(RunError, match="No space left on device; make room"):
        export_gguf(source, tmp_path / "new.gguf", "f16")


def test_an_unknown_precision_is_named(source, tmp_path):
    with pytest.raises(InputError, match="dtype: 'int3' is not known; use one of float32"):
        export(source, tmp_path / "new", "int3")


def test_tensors_go_to_transformers_and_back_without_a_changed_byte(source, tmp_path):
    GPT2LMHeadModel.from_pretrained(source).save_pretrained(tmp_path / "theirs")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "theirs" / name).write_bytes((source / name).read_bytes())
    export(tmp_path / "theirs", tmp_path / "ours", "float32")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


def test_eight_bits_cost_at_most_a_hundredth_of_perplexity(tmp_path):
    """The samples' model on the samples' text: in GGUF, and in our own decoding."""
    size, loss = export_gguf(
        SAMPLES / "gpt2-nano", tmp_path / "nano.gguf", "q8_0", SAMPLES / "stories.txt"
    )
    assert size == (tmp_path / "nano.gguf").stat().st_size
    assert size < 0.6 * (SAMPLES / "gpt2-nano" / "model.safetensors").stat().st_size
    assert loss.tokens == 8192
    for cost in (loss.after / loss.before - 1, loss.int8 / loss.before - 1):
        assert 0 < abs(cost) < 0.01


def test_half_precision_of_a_half_precision_model_costs_nothing(source, tmp_path):
    export(source, tmp_path / "half", "float16")
    (tmp_path / "text").write_text("a text, read in more than one row\n" * 2)
    _, loss = export_gguf(tmp_path / "half", tmp_path / "m.gguf", "f16", tmp_path / "text")
    assert loss.before == loss.after
    assert loss.tokens == 67  # bytes of the text, without the line's end at its edge


def test_a_gguf_goes_neither_over_other_files_nor_from_a_classifier(source, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    write_foreign = gguf.GGUFWriter(tmp_path / "llama.gguf", "gpt2")
    write_foreign.write_header_to_file()
    write_foreign.write_kv_data_to_file()
    write_foreign.close()
    for other in (tmp_path / "letter.txt", tmp_path / "llama.gguf", source):
        with pytest.raises(InputError, match="no GGUF file that was written here; choose another"):
            export_gguf(source, other, "f16")
    assert (tmp_path / "letter.txt").read_text() == "dear"
    for _ in range(2):  # over its like it does
        assert export_gguf(source, tmp_path / "m.gguf", "f16")[1] is None
    config = GPTConfig(vocab_size=257, context_length=16, n_layer=1, n_head=2, n_embd=16)
    classifier = GPTClassifier(config, ["ham", "spam"])
    save_model(classifier, tmp_path / "classifier", tokenizer=byte_tokenizer())
    with pytest.raises(InputError, match="holds a classifier"):
        export_gguf(tmp_path / "classifier", tmp_path / "new.gguf", "f16")
    assert not (tmp_path / "new.gguf").exists()


def test_a_text_that_cannot_be_measured_on_is_refused_before_anything_is_written(source, tmp_path):
    (tmp_path / "empty").write_text("")
    for text, why in (("missing", "No such file"), ("empty", "empty; give a text file")):
        with pytest.raises(InputError, match=why):
            export_gguf(source, tmp_path / "m.gguf", "f16", tmp_path / text)
        assert not (tmp_path / "m.gguf").exists()


def test_the_command_says_what_rounding_cost(source, tmp_path):
    (tmp_path / "text").write_text("a text, and then more of it\n" * 5)
    command = ["export", str(source), str(tmp_path / "m.gguf")]
    gguf = [*command, "--format", "gguf", "--text", str(tmp_path / "text")]
    done = CliRunner().invoke(app, gguf)
    first, second = done.output.splitlines()
    assert first.endswith("MB, q8_0")
    assert second.startswith("perplexity on 139 tokens: ")
    assert "of the file" in second
    assert "with --precision int8" in second
    for wrong in ([*gguf, "--dtype", "float16"], [*command, "--type", "f16"]):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2, done.output
