import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gpt.errors import InputError
from gpt.text import (
    Instruction,
    RawFile,
    Split,
    hash_position,
    read_documents,
    read_instructions,
    read_messages,
    read_sources,
    split_by_hash,
    split_instructions,
    split_messages,
    write_sources,
)

SPLIT = Split(train=0.7, validation=0.1)


def raw(folder, content, format_, name="a", **extra):
    """A raw folder with one file more."""
    folder.mkdir(exist_ok=True)
    content = content if isinstance(content, bytes) else content.encode()
    file = RawFile(
        name=name, file=f"{name}.raw", format=format_, bytes=len(content), sha256="0" * 64, **extra
    )
    (folder / file.file).write_bytes(content)
    there = read_sources(folder) if (folder / "sources.json").exists() else []
    write_sources(folder, [*there, file])
    return folder


def documents(folder):
    return [text for _, text in read_documents(folder)]


def test_a_text_without_separator_is_one_document_as_it_stands(tmp_path):
    raw(tmp_path, "  One.\r\n\n\nTwo.\n", "text")
    assert list(read_documents(tmp_path)) == [("a", "  One.\r\n\n\nTwo.\n")]


def test_a_separator_cuts_a_text_and_blank_pieces_are_dropped(tmp_path):
    raw(tmp_path, "One.\nTwo.\n\n\n\n\n\nThree.\n", "text", separator="\n\n\n")
    assert documents(tmp_path) == ["One.\nTwo.", "Three."]


@given(st.lists(st.text("ab\n", min_size=1, max_size=30), max_size=20))
def test_a_long_text_is_cut_in_the_same_places_as_a_short_one(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("raw")
    padding = "x" * 200_000  # so that the text is read in several pieces
    content = "==\n".join(text + padding for text in texts)
    raw(folder, content, "text", separator="==\n")
    assert documents(folder) == [(text + padding).strip("\n") for text in texts]


def test_a_byte_order_mark_is_no_text(tmp_path):
    raw(tmp_path, b"\xef\xbb\xbfOne.", "text")
    assert documents(tmp_path) == ["One."]


def test_json_lines_are_documents_and_sources_keep_their_order(tmp_path):
    raw(tmp_path, '{"text": "One\\n."}\n\n{"text": "Two.", "id": 3}\n{"text": " "}\n', "jsonl", "z")
    raw(tmp_path, "Three.", "text", "b")
    assert list(read_documents(tmp_path)) == [("z", "One\n."), ("z", "Two."), ("b", "Three.")]


MESSAGES = "".join(f"{'spam' if i % 3 else 'ham'}\tmessage {i}\n" for i in range(60))
RECORDS = [{"instruction": f"Do {i}.", "input": "x" * (i % 2), "output": "ok"} for i in range(20)]


def test_labelled_data_as_documents_keeps_to_the_training_part(tmp_path):
    raw(tmp_path, MESSAGES, "messages", "m", split=SPLIT, balance="undersample")
    raw(tmp_path, json.dumps(RECORDS), "instructions", "i", split=SPLIT)
    read = list(read_documents(tmp_path))

    raw(tmp_path / "m", MESSAGES, "messages")
    train = split_messages(read_messages(tmp_path / "m"), SPLIT, "undersample")["train"]
    assert [text for name, text in read if name == "m"] == train["text"].tolist()
    assert len(train) == 28

    raw(tmp_path / "i", json.dumps(RECORDS), "instructions")
    records = split_instructions(read_instructions(tmp_path / "i"), SPLIT)["train"]
    assert len(records) == 14
    assert [text for name, text in read if name == "i"] == [
        f"{r.instruction}\nx\nok" if r.input else f"{r.instruction}\nok" for r in records
    ]


def test_messages_are_read_without_csv_quoting(tmp_path):
    raw(tmp_path, 'ham\t"Well," he said\r\nspam\tWIN\x85 now"\nham\t\u2028ok\n', "messages")
    assert read_messages(tmp_path).to_dict("list") == {
        "label": ["ham", "spam", "ham"],
        "text": ['"Well," he said', 'WIN\x85 now"', "\u2028ok"],
    }


def test_the_sms_collection_has_all_its_rows_and_the_published_split(tmp_path, mirror):
    raw(tmp_path, (mirror / "SMSSpamCollection").read_bytes(), "messages")
    frame = read_messages(tmp_path)
    assert frame["label"].value_counts().to_dict() == {"ham": 4827, "spam": 747}
    parts = split_messages(frame, SPLIT, "undersample")
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1045,
        "validation": 149,
        "test": 300,
    }
    # Balancing and splitting are independent draws: every part holds both classes alike.
    for part in parts.values():
        assert 0.4 < (part["label"] == "spam").mean() < 0.6


def test_the_published_instructions_have_the_published_split(tmp_path, mirror):
    raw(tmp_path, (mirror / "instruction-data.json").read_bytes(), "instructions")
    parts = split_instructions(read_instructions(tmp_path), Split(train=0.85, validation=0.05))
    assert [len(parts[name]) for name in ("train", "test", "validation")] == [935, 110, 55]


