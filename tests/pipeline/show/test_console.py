"""Events survive the trip to the flow, and both displays show them."""

import io
import time

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from gpt.base.events import Message, Metrics, Progress, Text
from pipeline.show.console import (
    EVENTS_VARIABLE,
    LiveDisplay,
    PlainDisplay,
    event_from_json,
    event_to_json,
    make_log,
    read_events,
    report_console,
    seconds_in_words,
)

EVENTS = [
    Message("loss is high", "warning"),
    Progress("train", 3, 10, "step", {"loss": 3.25}),
    Metrics(3, {"train_loss": 3.25}),
    Text("sample.txt", "two\nlines — é"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_the_trip_through_json(event):
    line = event_to_json(event)
    assert "\n" not in line
    assert event_from_json(line) == event


@pytest.mark.parametrize("line", ["", "{", "3", '{"event": "unknown"}', '{"event": "message"}'])
def test_a_line_that_is_no_event_is_refused(line):
    with pytest.raises(ValueError, match=r"event|Expecting"):
        event_from_json(line)


def test_inside_the_flow_events_go_to_its_file_and_are_read_as_they_come(tmp_path, monkeypatch):
    path = tmp_path / "events"
    path.touch()
    monkeypatch.setenv(EVENTS_VARIABLE, str(path))
    with path.open("rb") as file, make_log("pretrain") as log:
        assert list(read_events(file)) == []
        for event in EVENTS[:2]:
            log(event)
        assert list(read_events(file)) == EVENTS[:2]
        for event in EVENTS[2:]:
            log(event)
        assert list(read_events(file)) == EVENTS[2:]


def test_a_half_written_line_waits_for_its_end(tmp_path):
    path = tmp_path / "events"
    line = event_to_json(EVENTS[3]).encode()
    path.write_bytes(line[:20])
    with path.open("rb") as file:
        assert list(read_events(file)) == []
        path.write_bytes(line + b"\n")
        assert list(read_events(file)) == [EVENTS[3]]


def test_plain_lines_are_prefixed_and_progress_comes_seldom_with_rate_and_time_left(capsys):
    now = 0.0
    display = PlainDisplay(interval=5, clock=lambda: now)
    for done in range(101):
        now = done * 0.5
        display.event("pretrain", Progress("train", done, 100, "step", {"loss": 3.21}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pretrain | train: step 10/100  loss 3.21  2 step/s  45 s left"
    assert lines[-1] == "pretrain | train: step 100/100  loss 3.21  2 step/s"
    assert len(lines) == 10


def test_plain_output_is_the_default_without_a_terminal(capsys, monkeypatch):
    monkeypatch.delenv(EVENTS_VARIABLE, raising=False)
    with make_log("download") as log:
        log(Message("careful", "warning"))
        log(Text("sample.txt", "one\ntwo"))
        log(Metrics(1, {"loss": 1.0}))
    assert capsys.readouterr().out.splitlines() == [
        "download | warning: careful",
        "download | sample.txt: one two",
    ]


def test_a_terminal_gets_a_bar_with_rate_and_lines_above_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=160, highlight=False)
    with LiveDisplay(console) as display:
        for done in range(5):
            display.event("pretrain", Progress("train", done, 10, "step", {"loss": 3.21}))
            time.sleep(0.3)
        time.sleep(0.4)  # the bars are drawn five times a second
        display.event("pretrain", Message("[not markup]"))
        display.done("pretrain")
        display.event("pretrain", Progress("train", 10, 10))
    shown = console.file.getvalue()
    assert "pretrain train" in shown
    assert "4/10" in shown
    assert "step/s" in shown
    assert "loss 3.21" in shown
    assert "[not markup]" in shown


HOSTILE = "[/x] \x1b]0;title\x07 \x9b2J \u202etxt\r\x7f"
OBEYED = ("\x1b]", "\x07", "\x9b", "\u202e", "\x7f")
HARMLESS = "[/x] ⟨U+001B⟩]0;title⟨U+0007⟩ ⟨U+009B⟩2J ⟨U+202E⟩txt⟨U+000D⟩⟨U+007F⟩"


@pytest.mark.parametrize("live", [True, False], ids=["terminal", "log"])
def test_what_a_stage_says_is_shown_and_not_obeyed(live, capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=200, highlight=False)
    events = [Message(HOSTILE), Text(HOSTILE, "a sample"), Progress(HOSTILE, 1, 10, HOSTILE)]
    if live:
        with LiveDisplay(console) as display:
            for event in events:
                display.event("pretrain", event)
            display._bars.refresh()
        shown = console.file.getvalue()
    else:
        ticks = iter(range(0, 1000, 10))
        display = PlainDisplay(clock=lambda: next(ticks))
        for event in (*events, events[-1]):
            display.event("pretrain", event)
        shown = capsys.readouterr().out
    assert shown.count(HARMLESS) >= 3
    assert not any(bad in shown for bad in OBEYED)


def test_a_report_s_names_are_shown_and_not_obeyed():
    console = report_console(Console(file=io.StringIO(), force_terminal=True, width=200))
    table = Table("name")
    table.add_row(RichText(HOSTILE))
    console.print(table)
    console.print(RichText(HOSTILE, style="bold"), soft_wrap=True)
    shown = console.file.getvalue()
    assert shown.count("[/x] ⟨U+001B⟩]0;title") == 2
    assert not any(bad in shown for bad in OBEYED)
    assert "\x1b[1m" in shown  # its own escapes are


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds, words):
    assert seconds_in_words(seconds) == words
