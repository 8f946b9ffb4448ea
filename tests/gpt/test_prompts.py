import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from gpt.base.errors import InputError
from gpt.base.files import write_json
from gpt.model.config import GPTConfig
from gpt.model.model import GPT
from gpt.model.weights import save_model
from gpt.prompts import (
    TEMPLATES,
    encode_turns,
    last_prompt,
    read_template,
    render_prompt,
    render_prompts,
)
from gpt.text.records import Instruction, Turn
from gpt.tokens.tokenizer import byte_tokenizer

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n"
)


def test_alpaca_is_the_books_text_to_the_letter():
    assert render_prompt("alpaca", "Spell it.", "Ocassion") == (
        f"{ALPACA}Spell it.\n\n### Input:\nOcassion\n\n### Response:\n"
    )


def test_without_an_input_its_section_is_left_out():
    assert render_prompt("alpaca", "Say hi.") == f"{ALPACA}Say hi.\n\n### Response:\n"
    assert render_prompt("phi3", "Say hi.") == "<|user|>\nSay hi.\n<|assistant|>\n"
    assert render_prompt("phi3", "Say", "hi") == "<|user|>\nSay\nhi\n<|assistant|>\n"


def test_further_turns_of_alpaca_repeat_its_headings_alone():
    assert render_prompts("alpaca", ["Count.", "On.", "Double it."], "4") == [
        f"{ALPACA}Count.\n\n### Response:\n",
        "\n\n### Instruction:\nOn.\n\n### Response:\n",
        "\n\n### Instruction:\nDouble it.\n\n### Input:\n4\n\n### Response:\n",
    ]


def test_further_turns_of_phi3_are_as_the_first():
    assert render_prompts("phi3", ["Count.", "On."]) == [
        "<|user|>\nCount.\n<|assistant|>\n",
        "<|user|>\nOn.\n<|assistant|>\n",
    ]


def test_chatml_closes_every_turn_but_the_assistants_own():
    """That one the vocabulary's own end closes."""
    assert render_prompts("chatml", ["Count.", "On."], "4", system="Be brief.") == [
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nOn.\n\n4<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_a_system_text_opens_the_conversation():
    """With alpaca in the place of its own."""
    assert render_prompts("alpaca", ["Count.", "On."], system="Be brief.") == [
        "Be brief.\n\n### Instruction:\nCount.\n\n### Response:\n",
        "\n\n### Instruction:\nOn.\n\n### Response:\n",
    ]
    assert render_prompts("phi3", ["Count.", "On."], system="Be brief.") == [
        "<|system|>\nBe brief.\n<|user|>\nCount.\n<|assistant|>\n",
        "<|user|>\nOn.\n<|assistant|>\n",
    ]
    for template in TEMPLATES:
        assert render_prompts(template, ["Hi."], system=" ") == [render_prompt(template, "Hi.")]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_in_tokens_is_its_prompts_and_responses(template):
    tokenizer = byte_tokenizer()
    records = [
        Instruction("Double it.", "4", "8"),
        Instruction("On!", "", "3", (Turn("Count.", "1"), Turn("On.", "2")), "Be brief."),
    ]
    single, several = encode_turns(tokenizer, template, records)
    ((prompt, response),) = single
    assert tokenizer.decode(prompt) == render_prompt(template, "Double it.", "4")
    assert tokenizer.decode(response) == "8"
    prompts = render_prompts(template, ["Count.", "On.", "On!"], system="Be brief.")
    assert [tokenizer.decode(ids) for ids, _ in several] == prompts
    assert [tokenizer.decode(ids) for _, ids in several] == ["1", "2", "3"]
    assert last_prompt(single, tokenizer.eot) == prompt
    text = f"{prompts[0]}1<|endoftext|>{prompts[1]}2<|endoftext|>{prompts[2]}"
    ids = last_prompt(several, tokenizer.eot)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eot) == 2


