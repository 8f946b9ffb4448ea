"""The stage finetune_classifier: trains what it says on the rows it says, and nothing else."""

import json
import shutil

import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from gpt.base.errors import InputError
from gpt.base.events import Message, Progress
from gpt.model.model import GPTClassifier
from gpt.model.weights import load_model
from gpt.text.records import Split, read_messages, split_messages
from gpt.tokens.tokenizer import byte_tokenizer, load_tokenizer
from stages.finetune_classifier import FinetuneClassifierParams, finetune_classifier

SPLIT = {"train": 0.6, "validation": 0.2, "seed": 7}
TRAIN = {
    "device": "cpu",
    "threads": 1,
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "eval_interval": 2,
}
MODEL_FILES = [
    "model/config.json",
    "model/merges.txt",
    "model/model.safetensors",
    "model/training.json",
    "model/vocab.json",
]


LORA = {"trainable": "lora", "lora": {"rank": 4, "dropout": 0.1}}


def params(train=(), **changes):
    return TypeAdapter(FinetuneClassifierParams).validate_python(
        {"base": "pretrain", "split": SPLIT, "train": {**TRAIN, **dict(train)}, **changes}
    )


def run(folder, params, base, messages, **options):
    figures = finetune_classifier(
        params,
        base=base,
        messages=messages,
        out=folder / "model",
        metrics=folder / "metrics.json",
        history=folder / "history.csv",
        **options,
    )
    assert json.loads((folder / "metrics.json").read_text()) == figures
    return figures


def parts_of(rows, balance="none"):
    frame = pd.DataFrame(rows, columns=["label", "text"])
    return split_messages(frame, Split(**SPLIT), balance)


def theirs(model, texts):
    """The logits of transformers for texts padded in one batch, with what it was given."""
    tokenizer = load_tokenizer(model)
    max_length = json.loads((model / "training.json").read_text())["max_length"]
    rows = [torch.tensor(tokenizer.encode(text)[:max_length]) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eot)
    reference = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        return reference(padded).logits, padded, torch.tensor([len(row) for row in rows])


def test_it_writes_its_outputs_and_nothing_else(tmp_path, base, messages, everything):
    figures = run(tmp_path, params(), base, messages)
    assert list(everything(tmp_path)) == ["history.csv", "metrics.json", *MODEL_FILES]
    assert json.loads((tmp_path / "model/training.json").read_text()) == {
        "base": "pretrain",
        "split": SPLIT,
        "balance": "undersample",
        "max_length": figures["max_length"],
    }
    history = pd.read_csv(tmp_path / "history.csv")
    assert history["step"].tolist() == [2, 4, 6]
    assert {"train_loss", "validation_loss", "validation_accuracy"} <= set(history)
    # 40 of each class, 60 % and 20 % and the rest of them
    rows = [figures[f"rows_{part}"] for part in ("train", "validation", "test")]
    assert rows == [48, 16, 16]


def test_equal_runs_give_equal_bytes(tmp_path, base, messages, everything):
    run(tmp_path / "one", params(), base, messages)
    torch.rand(3)
    run(tmp_path / "other", params(), base, messages)
    assert everything(tmp_path / "one") == everything(tmp_path / "other")


def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path, make_base, messages, everything, interrupt_at
):
    base = make_base(dropout=0.1)
    run(tmp_path / "straight", params(), base, messages)
    state = tmp_path / "state"
    for step in (1, 4, 6):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s", params(), base, messages, state=state, log=interrupt_at(step))
        assert not (tmp_path / "s").exists()
    heard = []
    run(tmp_path / "s", params(), base, messages, state=state, log=heard.append)
    assert Message("finetune_classifier: continuing from step 6 of 6") in heard
    assert everything(tmp_path / "s") == everything(tmp_path / "straight")


