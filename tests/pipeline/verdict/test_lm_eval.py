"""EleutherAI's harness gives the scores that a direct computation gives, and says what it cannot.

Needs the extra `lm-eval`; without it only the line that says so is tested.
"""

import importlib.util
import json
import math
import socket
import sys
import time
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from pydantic import ValidationError

from gpt.base.errors import InputError
from gpt.base.files import sha256_of
from gpt.inference import generate
from gpt.model.config import GPTConfig
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import load_base, save_model
from gpt.prompts import TEMPLATES, encode_turns, last_prompt, render_prompt
from gpt.text.records import Instruction, Turn
from gpt.tokens.tokenizer import END_OF_TEXT, train_bpe
from pipeline.verdict.lm_eval import HarnessParams, measure

CONTEXT = 48
INVALID = "\N{REPLACEMENT CHARACTER}"  # random models write bytes that are no text
WORDS = ["red", "green", "a very dark blue", "yellow, or nearly so", "white", "grey as the sea"]
QUESTIONS = [
    f"{'Once more, and slowly now. ' * (n % 4) * 2}What is the colour of number {n}?"
    for n in range(24)
]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The harness, with its cache in the test's folder."""
    pytest.importorskip("lm_eval", reason="needs the extra: pip install '.[lm-eval]'")
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An assistant of random weights, larger than at initialization: it has opinions."""
    tokenizer = train_bpe([*QUESTIONS, *WORDS, "the"] * 3, 320)
    torch.manual_seed(1)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, context_length=CONTEXT, n_layer=2, n_head=2, n_embd=16
    )
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    out = tmp_path_factory.mktemp("models") / "assistant"
    save_model(model.eval(), out, tokenizer=tokenizer, extra=TEMPLATES["phi3"].files)
    return out


@pytest.fixture
def make_task(tmp_path):
    """A function from a task's settings and its documents to its YAML file."""

    def make(documents, name="task", **settings):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in documents))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "metadata": {"version": 3},
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        return folder / f"{name}.yaml"

    return make


