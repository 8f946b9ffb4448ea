import csv
import gzip
import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError

from gpt.base.errors import InputError
from gpt.text.records import (
    MOST_CLASSES,
    Instruction,
    Preference,
    RawFile,
    Split,
    Turn,
    documents_in,
    hash_position,
    messages_in,
    read_documents,
    read_instructions,
    read_messages,
    read_preferences,
    read_sources,
    split_by_hash,
    split_instructions,
    split_messages,
    split_preferences,
    write_sources,
)

SPLIT = Split(train=0.7, validation=0.1)


KINDS = {"tsv": "messages", "csv": "messages", "json": "instructions", "file": "file"}


def raw(folder, content, format_, name="a", *, kind=None, end="raw", **extra):
    """A raw folder with one file more; of documents, but for the formats that others are in."""
    folder.mkdir(exist_ok=True)
    content = content if isinstance(content, bytes) else content.encode()
    file = RawFile(
        name=name,
        file=f"{name}.{end}",
        kind=kind or KINDS.get(format_, "documents"),
        format=format_,
        bytes=len(content),
        sha256="0" * 64,
        **extra,
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
    raw(tmp_path, MESSAGES, "tsv", "m", split=SPLIT, balance="undersample")
    raw(tmp_path, json.dumps(RECORDS), "json", "i", split=SPLIT)
    read = list(read_documents(tmp_path))

    raw(tmp_path / "m", MESSAGES, "tsv")
    train = split_messages(read_messages(tmp_path / "m"), SPLIT, "undersample")["train"]
    assert [text for name, text in read if name == "m"] == train["text"].tolist()
    assert len(train) == 28

    raw(tmp_path / "i", json.dumps(RECORDS), "json")
    records = split_instructions(read_instructions(tmp_path / "i"), SPLIT)["train"]
    assert len(records) == 14
    assert [text for name, text in read if name == "i"] == [
        f"{r.instruction}\nx\nok" if r.input else f"{r.instruction}\nok" for r in records
    ]


def test_messages_are_read_without_csv_quoting(tmp_path):
    raw(tmp_path, 'ham\t"Well," he said\r\nspam\tWIN\x85 now"\nham\t\u2028ok\n', "tsv")
    assert read_messages(tmp_path).to_dict("list") == {
        "label": ["ham", "spam", "ham"],
        "text": ['"Well," he said', 'WIN\x85 now"', "\u2028ok"],
    }


def test_the_sms_collection_has_all_its_rows_and_the_published_split(tmp_path, mirror):
    raw(tmp_path, (mirror / "SMSSpamCollection").read_bytes(), "tsv")
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
    raw(tmp_path, (mirror / "instruction-data.json").read_bytes(), "json")
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


PAIR = {"chosen": "Gladly.", "rejected": "No."}


def test_preferences_are_the_instructions_some_of_which_hold_two_answers(tmp_path):
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    records = [
        {**RECORDS[0], **PAIR},
        RECORDS[1],
        {**RECORDS[2], "chosen": None, "rejected": None},
        {"messages": said, **PAIR},
        said,
    ]
    expected = [
        Preference("Do 0.", "", "ok", chosen="Gladly.", rejected="No."),
        Instruction("Do 1.", "x", "ok"),
        Instruction("Do 2.", "", "ok"),
        Preference("Hi.", "", "Hello.", chosen="Gladly.", rejected="No."),
        Instruction("Hi.", "", "Hello."),
    ]
    raw(tmp_path / "json", json.dumps(records), "json")
    found = read_preferences(tmp_path / "json")
    assert found == expected
    assert [type(each) for each in found] == [type(each) for each in expected]
    plain = read_instructions(tmp_path / "json")
    assert {type(each) for each in plain} == {Instruction}, "the two answers are passed over"
    assert [each.task for each in plain] == [each.task for each in found]
    lines = "".join(json.dumps(each) + "\n" for each in records)
    raw(tmp_path / "jsonl", lines, "jsonl", kind="instructions")
    assert read_preferences(tmp_path / "jsonl") == expected
    buffer = io.BytesIO()
    # a column holds null where a record has no answer
    rows = [records[0], {**RECORDS[1], "chosen": None, "rejected": None}]
    parquet.write_table(pa.Table.from_pylist(rows), buffer)
    raw(tmp_path / "parquet", buffer.getvalue(), "parquet", kind="instructions")
    assert read_preferences(tmp_path / "parquet") == expected[:2]


def test_preferences_are_in_the_parts_that_their_records_are_in(tmp_path):
    """Whatever others hold no answers, and whatever the answers are."""
    records = [{**each, **PAIR} if i % 3 else each for i, each in enumerate(RECORDS)]
    raw(tmp_path, json.dumps(records), "json")
    parts = split_preferences(read_preferences(tmp_path), SPLIT)
    whole = split_instructions(read_instructions(tmp_path), SPLIT)
    assert list(parts) == list(whole)
    for name, part in whole.items():
        tasks = [each.task for each in part if int(each.instruction[3:-1]) % 3]
        assert [each.task for each in parts[name]] == tasks
        assert all(isinstance(each, Preference) for each in parts[name])


def test_instructions_ignore_other_fields(tmp_path):
    raw(tmp_path, json.dumps([{**RECORDS[0], "chosen": "x"}]), "json")
    assert read_instructions(tmp_path) == [Instruction("Do 0.", "", "ok")]


# --- one data set in many forms -------------------------------------------------------------------

FIELDS = {"text_field": "message", "label_field": "class"}


def as_csv(rows):
    file = io.StringIO()
    csv.writer(file).writerows([("id", "class", "message"), *((i, *r) for i, r in enumerate(rows))])
    return file.getvalue()


def as_json_lines(rows):
    return "".join(json.dumps({"message": text, "class": label}) + "\n" for label, text in rows)


def as_parquet(**columns):
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, row_group_size=100)
    return file.getvalue()


