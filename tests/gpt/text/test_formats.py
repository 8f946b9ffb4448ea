"""What comes out of files of all forms, and what becomes of bad ones."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import re
import tracemalloc

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from gpt.base.errors import InputError
from gpt.text import formats
from gpt.text.formats import fields_in, lines_in, objects_in, open_raw, parts_of, texts_in
from gpt.tokens.tokenizer import train_bpe


@pytest.fixture
def small(monkeypatch):
    """Files are read a few bytes at a time."""
    monkeypatch.setattr(formats, "_BLOCK", 5)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(path, **columns):
    parquet.write_table(pa.table(columns), path)
    return path


COMPRESS = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize("content", [b"", b"one\n", bytes(range(256)) * 3000])
def test_a_compressed_file_holds_what_was_put_in(tmp_path, end, content):
    path = write(tmp_path / f"a.txt.{end}", COMPRESS[end](content))
    with open_raw(path) as file:
        assert file.read() == content


@pytest.mark.parametrize("end", COMPRESS)
def test_a_compressed_file_is_read_whatever_it_is_called(tmp_path, end):
    for name in (f"A.TXT.{end.upper()}", "a.txt", "a.gz"):
        path = write(tmp_path / name, COMPRESS[end](b"one\n"))
        assert list(texts_in(path, None)) == ["one\n"]


@pytest.mark.parametrize("end", COMPRESS)
def test_compressed_files_that_were_joined_are_read_to_the_end(tmp_path, end):
    content = COMPRESS[end](b"one\n") + COMPRESS[end](b"two\n" * 1000)
    path = write(tmp_path / f"a.{end}", content)
    assert [line for _, line in lines_in(path)] == ["one\n", *["two\n"] * 1000]


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize("damage", ["a byte short", "half", "another file", "a bit"])
def test_a_damaged_compressed_file_is_refused(tmp_path, end, damage):
    content = bytes(i * i % 251 for i in range(100_000))
    options = {"level": 3} if end == "zst" else {}
    if end == "zst":  # as the command writes it
        whole = zstandard.ZstdCompressor(write_checksum=True, **options).compress(content)
    else:
        whole = gzip.compress(content)
    middle = len(whole) // 2
    damaged = {
        "a byte short": whole[:-1],
        "half": whole[:middle],
        "another file": content,
        "a bit": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :],
    }[damage]
    path = write(tmp_path / f"a.{end}", damaged)
    with pytest.raises(InputError, match=rf"a\.{end}: damaged or cut short .*fetch") as caught:
        list(texts_in(path, None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", COMPRESS)
def test_a_file_that_swells_beyond_all_text_is_refused_early(tmp_path, monkeypatch, end):
    monkeypatch.setattr(formats, "_SMALL", 1 << 18)
    path = write(tmp_path / f"a.{end}", COMPRESS[end](b"0" * (1 << 24)))
    with open_raw(path) as file:
        with pytest.raises(InputError, match="swells to more than 200 times its size"):
            file.read()
        assert file.raw._read < 1 << 22
    monkeypatch.setattr(formats, "_SMALL", 1 << 24)  # a small file may hold what it likes
    with open_raw(path) as file:
        assert len(file.read()) == 1 << 24


def test_a_line_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 1 << 20)
    path = write(tmp_path / "a", b"1\n" + b"x" * ((1 << 20) - 1) + b"\n" + b"x" * (1 << 21))
    lines = lines_in(path)
    assert [len(next(lines)[1]) for _ in range(2)] == [2, 1 << 20]
    with pytest.raises(InputError, match="line 3: longer than 1 MiB; break it up"):
        next(lines)


# --- text -----------------------------------------------------------------------------------------


@given(
    st.text("ab=\n\ré漢", max_size=60),
    st.sampled_from([None, "==", "\n", "\n\n\n", "=\n", "aa", "é"]),
    st.integers(2, 9),
)
def test_a_text_comes_out_alike_however_it_is_read(tmp_path_factory, content, separator, block):
    path = write(tmp_path_factory.mktemp("text") / "a", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_BLOCK", block)
        texts = list(texts_in(path, separator))
    if separator is None:
        assert "".join(texts) == content
    else:
        either = re.escape(separator).replace("\\\n", "\r?\n")
        assert texts == [text.strip("\r\n") for text in re.split(either, content)]


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "\r\n\r\n", "\n==\n"])
def test_a_separator_is_found_whichever_line_ends_a_file_has(tmp_path, separator):
    content = f"\ufeffone\nmore{separator}two"
    content = content.replace("\r\n", "\n")
    for name, ends in (("lf", content), ("crlf", content.replace("\n", "\r\n"))):
        texts = list(texts_in(write(tmp_path / name, ends), separator))
        assert [text.replace("\r\n", "\n") for text in texts] == ["one\nmore", "two"]


def test_the_line_of_a_byte_that_is_not_utf8_is_named(tmp_path, small):
    for where in range(4):
        lines = ["aaaa\n" * 3, "é\n", "bb\n", "c"]
        content = "".join(lines[: where + 1]).encode()[:-1] + b"\xc3"
        path = write(tmp_path / "a", content + b"\n" + b"more\n" * where)
        line = content.count(b"\n") + 1
        with pytest.raises(InputError, match=f"a: line {line}: byte 0xc3 is not UTF-8"):
            list(texts_in(path, "=="))
    with pytest.raises(InputError, match="a: line 2: byte 0xe6 is not UTF-8"):
        list(texts_in(write(tmp_path / "a", b"one\n" + "漢".encode()[:2]), None))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("Grüße".encode("utf-16"), "UTF-16 or UTF-32; save it as UTF-8"),
        ("hello, world".encode("utf-16-le"), "UTF-16 without a byte order mark; save it as UTF-8"),
        ("hello, world".encode("utf-16-be"), "UTF-16 without"),
        ("Прощай, мир".encode("utf-16-le"), "UTF-16 without"),
        (b"PK\x03\x04\x14\0\x06\0", "an archive, or a document that is made like one; take"),
        (b"a.txt" + b"\0" * 252 + b"ustar\0", "an archive"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a document of PDF or Office; save it as text"),
        (b"PAR1\x15\x04", "parquet; set its source's format: parquet"),
        (b"\x04\x22\x4d\x18\x64\x40", "compressed in a form that is not read; use .gz, .zst"),
        (
            gzip.compress(gzip.compress(b"text", mtime=0), mtime=0),
            "compressed twice; decompress it once",
        ),
    ],
)
def test_what_is_no_text_in_utf8_is_named(tmp_path, content, complaint):
    path = write(tmp_path / "a", content)
    for read in (lambda: texts_in(path, None), lambda: fields_in(path, "csv", ["text"])):
        with pytest.raises(InputError, match=rf"a: not a text in UTF-8 but {complaint}"):
            list(read())


def test_the_parts_of_a_document_have_its_tokens(tmp_path, monkeypatch, small):
    monkeypatch.setattr(formats, "LONGEST_DOCUMENT", 40)
    text = "It's a long, long story of 12 words  or more;\n\n so they say: don't they? " * 9
    parts = list(parts_of(text))
    assert "".join(parts) == text
    assert all(20 < len(part) <= 40 for part in parts[:-1])
    tokenizer = train_bpe([text], 300)
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)
    assert list(texts_in(write(tmp_path / "a", text), None)) == parts
    assert list(texts_in(write(tmp_path / "a", text), "==")) == list(parts_of(text.strip("\r\n")))


@given(st.text("ab= ", max_size=60), st.sampled_from(["=", "===", "=ab="]), st.integers(2, 9))
def test_long_documents_are_cut_in_the_same_places_however_they_are_read(
    tmp_path_factory, content, separator, block
):
    path = write(tmp_path_factory.mktemp("text") / "a", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_BLOCK", block)
        patch.setattr(formats, "LONGEST_DOCUMENT", 7)
        expected = [part for text in content.split(separator) for part in parts_of(text)]
        assert list(texts_in(path, separator)) == expected
        assert max(map(len, expected)) <= 7


def test_a_document_without_a_word_to_cut_at_is_cut_anyway(monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_DOCUMENT", 4)
    assert list(parts_of("x" * 10)) == ["xxxx", "xxxx", "xx"]
    assert list(parts_of("x  x  x")) == ["x  x", "  x"]
    assert list(parts_of("xxxx")) == ["xxxx"]


@pytest.mark.parametrize("separator", [None, "\n\n\n"])
def test_a_long_text_is_never_held_whole(tmp_path, monkeypatch, separator):
    monkeypatch.setattr(formats, "LONGEST_DOCUMENT", 1 << 15)
    monkeypatch.setattr(formats, "_BLOCK", 1 << 12)
    path = write(tmp_path / "a", b"some words " * 300_000)
    tracemalloc.start()
    n = sum(len(text) for text in texts_in(path, separator))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 3_300_000
    assert peak < 500_000


# --- records --------------------------------------------------------------------------------------


def test_fields_are_read_from_json_lines_csv_and_parquet(tmp_path):
    rows = [("1", 'a "b", c'), ("2", "d\ne")]
    lines = "".join(json.dumps({"n": n, "t": t, "more": [1]}) + "\n\n" for n, t in rows)
    paths = {
        "jsonl": write(tmp_path / "a.jsonl", lines),
        "csv": write(tmp_path / "a.csv", '\ufefft,more,n\r\n"a ""b"", c",,1\r\n\n"d\ne",x,2'),
        "parquet": table(tmp_path / "a.parquet", n=["1", "2"], more=[1, 2], t=[t for _, t in rows]),
    }
    read = {name: list(fields_in(path, name, ["n", "t"])) for name, path in paths.items()}
    assert {
        name: [tuple(row) for _, row in found] for name, found in read.items()
    } == dict.fromkeys(paths, rows)
    assert [number for number, _ in read["jsonl"]] == [1, 3]
    assert [number for number, _ in read["csv"]] == [2, 4]
    assert [number for number, _ in read["parquet"]] == [1, 2]


def test_only_the_columns_that_are_asked_for_are_read_of_a_parquet_file(tmp_path):
    """The pages of another one are destroyed, and nobody notices."""
    path = tmp_path / "a.parquet"
    data = pa.table({"text": ["a", "b"], "other": ["x" * 50, "y" * 50]})
    parquet.write_table(data, path, compression="none", use_dictionary=False)
    content = path.read_bytes()
    start = content.index(b"x" * 50) - 30
    write(path, content[:start] + b"\xff" * 30 + content[start + 30 :])
    assert [row for _, (row,) in fields_in(path, "parquet", ["text"])] == ["a", "b"]
    with pytest.raises(InputError, match=r"a\.parquet: not a parquet file, or damaged"):
        list(fields_in(path, "parquet", ["other"]))


def test_a_field_of_csv_may_be_long(tmp_path):
    path = write(tmp_path / "a.csv", "text\n" + "x" * 1_000_000 + "\n")
    ((_, (text,)),) = fields_in(path, "csv", ["text"])
    assert len(text) == 1_000_000


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "empty; the first line names the columns"),
        ("a,b\n1,2\n", "no column 'text'; there are 'a', 'b'"),
        ("text;b\n1;2\n", "no column 'text'; there are 'text;b'; commas separate fields, not ';'"),
        ("b,text,text\n1,2,3\n", "2 columns are called 'text'; rename or remove all but one"),
        ("text,b\n1,2\n1\n", "line 3: 1 fields where the header has 2"),
        ("text,b\n1,2\n\n1,2,3\n", "line 4: 3 fields where the header has 2"),
        ('text,b\n"x\ny",2\n"1"2,3\n', "line 4: not valid CSV .*correct the row that begins there"),
        ('text,b\n1,2\n"3,4\n5,6\n', "line 3: not valid CSV"),
        (b"text,b\n1,\xff\n", "line 2: byte 0xff is not UTF-8"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path, content, complaint):
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(InputError, match=rf"a\.csv: {complaint}") as caught:
        list(fields_in(path, "csv", ["text"]))
    assert "\n" not in str(caught.value)


def test_bad_parquet_is_refused(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", body=["a"] * 100_000, id=range(100_000))
    for read in (lambda: fields_in(path, "parquet", ["text"]), lambda: _objects(path, "text")):
        with pytest.raises(InputError, match="no column 'text'; there are 'body', 'id'"):
            list(read())
    monkeypatch.setattr(formats, "_SMALL", 1 << 10)
    monkeypatch.setattr(formats, "_SWELLING", 1)
    with pytest.raises(InputError, match="swells to more than 1 times its size"):
        list(fields_in(table(path, text=[" " * 100_000]), "parquet", ["text"]))
    monkeypatch.undo()
    for content in (b"", b"PAR1", path.read_bytes()[:-9], b"\0" + path.read_bytes()[:-1]):
        write(path, content)
        for read in (lambda: fields_in(path, "parquet", ["body"]), lambda: _objects(path, "body")):
            with pytest.raises(InputError, match=r"a\.parquet: not a parquet file, or") as caught:
                list(read())
            assert "\n" not in str(caught.value)


def test_a_value_of_parquet_that_python_does_not_know_is_refused(tmp_path):
    """Whichever exception it brings out: of Arrow, of dates or of text."""
    offsets = pa.py_buffer(b"\0\0\0\0\x02\0\0\0\x04\0\0\0")
    columns = {
        "date": pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32()),
        "stamp": pa.array([0, 2**62], pa.int64()).cast(pa.timestamp("ms")),
        "zone": pa.array([0, 1], pa.timestamp("s", "No/Where")),
        "text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")]),
    }
    path = table(tmp_path / "a.parquet", **columns)
    for name in columns:
        with pytest.raises(InputError, match=r"damaged behind row 0 \("):
            list(fields_in(path, "parquet", [name]))
    dated = table(tmp_path / "b.parquet", text=["a"], day=[datetime.date(2024, 2, 29)])
    assert list(fields_in(dated, "parquet", ["text"])) == [(1, ["a"])]


def test_columns_of_parquet_that_have_one_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "text", "b"])
    parquet.write_table(twice, path)
    with pytest.raises(InputError, match=r"a\.parquet: 2 columns are called 'text'"):
        list(fields_in(path, "parquet", ["text"]))
    assert list(fields_in(path, "parquet", ["b"])) == [(1, ["a"])]


def _objects(path, column):
    return objects_in(path, "parquet", [column])


def test_a_parquet_file_is_never_held_whole(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"{i} " * 2000 for i in range(3000)]
    pages = {"write_batch_size": 16, "data_page_size": 1 << 16}  # one has whole batches
    parquet.write_table(pa.table({"text": rows}), path, use_dictionary=False, **pages)
    held = pa.total_allocated_bytes()
    most = 0
    for (_, (text,)), row in zip(fields_in(path, "parquet", ["text"]), rows, strict=True):
        assert text == row
        most = max(most, pa.total_allocated_bytes() - held)
    assert most < sum(map(len, rows)) / 5


def test_objects_are_a_list_or_lines_of_json(tmp_path):
    path = write(tmp_path / "a.json.gz", gzip.compress(b'\xef\xbb\xbf[{"a": 1},\n [2]]'))
    assert list(objects_in(path, "json", [])) == [(1, {"a": 1}), (2, [2])]
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n[2]')
    assert list(objects_in(path, "jsonl", [])) == [(1, {"a": 1}), (3, [2])]


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        ('{"b": {"a": 1, "a": 1}}', "the key 'a' is given twice"),
        ("7" * 5000, "Exceeds the limit .* value has 5000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ', "Expecting value"),
        ("1 2", "Ex"),
        ("", "Expecting value"),
    ],
)
def test_bad_json_is_refused_with_its_place(tmp_path, bad, fault):
    lines = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n\n{bad or "x"}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl: line 3: not valid JSON \({fault}") as caught:
        list(objects_in(lines, "jsonl", []))
    assert len(str(caught.value)) < 300
    of_list = write(tmp_path / "a.json", f'[{{"a": 1}},\n\n{bad}]\n')
    with pytest.raises(InputError, match=rf"a\.json: (line 3: )?not valid JSON \({fault}"):
        list(objects_in(of_list, "json", []))


@pytest.mark.parametrize("content", ["[]", " [ ] ", "[1]", '[{"a": [1, {}]},\r\n\t"]" , null]\n'])
def test_a_list_is_read_as_json_has_it(tmp_path, content):
    path = write(tmp_path / "a.json", content)
    assert [value for _, value in objects_in(path, "json", [])] == json.loads(content)
    for more in ("]", ",", "[]"):
        with pytest.raises(InputError, match="not valid JSON"):
            list(objects_in(write(path, content + more), "json", []))


def test_a_file_of_another_form_than_its_name_tells_says_which_format_to_set(tmp_path):
    lines = write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n')
    with pytest.raises(InputError, match=r"not a JSON list; .*format: jsonl"):
        list(objects_in(lines, "json", []))
    for content in ("[\n1]", '[{"text": "a"}]'):
        path = write(tmp_path / "a.jsonl", content)
        with pytest.raises(InputError, match=r"line 1: .*if the file is one list.*jq -c"):
            list(fields_in(path, "jsonl", ["text"]))
    plain = write(tmp_path / "a.txt.gz", "plain")
    with pytest.raises(InputError, match=r"not compressed, take \.gz off its name"):
        list(texts_in(plain, None))


def test_a_list_that_is_too_long_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LIST", 1 << 20)
    path = write(tmp_path / "a.json", "[" + "1," * (1 << 20) + "1]")
    with pytest.raises(InputError, match=r"longer than 1 MiB, .* a record a line"):
        list(objects_in(path, "json", []))


def test_a_generator_that_is_left_early_closes_its_file(tmp_path):
    path = write(tmp_path / "a.gz", gzip.compress(b"1\n2\n"))
    lines = lines_in(path)
    next(lines)
    lines.close()
    file = open_raw(path)
    raw = file.raw
    assert isinstance(file, io.BufferedReader)
    file.close()
    assert raw._file.closed