def test_parts_are_disjoint_complete_and_in_file_order():
    keys = [f"key {i}" for i in range(97)]
    parts = split_by_hash(keys, SPLIT)
    assert [len(part) for part in parts] == [67, 9, 21]
    assert sorted(np.concatenate(parts).tolist()) == list(range(97))
    assert all((np.diff(part) > 0).all() for part in parts)


def test_the_split_depends_on_content_and_seed_not_on_the_order_of_rows():
    keys = [f"key {i}" for i in range(50)]
    train = {keys[i] for i in split_by_hash(keys, SPLIT)[0]}
    turned = keys[::-1]
    assert {turned[i] for i in split_by_hash(turned, SPLIT)[0]} == train
    other = Split(train=0.7, validation=0.1, seed=124)
    assert {keys[i] for i in split_by_hash(keys, other)[0]} != train


def test_a_hash_position_never_changes():
    # Frozen: another value here would move everybody's data between training and test.
    assert hash_position("a message", 123) == 1275446789879676093
    assert hash_position("a message", 123, "balance") != 1275446789879676093


def test_undersampling_keeps_as_many_of_every_class():
    frame = pd.DataFrame(
        {"label": ["a"] * 30 + ["b"] * 10 + ["c"] * 17, "text": [f"t{i}" for i in range(57)]}
    )
    parts = split_messages(frame, SPLIT, "undersample")
    kept = pd.concat(parts.values())
    assert kept["label"].value_counts().to_dict() == {"a": 10, "b": 10, "c": 10}
    assert kept["text"].is_unique
    assert sum(map(len, split_messages(frame, SPLIT, "none").values())) == 57


def test_a_split_that_leaves_no_test_part_is_refused():
    with pytest.raises(ValidationError, match="leave nothing to test on"):
        Split(train=0.9, validation=0.1)


def test_instructions_ignore_other_fields(tmp_path):
    raw(tmp_path, json.dumps([{**RECORDS[0], "chosen": "x"}]), "instructions")
    assert read_instructions(tmp_path) == [Instruction("Do 0.", "", "ok")]


@pytest.mark.parametrize(
    ("read", "format_", "content", "complaint"),
    [
        (read_messages, "messages", "ham\tone\nham\ttwo\n", r"1 class \('ham'\)"),
        (read_messages, "messages", "", "0 class"),
        (read_messages, "messages", "ham\tone\nspam two\n", "line 2: not a label"),
        (read_messages, "messages", "ham\tone\n\ttwo\n", "line 2: not a label"),
        (read_messages, "messages", "ham\tone\nspam\ttwo\tthree\n", "line 2: not a label"),
        (read_messages, "messages", b"ham\tone\nspam\ttw\xff\n", "line 2: byte 0xff is not UTF-8"),
        (read_instructions, "instructions", "[{]", "line 1: not valid JSON"),
        (read_instructions, "instructions", b'["\xff"]', "line 1: byte 0xff"),
        (read_instructions, "instructions", "[" * 100_000, "nested too deeply"),
        (read_instructions, "instructions", "{}", "not a JSON list"),
        (read_instructions, "instructions", "[1]", "record 1: not an object"),
        (
            read_instructions,
            "instructions",
            json.dumps([*RECORDS[:2], {"instruction": "a", "input": ""}]),
            "record 3: field 'output' is missing",
        ),
        (
            read_instructions,
            "instructions",
            json.dumps([{"instruction": "a", "input": None, "output": "b"}]),
            "record 1: field 'input' is not a text",
        ),
        (
            read_instructions,
            "instructions",
            json.dumps([{"instruction": " ", "input": "", "output": "b"}]),
            "record 1: field 'instruction' is empty",
        ),
        (
            read_instructions,
            "instructions",
            json.dumps([{"instruction": "a", "input": "", "output": "\ud800"}]),
            "record 1: field 'output' holds half a character",
        ),
        (documents, "text", b"one\n\xc3(\n", "line 2: byte 0xc3 is not UTF-8"),
        (documents, "jsonl", '{"text": "a"}\n{"text"\n', "line 2: not valid JSON"),
        (documents, "jsonl", '{"text": 1}\n', "line 1: not an object with a text"),
        (documents, "jsonl", '{"text": "\\ud800"}\n', "line 1: not an object with a text"),
        (documents, "file", "a", "holds no documents"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, read, format_, content, complaint):
    raw(tmp_path, content, format_)
    with pytest.raises(InputError, match=complaint) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_was_not_downloaded_is_named_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match="run the stage download first"):
        read_sources(tmp_path / "nothing")
    raw(tmp_path, "a", "text")
    (tmp_path / "a.raw").unlink()
    with pytest.raises(InputError, match=r"a\.raw: no such file"):
        read_sources(tmp_path)
    (tmp_path / "sources.json").write_text('[{"name": "a"}]')
    with pytest.raises(InputError, match=r"sources\.json: 0\.file"):
        read_sources(tmp_path)
