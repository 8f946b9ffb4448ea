"""The stage finetune_instruct: learns the answers of the training records, and nothing else."""

import json
import shutil

import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from gpt.base.events import Message, Text
from gpt.model.weights import load_model
from gpt.prompts import TEMPLATES, read_template, render_prompt, render_prompts
from gpt.text.records import Instruction, Split, Turn, split_instructions
from gpt.tokens.tokenizer import byte_tokenizer
from gpt.tune.lora import IN_BLOCKS, LoraParams
from stages.finetune_instruct import FinetuneInstructParams, finetune_instruct

SPLIT = {"train": 0.6, "validation": 0.2, "seed": 3}
TRAIN = {
    "device": "cpu",
    "threads": 1,
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "eval_interval": 2,
}


def params(train=(), **changes):
    return TypeAdapter(FinetuneInstructParams).validate_python(
        {
            "base": "pretrain",
            "split": SPLIT,
            "template": "phi3",
            "sample_tokens": 3,
            "train": {**TRAIN, **dict(train)},
            **changes,
        }
    )


def run(folder, params, base, instructions, **options):
    figures = finetune_instruct(
        params,
        base=base,
        instructions=instructions,
        out=folder / "model",
        metrics=folder / "metrics.json",
        history=folder / "history.csv",
        **options,
    )
    assert json.loads((folder / "metrics.json").read_text()) == figures
    return figures


def parts_of(records):
    return split_instructions([Instruction(**record) for record in records], Split(**SPLIT))


def loss_by_transformers(model, records, *, mask_prompt, max_length=64, template="phi3"):
    """The mean loss in nats, one record at a time."""
    tokenizer = byte_tokenizer()
    theirs = GPT2LMHeadModel.from_pretrained(model).eval()
    total, n = 0.0, 0
    for record in records:
        prompt = tokenizer.encode(render_prompt(template, record.instruction, record.input))
        ids = torch.tensor([*prompt, *tokenizer.encode(record.output), tokenizer.eot])
        ids = ids[: max_length + 1]
        first = len(prompt) - 1 if mask_prompt else 0
        with torch.no_grad():
            logits = theirs(ids[None, :-1]).logits[0]
        total += F.cross_entropy(logits[first:], ids[1 + first :], reduction="sum").item()
        n += len(ids) - 1 - first
    return total / n


def test_it_writes_its_outputs_and_nothing_else(tmp_path, base, instructions, everything):
    figures = run(tmp_path, params(), base, instructions)
    assert list(everything(tmp_path)) == [
        "history.csv",
        "metrics.json",
        "model/config.json",
        "model/generation_config.json",
        "model/merges.txt",
        "model/model.safetensors",
        "model/prompt.json",
        "model/tokenizer_config.json",
        "model/training.json",
        "model/vocab.json",
    ]
    model = tmp_path / "model"
    assert read_template(model) == TEMPLATES["phi3"]
    training = {"base": "pretrain", "split": SPLIT, "max_length": 64, "turns": 1}
    assert json.loads((model / "training.json").read_text()) == training
    assert pd.read_csv(tmp_path / "history.csv")["step"].tolist() == [2, 4, 6]
    records = [figures[f"records_{part}"] for part in ("train", "validation", "test")]
    assert records == [24, 8, 8]


def test_equal_runs_give_equal_bytes(tmp_path, base, instructions, everything):
    run(tmp_path / "one", params(), base, instructions)
    torch.rand(3)
    run(tmp_path / "other", params(), base, instructions)
    assert everything(tmp_path / "one") == everything(tmp_path / "other")