def in_every_form(folder, rows):
    """The same labelled rows in every format: the frames that are read."""
    lines = as_json_lines(rows).encode()
    labels, texts = zip(*rows, strict=True)
    forms = {
        "tsv": ("tsv", "".join(f"{label}\t{text}\n" for label, text in rows), "tsv"),
        "csv": ("csv", as_csv(rows), "csv"),
        "jsonl": ("jsonl", lines, "jsonl"),
        "gz": ("jsonl", gzip.compress(lines), "jsonl.gz"),
        "zst": ("jsonl", zstandard.compress(lines), "jsonl.zst"),
        "parquet": ("parquet", as_parquet(**{"class": labels, "message": texts}), "parquet"),
    }
    for name, (format_, content, end) in forms.items():
        fields = {} if name == "tsv" else FIELDS
        raw(folder / name, content, format_, kind="messages", end=end, **fields)
    return {name: read_messages(folder / name) for name in forms}


def test_the_same_messages_in_every_form_give_the_same_examples(tmp_path):
    odd = (
        '"Well," he said',
        "it's 5,00; or ,",
        '""',
        " led and trailed ",
        "£ é 漢 🙂",
        "NA",
        "\u2028",
    )
    rows = [(("ham", "spam", "so, so")[i % 3], f"{odd[i % 7]} {i}") for i in range(300)]
    frames = in_every_form(tmp_path, rows)
    assert list(frames.pop("tsv").itertuples(index=False, name=None)) == rows
    for name, frame in frames.items():
        assert list(frame.itertuples(index=False, name=None)) == rows, name


def test_the_sms_collection_in_every_form_gives_the_same_5574_examples(tmp_path, mirror):
    frame = messages_of(mirror / "SMSSpamCollection")
    frames = in_every_form(tmp_path, list(frame.itertuples(index=False, name=None)))
    assert len(frame) == 5574
    for name, other in frames.items():
        pd.testing.assert_frame_equal(other, frame, obj=name)


def messages_of(path):
    file = RawFile(name="a", file="a", kind="messages", format="tsv", bytes=0, sha256="")
    return messages_in(path, file)