@pytest.mark.parametrize("choice", [LORA, {"pooling": "mean", "balance": "class_weights"}])
def test_a_stopped_run_of_every_kind_goes_on_to_the_same_bytes(
    tmp_path, make_base, messages, everything, interrupt_at, choice
):
    base = make_base(dropout=0.1)
    learn = params(**choice)
    run(tmp_path / "straight", learn, base, messages)
    for step in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(
                tmp_path / "s",
                learn,
                base,
                messages,
                state=tmp_path / "state",
                log=interrupt_at(step),
            )
    heard = []
    run(tmp_path / "s", learn, base, messages, state=tmp_path / "state", log=heard.append)
    assert Message("finetune_classifier: continuing from step 4 of 6") in heard
    assert everything(tmp_path / "s") == everything(tmp_path / "straight")


@pytest.mark.parametrize(
    "choice",
    [
        {"trainable": "last_block"},
        {"trainable": "last_blocks", "blocks": 2},
        {"trainable": "head"},
        {"trainable": "lora", "lora": {"rank": 4, "blocks": 1}},
        {"trainable": "lora", "lora": {"rank": 4, "layers": ["head"]}},
        {"trainable": "head", "pooling": "mean"},
        {"trainable": "last_block", "pooling": "mean", "balance": "class_weights"},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_trunk_computed_once_trains_what_one_computed_at_each_step_does(
    tmp_path, monkeypatch, make_base, messages, choice, precision
):
    base = make_base(n_layer=3)
    learn = params(**choice, train={"precision": precision, "eps": 1e-5})
    figures = run(tmp_path / "once", learn, base, messages)
    monkeypatch.setattr("stages.finetune_classifier._KEPT_BYTES", 0)
    expected = run(tmp_path / "each", learn, base, messages)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert figures == pytest.approx(expected, rel=tolerance, abs=tolerance)
    weights = load_file(tmp_path / "once/model/model.safetensors")
    for name, theirs in load_file(tmp_path / "each/model/model.safetensors").items():
        assert torch.allclose(weights[name], theirs, atol=tolerance), name


def test_each_text_goes_through_a_frozen_trunk_once(tmp_path, monkeypatch, base, messages):
    """However many epochs and evaluations there are; and the progress says so."""
    seen = []
    plain = GPTClassifier.trunk

    def watch(model, idx, lengths, depth):
        seen.append(len(idx))
        return plain(model, idx, lengths, depth)

    monkeypatch.setattr(GPTClassifier, "trunk", watch)
    heard = []
    learn = params(trainable="last_block", train={"steps": None, "epochs": 5, "eval_interval": 3})
    figures = run(tmp_path, learn, base, messages, log=heard.append)
    n_texts = figures["rows_train"] + figures["rows_validation"]
    assert sum(seen) == n_texts
    progress = [e for e in heard if isinstance(e, Progress) and e.unit == "text"]
    assert progress[-1].done == progress[-1].total == n_texts


@pytest.mark.parametrize("trainable", ["all", "last_block", "last_blocks", "head"])
def test_what_is_not_to_be_trained_stays_as_it_was(tmp_path, make_base, messages, trainable):
    heard = []
    base = make_base(n_layer=3)
    blocks = {"blocks": 2} if trainable == "last_blocks" else {}
    run(tmp_path, params(trainable=trainable, **blocks), base, messages, log=heard.append)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "model/model.safetensors")
    assert set(after) == set(before) | {"score.weight"}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {
        "all": lambda name: True,
        "last_block": lambda name: name.startswith(("transformer.h.2.", "transformer.ln_f.")),
        "last_blocks": lambda name: name.startswith(
            ("transformer.h.1.", "transformer.h.2.", "transformer.ln_f.")
        ),
        "head": lambda name: False,
    }[trainable]
    assert changed == {name for name in before if trained(name)}
    n = sum(after[name].numel() for name in [*changed, "score.weight"])
    (said,) = (e.text for e in heard if isinstance(e, Message) and "parameters trained" in e.text)
    assert f", {n:,} of " in said


def test_without_pretraining_only_the_form_of_the_base_is_kept(tmp_path, base, messages):
    figures = run(tmp_path / "new", params(trainable="head", pretrained=False), base, messages)
    kept = run(tmp_path / "old", params(trainable="head"), base, messages)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "new/model/model.safetensors")
    assert {name: value.shape for name, value in after.items() if name in before} == {
        name: value.shape for name, value in before.items()
    }
    drawn = [n for n in before if n.endswith(("wte.weight", "c_attn.weight", "c_proj.weight"))]
    assert drawn
    assert not [name for name in drawn if torch.equal(before[name], after[name])]
    assert figures["max_length"] == kept["max_length"]
    files = [(tmp_path / name / "model/vocab.json").read_bytes() for name in ("new", "old")]
    assert files[0] == files[1]