def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path, make_base, instructions, everything, interrupt_at
):
    base = make_base(dropout=0.1)
    run(tmp_path / "straight", params(), base, instructions)
    state = tmp_path / "state"
    for step in (1, 4, 6):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s", params(), base, instructions, state=state, log=interrupt_at(step))
        assert not (tmp_path / "s").exists()
    heard = []
    run(tmp_path / "s", params(), base, instructions, state=state, log=heard.append)
    assert Message("finetune_instruct: continuing from step 6 of 6") in heard
    assert everything(tmp_path / "s") == everything(tmp_path / "straight")


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_losses_are_over_the_answer_or_over_everything(
    tmp_path, base, instructions, records, mask_prompt
):
    """Before and after training, held against transformers."""
    figures = run(tmp_path, params(mask_prompt=mask_prompt), base, instructions)
    validation = parts_of(records)["validation"]
    before = loss_by_transformers(base, validation, mask_prompt=mask_prompt)
    after = loss_by_transformers(tmp_path / "model", validation, mask_prompt=mask_prompt)
    assert figures["validation_loss_before"] == pytest.approx(before, abs=1e-4)
    assert figures["validation_loss"] == pytest.approx(after, abs=1e-4)
    assert figures["perplexity"] == pytest.approx(torch.tensor(after).exp().item(), rel=1e-3)
    assert after < before


def test_masking_the_prompt_trains_another_model(tmp_path, base, instructions, everything):
    weights = []
    for mask_prompt in (True, False):
        folder = tmp_path / str(mask_prompt)
        run(folder, params(mask_prompt=mask_prompt), base, instructions)
        weights.append(everything(folder)["model/model.safetensors"])
    assert weights[0] != weights[1]


def test_transformers_answers_alike(tmp_path, base, instructions):
    run(tmp_path, params(), base, instructions)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    idx = torch.randint(0, 257, (4, 64))
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "model")(idx), theirs(idx).logits, atol=1e-4)


def test_held_out_records_are_never_trained_on(tmp_path, base, raw, records, everything):
    """Other answers in a part leave everyone where they were: the split looks at tasks alone."""

    def with_other_answers(part):
        tasks = {(r.instruction, r.input) for r in parts_of(records)[part]}
        return [
            {**r, "output": "Else."} if (r["instruction"], r["input"]) in tasks else r
            for r in records
        ]

    last = params(train={"keep": "last"})
    run(tmp_path / "one", last, base, raw("instructions", records))
    for part in ("test", "validation", "train"):
        run(tmp_path / part, last, base, raw("instructions", with_other_answers(part)))
    one = everything(tmp_path / "one")
    assert everything(tmp_path / "test") == one  # not even a figure
    assert everything(tmp_path / "validation/model") == everything(tmp_path / "one/model")
    assert everything(tmp_path / "validation")["metrics.json"] != one["metrics.json"]
    assert everything(tmp_path / "train/model") != everything(tmp_path / "one/model")


def test_records_are_cut_to_max_length(tmp_path, base, instructions, records):
    cut = params(mask_prompt=False, max_length=20)
    figures = run(tmp_path, cut, base, instructions)
    validation = parts_of(records)["validation"]
    expected = loss_by_transformers(base, validation, mask_prompt=False, max_length=20)
    assert figures["validation_loss_before"] == pytest.approx(expected, abs=1e-4)
    assert json.loads((tmp_path / "model/training.json").read_text())["max_length"] == 20
    # every record is 20 long: batch_size x 20 tokens a step
    assert pd.read_csv(tmp_path / "history.csv")["tokens"].tolist() == [160, 320, 480]


def test_the_template_is_the_one_that_is_asked_for(tmp_path, make_base, instructions, records):
    wide = make_base(context_length=256, n_layer=1)
    figures = run(tmp_path, params(template="alpaca"), wide, instructions)
    expected = loss_by_transformers(
        wide,
        parts_of(records)["validation"],
        mask_prompt=True,
        max_length=256,
        template="alpaca",
    )
    assert figures["validation_loss_before"] == pytest.approx(expected, abs=1e-4)
    assert read_template(tmp_path / "model") == TEMPLATES["alpaca"]


