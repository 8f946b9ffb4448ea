"""The stage tune_preferences: the better answers become likelier, on pairs it never saw too."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from gpt.base.events import Message, Progress, Text
from gpt.model.weights import load_base, load_model, save_model
from gpt.prompts import TEMPLATES, render_prompt
from gpt.text.records import Instruction, Split, split_instructions
from gpt.tokens.tokenizer import byte_tokenizer
from gpt.tune.lora import IN_BLOCKS, LoraParams
from stages.finetune_instruct import FinetuneInstructParams, finetune_instruct
from stages.tune_preferences import TunePreferencesParams, tune_preferences

SPLIT = {"train": 0.6, "validation": 0.2, "seed": 3}
TRAINING = {"base": "pretrain", "split": SPLIT, "max_length": 64}
TRAIN = {
    "device": "cpu",
    "threads": 1,
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "eval_interval": 2,
}


def params(train=(), **changes):
    return TypeAdapter(TunePreferencesParams).validate_python(
        {"sample_tokens": 3, "train": {**TRAIN, **dict(train)}, **changes}
    )


def run(folder, params, assistant, instructions, **options):
    figures = tune_preferences(
        params,
        assistant=assistant,
        instructions=instructions,
        out=folder / "model",
        metrics=folder / "metrics.json",
        history=folder / "history.csv",
        **options,
    )
    assert json.loads((folder / "metrics.json").read_text()) == figures
    return figures


def as_assistant(base, out, template="phi3", training=TRAINING):
    model, tokenizer = load_base(base)
    extra = {**TEMPLATES[template].files, "training.json": training}
    save_model(model, out, tokenizer=tokenizer, extra=extra)
    return out


@pytest.fixture(scope="module")
def assistant(base, tmp_path_factory):
    return as_assistant(base, tmp_path_factory.mktemp("assistant") / "assistant")


@pytest.fixture(scope="module")
def pairs(records):
    return [
        {**r, "chosen": f"Sure: {r['output']}", "rejected": f"{r['output']} Dolt!"} for r in records
    ]


@pytest.fixture(scope="module")
def instructions(raw, pairs):
    return raw("instructions", pairs)


def part_of(records, part):
    """Whole records of a part of the assistant's own split."""
    plain = [Instruction(r["instruction"], r["input"], r["output"]) for r in records]
    tasks = {each.task for each in split_instructions(plain, Split(**SPLIT))[part]}
    return [r for r, each in zip(records, plain, strict=True) if each.task in tasks]


def answer_log_prob(model, prompt, answer):
    """By transformers, of the answer and its end."""
    tokenizer = byte_tokenizer()
    before, after = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eot]
    ids = torch.tensor([[*before, *after]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(before) - 1 :]
    return -F.cross_entropy(logits, torch.tensor(after), reduction="sum").item()


def rewards_by_transformers(reference, policy, records, beta):
    """Those of the chosen and the rejected answers, a pair at a time."""
    models = [GPT2LMHeadModel.from_pretrained(each).eval() for each in (policy, reference)]
    rewards = []
    for r in records:
        prompt = render_prompt("phi3", r["instruction"], r["input"])
        rewards.append(
            [
                beta * (after - before)
                for after, before in (
                    [answer_log_prob(model, prompt, r[name]) for model in models]
                    for name in ("chosen", "rejected")
                )
            ]
        )
    return torch.tensor(rewards)  # (n, 2)


def test_it_writes_an_assistants_directory_and_nothing_else(
    tmp_path, assistant, instructions, everything
):
    figures = run(tmp_path, params(), assistant, instructions)
    assert set(everything(tmp_path)) == {
        "history.csv",
        "metrics.json",
        *(f"model/{path}" for path in everything(assistant)),
    }
    for name in ("prompt.json", "training.json", "config.json", "vocab.json"):
        assert (tmp_path / "model" / name).read_bytes() == (assistant / name).read_bytes()
    history = pd.read_csv(tmp_path / "history.csv")
    assert history["step"].tolist() == [2, 4, 6]
    measured = ["loss", *(f"reward_{n}" for n in ("margin", "accuracy", "chosen", "rejected"))]
    assert {"train_loss", *(f"validation_{name}" for name in measured)} <= set(history)
    assert [figures[f"pairs_{part}"] for part in ("train", "validation", "test")] == [24, 8, 8]


def test_figures_are_those_of_transformers(tmp_path, assistant, instructions, pairs):
    figures = run(tmp_path, params(beta=0.4), assistant, instructions)
    for part in ("validation", "test"):
        rewards = rewards_by_transformers(
            assistant, tmp_path / "model", part_of(pairs, part), beta=0.4
        )
        margin = rewards[:, 0] - rewards[:, 1]
        expected = {
            "loss": -F.logsigmoid(margin).mean().item(),
            "reward_margin": margin.mean().item(),
            "reward_accuracy": (margin > 0).float().mean().item(),
            "reward_chosen": rewards[:, 0].mean().item(),
            "reward_rejected": rewards[:, 1].mean().item(),
        }
        found = {name: figures[f"{part}_{name}"] for name in expected}
        assert found == pytest.approx(expected, abs=1e-3)
        assert figures[f"{part}_loss_before"] == pytest.approx(math.log(2), abs=1e-6)


def test_what_it_cost_the_assistant_is_told(tmp_path, assistant, instructions, pairs):
    """Its own loss, on its own answers of the validation part."""
    figures = run(tmp_path, params(), assistant, instructions)
    tokenizer = byte_tokenizer()
    for name, directory in (
        ("instruct_loss_before", assistant),
        ("instruct_loss", tmp_path / "model"),
    ):
        model = GPT2LMHeadModel.from_pretrained(directory).eval()
        told = part_of(pairs, "validation")
        total = sum(
            answer_log_prob(model, render_prompt("phi3", r["instruction"], r["input"]), r["output"])
            for r in told
        )
        tokens = sum(len(tokenizer.encode(r["output"])) + 1 for r in told)
        assert figures[name] == pytest.approx(-total / tokens, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"by_token": True, "beta": 2}, {"label_smoothing": 0.1}])