def test_adapters_change_the_matrices_they_stand_beside_and_leave_a_plain_model(
    tmp_path, base, messages
):
    heard = []
    learn = params(trainable="lora", lora={"rank": 4, "layers": ["query", "value", "mlp.c_fc"]})
    run(tmp_path, learn, base, messages, log=heard.append)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "model/model.safetensors")
    assert set(after) == set(before) | {"score.weight"}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"transformer.h.{i}.{name}.weight" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")
    }
    for i in (0, 1):  # the file's layout is input-major
        name = f"transformer.h.{i}.attn.c_attn.weight"
        assert torch.equal(before[name][:, 16:32], after[name][:, 16:32]), "keys have no adapter"
    # 2 blocks of rank 4: queries and values 16 -> 16 each, 16 -> 64; a new head of 16 x 2
    n = 2 * 4 * (2 * 32 + 80) + 32
    (said,) = (e.text for e in heard if isinstance(e, Message) and "parameters trained" in e.text)
    assert f", {n:,} of " in said
    assert json.loads((tmp_path / "model/training.json").read_text()).keys() == {
        "base",
        "split",
        "balance",
        "max_length",
    }


@pytest.mark.parametrize("choice", [{}, LORA, {"trainable": "last_blocks", "blocks": 2}], ids=str)
def test_transformers_classifies_padded_texts_alike(tmp_path, base, messages, choice):
    """Twenty texts, each of another length, one row a text."""
    run(tmp_path, params(**choice), base, messages)
    texts = ["win a prize of words and numbers"[: i + 1] for i in range(20)]
    logits, padded, lengths = theirs(tmp_path / "model", texts)
    assert len(set(lengths.tolist())) == 20
    ours = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.allclose(ours(padded, lengths), logits, atol=1e-4)
    assert ours.labels == ["ham", "spam"]
    assert logits.std() > 0.01


def test_the_final_figures_are_those_of_the_model_that_is_kept(tmp_path, base, messages):
    figures = run(tmp_path, params(), base, messages)
    parts = split_messages(read_messages(messages), Split(**SPLIT), "undersample")
    for part in ("train", "validation"):
        logits, _, _ = theirs(tmp_path / "model", parts[part]["text"])
        actual = torch.tensor([["ham", "spam"].index(label) for label in parts[part]["label"]])
        loss = torch.nn.functional.cross_entropy(logits, actual).item()
        assert figures[f"{part}_loss"] == pytest.approx(loss, abs=1e-4)
        right = (logits.argmax(1) == actual).float().mean().item()
        assert figures[f"{part}_accuracy"] == pytest.approx(right)
    best = pd.read_csv(tmp_path / "history.csv")["validation_loss"].min()
    assert figures["validation_loss"] == pytest.approx(best, rel=1e-6)


def test_it_learns_what_tells_the_classes_apart(tmp_path, base, messages):
    learn = params(trainable="all", train={"steps": 40, "eval_interval": 40})
    figures = run(tmp_path, learn, base, messages)
    assert figures["train_accuracy"] == 1
    assert figures["validation_accuracy"] >= 0.9


def test_more_than_two_classes_are_learnt(tmp_path, base, raw):
    rows = [(label, f"{label} {i}") for i in range(20) for label in ("zoo", "art", "sport")]
    learn = params(trainable="all", train={"steps": 60, "eval_interval": 60})
    figures = run(tmp_path, learn, base, raw("messages", rows))
    assert load_model(tmp_path / "model").labels == ["art", "sport", "zoo"]
    assert figures["train_accuracy"] > 0.9
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["id2label"] == {"0": "art", "1": "sport", "2": "zoo"}
    logits, padded, lengths = theirs(tmp_path / "model", ["zoo 1", "art", "sport 20"])
    assert logits.shape == (3, 3)
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "model")(padded, lengths), logits, atol=1e-4)


