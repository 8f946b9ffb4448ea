"""What comes from outside is printed so that a terminal shows it and does not obey it."""

import io
import json
import sys

import pytest

from pipeline.show.terminal import safe, say, say_json, say_result

ESCAPES = "\x1b]0;title\x1b\\ \x9b2J \x7f\x08 \u202e\u2066 \udcff\r"


def test_what_a_terminal_would_obey_is_spelt_out_and_layout_stays():
    shown = safe(f"a\tb\r\nc {ESCAPES} é 漢 👩‍👩‍👧 ع")
    assert shown.startswith("a\tb\nc ⟨U+001B⟩]0;title⟨U+001B⟩\\ ⟨U+009B⟩2J ⟨U+007F⟩⟨U+0008⟩ ")
    assert shown.endswith("⟨U+202E⟩⟨U+2066⟩ ⟨U+DCFF⟩⟨U+000D⟩ é 漢 👩‍👩‍👧 ع")


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_keeps_its_bytes_but_on_a_terminal(terminal, monkeypatch):
    class Out(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stdout", Out())
    say_result("an answer\x1b[2J", end="")
    assert sys.stdout.getvalue() == ("an answer⟨U+001B⟩[2J" if terminal else "an answer\x1b[2J")


def test_messages_are_safe_in_a_log_too(capsys):
    say(f"error: {ESCAPES}", file=sys.stderr)
    assert "\x1b" not in capsys.readouterr().err


def test_json_is_the_same_for_a_program(capsys):
    say_json({"label": ESCAPES + "é"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"label": ESCAPES + "é"}
    assert safe(printed) == printed
