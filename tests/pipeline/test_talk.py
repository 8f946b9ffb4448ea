"""Generate, chat and classify, over tiny models with known behaviour."""

import codecs
import io
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gpt import generate as decoding
from gpt.config import GPTConfig
from gpt.errors import InputError, RunError
from gpt.generate import Sampling, Token, complete
from gpt.model import GPT, GPTClassifier
from gpt.prompts import render_prompt
from gpt.tokenizer import byte_tokenizer
from gpt.weights import save_model
from pipeline import talk
from pipeline.cli import app

CONFIG = GPTConfig(vocab_size=257, context_length=64, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(7)
    save_model(GPT(CONFIG), tmp_path / "base", tokenizer=byte_tokenizer())
    return tmp_path / "base"


@pytest.fixture
def assistant(tmp_path):
    torch.manual_seed(7)
    save_model(GPT(CONFIG), tmp_path / "assistant", tokenizer=byte_tokenizer())
    (tmp_path / "assistant" / "prompt.json").write_text('{"template": "phi3"}')
    return tmp_path / "assistant"


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(7)
    model = GPTClassifier(CONFIG, ["ham", "spam"])
    save_model(model, tmp_path / "classifier", tokenizer=byte_tokenizer())
    return tmp_path / "classifier"


IDS = {byte_tokenizer().decode_bytes([i])[0]: i for i in range(256)}


def scripted(monkeypatch, text: bytes):
    """Makes the model write this text, a byte a token."""

    def steps(model, prompts, *_, **__):
        for byte in text:
            yield [Token(IDS[byte], None)]

    monkeypatch.setattr(decoding, "_steps", steps)


def answer(model, tokenizer, prompt, n):
    """The greedy answer; a character that the length cut does not come."""
    sampling = Sampling(max_new_tokens=n, stop=(tokenizer.eot,))
    (ids,) = complete(model, [tokenizer.encode(prompt)], sampling)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(tokenizer.decode_bytes(ids))


def test_generate_prints_the_prompt_and_what_the_model_goes_on_with(base, capsys):
    talk.generate(base, "Once", Sampling(max_new_tokens=12))
    expected = answer(*talk._load_writer(base, "pretrain", "fp32"), "Once", 12)
    assert capsys.readouterr().out == f"Once{expected}\n"


def test_sampling_repeats_with_a_seed(base, capsys):
    shown = []
    for seed in (1, 1, 2):
        talk.generate(base, "Once", Sampling(max_new_tokens=12, temperature=1.0, seed=seed))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_text_is_printed_whole_and_up_to_a_stop_text(base, capsys, monkeypatch):
    scripted(monkeypatch, "né — ✓ END two".encode())
    talk.generate(base, "p ", Sampling(max_new_tokens=99, stop_texts=("END",)))
    assert capsys.readouterr().out == "p né — ✓ \n"


def test_the_weights_are_in_the_precision_that_was_asked_for(base, capsys):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, tokenizer = talk._load_writer(base, "pretrain", precision)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        talk.generate(base, "Once", Sampling(max_new_tokens=5), precision=precision)
        assert capsys.readouterr().out == f"Once{answer(model, tokenizer, 'Once', 5)}\n"


def test_8_bits_are_read_on_the_cpu(base, capsys):
    model, tokenizer = talk._load_writer(base, "pretrain", "int8")
    assert model.wte.weight.dtype == torch.int8
    assert model.device.type == "cpu"
    talk.generate(base, "Once", Sampling(max_new_tokens=5), precision="int8")
    assert capsys.readouterr().out == f"Once{answer(model, tokenizer, 'Once', 5)}\n"


def test_the_engine_is_the_one_that_was_asked_for(base, assistant, capsys):
    """Here no compiled engine can be had: the tests' cache is no folder."""
    for engine in ("auto", "plain"):
        talk.generate(base, "Once", Sampling(max_new_tokens=3), engine=engine)
        talk.chat(assistant, "Hello", "", Sampling(max_new_tokens=3), engine=engine)
    capsys.readouterr()
    with pytest.raises(RunError, match="cannot be compiled here"):
        talk.generate(base, "Once", Sampling(max_new_tokens=3), engine="compiled")
    with pytest.raises(RunError, match="cannot be compiled here"):
        talk.chat(assistant, "Hello", "", Sampling(max_new_tokens=3), engine="compiled")
    assert capsys.readouterr().out == ""


def test_every_option_of_the_command_line_arrives(monkeypatch):
    calls = []
    monkeypatch.setattr(talk, "generate", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(talk, "chat", lambda *args, **kwargs: calls.append((args, kwargs)))
    given = {
        "max-new-tokens": "7",
        "min-new-tokens": "2",
        "temperature": "0.5",
        "top-k": "3",
        "top-p": "0.25",
        "repetition-penalty": "1.5",
        "seed": "11",
        "stop": "END",
        "model": "some/model",
        "precision": "bf16",
        "engine": "plain",
    }
    options = [text for name, value in given.items() for text in (f"--{name}", value)]
    expected = Sampling(
        max_new_tokens=7,
        min_new_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        repetition_penalty=1.5,
        seed=11,
        stop_texts=("END", "."),
    )
    for command in (["generate", "Once"], ["chat", "Hello"]):
        result = CliRunner().invoke(app, [*command, *options, "--stop", "."])
        assert result.exit_code == 0, result.output
    (model, prompt, sampling), rest = calls[0]
    assert (model, prompt, sampling) == (Path("some/model"), "Once", expected)
    assert rest == {"precision": "bf16", "engine": "plain"}
    (model, prompt, context, sampling), rest = calls[1]
    assert (model, prompt, context, sampling) == (Path("some/model"), "Hello", "", expected)
    assert rest == {"precision": "bf16", "engine": "plain"}


def test_an_impossible_setting_is_one_line_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(talk, "load_base", pytest.fail)
    for setting in ("--top-p=0", "--repetition-penalty=0", "--min-new-tokens=101"):
        result = CliRunner().invoke(app, ["generate", "Once", "--model", ".", setting])
        assert result.exit_code == 2
        assert result.output.count("\n") == 1
        assert result.output.startswith(f"error: {setting[2:].partition('=')[0].replace('-', '_')}")


def test_an_empty_prompt_is_refused(base):
    with pytest.raises(InputError, match="prompt: there is nothing to continue"):
        talk.generate(base, "", Sampling(max_new_tokens=3))


def test_chat_answers_with_the_models_own_template(assistant, capsys, monkeypatch):
    talk.chat(assistant, "Say hello.", "to Ann", Sampling(max_new_tokens=12))
    shown = capsys.readouterr().out
    prompt = render_prompt("phi3", "Say hello.", "to Ann")
    expected = answer(*talk._load_writer(assistant, "finetune_instruct", "fp32"), prompt, 12)
    assert shown == expected.lstrip() + "\n"

    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello.\n"))
    talk.chat(assistant, None, "to Ann", Sampling(max_new_tokens=12))
    assert capsys.readouterr().out == shown


def test_chat_goes_on_until_an_empty_line(assistant, capsys, monkeypatch):
    lines = iter(["Say hello.", "Say goodbye.", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    talk.chat(assistant, None, "", Sampling(max_new_tokens=3))
    assert "an empty line or Ctrl-D ends" in capsys.readouterr().out
    assert next(lines, "all were asked for") == "all were asked for"


def test_a_base_model_is_no_assistant(base):
    with pytest.raises(InputError, match=r"prompt\.json: not there, .*gpt-pipeline generate"):
        talk.chat(base, "Say hello.", "", Sampling(max_new_tokens=3))


def test_a_damaged_prompt_json_is_named(assistant):
    (assistant / "prompt.json").write_text("[]")
    with pytest.raises(InputError, match=r"prompt\.json: must be JSON that names the template"):
        talk.chat(assistant, "Say hello.", "", Sampling(max_new_tokens=3))


def test_classify_gives_each_text_its_class_and_probabilities(classifier, capsys):
    talk.classify_texts(classifier, ["win a prize", "see you", ""], as_json=True)
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["text"] for each in results] == ["win a prize", "see you", ""]
    for each in results:
        assert set(each["probabilities"]) == {"ham", "spam"}
        assert sum(each["probabilities"].values()) == pytest.approx(1)
        assert each["probabilities"][each["label"]] == max(each["probabilities"].values())

    talk.classify_texts(classifier, ["win a prize"], as_json=False)
    shown = capsys.readouterr().out
    assert shown.startswith(results[0]["label"])
    assert shown.endswith("%  win a prize\n")


def test_classify_reads_lines_from_a_pipe(classifier, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    talk.classify_texts(classifier, ["-"], as_json=True)
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == [
        "one",
        "two",
    ]


def test_classify_cuts_a_text_as_its_training_did(classifier, capsys):
    (classifier / "training.json").write_text('{"max_length": 4}')
    talk.classify_texts(classifier, ["same begins", "same ends"], as_json=True)
    one, other = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one["probabilities"] == other["probabilities"]


def test_a_language_model_is_no_classifier_and_the_other_way_round(base, classifier):
    with pytest.raises(InputError, match="holds no classification head"):
        talk.classify_texts(base, ["x"], as_json=False)
    with pytest.raises(InputError, match="holds a classifier"):
        talk.generate(classifier, "Once", Sampling(max_new_tokens=3))