def test_labels_that_look_alike_are_one_class(tmp_path):
    labels = ["ham ", "\u00a0ham", "ham\u200b", "\ufeffham", "caf\u00e9", "cafe\u0301"]
    (tmp_path / "a").write_text("".join(f"{label}\ta\n" for label in labels), encoding="utf-8")
    assert messages_of(tmp_path / "a")["label"].tolist() == ["ham"] * 4 + ["caf\u00e9"] * 2
    raw(tmp_path, as_csv([(label, "a") for label in labels]), "csv", **FIELDS)
    assert set(read_messages(tmp_path)["label"]) == {"ham", "caf\u00e9"}


def test_a_label_of_which_nothing_is_seen_is_none(tmp_path):
    (tmp_path / "a").write_text("ham\ta\n\u200b\tb\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: the field 'label' is not a label"):
        messages_of(tmp_path / "a")


def test_more_classes_than_a_classifier_takes_end_in_one_line(tmp_path):
    raw(tmp_path, "".join(f"{i}\ttext\n" for i in range(MOST_CLASSES + 1)), "tsv")
    with pytest.raises(InputError, match=r"1,001 messages have 1,001 classes .* mixed up") as error:
        read_messages(tmp_path)
    assert "\n" not in str(error.value)


def test_a_text_with_line_ends_in_it_is_one_message_of_a_csv(tmp_path):
    rows = [("a", "one\ntwo\r\nthree"), ("b", "four")]
    raw(tmp_path, as_csv(rows), "csv", **FIELDS)
    assert list(read_messages(tmp_path).itertuples(index=False, name=None)) == rows


def test_labels_may_be_whole_numbers_or_truths(tmp_path):
    lines = '{"label": 1, "text": "a"}\n{"label": true, "text": "b"}\n{"label": "1", "text": "c"}\n'
    raw(tmp_path, lines, "jsonl", kind="messages")
    assert read_messages(tmp_path)["label"].tolist() == ["1", "true", "1"]


def test_the_same_documents_in_every_form_are_the_same(tmp_path):
    texts = [f"Document {i}.\n\nOf “two” paragraphs, é.\n" for i in range(300)]
    lines = "".join(json.dumps({"body": text, "id": 1}) + "\n" for text in texts).encode()
    field = {"text_field": "body"}
    table = as_parquet(id=range(300), body=texts)
    raw(tmp_path, table, "parquet", "p", kind="documents", **field)
    raw(tmp_path, lines, "jsonl", "j", **field)
    raw(tmp_path, gzip.compress(lines), "jsonl", "g", end="gz", **field)
    raw(tmp_path, zstandard.compress(lines), "jsonl", "z", end="zst", **field)
    file = io.StringIO()
    csv.writer(file).writerows([("body", "id"), *((text, 1) for text in texts)])
    raw(tmp_path, file.getvalue(), "csv", "c", kind="documents", **field)
    plain = "<|>".join(texts).encode()
    raw(tmp_path, gzip.compress(plain), "text", "t", end="txt.gz", separator="<|>")
    read = list(read_documents(tmp_path))
    for name in "pjgzc":
        assert [text for source, text in read if source == name] == texts, name
    assert [text for source, text in read if source == "t"] == [text.strip() for text in texts]


def test_a_document_that_is_too_long_comes_in_parts_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.text.formats.LONGEST_DOCUMENT", 100)
    monkeypatch.setattr("gpt.text.formats._BLOCK", 16)
    long = " ".join(f"word{i}" for i in range(100))
    raw(tmp_path, f"One.=={long}==Two.", "text", "t", separator="==")
    raw(
        tmp_path,
        "".join(json.dumps({"text": t}) + "\n" for t in ("One.", long, "Two.")),
        "jsonl",
        "j",
    )
    raw(tmp_path, as_parquet(text=["One.", long, "Two."]), "parquet", "p")
    raw(tmp_path, long, "text", "w")
    by_file = {
        file.name: list(documents_in(tmp_path / file.file, file)) for file in read_sources(tmp_path)
    }
    assert by_file["t"] == by_file["j"] == by_file["p"] == ["One.", *by_file["w"], "Two."]
    parts = by_file["w"]
    assert "".join(parts) == long
    assert all(90 < len(part) <= 100 for part in parts[:-1])
    assert all(part.startswith(" word") for part in parts[1:])


