"""The stage evaluate: every figure computed a second time, from what it wrote and by others."""

import json
import math
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

from gpt.base.errors import RunError
from gpt.base.events import Progress
from gpt.base.files import sha256_of
from gpt.model.weights import load_base
from gpt.prompts import render_prompt, render_prompts
from gpt.scores.bootstrap import accuracy, macro_f1, mean, mean_loss
from gpt.scores.likelihood import classify_by_likelihood
from gpt.scores.text_scores import length_statistics, score_texts
from gpt.text.records import (
    Instruction,
    Split,
    read_instructions,
    read_messages,
    split_instructions,
    split_messages,
)
from gpt.tokens.token_files import open_tokens
from gpt.tokens.tokenizer import byte_tokenizer, train_bpe
from stages.evaluate import EvaluateParams, evaluate
from stages.evaluate.bases import measure_untrained_classification
from stages.evaluate.classifier import measure_classifier
from stages.evaluate.intervals import bounds
from stages.finetune_classifier import FinetuneClassifierParams, finetune_classifier
from stages.finetune_instruct import FinetuneInstructParams, finetune_instruct
from stages.tokenize import TokenizeParams, tokenize

PARAMS = EvaluateParams(device="cpu", threads=1, batch_size=3, max_new_tokens=5, resamples=300)
CPU = torch.device("cpu")
SPLIT = {"train": 0.5, "validation": 0.2, "seed": 11}
TRAIN = {"device": "cpu", "threads": 1, "batch_size": 8, "learning_rate": 1e-2, "steps": 10}


@pytest.fixture(scope="module")
def bpe(documents):
    return train_bpe(documents, 300)


@pytest.fixture(scope="module")
def gpt2(make_base, bpe):
    """A base of its own tokenizer and context, other than those of the token files."""
    return make_base(tokenizer=bpe, context_length=48, n_layer=1)


def make_classifier(base, messages, out, train=TRAIN):
    finetune_classifier(
        TypeAdapter(FinetuneClassifierParams).validate_python(
            {"base": "pretrain", "split": SPLIT, "trainable": "all", "train": train}
        ),
        base=base,
        messages=messages,
        out=out,
        metrics=out.with_name("metrics.json"),
        history=out.with_name("history.csv"),
    )
    return out


def make_assistant(base, instructions, out):
    finetune_instruct(
        TypeAdapter(FinetuneInstructParams).validate_python(
            {
                "base": "gpt2",
                "split": SPLIT,
                "template": "phi3",
                "train": {**TRAIN, "steps": 40},
            }
        ),
        base=base,
        instructions=instructions,
        out=out,
        metrics=out.with_name("metrics.json"),
        history=out.with_name("history.csv"),
    )
    return out


@pytest.fixture(scope="module")
def paths(tmp_path_factory, base, gpt2, messages, instructions, tokens):
    """What evaluate reads: both bases, and the two models made of them."""
    models = tmp_path_factory.mktemp("models")
    make_assistant(gpt2, instructions, models / "assistant")
    return {
        "pretrain": base,
        "gpt2": gpt2,
        "classifier": make_classifier(base, messages, models / "classifier"),
        "assistant": models / "assistant",
        "tokens": tokens,
        "messages": messages,
        "instructions": instructions,
    }


def run(folder, params, paths, **options):
    figures = evaluate(
        params,
        **paths,
        predictions=folder / "predictions",
        metrics=folder / "metrics.json",
        **options,
    )
    assert json.loads((folder / "metrics.json").read_text()) == figures
    return figures


def read(folder, name):
    """A table of predictions as it was written: an empty text is a text."""
    path = folder / "predictions" / f"{name}.csv"
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory, paths):
    """The folder and the figures of one run."""
    folder = tmp_path_factory.mktemp("evaluate")
    return folder, run(folder, PARAMS, paths)


@pytest.fixture
def copied(tmp_path, paths):
    """A function that puts a copy of one of the paths in its place, to be broken."""

    def copy(name):
        shutil.copytree(paths[name], tmp_path / name)
        return {**paths, name: tmp_path / name}

    return copy


def test_it_writes_its_outputs_and_nothing_else(done, everything):
    folder, figures = done
    assert list(everything(folder)) == [
        "metrics.json",
        "predictions/assistant.csv",
        "predictions/classifier.csv",
        "predictions/classifier_confusion.csv",
        "predictions/classifier_most_wrong.csv",
        "predictions/gpt2.csv",
        "predictions/likelihood.csv",
        "predictions/pretrain.csv",
    ]
    assert list(figures) == ["pretrain", "gpt2", "classifier", "assistant"]


def test_equal_runs_give_equal_bytes(tmp_path, done, paths, everything):
    heard = []
    run(tmp_path, PARAMS, paths, log=heard.append)
    assert everything(tmp_path) == everything(done[0])
    steps = [event for event in heard if isinstance(event, Progress)]
    assert steps[-1].done == steps[-1].total == 5


