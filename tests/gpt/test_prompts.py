import pytest

from gpt.errors import InputError
from gpt.prompts import TEMPLATES, encode_turns, last_prompt, render_prompt, render_prompts
from gpt.text import Instruction, Turn
from gpt.tokenizer import byte_tokenizer

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
    with pytest.raises(InputError, match=r"no 'vicuna'; there are alpaca, phi3"):
        render_prompt("vicuna", "Say hi.")
