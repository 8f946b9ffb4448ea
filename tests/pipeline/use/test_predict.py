"""Generate, chat and classify, over tiny models with known behaviour."""

import codecs
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gpt import generation as decoding
from gpt.base.errors import InputError, RunError
from gpt.generation import Sampling, Token, complete
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import save_model
from gpt.prompts import TEMPLATES, render_prompt, render_prompts
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.cli import app
from pipeline.use import predict

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
    predict.generate(base, "Once", Sampling(max_new_tokens=12))
    expected = answer(*predict._load(base, "pretrain", "fp32"), "Once", 12)
    assert capsys.readouterr().out == f"Once{expected}\n"


def test_sampling_repeats_with_a_seed(base, capsys):
    shown = []
    for seed in (1, 1, 2):
        predict.generate(base, "Once", Sampling(max_new_tokens=12, temperature=1.0, seed=seed))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_text_is_printed_whole_and_up_to_a_stop_text(base, capsys, monkeypatch):
    scripted(monkeypatch, "né — ✓ END two".encode())
    predict.generate(base, "p ", Sampling(max_new_tokens=99, stop_texts=("END",)))
    assert capsys.readouterr().out == "p né — ✓ \n"


def test_the_weights_are_in_the_precision_that_was_asked_for(base, capsys):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, tokenizer = predict._load(base, "pretrain", precision)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        predict.generate(base, "Once", Sampling(max_new_tokens=5), precision=precision)
        assert capsys.readouterr().out == f"Once{answer(model, tokenizer, 'Once', 5)}\n"


def test_8_bits_are_read_on_the_cpu(base, capsys):
    model, tokenizer = predict._load(base, "pretrain", "int8")
    assert model.wte.weight.dtype == torch.int8
    assert model.device.type == "cpu"
    predict.generate(base, "Once", Sampling(max_new_tokens=5), precision="int8")
    assert capsys.readouterr().out == f"Once{answer(model, tokenizer, 'Once', 5)}\n"


def test_the_engine_is_the_one_that_was_asked_for(base, assistant, capsys):
    """Here no compiled engine can be had: the tests' cache is no folder."""
    for engine in ("auto", "plain"):
        predict.generate(base, "Once", Sampling(max_new_tokens=3), engine=engine)
        predict.chat(assistant, "Hello", "", Sampling(max_new_tokens=3), engine=engine)
    capsys.readouterr()
    with pytest.raises(RunError, match="cannot be compiled here"):
        predict.generate(base, "Once", Sampling(max_new_tokens=3), engine="compiled")
    with pytest.raises(RunError, match="cannot be compiled here"):
        predict.chat(assistant, "Hello", "", Sampling(max_new_tokens=3), engine="compiled")
    assert capsys.readouterr().out == ""