# --- the bases ------------------------------------------------------------------------------------


def loss_over(model, ids, context):
    theirs = GPT2LMHeadModel.from_pretrained(model).eval()
    losses = []
    for start in range(0, len(ids) - context, context):
        window = ids[start : start + context + 1]
        with torch.no_grad():
            losses.append(F.cross_entropy(theirs(window[None, :-1]).logits[0], window[1:]).item())
    return sum(losses) / len(losses)


def test_the_loss_of_a_base_is_over_the_validation_split(done, paths):
    figures = done[1]["pretrain"]
    ids = torch.from_numpy(open_tokens(paths["tokens"], "validation")[:])
    loss = loss_over(paths["pretrain"], ids, 64)
    assert figures["loss"] == pytest.approx(loss, abs=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    documents = byte_tokenizer().decode([i for i in ids.tolist() if i != 256])
    assert figures["bits_per_byte"] == pytest.approx(
        loss / math.log(2) * len(ids) / len(documents.encode()), rel=1e-4
    )
    # weights of 0.02 make all tokens about as likely
    assert figures["untrained_loss"] == pytest.approx(math.log(257), abs=0.1)


def test_a_base_of_another_tokenizer_is_measured_on_the_same_text(done, paths, bpe):
    """In its own tokens, with the end of text between documents; bits are by the same bytes."""
    ids = open_tokens(paths["tokens"], "validation")[:].tolist()
    texts = bytes(0 if i == 256 else i for i in ids).decode().split("\0")
    assert len(texts) == 5
    own = [bpe.encode(text) for text in texts]
    joined = torch.tensor([i for n, row in enumerate(own) for i in ([bpe.eot] * (n > 0)) + row])
    assert len(joined) < 0.6 * len(ids)
    loss = loss_over(paths["gpt2"], joined, 48)
    figures = done[1]["gpt2"]
    assert figures["loss"] == pytest.approx(loss, abs=1e-4)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert figures["bits_per_byte"] == pytest.approx(
        loss / math.log(2) * len(joined) / n_bytes, rel=1e-4
    )
    assert figures["untrained_loss"] == pytest.approx(math.log(bpe.vocab_size), abs=0.1)


# --- the classifier -------------------------------------------------------------------------------


def test_a_row_is_written_for_each_test_message(done, paths):
    table = read(done[0], "classifier")
    test = split_messages(read_messages(paths["messages"]), Split(**SPLIT), "undersample")["test"]
    assert table["text"].tolist() == test["text"].tolist()
    assert table["actual"].tolist() == test["label"].tolist()
    assert done[1]["classifier"]["rows"] == len(table) == 24


def test_the_predictions_are_those_of_transformers(done, paths):
    table = read(done[0], "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(paths["classifier"]).eval()
    cut = json.loads((paths["classifier"] / "training.json").read_text())["max_length"]
    for _, row in table.iterrows():
        with torch.no_grad():
            logits = model(torch.tensor([byte_tokenizer().encode(row["text"])[:cut]])).logits
        probabilities = logits.softmax(1)[0]
        assert row["predicted"] == model.config.id2label[int(probabilities.argmax())]
        for i, label in model.config.id2label.items():
            assert float(row[f"probability_{label}"]) == pytest.approx(
                float(probabilities[i]), abs=1e-4
            )


def test_the_scores_follow_from_the_predictions(done):
    table = read(done[0], "classifier")
    held = ("train_", "validation_")
    figures = {n: v for n, v in done[1]["classifier"].items() if not n.startswith(held)}
    intervals = {n: figures.pop(n) for n in list(figures) if n.endswith(("_low", "_high"))}
    assert set(intervals) == {
        f"{score}_{end}" for score in ("accuracy", "f1_macro") for end in ("low", "high")
    }
    # undersampled: as many of each class, near enough
    most = table["actual"].value_counts().max()
    assert figures.pop("majority_accuracy") == pytest.approx(most / 24)
    for name in held:  # the other parts have the same scores
        assert {name + key for key in figures} <= set(done[1]["classifier"])
    pairs = Counter(zip(table["actual"], table["predicted"], strict=True))
    assert figures.pop("accuracy") == pytest.approx(
        (pairs["ham", "ham"] + pairs["spam", "spam"]) / 24
    )
    f1, precision, recall = {}, {}, {}
    for label in ("ham", "spam"):
        right = pairs[label, label]
        said = sum(n for (_, predicted), n in pairs.items() if predicted == label)
        there = sum(n for (actual, _), n in pairs.items() if actual == label)
        f1[label] = 2 * right / (said + there)
        precision[label], recall[label] = right / said if said else 0, right / there
        assert figures.pop(f"precision_{label}") == pytest.approx(precision[label])
        assert figures.pop(f"recall_{label}") == pytest.approx(recall[label])
        assert figures.pop(f"f1_{label}") == pytest.approx(f1[label])
    for name, values in (("f1", f1), ("precision", precision), ("recall", recall)):
        assert figures.pop(f"{name}_macro") == pytest.approx(sum(values.values()) / 2)
    said = table[["probability_ham", "probability_spam"]].astype(float)
    spam = table["actual"] == "spam"
    area = roc_auc_score(spam, said["probability_spam"])
    assert figures.pop("roc_auc") == pytest.approx(area, abs=0.01)
    bins = pd.cut(said.max(axis=1), np.linspace(0, 1, 16))
    right = table["actual"] == table["predicted"]
    error = sum(
        len(rows) / 24 * abs(rows.mean() - said.max(axis=1)[rows.index].mean())
        for _, rows in right.groupby(bins, observed=True)
    )
    assert figures.pop("calibration_error") == pytest.approx(error, abs=1e-4)
    assert figures.pop("rows") == 24
    assert not figures


def test_each_part_has_its_confusion_matrix_and_the_messages_that_it_got_most_wrong(
    tmp_path, base, messages
):
    hardly = make_classifier(base, messages, tmp_path / "m/classifier", {**TRAIN, "steps": 1})
    figures, tables = measure_classifier(hardly, messages, CPU, 8, bounds(50, 0))
    confusion, wrong = tables["classifier_confusion"], tables["classifier_most_wrong"]
    for part in ("test", "validation", "train"):
        prefix = "" if part == "test" else f"{part}_"
        rows = confusion[confusion["part"] == part]
        assert rows["messages"].sum() == figures[f"{prefix}rows"]
        right = rows[rows["actual"] == rows["predicted"]]["messages"].sum()
        assert right / figures[f"{prefix}rows"] == pytest.approx(figures[f"{prefix}accuracy"])
        listed = wrong[wrong["part"] == part]
        assert len(listed) == min(20, figures[f"{prefix}rows"] - right)
        assert listed["probability_actual"].is_monotonic_increasing
        assert (listed["probability_actual"] <= 0.5).all()
        assert (listed["actual"] != listed["predicted"]).all()
    table = tables["classifier"]
    missed = table[table["actual"] != table["predicted"]]
    assert len(missed), "nothing was wrong: nothing is compared"
    of_test = wrong[wrong["part"] == "test"]
    assert set(of_test["text"]) <= set(missed["text"])
    columns = {label: missed[f"probability_{label}"] for label in ("ham", "spam")}
    worst = min(columns[label][i] for i, label in missed["actual"].items())
    assert of_test["probability_actual"].iloc[0] == worst


def test_more_than_two_classes_and_any_text_survive_the_table(tmp_path, base, paths, raw):
    odd = ('"quoted", with a comma', "NA", "null", " leading", "'=1+1", "é 漢 🙂", "a;b")
    rows = [
        (label, f"{odd[i % len(odd)]} {i // len(odd) or ''}".rstrip())
        for i in range(42)
        for label in ("first", "second", "third")
    ]
    messages = raw("messages", rows)
    classifier = make_classifier(base, messages, tmp_path / "models/classifier")
    figures = run(tmp_path, PARAMS, {**paths, "classifier": classifier, "messages": messages})
    test = split_messages(read_messages(messages), Split(**SPLIT), "undersample")["test"]
    table = read(tmp_path, "classifier")
    assert table["text"].tolist() == test["text"].tolist()
    right = (table["actual"] == table["predicted"]).mean()
    assert figures["classifier"]["accuracy"] == pytest.approx(right)
    assert {"f1_first", "f1_second", "f1_third"} <= set(figures["classifier"])


TOPICS = {
    "weather": (
        "Rain falls on hill {}.",
        "Snow and wind by noon, {} degrees.",
        "Fog at {}, then sun.",
    ),
    "sport": (
        "Team {} won the match.",
        "She ran lap {} in the lead.",
        "Goal number {} of the cup.",
    ),
    "food": ("Bake bread for {} minutes.", "Soup with {} onions.", "Add {} spoons of sugar."),
    "travel": (
        "Train {} leaves the city.",
        "Bus {} goes to the sea.",
        "Gate {}: the flight boards.",
    ),
    "music": (
        "Song {} has a slow beat.",
        "The choir sings part {}.",
        "Play chord {} on the piano.",
    ),
}


def test_five_classes_are_trained_and_measured_as_two_are(tmp_path, base, paths, raw):
    """By topic, in unequal numbers; every class is met in the test part, and some are taken for
    others.
    """
    rows = [
        (topic, sentence.format(i))
        for size, (topic, sentences) in enumerate(TOPICS.items())
        for sentence in sentences
        for i in range(8 + size)
    ]
    messages = raw("messages", rows)
    train = {**TRAIN, "steps": 60}
    classifier = make_classifier(base, messages, tmp_path / "models/classifier", train)
    figures = run(tmp_path, PARAMS, {**paths, "classifier": classifier, "messages": messages})
    scores, table = figures["classifier"], read(tmp_path, "classifier")
    labels = sorted(TOPICS)
    n = len(table)
    assert scores["rows"] == n == 36  # of 24 a class
    counts = pd.crosstab(table["actual"], table["predicted"]).reindex(
        index=labels, columns=labels, fill_value=0
    )
    assert counts.to_numpy().sum() == n
    assert (counts.sum(axis=1) > 0).all()
    assert scores["accuracy"] == pytest.approx(sum(counts.loc[k, k] for k in labels) / n)
    assert scores["accuracy"] > 0.5  # by chance 0.2
    for label in labels:
        said, right = counts[label].sum(), counts.loc[label, label]
        assert scores[f"precision_{label}"] == pytest.approx(right / said if said else 0)
        assert scores[f"recall_{label}"] == pytest.approx(right / counts.loc[label].sum())
    mean = sum(scores[f"f1_{label}"] for label in labels) / 5
    assert scores["f1_macro"] == pytest.approx(mean)
    probabilities = table[[f"probability_{label}" for label in labels]].astype(float)
    assert probabilities.sum(axis=1).to_numpy() == pytest.approx([1] * n, abs=1e-5)
    best = probabilities.to_numpy().argmax(1)
    assert table["predicted"].tolist() == [labels[i] for i in best]


# --- the assistant --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def test_records(records):
    return split_instructions([Instruction(**r) for r in records], Split(**SPLIT))["test"]


def test_a_row_is_written_for_each_test_record(done, test_records):
    table = read(done[0], "assistant")
    assert table["instruction"].tolist() == [r.instruction for r in test_records]
    assert table["input"].tolist() == [r.input for r in test_records]
    assert table["reference"].tolist() == [r.output for r in test_records]
    assert done[1]["assistant"]["records"] == len(table) == 12


@pytest.mark.parametrize(("prefix", "name"), [("", "assistant"), ("base_", "gpt2")])
def test_losses_and_answers_are_those_of_transformers(done, paths, bpe, test_records, prefix, name):
    """For the assistant, and for the base that it was made of, which is asked the same."""
    theirs = GPT2LMHeadModel.from_pretrained(paths[name]).eval()
    total, n = 0.0, 0
    answers = []
    for record in test_records:
        prompt = bpe.encode(render_prompt("phi3", record.instruction, record.input))
        ids = torch.tensor([*prompt, *bpe.encode(record.output), bpe.eot])[:49]
        targets = ids[len(prompt) :]
        with torch.no_grad():
            logits = theirs(ids[None, :-1]).logits[0, len(prompt) - 1 :]
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        n += len(targets)
        row = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                row.append(int(theirs(torch.tensor([row[-48:]])).logits[0, -1].argmax()))
            if row[-1] == bpe.eot:
                row.pop()
                break
        answers.append(bpe.decode(row[len(prompt) :]).strip())
    figures = done[1]["assistant"]
    assert figures[f"{prefix}loss"] == pytest.approx(total / n, abs=1e-4)
    assert figures[f"{prefix}perplexity"] == pytest.approx(math.exp(figures[f"{prefix}loss"]))
    assert read(done[0], "assistant")[f"{prefix}answer"].tolist() == answers


def test_single_turns_have_no_column_of_earlier_ones(done):
    asked = ["instruction", "input", "reference"]
    scored = ["answer", "tokens", "loss", "exact_match", "rouge_l", "chrf", "at_limit"]
    columns = [*asked, *scored, *(f"base_{name}" for name in scored)]
    assert read(done[0], "assistant").columns.tolist() == columns


@pytest.fixture(scope="module")
def talked(tmp_path_factory, paths, make_base, bpe, raw):
    """An assistant that was trained on conversations of one to three turns, and its evaluation."""
    folder = tmp_path_factory.mktemp("talked")
    said = [
        [
            *([{"role": "system", "content": "Be brief."}] if i % 3 == 1 else []),
            *(
                {"role": role, "content": f"{text} {i}"}
                for turn in (("Cats?", "Cats"), ("And dogs?", "dogs"), ("Is that", " all"))[
                    : 1 + i % 3
                ]
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ),
        ]
        for i in range(40)
    ]
    instructions = raw("conversations", said)
    base = make_base(tokenizer=bpe, context_length=160, n_layer=1)
    assistant = make_assistant(base, instructions, folder / "models/assistant")
    here = {**paths, "gpt2": base, "assistant": assistant, "instructions": instructions}
    here["tokens"] = folder / "tokens"
    tokenize(
        TokenizeParams(tokenizer="bytes", validation=0.2),
        corpus=raw("jsonl", [f"A longer text is needed, of {i} lines." for i in range(400)]),
        vocabulary=None,
        out=here["tokens"],
        metrics=folder / "tokens.json",
        report=folder / "tokens-report.json",
    )
    return folder, run(folder, PARAMS, here), here


def test_a_conversation_is_measured_on_all_its_answers_and_asked_for_the_last(talked, bpe):
    """Held against transformers; the earlier turns are as the record has them."""
    folder, figures, here = talked
    theirs = GPT2LMHeadModel.from_pretrained(here["assistant"]).eval()
    test = split_instructions(read_instructions(here["instructions"]), Split(**SPLIT))["test"]
    assert {len(record.earlier) for record in test} == {0, 1, 2}
    total, n, answers = 0.0, 0, []
    for record in test:
        asked = [*(turn.prompt for turn in record.earlier), record.instruction]
        responses = [*(turn.response for turn in record.earlier), record.output]
        row = []
        for prompt, response in zip(
            render_prompts("phi3", asked, "", record.system), responses, strict=True
        ):
            row += bpe.encode(prompt)
            start, end = len(row), [*bpe.encode(response), bpe.eot]
            with torch.no_grad():
                logits = theirs(torch.tensor([[*row, *end]])).logits[0, start - 1 : -1]
            total += F.cross_entropy(logits, torch.tensor(end), reduction="sum").item()
            n += len(end)
            row += end
        row = row[:start]
        for _ in range(5):
            with torch.no_grad():
                row.append(int(theirs(torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] == bpe.eot:
                row.pop()
                break
        answers.append(bpe.decode(row[start:]).strip())
    assert figures["assistant"]["loss"] == pytest.approx(total / n, abs=1e-4)
    table = read(folder, "assistant")
    assert table["answer"].tolist() == answers
    assert table["reference"].tolist() == [record.output for record in test]


def test_what_was_said_before_is_a_column_where_there_is_some(talked):
    folder, _, here = talked
    test = split_instructions(read_instructions(here["instructions"]), Split(**SPLIT))["test"]
    for (_, row), record in zip(read(folder, "assistant").iterrows(), test, strict=True):
        said = [("system", record.system)] if record.system else []
        for turn in record.earlier:
            said += [("user", turn.prompt), ("assistant", turn.response)]
        shown = json.loads(row["earlier"] or "[]")
        assert [(message["role"], message["content"]) for message in shown] == said
        assert row["instruction"] == record.instruction


@pytest.mark.parametrize("prefix", ["", "base_"])
def test_the_scores_of_the_assistant_follow_from_the_answers_in_the_table(done, prefix):
    table, figures = read(done[0], "assistant"), dict(done[1]["assistant"])
    answers, references = table[f"{prefix}answer"].tolist(), table["reference"].tolist()
    scores = score_texts(answers, references)
    for name in ("exact_match", "rouge_l", "chrf"):
        column = pd.to_numeric(table[f"{prefix}{name}"])
        assert column.to_numpy() == pytest.approx(getattr(scores, name), nan_ok=True)
        assert figures[f"{prefix}{name}"] == pytest.approx(column.mean())  # of short ones only
    assert figures["short_records"] == scores.short.sum() > 0
    total = table[f"{prefix}loss"].astype(float).sum() / table[f"{prefix}tokens"].astype(int).sum()
    assert figures[f"{prefix}loss"] == pytest.approx(total)
    limits = [flag == "1" for flag in table[f"{prefix}at_limit"]]
    assert figures[f"{prefix}at_limit"] == sum(limits) / len(limits)
    for name, value in length_statistics(answers, references, at_limit=limits).items():
        assert figures[f"{prefix}{name}"] == value
    assert prefix or scores.chrf.sum() > 0  # the answers of the assistant have something to them


# --- intervals, and what fine-tuning buys ---------------------------------------------------------


def test_every_interval_is_drawn_from_what_stands_in_the_tables(done):
    folder, figures = done
    of = bounds(PARAMS.resamples, PARAMS.seed)
    expected = {}
    for name in ("pretrain", "gpt2"):
        rows = pd.read_csv(folder / f"predictions/{name}.csv").groupby("window").sum()
        expected[name, "loss"] = of(mean_loss(rows["loss"], rows["tokens"]))
    classes = pd.read_csv(folder / "predictions/classifier.csv")
    numbers = [[("ham", "spam").index(c) for c in classes[k]] for k in ("actual", "predicted")]
    expected["classifier", "accuracy"] = of(accuracy(*numbers))
    expected["classifier", "f1_macro"] = of(macro_f1(*numbers, 2))
    answers = pd.read_csv(folder / "predictions/assistant.csv", keep_default_na=False, dtype=str)
    for prefix in ("", "base_"):
        loss = answers[f"{prefix}loss"].astype(float), answers[f"{prefix}tokens"].astype(int)
        expected["assistant", f"{prefix}loss"] = of(mean_loss(*loss))
        for name in ("exact_match", "rouge_l", "chrf"):
            values = pd.to_numeric(answers[f"{prefix}{name}"]).dropna()
            expected["assistant", f"{prefix}{name}"] = of(mean(values))
    tried = pd.read_csv(folder / "predictions/likelihood.csv")
    for (model, method), rows in tried.groupby(["model", "method"]):
        numbers = [[("ham", "spam").index(c) for c in rows[k]] for k in ("actual", "predicted")]
        prefix = method.replace("-", "_")
        expected[model, f"{prefix}_accuracy"] = of(accuracy(*numbers))
        expected[model, f"{prefix}_f1_macro"] = of(macro_f1(*numbers, 2))
    for (model, score), found in expected.items():
        held = [figures[model][f"{score}{end}"] for end in ("", "_low", "_high")]
        assert held == pytest.approx([found.value, found.low, found.high], rel=1e-9), (model, score)
    drawn = {(m, k.removesuffix("_low")) for m in figures for k in figures[m] if k.endswith("_low")}
    assert drawn == {*expected, ("pretrain", "bits_per_byte"), ("gpt2", "bits_per_byte")}
    for name in ("pretrain", "gpt2"):
        own = figures[name]
        for end in ("_low", "_high"):
            ratio = own[f"bits_per_byte{end}"] / own["bits_per_byte"]
            assert ratio == pytest.approx(own[f"loss{end}"] / own["loss"])


def test_bases_classify_the_very_messages_that_the_classifier_is_tested_on(done, paths):
    """Without and with training messages before them, by likelihood alone."""
    test, tried = read(done[0], "classifier"), read(done[0], "likelihood")
    assert set(zip(tried["model"], tried["method"], strict=True)) == {
        (model, method) for model in ("pretrain", "gpt2") for method in ("zero-shot", "few-shot")
    }
    for (model, method), rows in tried.groupby(["model", "method"]):
        if method == "few-shot":
            shown = rows["shown"].astype(int).mean()
            assert done[1][model]["few_shot_examples"] == pytest.approx(shown)
        assert rows["example"].astype(int).tolist() == list(range(24))
        assert rows["actual"].tolist() == test["actual"].tolist()
    model, tokenizer = load_base(paths["gpt2"])
    found = classify_by_likelihood(
        model, tokenizer, test["text"].tolist(), ["ham", "spam"], calibrate=True
    )
    rows = tried[(tried["model"] == "gpt2") & (tried["method"] == "zero-shot")]
    assert rows["probability_spam"].astype(float).to_numpy() == pytest.approx(
        np.exp(found.log_probs[:, 1]), abs=1e-4
    )


@pytest.mark.parametrize(("shots", "shown"), [(1, 2), (2, 4), (1000, None)])
def test_examples_stand_before_a_message_as_far_as_the_context_holds_them(
    paths, raw, make_base, bpe, shots, shown
):
    """At most as many of each class as the smallest has in the training part."""
    wide = {"wide": make_base(tokenizer=bpe, context_length=600, n_layer=1)}
    few = raw("messages", [("ham" if i % 5 else "spam", f"text {i}") for i in range(60)])
    figures, table = measure_untrained_classification(
        wide, paths["classifier"], few, CPU, 8, shots, bounds(50, 0)
    )
    before = table.groupby("method")["shown"]
    assert before.max()["zero-shot"] == 0
    if shots == 1000:
        train = split_messages(read_messages(few), Split(**SPLIT), "undersample")["train"]
        shown = 2 * train["label"].value_counts().min()
    assert before.max()["few-shot"] == shown
    assert figures["wide"]["few_shot_examples"] == pytest.approx(before.mean()["few-shot"])


def test_a_base_whose_context_a_label_fills_is_passed_over_and_that_is_told(tmp_path, paths, raw):
    rows = [(label, f"{label[0]} text {i}") for i in range(12) for label in ("ham", "s" * 100)]
    messages = raw("messages", rows)
    train = {**TRAIN, "steps": 1}
    classifier = make_classifier(paths["pretrain"], messages, tmp_path / "classifier", train)
    said = []
    figures, table = measure_untrained_classification(
        {"pretrain": paths["pretrain"]}, classifier, messages, CPU, 8, 2, bounds(50, 0), said.append
    )
    assert figures == {"pretrain": {}}
    assert table.empty
    assert [event.level for event in said] == ["warning"]
    assert "pretrain is not asked for classes without training: the label 's" in said[0].text


def test_a_message_that_stands_in_the_training_part_twice_is_one_example(
    paths, raw, make_base, bpe
):
    rows = [("ham", f"text {i}") for i in range(40)] + [("spam", "win now")] * 30
    rows += [("spam", f"win {i}") for i in range(12)]
    messages = raw("messages", rows)
    bases = {"wide": make_base(tokenizer=bpe, context_length=600, n_layer=1)}
    _, table = measure_untrained_classification(
        bases, paths["classifier"], messages, CPU, 8, 1000, bounds(50, 0)
    )
    train = split_messages(read_messages(messages), Split(**SPLIT), "undersample")["train"]
    distinct = train.drop_duplicates("text")["label"].value_counts()
    assert len(train) > distinct.sum(), "nothing stands there twice: nothing is tested"
    few = table[table["method"] == "few-shot"]
    assert 0 < few["shown"].max() <= 2 * distinct.min()


def test_the_loss_is_told_by_source_and_the_sources_make_up_the_whole(tmp_path, copied):
    """Under their own names; the bases read the same text in other tokens."""
    paths = copied("tokens")
    ids = open_tokens(paths["tokens"], "validation")[:].astype("<u2")
    parts = {"a": ids[:150], "b/c": ids[150:]}
    write_shards(paths["tokens"], parts)
    figures = run(tmp_path / "o", PARAMS, paths)
    for model in ("pretrain", "gpt2"):
        table = pd.read_csv(tmp_path / f"o/predictions/{model}.csv")
        assert table["source"].drop_duplicates().tolist() == list(parts)
        for source in parts:
            rows = table[table["source"] == source]
            loss = rows["loss"].sum() / rows["tokens"].sum()
            assert figures[model][f"loss/{source}"] == pytest.approx(loss)
        whole = table["loss"].sum() / table["tokens"].sum()
        assert figures[model]["loss"] == pytest.approx(whole)
    # the first of a window of 64 is no target of its own, and what fills no window is left out
    table = pd.read_csv(tmp_path / "o/predictions/pretrain.csv")
    counted = table.groupby("source")["tokens"].sum()
    assert counted["a"] == 149
    assert counted["b/c"] == (len(ids) - 1) // 64 * 64 - 149
    a_byte = figures["pretrain"]["loss/a"] / math.log(2)
    n_bytes = 150  # as `write_shards` has it
    assert figures["pretrain"]["bits_per_byte/a"] == pytest.approx(a_byte * 150 / n_bytes)


def write_shards(folder, parts):
    """The validation split of a folder of tokens anew: a shard a source."""
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = []
    for number, (source, ids) in enumerate(parts.items()):
        path = folder / f"part-{number}.bin"
        ids.tofile(path)
        counts = {"documents": 1, "bytes": len(ids), "tokens": len(ids)}
        shard = {"file": path.name, "source": source, "sha256": sha256_of(path)}
        shards.append({**shard, "counts": counts})
    manifest["splits"]["validation"]["shards"] = shards
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- what is refused ------------------------------------------------------------------------------


def test_a_class_that_the_classifier_never_saw_is_refused(tmp_path, paths, raw, refused):
    other = raw("messages", [(("ham", "eggs", "spam")[i % 3], f"text {i}") for i in range(30)])
    with refused(
        r"messages: the class 'eggs' is unknown to .*classifier \(ham, spam\); "
        "run finetune_classifier on these messages"
    ):
        run(tmp_path / "o", PARAMS, {**paths, "messages": other})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"training\.json: no such file; run the fine-tuning stage again"),
        (b"{", r"training\.json: not JSON .*; run the fine-tuning again"),
        (b"\xff", r"training\.json: not JSON .*; run the fine-tuning again"),
        (b"[]", r"training\.json: not a JSON object; run the fine-tuning again"),
        (b"{}", r"training\.json: base: .*; run the fine-tuning again"),
        ({"base": "other"}, r"training\.json: base: .*; run the fine-tuning again"),
        ({"max_length": -1}, r"training\.json: max_length: .*; run the fine-tuning again"),
        ({"split": {"train": 1, "validation": 1}}, r"training\.json: split\.train: "),
        ({"extra": 1}, r"training\.json: extra: "),
    ],
    ids=str,
)
def test_a_damaged_training_json_is_refused(tmp_path, copied, refused, content, complaint):
    paths = copied("classifier")
    path = tmp_path / "classifier/training.json"
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    with refused(f"classifier/{complaint}"):
        run(tmp_path / "o", PARAMS, paths)


def test_an_assistant_without_training_json_is_refused(tmp_path, copied, refused):
    paths = copied("assistant")
    (tmp_path / "assistant/training.json").unlink()
    with refused(r"assistant/training\.json: no such file; run the fine-tuning stage again"):
        run(tmp_path / "o", PARAMS, paths)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"prompt\.json: not there, so this model follows no instructions; take one"),
        ("{}", r"prompt\.json: must be JSON with the texts .*; run the fine-tuning again"),
        (
            '{"template": [1]}',
            r"prompt\.json: template: no '\[1\]'; there are .*; run the fine-tun",
        ),
    ],
)
def test_a_damaged_prompt_json_is_refused(tmp_path, copied, refused, content, complaint):
    paths = copied("assistant")
    path = tmp_path / "assistant/prompt.json"
    path.unlink() if content is None else path.write_text(content)
    with refused(complaint):
        run(tmp_path / "o", PARAMS, paths)