def test_kinds_are_read_from_their_own_formats(tmp_path):
    raw(tmp_path, "ham\tone\n", "tsv", kind="documents")
    with pytest.raises(
        InputError, match=r"documents cannot be read from the format 'tsv'; use one of"
    ):
        documents(tmp_path)


# --- conversations --------------------------------------------------------------------------------


def chat(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))]


CHATS = [
    {"messages": chat("Hi.", "Hello!"), "id": 7},
    chat("Count.", "One.", "On.", "Two.", "On!", "Three.", system="Be brief."),
    RECORDS[1],
]
READ = [
    Instruction("Hi.", "", "Hello!"),
    Instruction(
        "On!", "", "Three.", (Turn("Count.", "One."), Turn("On.", "Two.")), system="Be brief."
    ),
    Instruction("Do 1.", "x", "ok"),
]


def test_a_record_may_be_a_conversation_in_every_form(tmp_path):
    raw(tmp_path / "json", json.dumps(CHATS), "json")
    lines = "".join(json.dumps(record) + "\n" for record in CHATS)
    raw(tmp_path / "jsonl", lines, "jsonl", kind="instructions")
    raw(tmp_path / "gz", gzip.compress(lines.encode()), "jsonl", kind="instructions", end="gz")
    for name in ("json", "jsonl", "gz"):
        assert read_instructions(tmp_path / name) == READ, name
    table = as_parquet(id=[1, 2], messages=[CHATS[0]["messages"], CHATS[1]])
    raw(tmp_path / "parquet", table, "parquet", kind="instructions")
    assert read_instructions(tmp_path / "parquet") == READ[:2]


def test_a_conversation_as_a_document_is_all_that_was_said(tmp_path):
    raw(tmp_path, json.dumps(CHATS[1:2]), "json")
    assert documents(tmp_path) == ["Be brief.\nCount.\nOne.\nOn.\nTwo.\nOn!\nThree."]