def test_a_mean_is_over_the_real_positions_and_the_directory_says_so(tmp_path, base, messages):
    run(tmp_path, params(pooling="mean"), base, messages)
    for name in ("config", "training"):
        said = json.loads((tmp_path / f"model/{name}.json").read_text())
        assert said["pooling"] == "mean"
    ours = load_model(tmp_path / "model")
    ids = torch.tensor([byte_tokenizer().encode(text) for text in ("win now", "see you")])
    with torch.no_grad():
        expected = ours.score(ours.hidden(ids).mean(1))
        assert torch.allclose(ours(ids), expected, atol=1e-5)
        padded = torch.cat([ids, torch.full((2, 5), 256)], 1)
        assert torch.allclose(ours(padded, torch.tensor([7, 7])), expected, atol=1e-5)
    # transformers loads it, and takes the last position
    logits, _, _ = theirs(tmp_path / "model", ["win now"])
    assert not torch.allclose(logits, expected[:1], atol=1e-4)
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pooling": "max"}))
    with pytest.raises(
        InputError, match=r"config\.json: pooling is 'max'; it is one of last, mean"
    ):
        load_model(tmp_path / "model")


def test_class_weights_let_a_rare_class_count_as_much_as_a_frequent_one(tmp_path, base, raw):
    """What nothing tells apart goes to the frequent class, unless the classes weigh the same."""
    rows = [("ham" if i % 10 else "spam", f"text {i * 37 % 101}") for i in range(200)]
    messages = raw("messages", rows)
    learn = {"trainable": "head", "train": {"steps": 60, "eval_interval": 60, "keep": "last"}}
    said = {}
    for balance in ("none", "class_weights"):
        folder = tmp_path / balance
        figures = run(folder, params(balance=balance, **learn), base, messages)
        assert figures["rows_train"] == 120, "no row is left out"
        model = load_model(folder / "model")
        ids = [torch.tensor([byte_tokenizer().encode(text)]) for _, text in rows[:40]]
        with torch.no_grad():
            said[balance] = torch.cat([model(each).softmax(1) for each in ids])[:, 1].mean().item()
    assert said["none"] < 0.25
    assert 0.35 < said["class_weights"] < 0.65


@pytest.mark.parametrize(
    "choice",
    [
        {"trainable": "all"},
        {"trainable": "lora"},
        {"pooling": "mean"},
        {"balance": "class_weights", "trainable": "last_blocks", "blocks": 2},
    ],
    ids=str,
)
def test_five_classes_train_unchanged(tmp_path, base, raw, choice):
    labels = ("art", "law", "sea", "sport", "zoo")
    rows = [(label, f"{label} {i}") for i in range(20) for label in labels]
    learn = params(**choice, train={"steps": 100, "eval_interval": 50})
    figures = run(tmp_path, learn, base, raw("messages", rows))
    assert load_model(tmp_path / "model").labels == list(labels)
    assert figures["train_accuracy"] > 0.9


@pytest.fixture
def exchange(raw, message_rows):
    """A function that puts another text in the place of one of a part; all others stay in theirs.

    Where a message lies in the split is a matter of its text, so many are tried.
    """

    def rows(part, words):
        before = parts_of(message_rows)
        old = tuple(before[part].iloc[0])
        for i in range(10_000):
            new = (old[0], f"{words} {i}")
            after = parts_of([new if row == old else row for row in message_rows])
            if new[1] in after[part]["text"].tolist():
                for name in before:
                    stayed = set(before[name]["text"]) - {old[1]}
                    assert set(after[name]["text"]) - {new[1]} == stayed
                return raw("messages", [new if row == old else row for row in message_rows])
        raise AssertionError("no such text")

    return rows