def test_the_margin_grows_on_pairs_that_are_held_out(tmp_path, assistant, instructions, changes):
    long = params(train={"steps": 24, "eval_interval": 6}, **changes)
    figures = run(tmp_path, long, assistant, instructions)
    history = pd.read_csv(tmp_path / "history.csv")
    margins = history["validation_reward_margin"].tolist()
    assert 0 < margins[0] < margins[-1]
    assert figures["test_reward_margin"] > 0.05
    assert figures["test_reward_accuracy"] > 0.9
    assert figures["test_loss"] < figures["test_loss_before"]


def test_equal_runs_give_equal_bytes(tmp_path, assistant, instructions, everything):
    run(tmp_path / "one", params(), assistant, instructions)
    torch.rand(3)
    run(tmp_path / "other", params(), assistant, instructions)
    assert everything(tmp_path / "one") == everything(tmp_path / "other")


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path, make_base, instructions, everything, interrupt_at, trainable
):
    assistant = as_assistant(make_base(dropout=0.1), tmp_path / "assistant")
    own = params(trainable=trainable)
    run(tmp_path / "straight", own, assistant, instructions)
    state = tmp_path / "state"
    for step in (1, 4, 6):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s", own, assistant, instructions, state=state, log=interrupt_at(step))
        assert not (tmp_path / "s").exists()
    heard = []
    run(tmp_path / "s", own, assistant, instructions, state=state, log=heard.append)
    assert Message("tune_preferences: continuing from step 6 of 6") in heard
    assert everything(tmp_path / "s") == everything(tmp_path / "straight")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_has_no_say_in_the_first_loss(tmp_path, make_base, instructions, precision):
    assistant = as_assistant(make_base(dropout=0.3), tmp_path / "assistant")
    own = params(train={"precision": precision, "batch_size": 3})
    figures = run(tmp_path, own, assistant, instructions)
    for part in ("validation", "test"):
        assert figures[f"{part}_loss_before"] == pytest.approx(math.log(2), abs=1e-6)


def test_adapters_alone_are_trained_and_merged(tmp_path, assistant, instructions):
    heard = []
    own = params(trainable="lora", lora={"rank": 2})
    assert own.adapters == LoraParams(rank=2, layers=IN_BLOCKS)
    figures = run(tmp_path, own, assistant, instructions, log=heard.append)
    before, after = (load_model(each).state_dict() for each in (assistant, tmp_path / "model"))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert changed == {f"h.{i}.{name}" for i in range(2) for name in linear}
    # rank x (inputs + outputs) of query, key, value, two projections and c_fc, in two blocks
    adapters = 2 * 2 * (4 * (16 + 16) + 2 * (16 + 64))
    assert figures["parameters_trained"] == adapters
    total = load_model(assistant).n_params
    told = f"24 training pairs, {adapters:,} of {total:,} parameters trained"
    assert Message(f"tune_preferences: {told}") in heard
    assert figures["validation_reward_margin"] > 0


