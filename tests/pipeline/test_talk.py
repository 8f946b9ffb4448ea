"""Generate, chat and classify, over tiny models with known behaviour."""

import io
import json

import pytest
import torch

from gpt.config import GPTConfig
from gpt.errors import InputError
from gpt.generate import complete
from gpt.model import GPT, GPTClassifier
from gpt.prompts import render_prompt
from gpt.tokenizer import byte_tokenizer
from gpt.weights import save_model
from pipeline import talk
from pipeline.talk import Sampling

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

    def stream(model, prompts, *_, **__):
        for byte in text:
            yield [IDS[byte]]

    monkeypatch.setattr(talk, "stream", stream)


def written(sampling, prompt="p"):
    return list(talk.continuation(None, byte_tokenizer(), prompt, sampling))


def test_generate_prints_the_prompt_and_what_the_model_goes_on_with(base, capsys):
    talk.generate(base, "Once", Sampling(max_new_tokens=12))
    model, tokenizer = talk._load_writer(base, "pretrain")
    expected = complete(model, [tokenizer.encode("Once")], 12, stop=tokenizer.eot)[0]
    assert capsys.readouterr().out == "Once" + tokenizer.decode(expected) + "\n"


def test_sampling_repeats_with_a_seed(base, capsys):
    shown = []
    for seed in (1, 1, 2):
        talk.generate(base, "Once", Sampling(max_new_tokens=12, temperature=1.0, seed=seed))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_a_character_of_many_tokens_comes_whole(monkeypatch):
    scripted(monkeypatch, "né — ✓".encode())
    pieces = written(Sampling(max_new_tokens=99))
    assert "".join(pieces) == "né — ✓"
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [((), "one END two"), (("END",), "one "), (("two", " END"), "one"), (("ENDE",), "one END two")],
)
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(monkeypatch, stop, expected):
    scripted(monkeypatch, b"one END two")
    assert "".join(written(Sampling(max_new_tokens=99, stop=stop))) == expected


@pytest.mark.parametrize(
    ("sampling", "named"),
    [({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 2.0}, "top_p")],
)
def test_an_impossible_setting_is_refused_before_anything_is_printed(base, capsys, sampling, named):
    with pytest.raises(InputError, match=named):
        talk.generate(base, "Once", Sampling(max_new_tokens=3, **sampling))
    assert capsys.readouterr().out == ""


def test_an_empty_prompt_is_refused(base):
    with pytest.raises(InputError, match="prompt: there is nothing to continue"):
        talk.generate(base, "", Sampling(max_new_tokens=3))


def test_chat_answers_with_the_models_own_template(assistant, capsys, monkeypatch):
    talk.chat(assistant, "Say hello.", "to Ann", Sampling(max_new_tokens=12))
    shown = capsys.readouterr().out
    model, tokenizer = talk._load_writer(assistant, "finetune_instruct")
    prompt = tokenizer.encode(render_prompt("phi3", "Say hello.", "to Ann"))
    expected = tokenizer.decode(complete(model, [prompt], 12, stop=tokenizer.eot)[0])
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