@pytest.mark.parametrize("name", ["pretrain", "gpt2", "classifier", "assistant"])
def test_a_truncated_model_is_refused(tmp_path, copied, refused, name):
    paths = copied(name)
    path = tmp_path / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with refused(rf"{name}/model\.safetensors: damaged or cut short"):
        run(tmp_path / "o", PARAMS, paths)


def test_a_model_in_the_place_of_another_is_refused(tmp_path, paths, refused):
    with refused("base: holds no classification head; a classifier is needed"):
        run(tmp_path / "o", PARAMS, {**paths, "classifier": paths["pretrain"]})
    with refused("classifier: holds a classifier; a language model is needed"):
        run(tmp_path / "o", PARAMS, {**paths, "gpt2": paths["classifier"]})


@pytest.mark.parametrize("name", ["pretrain", "classifier"])
def test_a_model_with_a_foreign_vocabulary_is_refused(tmp_path, copied, bpe, refused, name):
    paths = copied(name)
    bpe.save(tmp_path / name)
    with refused(rf"{name}: the model has 257 tokens, its vocab\.json {bpe.vocab_size}; take both"):
        run(tmp_path / "o", PARAMS, paths)


def test_a_validation_split_shorter_than_one_context_is_refused(
    tmp_path, paths, make_base, refused
):
    wide = make_base(context_length=2000, n_layer=1)
    with refused(r"tokens: the validation split has \d+ tokens, fewer than one context of .*base"):
        run(tmp_path / "o", PARAMS, {**paths, "pretrain": wide})