def test_held_out_pairs_are_never_trained_on(tmp_path, assistant, raw, pairs, everything):
    """Other answers in a part leave everyone where they were: the split looks at tasks alone."""

    def with_other_answers(part):
        tasks = [(r["instruction"], r["input"]) for r in part_of(pairs, part)]
        return [
            {**r, "chosen": "Well.", "rejected": "Bad."}
            if (r["instruction"], r["input"]) in tasks
            else r
            for r in pairs
        ]

    last = params(train={"keep": "last"})
    run(tmp_path / "one", last, assistant, raw("instructions", pairs))
    for part in ("test", "validation", "train"):
        run(tmp_path / part, last, assistant, raw("instructions", with_other_answers(part)))
    one = everything(tmp_path / "one/model")
    assert everything(tmp_path / "test/model") == one
    assert everything(tmp_path / "validation/model") == one
    assert everything(tmp_path / "train/model") != one
    history = [(tmp_path / part / "history.csv").read_bytes() for part in ("one", "test")]
    assert history[0] == history[1]  # not even a figure of the curve


def test_a_record_is_in_the_part_that_the_assistant_had_it_in(tmp_path, assistant, raw, pairs):
    """Whatever other records lack the two answers, and were in the assistant's split too."""
    bare = [
        {key: r[key] for key in ("instruction", "input", "output")} if i % 3 else r
        for i, r in enumerate(pairs)
    ]
    figures = run(tmp_path, params(), assistant, raw("instructions", bare))
    for part in ("train", "validation", "test"):
        expected = sum("chosen" in r for r in part_of(bare, part))
        assert figures[f"pairs_{part}"] == expected > 0


def test_progress_and_answers_are_shown(tmp_path, assistant, instructions, pairs):
    heard = []
    run(tmp_path, params(), assistant, instructions, log=heard.append)
    asked = [e.done for e in heard if isinstance(e, Progress) and e.task.endswith(": reference")]
    assert (asked[-1], asked) == (40, sorted(set(asked)))  # each pair once
    texts = [event for event in heard if isinstance(event, Text)]
    assert [event.name for event in texts] == [f"samples/step-{i:06d}.txt" for i in (2, 4, 6)]
    for r in part_of(pairs, "validation")[:3]:
        assert r["instruction"] in texts[-1].text


def test_pairs_that_teach_nothing_are_left_out_and_told_of(tmp_path, assistant, raw, pairs):
    train = part_of(pairs, "train")
    equal, long = train[0], train[1]
    changed = [
        {**r, "rejected": f"{r['chosen']} "}
        if r is equal
        else {**r, "input": "x" * 60}
        if r is long
        else r
        for r in pairs
    ]
    figures_heard = []
    figures = run(
        tmp_path, params(), assistant, raw("instructions", changed), log=figures_heard.append
    )
    said = [e.text for e in figures_heard if isinstance(e, Message)]
    same = "1 of 40 pairs hold the same answer twice, and are left out"
    assert f"tune_preferences: {same}" in said
    assert any("pairs are cut before their answers differ, and left out" in text for text in said)
    assert sum(figures[f"pairs_{part}"] for part in ("train", "validation", "test")) == 38


def test_a_conversations_last_answer_is_the_one_that_counts(tmp_path, make_base, raw):
    said = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"{i}."},
                {"role": "user", "content": "Once more."},
                {"role": "assistant", "content": f"{i}!"},
            ],
            "chosen": f"{i}, gladly.",
            "rejected": "No.",
        }
        for i in range(20)
    ]
    assistant = as_assistant(make_base(context_length=128), tmp_path / "assistant")
    figures = run(tmp_path, params(), assistant, raw("instructions", said))
    assert figures["pairs_train"] == 12
    assert figures["validation_reward_margin"] > 0


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ({"chosen": "a"}, "record 2: rejected: Field required; give both "),
        ({"rejected": "a"}, "record 2: chosen: Field required; give both "),
        ({"chosen": "a", "rejected": None}, "record 2: rejected: "),
        ({"chosen": " ", "rejected": "b"}, "record 2: chosen: empty; fill it in"),
        ({"chosen": "a", "rejected": 1}, "record 2: rejected: Input should be a valid string"),
        ({"chosen": "\ud800", "rejected": "b"}, "record 2: chosen: Input should be a valid string"),
    ],
    ids=["one", "the other", "null", "blank", "number", "half a character"],
)
def test_a_record_with_half_a_pair_is_refused(
    tmp_path, assistant, raw, records, refused, answers, complaint
):
    folder = raw("instructions", [records[0], {**records[1], **answers}])
    with refused(complaint):
        run(tmp_path / "o", params(), assistant, folder)