def test_the_test_part_changes_nothing_but_how_much_of_it_is_seen_in_training(
    tmp_path, base, messages, exchange, everything
):
    """A test message longer than all others changes no weight, no other figure, no length."""
    plain = params(balance="none", trainable="all")
    one = run(tmp_path / "one", plain, base, messages)
    other = run(tmp_path / "other", plain, base, exchange("test", "a long text " * 6))
    # but for numbers there are 7 different messages, so all are seen in training
    assert one["contaminated_test"] == one["rows_test"]
    assert one["contaminated_validation"] == one["rows_validation"]
    assert other == one | {"contaminated_test": one["rows_test"] - 1}
    assert everything(tmp_path / "one/model") == everything(tmp_path / "other/model")
    assert (
        everything(tmp_path / "one")["history.csv"] == everything(tmp_path / "other")["history.csv"]
    )


def test_held_out_messages_that_are_seen_in_training_are_said(tmp_path, base, raw):
    rows = [(("ham", "spam")[i % 2], f"Message {'abcdefghijklmnopqrst'[i]}.") for i in range(20)]
    parts = parts_of(rows)
    (held_out, *_), (trained, *_) = parts["test"]["text"], parts["train"]["text"]
    heard = []
    one_step = params(balance="none", train={"steps": 1})
    figures = run(tmp_path / "one", one_step, base, raw("messages", rows), log=heard.append)
    assert figures["contaminated_test"] == figures["contaminated_validation"] == 0
    assert not [e for e in heard if isinstance(e, Message) and "share text" in e.text]
    # the same in capitals falls wherever its own hash lies: tried until it is in training
    twin = next(
        new
        for new in (held_out.upper().replace(" ", " " * n) for n in range(1, 99))
        if new in parts_of([*rows, ("ham", new)])["train"]["text"].tolist()
        and held_out in parts_of([*rows, ("ham", new)])["test"]["text"].tolist()
    )
    assert twin != trained
    messages = raw("messages", [*rows, ("ham", twin)])
    figures = run(tmp_path / "other", one_step, base, messages, log=heard.append)
    assert figures["contaminated_test"] == 1
    n = int(figures["rows_test"])
    said = f"finetune_classifier: 1 of {n} test examples share text with the training part"
    assert Message(said) in heard


def test_only_the_training_part_is_trained_on(tmp_path, base, messages, exchange, everything):
    last = params(balance="none", trainable="all", max_length=20, train={"keep": "last"})
    run(tmp_path / "one", last, base, messages)
    for part in ("validation", "train"):
        run(tmp_path / part, last, base, exchange(part, "entirely other words"))
    one, validation, train = (
        everything(tmp_path / name) for name in ("one", "validation", "train")
    )
    assert validation["model/model.safetensors"] == one["model/model.safetensors"]
    assert validation["metrics.json"] != one["metrics.json"]
    assert train["model/model.safetensors"] != one["model/model.safetensors"]


def test_texts_are_cut_to_max_length(tmp_path, base, messages):
    figures = run(tmp_path, params(max_length=9, train={"steps": 2}), base, messages)
    assert figures["max_length"] == 9
    # every row is cut: batch_size x 9 tokens a step
    assert pd.read_csv(tmp_path / "history.csv")["tokens"].tolist() == [2 * 8 * 9]
    assert json.loads((tmp_path / "model/training.json").read_text())["max_length"] == 9


def test_without_max_length_it_is_the_longest_training_text_or_the_context(
    tmp_path, base, make_base, messages
):
    parts = split_messages(read_messages(messages), Split(**SPLIT), "undersample")
    longest = max(len(byte_tokenizer().encode(text)) for text in parts["train"]["text"])
    one_step = params(train={"steps": 1})
    assert run(tmp_path / "one", one_step, base, messages)["max_length"] == longest < 64
    small = make_base(context_length=16)
    assert run(tmp_path / "small", one_step, small, messages)["max_length"] == 16


# --- what is refused ------------------------------------------------------------------------------