@pytest.fixture
def choices(make_task):
    """A multiple-choice task, of which some questions are longer than the context."""
    documents = [
        {"question": question, "choices": WORDS[n % 3 :], "label": n % 3}
        for n, question in enumerate(QUESTIONS)
    ]
    path = make_task(
        documents,
        "colours",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    return path, documents


def log_probs(model, ids, n):
    """The summed log-probability of the last n ids, from the logits of all positions."""
    ids = torch.tensor([ids[-(CONTEXT + 1) :]])
    known = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
    return known[-n:].sum().item()


def values(results):
    return {score["metric"]: score["value"] for score in results["scores"]}


@torch.no_grad()
def test_a_local_task_has_the_accuracy_of_full_logits(installed, directory, choices, tmp_path):
    path, documents = choices
    model, tokenizer = load_base(directory)
    right, right_norm = [], []
    for each in documents:
        question = tokenizer.encode(each["question"])
        answers = [tokenizer.encode(f" {choice}") for choice in each["choices"]]
        sums = [log_probs(model, [*question, *answer], len(answer)) for answer in answers]
        norm = [s / len(choice) for s, choice in zip(sums, each["choices"], strict=True)]
        right.append(sums.index(max(sums)) == each["label"])
        right_norm.append(norm.index(max(norm)) == each["label"])
    acc, acc_norm = sum(right) / len(right), sum(right_norm) / len(right)
    assert 0 < acc < 1
    assert acc != acc_norm, "the questions must tell the two apart"

    results = measure(HarnessParams(tasks=(str(path),)), model=directory, out=tmp_path / "out")
    assert values(results) == {"acc": acc, "acc_norm": acc_norm}
    assert results["shortened"] > 0
    samples = pd.read_json(tmp_path / "out" / "samples.jsonl", lines=True)
    assert samples.sort_values("doc_id")["acc"].astype(bool).tolist() == right


def test_results_say_what_was_measured_and_how_sure_it_is(installed, directory, choices, tmp_path):
    path, _ = choices
    params = HarnessParams(tasks=(str(path.parent),), limit=9, shots=2)
    results = measure(params, model=directory, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert results["model_sha256"] == sha256_of(directory / "model.safetensors")
    assert results["limit"] == 9
    acc = results["scores"][0]
    assert (acc["task"], acc["version"], acc["samples"], acc["shots"]) == ("colours", 3, 9, 2)
    p = acc["value"]
    assert acc["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (9 - 1)))
    page = (tmp_path / "out" / "results.md").read_text()
    assert f"lm-evaluation-harness {results['harness']}, the first 9 documents" in page
    row = next(line for line in page.splitlines() if line.startswith("| colours"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["colours", "3", "2", "9", "acc", "none", f"{p:.4g}", f"{acc['stderr']:.4g}"]


@pytest.fixture
def writing(make_task, directory):
    """A task of writing, right in every other document; what is written directly comes with it.

    An answer ends before a pair of characters or before the second of them alone, with the end of
    the text, or after 10 tokens.
    """
    model, tokenizer = load_base(directory)

    def direct(prompt):
        ids = torch.tensor([tokenizer.encode(prompt)[-(CONTEXT - 10) :]])
        added = generate(model, ids, 10, stop=tokenizer.eot)[0, ids.shape[1] :].tolist()
        return tokenizer.decode([i for i in added if i != tokenizer.eot])

    def make(prompt_of=str):
        whole = [direct(prompt_of(question)) for question in QUESTIONS]
        pairs = Counter(text[i : i + 2] for text in whole for i in range(1, len(text) - 1))
        pair = next(two for two, _ in pairs.most_common() if INVALID not in two)
        stops = [pair, pair[1]]
        answers = [text.split(pair)[0].split(pair[1])[0] for text in whole]
        assert any(answer + pair in text for text, answer in zip(whole, answers, strict=True))
        documents = [
            {"question": question, "answer": answer if n % 2 else f"not {answer}"}
            for n, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
        ]
        path = make_task(
            documents,
            "writing",
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": stops, "max_gen_toks": 10, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        )
        return path, answers

    return make


def written(out):
    samples = pd.read_json(out / "samples.jsonl", lines=True).sort_values("doc_id")
    return [response for ((response,),) in samples["responses"]]


def test_written_answers_are_those_of_direct_generation(installed, directory, writing, tmp_path):
    path, answers = writing()
    assert len(set(answers)) > 3
    results = measure(HarnessParams(tasks=(str(path),)), model=directory, out=tmp_path / "out")
    assert written(tmp_path / "out") == answers
    assert values(results) == {"exact_match": 0.5}


def test_chat_asks_in_the_words_of_the_models_own_template(installed, directory, writing, tmp_path):
    path, answers = writing(lambda question: render_prompt("phi3", question))
    results = measure(
        HarnessParams(tasks=(str(path),), chat=True), model=directory, out=tmp_path / "out"
    )
    assert written(tmp_path / "out") == answers
    assert values(results) == {"exact_match": 0.5}
    assert results["chat"] is True


@torch.no_grad()
def test_perplexity_is_that_of_a_direct_computation(installed, directory, make_task, tmp_path):
    """Texts of one window, of just one, of several, and of none."""
    texts = ["A short one.", " ".join(QUESTIONS), "The sea is grey. " * 9, "x"]
    path = make_task(
        [{"text": text} for text in texts],
        "texts",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )
    model, tokenizer = load_base(directory)
    total = 0.0
    for text in texts:
        ids = [tokenizer.eot, *tokenizer.encode(text)]
        for start in range(1, len(ids), CONTEXT):
            end = min(start + CONTEXT, len(ids))
            total += log_probs(model, ids[:end], end - start)
    per_byte = -total / sum(len(text.encode()) for text in texts)

    results = measure(HarnessParams(tasks=(str(path),)), model=directory, out=tmp_path / "out")
    assert values(results)["byte_perplexity"] == pytest.approx(math.exp(per_byte), rel=1e-5)
    assert values(results)["bits_per_byte"] == pytest.approx(per_byte / math.log(2), rel=1e-5)


def request(*args):
    """What the model looks at of one of the harness's requests."""
    return SimpleNamespace(args=args)


def test_what_has_no_context_is_the_beginning_of_a_text(installed, directory):
    from pipeline.verdict.lm_eval_model import HarnessModel

    model, tokenizer = load_base(directory)
    asked = HarnessModel(directory)
    empty, blank = asked.loglikelihood([request("", " red"), request(" ", "red")])
    ids = [tokenizer.eot, *tokenizer.encode(" red")]
    assert empty == blank
    assert empty[0] == pytest.approx(log_probs(model, ids, len(ids) - 1))


def test_a_conversation_has_the_ids_of_training(installed, directory):
    from pipeline.verdict.lm_eval_model import HarnessModel

    _, tokenizer = load_base(directory)
    template = TEMPLATES["phi3"]
    asked = HarnessModel(directory, template)
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    earlier = (Turn(QUESTIONS[0], "red"),)
    record = Instruction(QUESTIONS[1], "", "", earlier, "Be brief.")
    (turns,) = encode_turns(tokenizer, template, [record])
    ids = asked.tok_encode(asked.apply_chat_template(said))
    assert ids == last_prompt(turns, tokenizer.eot)
    begun = asked.apply_chat_template(said[:3], add_generation_prompt=False)
    assert begun.endswith("red")
    assert asked.apply_chat_template(said[:3]) == begun + END_OF_TEXT


# --- what cannot be measured ----------------------------------------------------------------------


@pytest.fixture
def refused(directory, tmp_path):
    """A function that expects one line of refusal that matches, and nothing written."""

    def expect(complaint, *tasks, model=directory, **settings):
        with pytest.raises(InputError, match=complaint) as caught:
            measure(HarnessParams(tasks=tasks, **settings), model=model, out=tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    return expect


def test_without_the_extra_one_line_says_how_to_install_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(r"^lm-eval is not installed: pip install '.\[lm-eval\]'$", "hellaswag")


def test_a_task_that_is_not_there_is_refused(installed, refused, tmp_path):
    refused("no/such.yaml: no such file; give a task's name", "no/such.yaml")
    (tmp_path / "empty").mkdir()
    refused("empty/: no such task; .*holds YAML files with", f"{tmp_path}/empty/")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("just words", "got str"),
        ("a: 1", "Unknown config shape"),
        ("a: [", "while parsing"),
        ("task: t\noutput_type: multiple_choice", "TypeError"),
    ],
)
def test_a_file_that_is_no_task_is_refused(installed, refused, tmp_path, content, why):
    (tmp_path / "t.yaml").write_text(content)
    refused(f"t.yaml: not a task that the harness can run .*{why}.*see docs", f"{tmp_path}/t.yaml")


def test_a_field_that_some_document_lacks_is_refused(installed, refused, make_task):
    path = make_task(
        [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}],
        output_type="loglikelihood",
        doc_to_text="{{question}}",
        doc_to_target="{{answer.upper()}}",
        metric_list=[{"metric": "acc"}],
    )
    refused("task.yaml: not a task that the harness can run .*upper", str(path))


@pytest.mark.slow
def test_names_are_those_of_the_harness_beside_local_files(installed, refused, choices):
    """Slow: to know all its names the harness reads fourteen thousand files."""
    refused("hellaswga: no such task; there are .*hellaswag", "hellaswga")
    refused("hellaswag: the data cannot be read", f"{choices[0].parent}/", "hellaswag")


def test_a_task_whose_data_is_not_there_is_refused(installed, refused, choices, make_task):
    path, _ = choices
    path.with_suffix(".jsonl").unlink()
    refused("colours.yaml: the data cannot be read .*; add --online where", str(path))


def test_nothing_goes_out_to_the_network_unless_asked(
    installed, refused, choices, make_task, monkeypatch
):
    """A task whose data would be fetched: offline nobody even asks for an address."""
    tried = []

    def no_network(host, *_, **__):
        tried.append(host)
        raise socket.gaierror("there is no network here")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # it tries again, ever later
    settings = yaml.safe_load(choices[0].read_text())
    settings |= {"dataset_path": "nobody/nothing", "dataset_kwargs": {}}
    path = make_task([], settings.pop("task"), **settings)
    refused("colours.yaml: the data cannot be read .*nobody/nothing.*; add --online", str(path))
    assert tried == []
    refused("nobody/nothing.*; look at the network", str(path), online=True)
    assert tried


def test_only_language_models_are_measured(installed, refused, directory, tmp_path):
    config = GPTConfig(vocab_size=320, context_length=16, n_layer=1, n_head=2, n_embd=16)
    tokenizer = load_base(directory)[1]
    save_model(GPTClassifier(config, ["ham", "spam"]), tmp_path / "c", tokenizer=tokenizer)
    refused("holds a classifier; a language model is needed", "hellaswag", model=tmp_path / "c")
    save_model(GPT(config), tmp_path / "base", tokenizer=tokenizer)
    no_template = "prompt.json: not there, so this model follows no instructions"
    refused(no_template, "hellaswag", model=tmp_path / "base", chat=True)
    refused("no such file; .* is no model directory", "hellaswag", model=tmp_path / "none")


def test_files_of_someone_else_are_not_written_over(directory, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # it is not needed yet
    (tmp_path / "results.json").write_text('{"my": "results"}')
    with pytest.raises(InputError, match=r"holds a results\.json that was not written here"):
        measure(HarnessParams(tasks=("hellaswag",)), model=directory, out=tmp_path)
    assert (tmp_path / "results.json").read_text() == '{"my": "results"}'


def test_what_the_context_cannot_hold_is_refused(installed, refused, choices, writing):
    path, documents = choices
    data = path.with_suffix(".jsonl")
    long = {**documents[0], "choices": ["what " * 40, "red"]}
    data.write_text(json.dumps(long) + "\n")
    refused(f"a continuation of [0-9]+ tokens, and it must have 1 to {CONTEXT}", str(path))
    path, _ = writing()
    task = yaml.safe_load(path.read_text())
    for changes, complaint in (
        (
            {"max_gen_toks": CONTEXT},
            rf"\({CONTEXT}\) must be less than model's maximum sequence",
        ),
        ({"no_such": 4}, "ValueError: The following .*no_such"),
    ):
        changed = {**task, "generation_kwargs": {**task["generation_kwargs"], **changes}}
        path.write_text(yaml.safe_dump(changed))
        refused(complaint, str(path))


def test_impossible_settings_are_refused():
    for wrong in ({"tasks": ()}, {"limit": 0}, {"shots": -1}, {"device": "cpu"}):
        with pytest.raises(ValidationError):
            HarnessParams(**{"tasks": ("hellaswag",), **wrong})
    assert asdict(HarnessParams(tasks=("a",)))["online"] is False