def test_answers_to_validation_records_are_shown_at_each_evaluation(
    tmp_path, base, instructions, records
):
    heard = []
    run(tmp_path, params(), base, instructions, log=heard.append)
    texts = [event for event in heard if isinstance(event, Text)]
    assert [event.name for event in texts] == [f"samples/step-{i:06d}.txt" for i in (2, 4, 6)]
    for record in parts_of(records)["validation"][:3]:
        assert all(record.instruction in event.text for event in texts)


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_packed_rows_learn_what_padded_ones_do(
    tmp_path, base, instructions, everything, mask_prompt
):
    """Here the records of a step have a template's words in common."""
    curves = {}
    for rows in ("packed", "padded"):
        run(tmp_path / rows, params(rows=rows, mask_prompt=mask_prompt), base, instructions)
        curves[rows] = pd.read_csv(tmp_path / rows / "history.csv")
    for column in ("train_loss", "validation_loss"):
        packed, padded = (curves[rows][column].to_numpy() for rows in ("packed", "padded"))
        assert packed == pytest.approx(padded, rel=1e-4)
    tokens = {rows: curve["tokens"].iloc[-1] for rows, curve in curves.items()}
    assert (tokens["packed"] < tokens["padded"]) == mask_prompt  # the words stand once in a row
    assert everything(tmp_path / "packed/model") != everything(tmp_path / "padded/model")


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
def test_adapters_are_merged_into_a_plain_model(
    tmp_path, make_base, instructions, records, tie_weights
):
    """What was not adapted is as it was; transformers reads the rest and measures the same."""
    base = make_base(tie_weights=tie_weights)
    layers = ["query", "mlp.c_fc", *([] if tie_weights else ["head"])]
    learn = params(trainable="lora", lora={"rank": 4, "layers": layers})
    figures = run(tmp_path, learn, base, instructions)
    before, after = load_model(base).state_dict(), load_model(tmp_path / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {f"h.{i}.{name}.weight" for i in range(2) for name in ("attn.c_attn", "mlp.c_fc")}
    assert changed == adapted | (set() if tie_weights else {"lm_head.weight"})
    C, V, rank = 16, 257, 4
    expected = 2 * (rank * (C + C) + rank * (C + 4 * C)) + (0 if tie_weights else rank * (C + V))
    assert figures["parameters_trained"] == expected
    validation = parts_of(records)["validation"]
    loss = loss_by_transformers(tmp_path / "model", validation, mask_prompt=True)
    assert figures["validation_loss"] == pytest.approx(loss, abs=1e-4)
    assert loss < figures["validation_loss_before"]


def test_adapters_are_beside_every_layer_of_the_blocks_unless_others_are_named(
    tmp_path, base, instructions
):
    """GPT-2's head is its embedding, and has no adapter of its own."""
    assert params(trainable="lora", lora={"rank": 2}).lora == LoraParams(rank=2, layers=IN_BLOCKS)
    figures = run(tmp_path / "plain", params(trainable="lora"), base, instructions)
    named = params(trainable="lora", lora={"layers": list(IN_BLOCKS)})
    assert run(tmp_path / "named", named, base, instructions) == figures


def test_an_adapter_of_a_tied_head_is_refused(tmp_path, base, instructions, refused):
    head = params(trainable="lora", lora={"layers": ["head"]})
    with refused(r"lora\.layers: the head of this model is its embedding .*leave head out"):
        run(tmp_path / "o", head, base, instructions)


def test_a_stopped_run_with_adapters_goes_on_to_the_same_bytes(
    tmp_path, make_base, instructions, everything, interrupt_at
):
    base = make_base(dropout=0.1)
    learn = params(trainable="lora", lora={"rank": 4, "dropout": 0.1})
    run(tmp_path / "straight", learn, base, instructions)
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", learn, base, instructions, state=state, log=interrupt_at(3))
    run(tmp_path / "s", learn, base, instructions, state=state)
    assert everything(tmp_path / "s") == everything(tmp_path / "straight")


# --- conversations --------------------------------------------------------------------------------


def conversation(i):
    """Of one to three turns, every third with a system text; and how it is read."""
    turns = [(f"Say {i}.", f"{i}."), ("Once more.", f"{i}!"), ("And?", "No.")][: 1 + i % 3]
    system = [{"role": "system", "content": "Be brief."}] if i % 3 == 1 else []
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    *earlier, (prompt, response) = (Turn(*turn) for turn in turns)
    record = Instruction(prompt, "", response, tuple(earlier), "Be brief." if system else "")
    return [*system, *messages], record


@pytest.fixture(scope="module")
def conversations():
    return [conversation(i) for i in range(40)]


def conversation_loss(model, records, template):
    """The mean loss of all responses and their ends by transformers, one conversation at a time."""
    tokenizer = byte_tokenizer()
    theirs = GPT2LMHeadModel.from_pretrained(model).eval()
    total, n = 0.0, 0
    for record in records:
        turns = [*record.earlier, Turn(record.instruction, record.output)]
        prompts = render_prompts(template, [turn.prompt for turn in turns], "", record.system)
        ids, learnt = [], []
        for prompt, turn in zip(prompts, turns, strict=True):
            response = [*tokenizer.encode(turn.response), tokenizer.eot]
            learnt += range(len(ids) + len(tokenizer.encode(prompt)), 10**6)[: len(response)]
            ids += [*tokenizer.encode(prompt), *response]
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0]
        before = torch.tensor(learnt) - 1
        targets = torch.tensor(ids)[learnt]
        total += F.cross_entropy(logits[before], targets, reduction="sum").item()
        n += len(learnt)
    return total / n