def test_records_without_pairs_are_refused(tmp_path, assistant, raw, records, refused):
    with refused(
        r"instructions: the train part of 40 records holds no pair of a better and a worse answer; "
        r"add the fields chosen and rejected"
    ):
        run(tmp_path / "o", params(), assistant, raw("instructions", records))


def test_answers_that_do_not_fit_are_refused(tmp_path, assistant, instructions, refused):
    with refused(r"every pair of the train part are the same in their first 10 tokens, prompt"):
        run(tmp_path / "o", params(max_length=10), assistant, instructions)
    with refused(r"tune_preferences\.max_length: 65 tokens are more than the context of .*\(64\)"):
        run(tmp_path / "o", params(max_length=65), assistant, instructions)


def test_a_directory_that_is_no_assistants_is_refused(
    tmp_path, base, assistant, instructions, refused
):
    with refused(r"prompt\.json: not there, so this model follows no instructions"):
        run(tmp_path / "o", params(), base, instructions)
    broken = tmp_path / "broken"
    shutil.copytree(assistant, broken)
    for content, complaint in (
        ("{", r"training\.json: not JSON"),
        ("[]", r"training\.json: not a JSON object; run the fine-tuning again"),
        ("{}", r"training\.json: base: .*; run the fine-tuning again"),
        ('{"split": {"train": 2}}', r"training\.json: .*; run the fine-tuning again"),
    ):
        (broken / "training.json").write_text(content)
        with refused(complaint):
            run(tmp_path / "o", params(), broken, instructions)
    (broken / "training.json").unlink()
    with refused(r"training\.json: no such file; run the fine-tuning stage again"):
        run(tmp_path / "o", params(), broken, instructions)


def test_a_head_that_is_the_embedding_has_no_adapter(tmp_path, assistant, instructions, refused):
    with refused(r"lora\.layers: the head of this model is its embedding"):
        run(
            tmp_path / "o",
            params(trainable="lora", lora={"layers": ["head"]}),
            assistant,
            instructions,
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 0},
        {"label_smoothing": 0.5},
        {"trainable": "head"},
        {"lora": {"rank": 4}},
        {"template": "phi3"},
        {"split": SPLIT},
        {"max_length": 0},
    ],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        params(**wrong)


# --- the published data ---------------------------------------------------------------------------


@pytest.mark.slow
def test_on_the_published_pairs_the_margin_grows_from_a_small_base(tmp_path, raw, mirror):
    """An assistant made of samples/gpt2-nano in a few steps, then tuned on the 1,100 records."""
    nano = Path(__file__).resolve().parents[2] / "samples" / "gpt2-nano"
    content = (mirror / "instruction-data-with-preference.json").read_bytes()
    folder = raw("instructions", content)
    recipe = {"device": "cpu", "threads": 1, "batch_size": 8}
    instruct = TypeAdapter(FinetuneInstructParams).validate_python(
        {
            "split": {"train": 0.85, "validation": 0.05},
            "train": {**recipe, "steps": 60, "learning_rate": 1e-3, "eval_interval": 60},
        }
    )
    finetune_instruct(
        instruct,
        base=nano,
        instructions=folder,
        out=tmp_path / "assistant",
        metrics=tmp_path / "m.json",
        history=tmp_path / "h.csv",
    )
    own = params(
        train={**recipe, "steps": 30, "learning_rate": 2e-4, "eval_interval": 10}, sample_tokens=8
    )
    figures = run(tmp_path / "tuned", own, tmp_path / "assistant", folder)
    pairs = [figures[f"pairs_{part}"] for part in ("train", "validation", "test")]
    assert sum(pairs) == 1094  # six records hold one answer twice
    assert figures["validation_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    margins = pd.read_csv(tmp_path / "tuned/history.csv")["validation_reward_margin"].tolist()
    assert 0 < margins[0] < margins[1] < margins[-1]
    assert figures["test_reward_margin"] > 0.5
    assert figures["test_reward_accuracy"] > 0.7
