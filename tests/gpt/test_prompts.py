import pytest

from gpt.errors import InputError
from gpt.prompts import TEMPLATES, render_prompt

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


@pytest.mark.parametrize("template", TEMPLATES)
def test_braces_in_a_users_text_are_text(template):
    text = "{instruction} {0} {{}} {input}"
    assert render_prompt(template, text, text).count(text) == 2


def test_an_unknown_template_is_named_with_those_there_are():
    with pytest.raises(InputError, match=r"no 'vicuna'; there are alpaca, phi3"):
        render_prompt("vicuna", "Say hi.")