@pytest.mark.parametrize("template", ["phi3", "alpaca"])
def test_an_assistant_learns_every_answer_of_a_conversation(
    tmp_path, make_base, raw, conversations, template
):
    """Its losses before and after are those of transformers."""
    wide = make_base(context_length=320, n_layer=1)
    heard = []
    folder = raw("conversations", [messages for messages, _ in conversations])
    figures = run(tmp_path, params(template=template), wide, folder, log=heard.append)
    validation = split_instructions([r for _, r in conversations], Split(**SPLIT))["validation"]
    assert {len(record.earlier) for record in validation} == {0, 1, 2}
    before = conversation_loss(wide, validation, template)
    after = conversation_loss(tmp_path / "model", validation, template)
    assert figures["validation_loss_before"] == pytest.approx(before, abs=1e-4)
    assert figures["validation_loss"] == pytest.approx(after, abs=1e-4)
    assert after < before
    texts = [event.text for event in heard if isinstance(event, Text)]
    assert all(record.instruction in texts[-1] for record in validation[:3])


def test_a_message_out_of_turn_is_refused(tmp_path, base, raw, refused):
    turned = [*(conversation(i)[0] for i in range(20)), conversation(0)[0][::-1]]
    with refused("line 21: message 1: from 'assistant', where 'user' has its turn; "):
        run(tmp_path / "o", params(), base, raw("conversations", turned))


def test_held_out_records_that_are_seen_in_training_are_counted(tmp_path, base, raw, records):
    """A task that differs from one of the training part in its spelling alone, or an answer that
    has 13 words of one.
    """
    words = " ".join("abcdefghijklm")

    def answered(part, tasks):
        seen = {(r.instruction, r.input) for r in parts_of(tasks)[part][:2]}
        return [
            {**r, "output": f"{part} {words} {part}"}
            if (r["instruction"], r["input"]) in seen
            else r
            for r in tasks
        ]

    letters = [
        {**r, "instruction": f"Say {'ab'[i // 26]}{chr(97 + i % 26)}."}
        for i, r in enumerate(records)
    ]
    heard = []
    figures = run(tmp_path / "a", params(), base, raw("instructions", letters), log=heard.append)
    assert figures["contaminated_test"] == figures["contaminated_validation"] == 0
    assert not [e for e in heard if isinstance(e, Message) and "share text" in e.text]
    for part in ("test", "train"):
        letters = answered(part, letters)
    figures = run(tmp_path / "b", params(), base, raw("instructions", letters), log=heard.append)
    assert (figures["contaminated_test"], figures["contaminated_validation"]) == (2, 0)
    assert (
        Message("finetune_instruct: 2 of 8 test examples share text with the training part")
        in heard
    )