@pytest.mark.parametrize(
    ("shares", "part"),
    [((0.5, 0.001), "validation"), ((1e-3, 0.5), "train")],
)
def test_messages_of_which_a_part_is_empty_are_refused(
    tmp_path, copied, raw, refused, shares, part
):
    rows = [("ham", f"a{i}") for i in range(4)] + [("spam", f"b{i}") for i in range(4)]
    paths = copied("classifier") | {"messages": raw("messages", rows)}
    path = tmp_path / "classifier/training.json"
    said = json.loads(path.read_text()) | {"balance": "none"}
    said["split"] = {"train": shares[0], "validation": shares[1], "seed": 11}
    path.write_text(json.dumps(said))
    with refused(f"messages: the {part} part of 8 messages is empty; add messages or change finet"):
        run(tmp_path / "o", PARAMS, paths)


def test_no_message_to_test_on_is_refused(tmp_path, paths, raw, refused):
    with refused("messages"):
        run(tmp_path / "o", PARAMS, {**paths, "messages": raw("messages", [])})


def test_instructions_without_a_test_part_are_refused(tmp_path, paths, raw, refused):
    with refused(r"instructions: no record to test on; add records"):
        run(tmp_path / "o", PARAMS, {**paths, "instructions": raw("instructions", b"[]")})