def test_texts_longer_than_the_bases_context_are_refused(tmp_path, base, messages, refused):
    with refused(
        r"finetune_classifier\.max_length: 65 tokens are more than the context of .*base holds "
        r"\(64\); use at most that"
    ):
        run(tmp_path / "o", params(max_length=65), base, messages)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([("ham", f"only {i}") for i in range(9)], r"the messages have 1 class \('ham'\)"),
        (b"ham\tone\nspam two\n", "line 2: not a label, a tab and a text"),
        (b"ham\tone\nspam\ttw\xff\n", "line 2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ([("ham", "a"), ("spam", "b")], r"the validation part of 2 messages is empty; add mess"),
        (
            [("ham", f"text {i}") for i in range(20)] + [("spam", "b")],
            r"is empty; undersampling leaves 2 of 21 messages, of each class as many as 'spam' has "
            r"\(1\); add messages of that class or leave it out, or set finetune_classifier",
        ),
    ],
    ids=["one class", "malformed", "not utf-8", "too few", "one of a class"],
)
def test_messages_that_cannot_be_used_are_refused(tmp_path, base, raw, refused, content, complaint):
    messages = raw("messages", content)
    with refused(complaint):
        run(tmp_path / "o", params(), base, messages)


def test_what_a_part_lacks_and_what_undersampling_costs_is_told(tmp_path, base, raw):
    rows = [("ham", "the same text")] * 25 + [("spam", f"message {i}") for i in range(200)]
    said = []
    run(tmp_path, params(train={"steps": 1}), base, raw("messages", rows), log=said.append)
    warnings = [each.text for each in said if getattr(each, "level", "") == "warning"]
    assert "undersampling leaves 50 of 225 messages, of each class as many as 'ham'" in warnings[0]
    parts = parts_of(rows, "undersample")
    lacking = [name for name, part in parts.items() if part["label"].nunique() < 2]
    assert lacking, "no part lacks a class: nothing is tested"
    for name, text in zip(lacking, warnings[1:], strict=True):
        (only,) = parts[name]["label"].unique()
        other = "spam" if only == "ham" else "ham"
        told = f"has messages of '{only}' alone, and no message of 1 of 2 classes ('{other}')"
        assert f"the {name} part {told}" in text


def truncate(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def add_a_token(base):
    path = base / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ab": 257}))
    (base / "merges.txt").write_text("#version: 0.2\na b\n")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (shutil.rmtree, r"config\.json: no such file; .*run the stage that makes it"),
        (truncate, r"model\.safetensors: damaged or cut short"),
        (add_a_token, r"the model has 257 tokens, its vocab\.json 258"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(
    tmp_path, base, messages, refused, damage, complaint
):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    damage(broken)
    with refused(complaint):
        run(tmp_path / "o", params(), broken, messages)


@pytest.mark.parametrize(
    "choice",
    [{"trainable": "last_blocks", "blocks": 3}, {"trainable": "lora", "lora": {"blocks": 3}}],
)
def test_more_blocks_than_the_base_has_are_refused(tmp_path, base, messages, refused, choice):
    with refused(r"blocks: 3 blocks are to be .* has 2; use at most that"):
        run(tmp_path / "o", params(**choice), base, messages)


def test_a_classifier_is_no_base(tmp_path, base, messages, refused):
    run(tmp_path, params(train={"steps": 1}), base, messages)
    with refused("holds a classifier; a language model is needed"):
        run(tmp_path / "o", params(), tmp_path / "model", messages)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": "gpt3"},
        {"trainable": "some"},
        {"max_length": 0},
        {"split": {"train": 1}},
        {"x": 1},
        {"trainable": "last_blocks"},
        {"trainable": "all", "blocks": 1},
        {"trainable": "all", "lora": {"rank": 4}},
        {"trainable": "lora", "lora": {"layers": ["score"]}},
        {"pooling": "first"},
        {"balance": "oversample"},
    ],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        params(**wrong)


# --- the published data ---------------------------------------------------------------------------


def test_the_sms_collection_is_balanced_and_split_as_published(tmp_path, make_base, raw, mirror):
    sms = raw("messages", (mirror / "SMSSpamCollection").read_bytes())
    book = params(
        split={"train": 0.7, "validation": 0.1},
        max_length=16,
        train={"steps": 1, "batch_size": 64},
    )
    figures = run(tmp_path, book, make_base(n_layer=1), sms)
    assert [figures[f"rows_{p}"] for p in ("train", "validation", "test")] == [1045, 149, 300]