def test_every_option_of_the_command_line_arrives(monkeypatch):
    calls = []
    monkeypatch.setattr(predict, "generate", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(predict, "chat", lambda *args, **kwargs: calls.append((args, kwargs)))
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
    told = ["--system", "Hm.", "--turns", "3"]
    for command in (["generate", "Once"], ["chat", "Hello", *told]):
        result = CliRunner().invoke(app, [*command, *options, "--stop", "."])
        assert result.exit_code == 0, result.output
    (model, prompt, sampling), rest = calls[0]
    assert (model, prompt, sampling) == (Path("some/model"), "Once", expected)
    assert rest == {"precision": "bf16", "engine": "plain"}
    (model, prompt, context, sampling), rest = calls[1]
    assert (model, prompt, context, sampling) == (Path("some/model"), "Hello", "", expected)
    assert rest == {"precision": "bf16", "engine": "plain", "system": "Hm.", "turns": 3}


def test_an_impossible_setting_is_one_line_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(predict, "load_base", pytest.fail)
    for setting in ("--top-p=0", "--repetition-penalty=0", "--min-new-tokens=101"):
        result = CliRunner().invoke(app, ["generate", "Once", "--model", ".", setting])
        assert result.exit_code == 2
        assert result.output.count("\n") == 1
        assert result.output.startswith(f"error: {setting[2:].partition('=')[0].replace('-', '_')}")


def test_an_empty_prompt_is_refused(base):
    with pytest.raises(InputError, match="prompt: there is nothing to continue"):
        predict.generate(base, "", Sampling(max_new_tokens=3))


def test_chat_answers_with_the_models_own_template(assistant, capsys, monkeypatch):
    predict.chat(assistant, "Say hello.", "to Ann", Sampling(max_new_tokens=12))
    shown = capsys.readouterr().out
    prompt = render_prompt("phi3", "Say hello.", "to Ann")
    expected = answer(*predict._load(assistant, "finetune_instruct", "fp32"), prompt, 12)
    assert shown == expected.lstrip() + "\n"

    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello.\n"))
    predict.chat(assistant, None, "to Ann", Sampling(max_new_tokens=12))
    assert capsys.readouterr().out == shown


def test_chat_goes_on_until_an_empty_line(assistant, capsys, monkeypatch):
    lines = iter(["Say hello.", "Say goodbye.", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    predict.chat(assistant, None, "", Sampling(max_new_tokens=3))
    assert "an empty line or Ctrl-D ends" in capsys.readouterr().out
    assert next(lines, "all were asked for") == "all were asked for"


@pytest.fixture
def person(monkeypatch):
    """Types lines into a chat whose model answers A; returns the prompts that it was given."""

    def types(assistant, *lines, answer=b" A", context="", **options):
        typed = iter([*lines, ""])
        prompts = []

        def steps(model, given, *_, **__):
            prompts.append(byte_tokenizer().decode(given[0]))
            for byte in answer:
                yield [Token(IDS[byte], None)]

        monkeypatch.setattr(decoding, "_steps", steps)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda _: next(typed))
        predict.chat(assistant, None, context, Sampling(max_new_tokens=2), **options)
        return prompts

    return types


def phi3(*turns, system=""):
    prompts = render_prompts("phi3", turns, system=system)
    return "A<|endoftext|>".join(prompts)


@pytest.fixture
def wide(tmp_path):
    torch.manual_seed(7)
    model = GPT(replace(CONFIG, context_length=150))
    save_model(model, tmp_path / "wide", tokenizer=byte_tokenizer())
    (tmp_path / "wide" / "prompt.json").write_text('{"template": "phi3"}')
    return tmp_path / "wide"


def test_a_conversation_is_read_in_the_form_of_its_training(wide, person, capsys):
    """The earlier turns with their answers, up to as many as it may read, and the system text."""
    asked = ["One?", "Two?", "Three?", "Four?"]
    assert person(wide, *asked, turns=3, system="Hm.") == [
        phi3("One?", system="Hm."),
        phi3("One?", "Two?", system="Hm."),
        phi3("One?", "Two?", "Three?", system="Hm."),
        phi3("Two?", "Three?", "Four?", system="Hm."),
    ]
    shown = capsys.readouterr()
    assert "The last 3 are read together; /new forgets them." in shown.out
    assert shown.out.count("A\n") == 4
    assert shown.err == ""


def test_new_begins_a_conversation_anew(wide, person):
    assert person(wide, "One?", "Two?", "/new", "Three?", turns=9) == [
        phi3("One?"),
        phi3("One?", "Two?"),
        phi3("Three?"),
    ]


def test_an_earlier_turn_keeps_what_it_was_about(wide, person):
    first, second = person(wide, "One?", "Two?", turns=2, context="x")
    assert first == render_prompt("phi3", "One?", "x")
    assert (
        second
        == f"{phi3('One?' + chr(10) + 'x')}A<|endoftext|>"
        + (render_prompts("phi3", ["One?", "Two?"], "x")[1])
    )


def test_the_oldest_turns_go_where_the_context_ends(wide, person, capsys):
    asked = ["One?", "Two?", "Three?", "x" * 90]
    prompts = person(wide, *asked, turns=9)
    assert prompts[3] == phi3("Three?", "x" * 90)
    assert capsys.readouterr().err == "(no room for the first 2 of what was said before)\n"


@pytest.mark.parametrize("learnt", [None, 1, 2])
def test_an_assistant_reads_as_many_turns_as_it_learnt_from(wide, person, capsys, learnt):
    """One that has only seen single instructions makes nothing of more."""
    if learnt:
        (wide / "training.json").write_text(json.dumps({"turns": learnt}))
    one, two = person(wide, "One?", "Two?")
    assert one == phi3("One?")
    assert two == (phi3("One?", "Two?") if learnt == 2 else phi3("Two?"))
    assert ("Each one stands for itself." in capsys.readouterr().out) == (learnt != 2)


def test_what_is_typed_or_answered_never_ends_a_turn(wide, monkeypatch):
    tokenizer = byte_tokenizer()
    conversation = predict.Conversation(TEMPLATES["phi3"], tokenizer, 999, earlier=1)
    conversation.add("<|endoftext|>", "", "<|endoftext|>")
    assert conversation.prompt("<|endoftext|>").count(tokenizer.eot) == 1


def test_a_base_model_is_no_assistant(base):
    with pytest.raises(InputError, match=r"prompt\.json: not there, so this model follows no inst"):
        predict.chat(base, "Say hello.", "", Sampling(max_new_tokens=3))


def test_a_damaged_prompt_json_is_named(assistant):
    (assistant / "prompt.json").write_text("{}")
    with pytest.raises(InputError, match=r"prompt\.json: must be JSON with the texts"):
        predict.chat(assistant, "Say hello.", "", Sampling(max_new_tokens=3))


def test_classify_gives_each_text_its_class_and_probabilities(classifier, capsys):
    predict.classify_texts(classifier, ["win a prize", "see you", ""], as_json=True)
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["text"] for each in results] == ["win a prize", "see you", ""]
    for each in results:
        assert set(each["probabilities"]) == {"ham", "spam"}
        assert sum(each["probabilities"].values()) == pytest.approx(1)
        assert each["probabilities"][each["label"]] == max(each["probabilities"].values())

    predict.classify_texts(classifier, ["win a prize"], as_json=False)
    shown = capsys.readouterr().out
    assert shown.startswith(results[0]["label"])
    assert shown.endswith("%  win a prize\n")


@pytest.mark.parametrize(
    ("piped", "texts"),
    [
        ("one\n\n \ntwo\n", ["one", "", " ", "two"]),
        ("\ufeffone\ntwo", ["one", "two"]),
        ("\n", [""]),
        ("", []),
    ],
)
def test_each_line_of_a_pipe_has_its_line_of_classes(classifier, capsys, monkeypatch, piped, texts):
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    predict.classify_texts(classifier, ["-"], as_json=True)
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == texts


COMMAND = [sys.executable, "-m", "pipeline"]


def _run(*arguments, shell="", **settings):
    """The code and the output of a command line; `shell` follows it, as a redirection."""
    line = " ".join(map(shlex.quote, [*COMMAND, *map(str, arguments)])) + f" {shell}"
    root = Path(__file__).resolve().parents[3]
    return subprocess.run(
        ["bash", "-c", line], cwd=root, capture_output=True, timeout=100, check=False, **settings
    )


@pytest.mark.parametrize(
    ("command", "shell", "code", "said"),
    [
        (["classify"], "<&-", 0, ""),
        (["classify"], "0> /dev/null", 2, "error: standard input: Bad file descriptor; pipe in"),
        (
            ["classify"],
            r"< <(printf 'plain\ncaf\xe9\n')",
            2,
            "error: standard input: line 2 is not",
        ),
        (["classify"], r"$'caf\xe9'", 2, r"error: argument caf\xe9: not UTF-8; convert it"),
        (["classify", "café 🚢"], ">&-", 0, ""),
        (["classify", ""], r"2>&- $'\xe9'", 2, ""),
    ],
)
def test_odd_streams_and_bytes_end_in_one_line(classifier, command, shell, code, said):
    done = _run(*command, "--model", classifier, shell=shell)
    assert done.returncode == code, done.stderr
    assert done.stderr.decode().startswith(said)
    assert done.stderr.count(b"\n") == bool(said)


def test_a_terminal_of_few_characters_shows_the_others_spelled_out(classifier):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = _run("classify", "--json", "é🚢", "--model", classifier, env=environment)
    assert json.loads(done.stdout)["text"] == "é🚢"
    done = _run("classify", "é🚢", "--model", classifier, env=environment)
    assert done.stdout.endswith(b"\\xe9\\U0001f6a2\n")


def test_classify_cuts_a_text_as_its_training_did(classifier, capsys):
    (classifier / "training.json").write_text('{"max_length": 4}')
    predict.classify_texts(classifier, ["same begins", "same ends"], as_json=True)
    one, other = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one["probabilities"] == other["probabilities"]


def test_a_language_model_is_no_classifier_and_the_other_way_round(base, classifier):
    with pytest.raises(InputError, match="holds no classification head"):
        predict.classify_texts(base, ["x"], as_json=False)
    with pytest.raises(InputError, match="holds a classifier"):
        predict.generate(classifier, "Once", Sampling(max_new_tokens=3))