def test_answers_that_begin_behind_the_cut_are_refused(tmp_path, copied, refused):
    paths = copied("assistant")
    path = tmp_path / "assistant/training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_length": 3}))
    with refused("no answer of the test records begins within the 3 tokens that .*assistant was"):
        run(tmp_path / "o", PARAMS, paths)


@pytest.mark.parametrize("name", ["pretrain", "classifier", "assistant"])
def test_a_model_whose_scores_are_not_finite_is_refused(tmp_path, copied, refused, name):
    """Its weights are finite, and too large for what is computed from them."""
    paths = copied(name)
    path = paths[name] / "model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if "ln_f" in key:
            tensors[key] = torch.full_like(tensors[key], 3e38)
    save_file(tensors, path, metadata={"format": "pt"})
    with refused(rf"{name}: the model's logits are not finite numbers", RunError):
        run(tmp_path / "o", PARAMS, paths)


def test_a_class_that_the_test_part_lacks_is_counted(tmp_path, paths, raw):
    rows = [("ham", "the same text")] * 25 + [("spam", f"message {i}") for i in range(25)]
    messages = raw("messages", rows)
    train = {**TRAIN, "steps": 1}
    classifier = make_classifier(paths["pretrain"], messages, tmp_path / "classifier", train)
    figures, tables = measure_classifier(classifier, messages, CPU, 8, bounds(50, 0))
    for part, prefix in (("test", ""), ("validation", "validation_"), ("train", "train_")):
        confusion = tables["classifier_confusion"]
        of = confusion[(confusion["part"] == part) & (confusion["messages"] > 0)]
        lacking = 2 - of["actual"].nunique()
        assert figures.get(f"{prefix}missing_classes", 0) == lacking
    assert "validation_missing_classes" in figures, "nothing is missing: nothing is tested"


def test_of_many_classes_only_pairs_that_occur_are_listed(tmp_path, paths, raw):
    rows = [(f"class {i % 60}", f"text {i}") for i in range(480)]
    messages = raw("messages", rows)
    train = {**TRAIN, "steps": 1}
    classifier = make_classifier(paths["pretrain"], messages, tmp_path / "classifier", train)
    _, tables = measure_classifier(classifier, messages, CPU, 8, bounds(50, 0))
    confusion = tables["classifier_confusion"]
    assert confusion["messages"].min() == 1
    assert confusion["messages"].sum() == 480


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_new_tokens": "all"}, {"x": 1}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(EvaluateParams).validate_python(wrong)
