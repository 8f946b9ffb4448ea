"""Raw text in, records out: documents, labelled messages, instructions, and their splits.

A raw folder holds files as they were fetched and `sources.json`, which says what each of them is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from gpt.errors import InputError
from gpt.files import write_json

Balance = Literal["undersample", "none"]
Format = Literal["text", "jsonl", "messages", "instructions", "file"]
"""What a raw file holds: `text` is plain text, one document or several with a separator between
them; `jsonl` a JSON object a line with a document in its field "text"; `messages` a label, a tab
and a text a line; `instructions` a JSON list of objects with instruction, input and output;
`file` is anything else, kept as it is."""

SOURCES = "sources.json"
T = TypeVar("T")


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Split:
    """Shares of labelled data for training and validation; the rest is the test part."""

    train: Annotated[float, Field(gt=0, lt=1)]
    validation: Annotated[float, Field(gt=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 123

    @model_validator(mode="after")
    def _leaves_a_test_part(self) -> Split:
        if self.train + self.validation >= 1:
            raise ValueError(
                f"train {self.train} and validation {self.validation} leave nothing to test on; "
                "they must add up to less than 1"
            )
        return self


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class RawFile:
    """One file of a raw folder, as `sources.json` lists it.

    Attributes:
        name: the source's name.
        file: the file's name in the folder.
        format: how to read it.
        bytes: its size.
        sha256: of its bytes.
        url: where it is published.
        separator: what stands between the documents of a `text`.
        split: of `messages` or `instructions` as documents: only the training part is read.
        balance: how that split balances the classes of `messages`.
        records: the documents, messages or instruction records in it.
    """

    name: str
    file: str
    format: Format
    bytes: int
    sha256: str
    url: str | None = None
    separator: str | None = None
    split: Split | None = None
    balance: Balance = "none"
    records: int | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    """A task in words, what it is to be done on (may be empty), and the answer."""

    instruction: str
    input: str
    output: str


# --- raw folders ----------------------------------------------------------------------------------

_SOURCES: TypeAdapter[list[RawFile]] = TypeAdapter(list[RawFile])


def write_sources(folder: Path, files: Sequence[RawFile]) -> None:
    """Write `sources.json`."""
    write_json(folder / SOURCES, _SOURCES.dump_python(list(files), exclude_none=True))


def read_sources(folder: Path) -> list[RawFile]:
    """The files of a raw folder.

    Raises:
        InputError: `sources.json` or a file it names is missing, or it cannot be read.
    """
    path = folder / SOURCES
    if not path.is_file():
        raise InputError(f"{path}: no such file; run the stage download first")
    try:
        files = _SOURCES.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {where or 'file'}: {first['msg']}; run the stage download again"
        ) from None
    for file in files:
        if not (folder / file.file).is_file():
            raise InputError(f"{folder / file.file}: no such file; run the stage download again")
    return files


def read_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """The documents of a raw folder, each with its source's name, in the order of the sources.

    Plain text with a separator and JSON lines are read piece by piece; a document is never blank.

    Raises:
        InputError: a file is not what its format says; file, line and remedy are named.
    """
    for file in read_sources(folder):
        for text in documents_in(folder / file.file, file):
            yield file.name, text


def documents_in(path: Path, file: RawFile) -> Iterator[str]:
    """The documents of one file; `read_documents` says more."""
    if file.format == "text":
        documents = _split_text(path, file.separator)
    elif file.format == "jsonl":
        documents = _json_line_texts(path)
    elif file.format == "messages":
        frame = messages_in(path)
        if file.split:
            frame = split_messages(frame, file.split, file.balance)["train"]
        documents = iter(frame["text"].tolist())
    elif file.format == "instructions":
        records = instructions_in(path)
        if file.split:
            records = split_instructions(records, file.split)["train"]
        documents = ("\n".join(filter(None, (r.instruction, r.input, r.output))) for r in records)
    else:
        raise InputError(f"{path}: a {file.format!r} holds no documents; use another format")
    return (text for text in documents if text.strip())


def read_messages(folder: Path) -> pd.DataFrame:
    """The labelled messages of a raw folder: string columns `label` and `text`, in file order.

    Raises:
        InputError: a line is not a label, a tab and a text; a file is not UTF-8; or all messages
            have one label.
    """
    frames = [messages_in(folder / file.file) for file in read_sources(folder)]
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"label": []})
    if frame["label"].nunique() < 2:
        found = ", ".join(map(repr, frame["label"].unique())) or "none"
        raise InputError(
            f"{folder}: the messages have {frame['label'].nunique()} class ({found}); "
            "a classifier needs two or more"
        )
    return frame


def messages_in(path: Path) -> pd.DataFrame:
    """The messages of one file; `read_messages` says more, but for the number of classes."""
    labels, texts = [], []
    # Not pandas' reader: it reads quotes as CSV's and joins lines between them.
    for number, line in _lines(path):
        line = line.rstrip("\r\n")
        if not line:
            continue
        parts = line.split("\t")
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise InputError(
                f"{path}: line {number}: not a label, a tab and a text; correct or remove the line"
            )
        labels.append(parts[0])
        texts.append(parts[1])
    return pd.DataFrame({"label": labels, "text": texts}, dtype="str")


def read_instructions(folder: Path) -> list[Instruction]:
    """The instruction records of a raw folder, in file order.

    Raises:
        InputError: a file is not JSON, not a list of objects, or a record lacks a field.
    """
    return [
        record for file in read_sources(folder) for record in instructions_in(folder / file.file)
    ]


def instructions_in(path: Path) -> list[Instruction]:
    """The instruction records of one file; `read_instructions` says more."""
    try:
        records = json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}: not valid JSON ({error.msg}); correct the file"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; the file must be a list of records") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: not a JSON list; put the records between [ and ]")
    return [_instruction(path, number, record) for number, record in enumerate(records, start=1)]


def _instruction(path: Path, number: int, record: Any) -> Instruction:
    if not isinstance(record, dict):
        raise InputError(f"{path}: record {number}: not an object with fields; correct the record")
    values = {}
    for field in fields(Instruction):
        value = record.get(field.name)
        if not isinstance(value, str):
            fault = "is not a text" if field.name in record else "is missing"
            raise InputError(
                f"{path}: record {number}: field {field.name!r} {fault}; "
                "a record has the texts instruction, input and output (input may be empty)"
            )
        if not value.strip() and field.name != "input":
            raise InputError(f"{path}: record {number}: field {field.name!r} is empty; fill it in")
        if not _is_unicode(value):
            raise InputError(
                f"{path}: record {number}: field {field.name!r} holds half a character "
                "(an unpaired surrogate); correct the record"
            )
        values[field.name] = value
    return Instruction(**values)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers and their ends as they are (only U+000A ends a line)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # A byte order mark at the start of a file is no text.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: line {number}: byte 0x{line[error.start]:02x} is not UTF-8; "
                    "save the file as UTF-8"
                ) from None


def _split_text(path: Path, separator: str | None) -> Iterator[str]:
    if not separator:
        yield "".join(line for _, line in _lines(path))
        return
    pending: list[str] = []
    size = 0
    for _, line in _lines(path):
        pending.append(line)
        size += len(line)
        if size >= 1 << 20:
            *whole, rest = "".join(pending).split(separator)
            yield from (text.strip("\r\n") for text in whole)
            pending, size = [rest], 0
    yield from (text.strip("\r\n") for text in "".join(pending).split(separator))


def _json_line_texts(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                f"{path}: line {number}: not valid JSON ({error}); correct or remove the line"
            ) from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not _is_unicode(text):
            raise InputError(
                f'{path}: line {number}: not an object with a text in its field "text"; '
                "correct or remove the line"
            )
        yield text


def _is_unicode(text: str) -> bool:
    """JSON can spell unpaired surrogates, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- splits ---------------------------------------------------------------------------------------