# --- what is refused ------------------------------------------------------------------------------


def test_records_longer_than_the_bases_context_are_refused(tmp_path, base, instructions, refused):
    with refused(
        r"finetune_instruct\.max_length: 65 tokens are more than the context of .*base holds "
        r"\(64\); use at most that"
    ):
        run(tmp_path / "o", params(max_length=65), base, instructions)


def test_prompts_that_leave_no_room_for_an_answer_are_refused(
    tmp_path, base, instructions, refused
):
    with refused(
        r"instructions: no answer of the train part begins within 64 tokens; .*shorter template"
    ):
        run(tmp_path / "o", params(template="alpaca"), base, instructions)


def test_records_that_are_cut_before_their_answer_are_told_of(tmp_path, base, raw, records):
    long = [{**r, "input": "x" * 60} if i < 5 else r for i, r in enumerate(records)]
    heard = []
    run(tmp_path, params(), base, raw("instructions", long), log=heard.append)
    warnings = [e.text for e in heard if isinstance(e, Message) and e.level == "warning"]
    cut = {"train": 0, "validation": 0, "test": 0}
    for name, part in parts_of(long).items():
        cut[name] = sum(len(record.input) == 60 for record in part)
    assert [text.split(": ")[1] for text in warnings] == [
        f"{cut[name]} of {n} {name} records are cut before their answer"
        for name, n in (("train", 24), ("validation", 8))
        if cut[name]
    ]
    assert cut["train"] > 0


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[{", "line 1: not valid JSON"),
        (
            b'[{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a"}]',
            "record 2: input: Field required; a record has the texts",
        ),
        (b"[]", r"the train part of 0 records is empty; add records or change finetune_instruct\."),
        (b'[{"instruction": "a", "input": "", "output": "\xff"}]', "byte 0xff is not UTF-8"),
    ],
    ids=["not json", "a field", "empty", "not utf-8"],
)
def test_records_that_cannot_be_used_are_refused(tmp_path, base, raw, refused, content, complaint):
    instructions = raw("instructions", content)
    with refused(complaint):
        run(tmp_path / "o", params(), base, instructions)


def test_a_base_that_cannot_be_used_is_refused(tmp_path, base, instructions, refused):
    with refused(r"nowhere/config\.json: no such file; .*run the stage that makes it"):
        run(tmp_path / "o", params(), tmp_path / "nowhere", instructions)
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with refused(r"model\.safetensors: damaged or cut short"):
        run(tmp_path / "o", params(), broken, instructions)


@pytest.mark.parametrize(
    "wrong",
    [
        {"template": "vicuna"},
        {"mask_prompt": "maybe"},
        {"max_length": 0},
        {"sample_tokens": 0},
        {"rows": "ragged"},
        {"trainable": "head"},
        {"lora": {"rank": 4}},  # without trainable: lora
        {"trainable": "lora", "lora": {"rank": 0}},
    ],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        params(**wrong)


# --- the published data ---------------------------------------------------------------------------


def test_the_published_instructions_are_split_as_published(tmp_path, make_base, raw, mirror):
    records = raw("instructions", (mirror / "instruction-data.json").read_bytes())
    book = params(
        split={"train": 0.85, "validation": 0.05},
        max_length=96,
        train={"steps": 1, "batch_size": 8},
    )
    figures = run(tmp_path, book, make_base(context_length=128, n_layer=1), records)
    assert [figures[f"records_{p}"] for p in ("train", "validation", "test")] == [935, 55, 110]