def test_what_a_user_writes_never_ends_a_turn():
    tokenizer = byte_tokenizer()
    record = Instruction("a<|endoftext|>", "<|endoftext|>", "<|endoftext|>")
    ((prompt, response),) = encode_turns(tokenizer, "phi3", [record])[0]
    assert tokenizer.eot not in [*prompt, *response]


@pytest.mark.parametrize("template", TEMPLATES)
def test_braces_in_a_users_text_are_text(template):
    text = "{instruction} {0} {{}} {input} {system}"
    assert render_prompt(template, text, text).count(text) == 2
    assert "".join(render_prompts(template, [text, text], text, text)).count(text) == 4


def test_an_unknown_template_is_named_with_those_there_are():
    with pytest.raises(InputError, match=r"no 'vicuna'; there are alpaca, phi3, chatml"):
        render_prompt("vicuna", "Say hi.")


# --- with a model ---------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=257, context_length=16, n_layer=1, n_head=1, n_embd=8)
    save_model(GPT(config), tmp_path / "model", tokenizer=byte_tokenizer())
    return tmp_path / "model"


def write_template(directory, template):
    for name, value in template.files.items():
        write_json(directory / name, value)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_model_brings_its_template_along(directory, template):
    """As it was when the model learnt it, whatever the table says today."""
    for each in (template, replace(template, opening="Do {this}:\n", response="\n=> ")):
        write_template(directory, each)
        assert read_template(directory) == each


def test_a_name_alone_is_that_of_a_template_of_the_table(directory):
    (directory / "prompt.json").write_text('{"template": "phi3"}')
    assert read_template(directory) == TEMPLATES["phi3"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("system", ["", "Be {{ brief }}, 'please'."])
@pytest.mark.parametrize("turns", [1, 3])
def test_transformers_asks_in_the_same_words(directory, template, system, turns):
    """And in the same tokens: its chat template is ours."""
    write_template(directory, template)
    theirs = AutoTokenizer.from_pretrained(directory)
    asked = ["Count {1}.\n", "On \\ {{on}}!", 'And "now"?'][:turns]
    messages = [{"role": "system", "content": system}] if system else []
    for text in asked:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "2, 3"}]
    prompts = render_prompts(template, asked, system=system)
    text = "2, 3<|endoftext|>".join(prompts)
    options = {"add_generation_prompt": True}
    assert theirs.apply_chat_template(messages[:-1], tokenize=False, **options) == text
    ids = theirs.apply_chat_template(messages[:-1], return_dict=True, **options)["input_ids"]
    tokenizer = byte_tokenizer()
    own = [(tokenizer.encode(prompt), tokenizer.encode("2, 3")) for prompt in prompts]
    assert ids == last_prompt(own, tokenizer.eot)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"prompt\.json: not there, so this model follows no instructions; take one"),
        ("{", r"prompt\.json: not JSON .*; run the fine-tuning again"),
        ("[]", r"prompt\.json: not a JSON object; run the fine-tuning again"),
        ("{}", r"prompt\.json: must be JSON with the texts template, opening, .*, response"),
        ('{"template": "vicuna"}', r"prompt\.json: .*no 'vicuna'; there are alpaca, phi3, chatml"),
        ({"response": 3}, r"prompt\.json: must be JSON with the texts"),
        ({"instruction": "{input}"}, r"instruction: must hold \{instruction\} once and no other"),
        ({"system": "{system} {system}"}, r"system: must hold \{system\} once"),
        ({"input": "{input.__class__}"}, r"input: must hold \{input\} once"),
        ({"input": "{input!r:>9}"}, r"input: must hold \{input\} once"),
        ({"input": "{input} {"}, r"input: must hold \{input\} once"),
    ],
    ids=str,
)
def test_a_template_that_cannot_be_used_is_refused(directory, content, complaint):
    if isinstance(content, dict):
        content = json.dumps({**TEMPLATES["alpaca"].files["prompt.json"], **content})
    if content is not None:
        (directory / "prompt.json").write_text(content)
    with pytest.raises(InputError, match=complaint):
        read_template(directory)
