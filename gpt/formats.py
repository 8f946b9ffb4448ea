"""Files in the forms that data sets come in, read as streams: text, JSON, CSV and parquet.

All but parquet may be compressed, which the end of a file's name says: `.gz` or `.zst`. Files come
from outside: what a compressed one swells to and how long a line may be are bounded, and whatever
is wrong with one ends in an `InputError` that names the file and the place in it.
"""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from gpt.errors import InputError

LONGEST_DOCUMENT = 1 << 24
"""Characters. A longer document comes in parts, so that no more than that is held."""
LONGEST_LINE = 1 << 26
"""Bytes of a line that is read as one."""
PLACES = {"tsv": "line", "jsonl": "line", "csv": "line", "json": "record", "parquet": "row"}
"""What the numbers that come with the records of a format count."""

_BLOCK = 1 << 20
_ROWS = 64  # of a parquet file, held at once: they may be long
_COMPRESSED = 1 << 10  # bytes of zstd taken at once: they swell to some 32 MiB at the very most
_SMALL = 1 << 26  # bytes that any compressed file may swell to
_SWELLING = 200  # and how many times its size beyond that
_NEAR = 1 << 16  # characters before a cut in which a word's start is looked for

# A text may be cut here: its two parts have the tokens of the whole.
_WORD_START = re.compile(r"(?<=\S) (?=\S)")


# --- bytes ----------------------------------------------------------------------------------------


def open_raw(path: Path) -> BinaryIO:
    """A file's bytes, decompressed where its name ends in `.gz` or `.zst`.

    Raises:
        InputError: later, while reading: the file is damaged, cut short, or swells to more than
            200 times its size.
    """
    if path.suffix not in (".gz", ".zst"):
        return path.open("rb", buffering=_BLOCK)
    return cast(BinaryIO, io.BufferedReader(_Decompressed(path), _BLOCK))


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Decompressed(io.RawIOBase):
    """What a compressed file holds, with an end to how much that may be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        zipped = path.suffix == ".gz"
        self._source: _Source = gzip.GzipFile(fileobj=self._file) if zipped else _Zstd(self._file)
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
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            raise InputError(
                f"{self._path}: damaged or cut short ({error}); fetch the file again"
            ) from None
        self._read += len(data)
        if self._read > self._bound:
            raise InputError(
                f"{self._path}: swells to more than {_SWELLING} times its size, as no text does; "
                "if it is what it should be, decompress it yourself"
            )
        buffer[: len(data)] = data
        return len(data)


class _Zstd:
    """The frames of a zstd file, one behind the other.

    Not zstandard's own reader: it takes a file that was cut short for a whole one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._left = b""
        self._ready = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        while not self._ready:
            data = self._left or self._file.read(_COMPRESSED)
            self._left = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return b""
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        data, self._ready = bytes(self._ready[:size]), self._ready[size:]
        return data


# --- text -----------------------------------------------------------------------------------------


class _Decoder:
    """Bytes to text, block by block, that knows the line of what is not UTF-8."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A byte order mark at the start of a file is no text.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._line = 1

    def decode(self, block: bytes) -> str:
        """The text of the next block, but for a character that goes on in the one behind it.

        An empty block is the end.
        """
        try:
            text = self._decoder.decode(block, not block)
        except UnicodeDecodeError as error:
            line = self._line + error.object[: error.start].count(b"\n")
            raise _not_utf8(self._path, line, error) from None
        self._line += block.count(b"\n")
        return text


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> InputError:
    byte = error.object[error.start]
    return InputError(
        f"{path}: line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
    )


def _whole_text(path: Path) -> str:
    decoder = _Decoder(path)
    with open_raw(path) as file:
        blocks = iter(functools.partial(file.read, _BLOCK), b"")
        return "".join([*map(decoder.decode, blocks), decoder.decode(b"")])


def lines_in(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers and their ends as they are (only U+000A ends a line).

    Raises:
        InputError: a line is too long or not UTF-8.
    """
    with open_raw(path) as file:
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
        separator: what stands between the documents, which lose the line ends at their edges;
            without it the file is one document as it stands.

    Raises:
        InputError: a line is not UTF-8.
    """
    edges = "\r\n" if separator else ""
    # What ends a longer text than this may be the beginning of a separator.
    longest = LONGEST_DOCUMENT + len(separator or "")
    decoder = _Decoder(path)
    rest = ""  # of the last document: its end is not read yet
    begun = False  # a part of it was given already
    with open_raw(path) as file:
        ended = False
        while not ended:
            # As much again as is held, so that a long document is not searched once a block.
            block = file.read(max(_BLOCK, len(rest)))
            ended = not block
            text = rest + decoder.decode(block)
            *whole, rest = text.split(separator) if separator else [text]
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


def parts_of(text: str) -> Sequence[str]:
    """A document in parts of at most `LONGEST_DOCUMENT` characters, cut before words if it can be.

    The parts of a text cut before words have the tokens of the whole.
    """
    if len(text) <= LONGEST_DOCUMENT:
        return (text,)
    parts = []
    while len(text) > LONGEST_DOCUMENT:
        cut = _cut(text)
        parts.append(text[:cut])
        text = text[cut:]
    return (*parts, text)


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
    if format == "jsonl":
        yield from _json_lines(path)
    elif format == "json":
        yield from enumerate(_json_list(path), start=1)
    else:
        there = _parquet_columns(path)
        names = [name for name in columns if name in there] or columns
        for number, values in _parquet_rows(path, names):
            yield number, dict(zip(names, values, strict=True))


def fields_in(path: Path, format: str, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
    """The named fields of the records in `jsonl`, `csv` or `parquet`, with the records' numbers.

    A field that a JSON object lacks is None.

    Raises:
        InputError: the file is not what its format says, or lacks a column.
    """
    if format == "csv":
        yield from _csv_rows(path, names)
    elif format == "parquet":
        yield from _parquet_rows(path, names)
    else:
        for number, record in _json_lines(path):
            if not isinstance(record, dict):
                raise InputError(
                    f"{path}: line {number}: not an object with fields; correct or remove the line"
                )
            yield number, [record.get(name) for name in names]


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in lines_in(path):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: line {number}: not valid JSON ({error}); correct or remove the line"
            ) from None
        yield number, value


def _json_list(path: Path) -> list[Any]:
    try:
        records = json.loads(_whole_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}: not valid JSON ({error.msg}); correct the file"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; the file must be a list of records") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: not a JSON list; put the records between [ and ]")
    return records


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
            raise InputError(
                f"{path}: no column {column!r}; there are {', '.join(map(repr, there))}"
            )
    return [there.index(column) for column in columns]


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow as pa  # here: only parquet needs it, and it takes long
    from pyarrow import parquet

    try:
        return list(parquet.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise _damaged_table(path, error) from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK) as table:
            _places_of(path, table.schema_arrow.names, columns)
            about = table.metadata
            size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if size > max(_SMALL, _SWELLING * path.stat().st_size):
                raise InputError(
                    f"{path}: swells to more than {_SWELLING} times its size, as no text does; "
                    "if it is what it should be, write it again without compression"
                )
            batches = table.iter_batches(_ROWS, columns=list(columns), use_threads=False)
            for batch in batches:
                values = [batch.column(name).to_pylist() for name in columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise _damaged_table(path, error) from None


def _damaged_table(path: Path, error: Exception) -> InputError:
    text = " ".join(str(error).split())
    return InputError(f"{path}: not a parquet file, or damaged ({text:.200}); fetch it again")