def test_conversations_that_ask_the_same_fall_into_one_part():
    """Whatever was answered; and a conversation is told from its last turn alone."""
    records = [
        Instruction("On.", "", f"{answer}", (Turn(f"Count {i}.", f"{answer}"),))
        for i in range(40)
        for answer in range(2)
    ]
    assert len({record.task for record in records}) == 40
    parts = split_instructions(records, Split(train=0.5, validation=0.25))
    for part in parts.values():
        assert len(part) == 2 * len({record.task for record in part})
    assert Instruction("On.", "", "a").task == "On.\n"  # as a single turn always was


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no list of messages"),
        ("Hi.", "no list of messages"),
        ([1], "message 1: .*Input should be a valid dictionary"),
        ([{"role": "user"}], "message 1: content: Field required"),
        ([{"role": "user", "content": ["Hi."]}], "message 1: content: Input should be"),
        ([{"content": "Hi."}], "message 1: role: Field required"),
        (
            [{"role": "user", "content": "\ud800"}],
            "message 1: content: .*string, unable",
        ),
        (chat("Hi.", "Hello!", " ", "Eh?"), "message 3: its content is empty"),
        (chat("Hi.", "Hello!", "More."), "message 3: the last one, and not the assistant's"),
        (chat(system="Be brief."), "message 1: the last one, and not the assistant's"),
        (chat("Hi.", "Hello!")[::-1], "message 1: from 'assistant', where 'user' has its turn"),
        (chat("Hi.") + chat("Hi.", "a"), "message 2: from 'user', where 'assistant' has its"),
        (
            [*chat("Hi.", "Hello!"), *chat("More.", "No.", system="b")],
            "message 3: from 'system', where 'user' has its turn",
        ),
        (
            [{"role": "human", "content": "Hi."}, *chat("a", "b")[1:]],
            "message 1: from 'human', where 'user' has its turn",
        ),
    ],
)
def test_a_conversation_out_of_order_names_record_and_message(tmp_path, messages, complaint):
    records = [CHATS[0], {"messages": messages}]
    raw(tmp_path / "json", json.dumps(records), "json")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    raw(tmp_path / "jsonl", lines, "jsonl", kind="instructions")
    for name, place in (("json", "record"), ("jsonl", "line")):
        with pytest.raises(InputError, match=f"a.raw: {place} 2: {complaint}") as caught:
            read_instructions(tmp_path / name)
        assert "\n" not in str(caught.value)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "format_", "content", "complaint"),
    [
        (read_messages, "tsv", "ham\tone\nham\ttwo\n", r"1 class \('ham'\)"),
        (read_messages, "tsv", "", "0 class"),
        (read_messages, "tsv", "ham\tone\nspam two\n", "line 2: not a label"),
        (read_messages, "tsv", "ham\tone\n\ttwo\n", "line 2: the field 'label' is not a label"),
        (read_messages, "tsv", "ham\tone\nspam\ttwo\tthree\n", "line 2: not a label"),
        (read_messages, "tsv", b"ham\tone\nspam\ttw\xff\n", "line 2: byte 0xff is not UTF-8"),
        (read_instructions, "json", "[{]", "line 1: not valid JSON"),
        (read_instructions, "json", b'["\xff"]', "line 1: byte 0xff"),
        (read_instructions, "json", "[" * 100_000, "nested too deeply"),
        (read_instructions, "json", "{}", "not a JSON list"),
        (read_instructions, "json", "[1]", "record 1: not an object"),
        (
            read_instructions,
            "json",
            json.dumps([*RECORDS[:2], {"instruction": "a", "input": ""}]),
            "record 3: output: Field required",
        ),
        (
            read_instructions,
            "json",
            json.dumps([{"instruction": "a", "input": None, "output": "b"}]),
            "record 1: input: Input should be a valid string",
        ),
        (
            read_instructions,
            "json",
            json.dumps([{"instruction": " ", "input": "", "output": "b"}]),
            "record 1: instruction: .*empty; fill it in",
        ),
        (
            read_instructions,
            "json",
            json.dumps([{"instruction": "a", "input": "", "output": "\ud800"}]),
            "record 1: output: Input should be a valid string, unable to parse",
        ),
        (
            read_instructions,
            "jsonl",
            json.dumps(RECORDS[:2]),
            "line 1: a list, but of no messages.*set its source's format: json",
        ),
        (documents, "text", b"one\n\xc3(\n", "line 2: byte 0xc3 is not UTF-8"),
        (documents, "jsonl", '{"text": "a"}\n{"text"\n', "line 2: not valid JSON"),
        (documents, "jsonl", '{"text": 1}\n', "line 1: not an object with a text"),
        (documents, "jsonl", '{"text": "a"}\n[1]\n', "line 2: not an object with fields"),
        (documents, "jsonl", '{"text": "\\ud800"}\n', "line 1: not an object with a text"),
        (documents, "jsonl", '{"text": "a", "n": 1' + "0" * 5000 + "}", "line 1: not valid JSON"),
        (documents, "file", "a", "holds no documents"),
        (
            read_messages,
            "csv",
            "label,text\nham,one\nspam,\n",
            "line 3: the field 'text' is not a te",
        ),
        (
            read_messages,
            "csv",
            "class,text\nham,one\n",
            "no column 'label'; there are 'class', 'text",
        ),
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


def test_files_may_lie_in_folders_below_and_never_outside(tmp_path):
    file = RawFile(name="a", file="b/c.txt", kind="documents", format="text", bytes=1, sha256="")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.txt").write_text("One.")
    write_sources(tmp_path, [file])
    assert documents(tmp_path) == ["One."]
    (entry,) = json.loads((tmp_path / "sources.json").read_text())
    for outside in ("../c.txt", "/etc/passwd", "b/../../c.txt", "C:c.txt", "b\\c.txt", ""):
        (tmp_path / "sources.json").write_text(json.dumps([{**entry, "file": outside}]))
        with pytest.raises(InputError, match=r"sources\.json: 0\.file: .* inside (its|the) folder"):
            read_sources(tmp_path)
