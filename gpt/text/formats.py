"""Files in the forms that data sets come in, read as streams: text, JSON, CSV and parquet.

All but parquet may be compressed (gzip, zstd, bzip2, xz), which is detected from the first bytes,
not from the name. Files are untrusted: decompressed size and line length are limited, and every
defect raises an `InputError` that names the file and the place in it.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import functools
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from gpt.base.errors import InputError, first_few, in_one_line, shortened, shown
from gpt.base.files import unique_keys

LONGEST_DOCUMENT = 1 << 22
"""Characters. Longer documents are split into parts, so that no more is held in memory."""
LONGEST_LINE = 1 << 26
"""Bytes of a line that is read as one."""
LONGEST_LIST = 1 << 28
"""Bytes of a JSON list, which is held whole."""
PLACES = {"tsv": "line", "jsonl": "line", "csv": "line", "json": "record", "parquet": "row"}
"""What the numbers that come with the records of a format count."""

_BLOCK = 1 << 20
_ROWS = 64  # of a parquet file, held at once: they may be long
_SMALL = 1 << 26  # bytes that any compressed file may swell to
_SWELLING = 200  # and how many times its size beyond that
_NEAR = 1 << 16  # characters before a cut in which a word's start is looked for

# A text may be cut here: its two parts have the tokens of the whole.
_WORD_START = re.compile(r"(?<=\S) (?=\S)")


# --- bytes ----------------------------------------------------------------------------------------


def open_raw(path: Path) -> BinaryIO:
    """A file's bytes, decompressed where they are compressed.

    Raises:
        InputError: later, while reading: the file is damaged, cut short, or swells to more than
            200 times its size.
    """
    file = path.open("rb", buffering=_BLOCK)
    packing = _packing(file.read(16)) or path.suffix.lower()
    file.seek(0)
    if packing not in PACKINGS:
        return file
    return cast(BinaryIO, io.BufferedReader(_Decompressed(path, file, packing), _BLOCK))


def _packing(head: bytes) -> str | None:
    """How a file that begins so is compressed."""
    return next((end for end, (begins, _) in PACKINGS.items() if begins.match(head)), None)


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, with a limit on its size."""

    def __init__(self, path: Path, file: BinaryIO, packing: str) -> None:
        self._path = path
        self._file = file
        self._source = PACKINGS[packing][1](file)
        self._read = 0
        self._bound = max(_SMALL, _SWELLING * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise InputError(
                f"{self._path}: damaged or cut short ({error}); fetch the file again, or, if it is "
                f"not compressed, take {self._path.suffix} off its name"
            ) from None
        self._read += len(data)
        if self._read > self._bound:
            raise InputError(
                f"{self._path}: swells to more than {_SWELLING} times its size, as no text does; "
                "if it is what it should be, decompress it yourself"
            )
        buffer[: len(data)] = data
        return len(data)


def _zstd(file: BinaryIO) -> _Source:
    import pyarrow  # here: it takes long

    # not zstandard's reader, which takes a file that was cut short for a whole one
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")  # type: ignore[no-any-return]


PACKINGS: dict[str, tuple[re.Pattern[bytes], Callable[[BinaryIO], _Source]]] = {
    ".gz": (re.compile(rb"\x1f\x8b"), lambda file: gzip.GzipFile(fileobj=file)),
    ".zst": (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd),
    ".bz2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    ".xz": (re.compile(rb"\xfd7zXZ\0"), lzma.LZMAFile),
}
"""The ends of compressed files' names: what such a file begins with, and what decompresses it."""


# --- text -----------------------------------------------------------------------------------------

_HEAD = 1 << 10  # bytes that tell what a file is
_CONTROLS = bytes({*range(32)} - {*b"\t\n\f\r\x1b"})
# What begins so is no text, what it is, and what helps.
_NO_TEXT: Sequence[tuple[re.Pattern[bytes], str, str]] = (
    (re.compile(rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff"), "UTF-16 or UTF-32", "save it as UTF-8"),
    (re.compile(rb"PAR1[\0-\x1f]"), "parquet", "set its source's format: parquet"),
    (re.compile(rb"ARROW1\0\0|Obj\x01|\x89HDF|SQLite format 3\0"), "a table", "make it parquet"),
    (re.compile(rb"%PDF-|\xd0\xcf\x11\xe0"), "a document of PDF or Office", "save it as text"),
    (
        re.compile(rb"(?s)PK\x03\x04|7z\xbc\xaf|Rar!\x1a|.{257}ustar"),
        "an archive, or a document that is made like one",
        "take the texts out of it",
    ),
    (
        re.compile(rb"\x04\x22\x4d\x18|\x1f\x9d|LZIP\x01"),
        "compressed in a form that is not read",
        f"use {', '.join(PACKINGS)} or none",
    ),
)


def _open_text(path: Path) -> BinaryIO:
    """`open_raw` of a text.

    Raises:
        InputError: it begins as a text in UTF-8 does not.
    """
    file = cast(io.BufferedReader, open_raw(path))
    head = file.peek(_HEAD)[:_HEAD]
    packed = (_packing(head), "compressed twice", "decompress it once")
    found = [(begins.match(head), what, remedy) for begins, what, remedy in _NO_TEXT]
    utf16 = (_is_utf16(head), "UTF-16 without a byte order mark", "save it as UTF-8")
    for it_is, what, remedy in (packed, *found, utf16):
        if it_is:
            file.close()
            raise InputError(f"{path}: not a text in UTF-8 but {what}; {remedy}")
    return file


def _is_utf16(head: bytes) -> bool:
    """Whether every other byte looks like the high byte of a UTF-16 letter, as in no UTF-8 text."""
    least, most = sorted(
        len(half) - len(half.translate(None, _CONTROLS)) for half in (head[::2], head[1::2])
    )
    return len(head) >= 4 and 3 * most >= len(head) and 3 * least <= most


class _Decoder:
    """Decodes bytes block by block, and reports the line of bytes that are not UTF-8."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A byte order mark at the start of a file is no text.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._line = 1

    def decode(self, block: bytes, last: bool) -> str:
        """The text of the next block, without a character that continues in the block after it."""
        try:
            text = self._decoder.decode(block, last)
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, self._line, error) from None
        self._line += block.count(b"\n")
        return text


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> InputError:
    """`line` is the first of what was decoded."""
    line += error.object[: error.start].count(b"\n")
    byte = error.object[error.start]
    return InputError(
        f"{path}: line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
    )


def lines_in(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers and their ends as they are (only U+000A ends a line).

    Raises:
        InputError: a line is too long or not UTF-8.
    """
    with _open_text(path) as file:
        lines = iter(functools.partial(file.readline, LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > LONGEST_LINE:
                raise InputError(
                    f"{path}: line {number}: longer than {LONGEST_LINE >> 20} MiB; break it up"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from None
            yield number, text


def texts_in(path: Path, separator: str | None) -> Iterator[str]:
    """The documents of a plain text; one that is too long comes in parts (`parts_of`).

    Args:
        path: the file.
        separator: what stands between the documents, which lose the line ends at their edges; a
            line end in it is any (`\\n` or `\\r\\n`). Without it the file is one document as it
            stands.

    Raises:
        InputError: a line is not UTF-8.
    """
    edges = "\r\n" if separator else ""
    lines = re.split("\r?\n", separator or "")
    between = re.compile("\r?\n".join(map(re.escape, lines)))
    # The end of a text longer than this may be the beginning of a separator.
    longest = LONGEST_DOCUMENT + len("\r\n".join(lines))
    decoder = _Decoder(path)
    rest = ""  # of the last document: its end is not read yet
    begun = False  # a part of it was yielded already
    with _open_text(path) as file:
        ended = False
        while not ended:
            # As much again as is held, so that a long document is not searched once a block.
            block = file.read(max(_BLOCK, len(rest)))
            ended = not block
            text = rest + decoder.decode(block, ended)
            *whole, rest = between.split(text) if separator else [text]
            for document in whole:
                yield from parts_of(document.rstrip(edges) if begun else document.strip(edges))
                begun = False
            if len(rest) > longest and not begun:
                rest = rest.lstrip(edges)
            while len(rest) > longest:
                cut = _cut(rest)
                yield rest[:cut]
                rest, begun = rest[cut:], True
    yield from parts_of(rest.rstrip(edges) if begun else rest.strip(edges))


def parts_of(text: str) -> Iterator[str]:
    """A document in parts of at most `LONGEST_DOCUMENT` characters, cut before words if it can be.

    The parts of a text cut before words have the tokens of the whole.
    """
    while len(text) > LONGEST_DOCUMENT:
        cut = _cut(text)
        yield text[:cut]
        text = text[cut:]
    yield text


def _cut(text: str) -> int:
    """Where the first part of a longer text ends."""
    start = max(LONGEST_DOCUMENT - _NEAR, 1)
    places = _WORD_START.finditer(text, start, LONGEST_DOCUMENT + 1)
    return max((place.start() for place in places), default=LONGEST_DOCUMENT)


# --- records --------------------------------------------------------------------------------------


def objects_in(path: Path, format: str, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """The values of `jsonl` or of a list in `json`, or the rows of `parquet`, with their numbers.

    Args:
        path: the file.
        format: one of these.
        columns: all that is read of `parquet`; those that it lacks are left out.

    Raises:
        InputError: the file is not what its format says, or has none of the columns.
    """
    if format == "parquet":
        return _parquet_rows(path, columns, all_of_them=False)
    return _json_lines(path) if format == "jsonl" else _json_list(path)


def fields_in(path: Path, format: str, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
    """The named fields of the records in `jsonl`, `json`, `csv` or `parquet`, with their numbers.

    A field that a JSON object lacks is None.

    Raises:
        InputError: the file is not what its format says, or lacks a column.
    """
    if format == "csv":
        yield from _csv_rows(path, names)
        return
    place = PLACES[format]
    rows = _parquet_rows(path, names) if format == "parquet" else objects_in(path, format, names)
    for number, record in rows:
        if not isinstance(record, dict):
            a_list = isinstance(record, list) and format == "jsonl"
            raise InputError(
                f"{path}: {place} {number}: not an object with fields; correct or remove the "
                f"{place}" + _ONE_LIST * a_list
            )
        yield number, [record.get(name) for name in names]


_ONE_LIST = "; if the file is one list, write an object a line, as `jq -c .[]` does"


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in lines_in(path):
        if line.isspace():
            continue
        try:
            value = _JSON.decode(line)
        except (ValueError, RecursionError) as error:
            opens_list = number == 1 and line.strip() == "["
            raise InputError(
                f"{path}: line {number}: not valid JSON ({_fault(error)}); correct or remove the "
                "line" + _ONE_LIST * opens_list
            ) from None
        yield number, value


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    content = bytearray()
    with _open_text(path) as file:
        # block by block: a read of so many bytes takes the memory for all of them at once
        while len(content) <= LONGEST_LIST and (block := file.read(_BLOCK)):
            content += block
    if len(content) > LONGEST_LIST:
        raise InputError(
            f"{path}: longer than {LONGEST_LIST >> 20} MiB, too long for one list; write a record "
            "a line (jsonl)"
        )
    text = _Decoder(path).decode(bytes(content), True)
    if not text.lstrip().startswith("["):
        raise InputError(
            f"{path}: not a JSON list; put the records between [ and ], or, if it has a record a "
            "line, set its source's format: jsonl"
        )
    try:
        yield from enumerate(_JSON.decode(text), start=1)
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}: {line}not valid JSON ({_fault(error)}); correct it") from None


_JSON = json.JSONDecoder(object_pairs_hook=unique_keys)


def _fault(error: Exception) -> str:
    """What is wrong with JSON, in a few words."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return str(error).partition(";")[0]  # a number's many digits, and Python's way to allow them


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    # One limit for the process, and a short one; a line's own bounds a field without line ends.
    csv.field_size_limit(max(LONGEST_LINE, csv.field_size_limit()))
    reader = csv.reader((line for _, line in lines_in(path)), strict=True)
    width, places = 0, []
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise InputError(
                f"{path}: line {number}: not valid CSV ({error}); correct the row that begins there"
            ) from None
        if not row:
            continue
        if not width:
            width, places = len(row), _places_of(path, row, columns)
        elif len(row) != width:
            raise InputError(
                f"{path}: line {number}: {len(row)} fields where the header has {width}; correct "
                "the row, or quote the field that has a comma or a line end in it"
            )
        else:
            yield number, [row[place] for place in places]
    if not width:
        raise InputError(f"{path}: empty; the first line names the columns")


def _places_of(path: Path, there: Sequence[str], columns: Sequence[str]) -> list[int]:
    for column in columns:
        if column not in there:
            marks = [mark for mark in "\t;|" if mark in there[0]] if len(there) == 1 else []
            raise InputError(
                f"{path}: no column {column!r}; there are {first_few(list(map(shown, there)), 20)}"
                + "".join(f"; commas separate fields, not {mark!r}" for mark in marks[:1])
            )
        if there.count(column) > 1:
            raise InputError(
                f"{path}: {there.count(column)} columns are called {column!r}; rename or remove "
                f"all but one ({first_few(list(map(shown, there)), 20)})"
            )
    return [there.index(column) for column in columns]


def _parquet_rows(
    path: Path, columns: Sequence[str], *, all_of_them: bool = True
) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import parquet  # here: only parquet needs it, and it takes long

    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK) as table:
            there = table.schema_arrow.names
            found = [name for name in columns if name in there]
            names = columns if all_of_them else found or columns
            _places_of(path, there, names)
            about = table.metadata
            size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if size > max(_SMALL, _SWELLING * path.stat().st_size):
                raise InputError(
                    f"{path}: swells to more than {_SWELLING} times its size, as no text does; "
                    "if it is what it should be, write it again without compression"
                )
            for batch in table.iter_batches(_ROWS, columns=list(names), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except InputError:
        raise
    except Exception as error:  # a damaged page can bring out any of pyarrow's and of Python's
        with path.open("rb") as file:
            packed = _packing(file.read(16))
        remedy = "decompress it" if packed else "fetch it again, or set its source's format"
        raise InputError(
            f"{path}: not a parquet file, or damaged behind row {number} "
            f"({shortened(in_one_line(error), 200)}); " + remedy
        ) from None