def hash_position(key: str, seed: int, purpose: str = "split") -> int:
    """Where `key` lies in 0 … 2**64 - 1: the same for equal keys, in any data and order.

    Args:
        key: what is to be placed, for example the text of a message.
        seed: another seed, another place.
        purpose: draws for different purposes are independent.
    """
    digest = hashlib.blake2b(
        key.encode(), digest_size=8, salt=seed.to_bytes(8, "big"), person=purpose.encode()
    )
    return int.from_bytes(digest.digest(), "big")


def split_by_hash(keys: Sequence[str], split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of the training, validation and test part, each in the rows' own order.

    Rows are put in the order of their keys' hashes and cut at int(n * train) and
    int(n * validation) further on, so that the counts are exact.
    """
    order = _hash_order(keys, split.seed, "split")
    n_train, n_validation = int(len(keys) * split.train), int(len(keys) * split.validation)
    train, validation, test = np.split(order, [n_train, n_train + n_validation])
    return np.sort(train), np.sort(validation), np.sort(test)


def split_messages(frame: pd.DataFrame, split: Split, balance: Balance) -> dict[str, pd.DataFrame]:
    """Messages by part: `train`, `validation`, `test`.

    `undersample` first reduces every class to as many messages as the smallest one has.
    """
    if balance == "undersample":
        classes = frame.groupby("label").indices.values()
        n = min(len(rows) for rows in classes)
        texts = frame["text"].to_numpy()
        kept = [rows[_hash_order(texts[rows], split.seed, "balance")[:n]] for rows in classes]
        frame = frame.iloc[np.sort(np.concatenate(kept))]
    parts = split_by_hash(frame["text"].tolist(), split)
    return _parts([frame.iloc[part].reset_index(drop=True) for part in parts])


def split_instructions(
    records: Sequence[Instruction], split: Split
) -> dict[str, list[Instruction]]:
    """Records by part: `train`, `validation`, `test`; placed by their task, not their answer."""
    parts = split_by_hash([f"{r.instruction}\n{r.input}" for r in records], split)
    return _parts([[records[i] for i in part] for part in parts])


def _parts(parts: Sequence[T]) -> dict[str, T]:
    return dict(zip(("train", "validation", "test"), parts, strict=True))


def _hash_order(keys: Iterable[str], seed: int, purpose: str) -> np.ndarray:
    positions = np.array([hash_position(key, seed, purpose) for key in keys], dtype=np.uint64)
    return np.argsort(positions, kind="stable")
