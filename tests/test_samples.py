"""The samples that the project carries keep what is said of them."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gpt.model.weights import load_base
from gpt.text.records import RawFile, instructions_in, messages_in
from pipeline.project.params import load_params

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
NANO = SAMPLES / "gpt2-nano"


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def raw_file(kind, format_):
    return RawFile(name=kind, file=kind, kind=kind, format=format_, bytes=0, sha256="")


@pytest.fixture(scope="module")
def messages():
    return messages_in(SAMPLES / "messages.tsv", raw_file("messages", "tsv"))


def test_there_are_60_kb_of_stories():
    assert len((SAMPLES / "stories.txt").read_text(encoding="utf-8").encode()) >= 60_000


def test_no_story_is_there_twice():
    separator = load_params(ROOT / "params.yaml").download.corpus[1].separator
    stories = (SAMPLES / "stories.txt").read_text(encoding="utf-8").split(separator)
    assert len(stories) > 20
    assert len({story.strip() for story in stories}) == len(stories)


def test_there_are_1200_messages_of_two_labels_in_like_numbers(messages):
    counts = messages["label"].value_counts()
    assert set(counts.index) == {"ham", "spam"}
    assert counts.sum() >= 1200
    assert counts.min() >= 500


def test_no_two_messages_are_near_duplicates(messages):
    """At a Jaccard similarity of 0.8 over word trigrams."""
    seen = defaultdict(list)  # trigram -> the messages that it is in
    sizes = []
    for number, text in enumerate(messages["text"]):
        found = words(text)
        trigrams = {tuple(found[i : i + 3]) for i in range(max(1, len(found) - 2))}
        sizes.append(len(trigrams))
        shared = Counter(other for trigram in trigrams for other in seen[trigram])
        for other, n in shared.items():
            similarity = n / (sizes[number] + sizes[other] - n)
            assert similarity < 0.8, (text, messages["text"][other])
        for trigram in trigrams:
            seen[trigram].append(number)


def test_no_single_word_gives_a_label_away(messages):
    spam = (messages["label"] == "spam").tolist()
    having, in_spam = Counter(), Counter()
    for text, is_spam in zip(messages["text"], spam, strict=True):
        for word in set(words(text)):
            having[word] += 1
            in_spam[word] += is_spam
    for word, n in having.items():
        if n >= 30:
            assert 0 < in_spam[word] < n, word
        # "spam where the word is, else ham", or the other way round
        right = in_spam[word] + (len(spam) - sum(spam)) - (n - in_spam[word])
        assert max(right, len(spam) - right) / len(spam) < 0.8, word


def test_there_are_600_instructions_and_no_task_twice():
    path = SAMPLES / "instructions.json"
    records = instructions_in(path, raw_file("instructions", "json"))
    assert len(records) >= 600
    tasks = Counter(" ".join(f"{r.instruction} {r.input}".lower().split()) for r in records)
    assert [task for task, n in tasks.items() if n > 1] == []


def test_every_instruction_has_its_own_answer_as_the_better_one_and_a_worse_one():
    records = json.loads((SAMPLES / "instructions.json").read_text(encoding="utf-8"))
    assert all(list(r) == ["instruction", "input", "output", "chosen", "rejected"] for r in records)
    assert all(r["chosen"] == r["output"] != r["rejected"].strip() for r in records)

    # what samples/README.md says of them
    def kind(answer, worse):
        if worse == answer.rstrip(".").upper() + "!!!":
            return "shouted"
        if worse.endswith(f": {answer}"):
            return "announced"
        if worse.endswith(answer):
            return "remark before"
        return "remark behind" if worse.startswith(answer) else "no answer"

    assert Counter(kind(r["output"], r["rejected"]) for r in records) == {
        "remark before": 280,
        "remark behind": 229,
        "announced": 37,
        "no answer": 91,
        "shouted": 71,
    }


def test_the_base_model_is_small_and_has_learnt_something():
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= 8_000_000
    model, tokenizer = load_base(NANO)
    ids = torch.tensor(tokenizer.encode("The old man looked out of the window."))
    loss = F.cross_entropy(model(ids[None])[0, :-1], ids[1:]).item()
    assert loss < math.log(tokenizer.vocab_size) - 2


def test_the_base_model_has_not_seen_what_params_yaml_tests_on():
    params, nano = load_params(ROOT / "params.yaml"), load_params(ROOT / "presets/gpt2-nano.yaml")
    corpus = {source.name: source for source in nano.download.corpus}
    messages = corpus.pop("messages")
    assert messages.file == params.download.messages[0].file
    assert messages.part == "train"
    assert messages.split == params.finetune_classifier.split
    assert messages.balance == params.finetune_classifier.balance
    # nothing else than the default's own corpus, with the same documents held out
    assert list(corpus.values()) == list(params.download.corpus)
    for name in ("validation", "split", "seed"):
        assert getattr(nano.tokenize, name) == getattr(params.tokenize, name), name


def test_git_keeps_the_samples_and_the_presets(tmp_path):
    """In a repository of its own: a source archive has none."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    nano = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
    kept = [ROOT / "params.yaml", *SAMPLES.glob("*.*"), *(ROOT / "presets").glob("*.yaml")]
    kept += [NANO / name for name in nano]
    names = [str(path.relative_to(ROOT)) for path in kept]
    command = ["git", "-c", "core.excludesFile=", "check-ignore", *names]
    ignored = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ignored.stdout == ""
    assert ignored.returncode == 1, ignored.stderr
