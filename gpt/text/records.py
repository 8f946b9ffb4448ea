"""Raw text in, records out: documents, labelled messages, instructions, and their splits.

A raw folder holds files as they were fetched, and `sources.json`, which describes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass as checked_dataclass
from typing_extensions import TypedDict  # pydantic knows that of Python 3.12 and later

from gpt.base.errors import InputError, first_problem
from gpt.base.files import write_json
from gpt.base.labels import in_short, plain_label
from gpt.text.formats import PLACES, fields_in, lines_in, objects_in, parts_of, texts_in

if TYPE_CHECKING:  # imported where a table is made: whoever reads documents should not wait for it
    import pandas as pd

Balance = Literal["undersample", "class_weights", "none"]
"""Of classes of unlike size: take as many of each as of the smallest, let a text of a rare class
count for more in the loss, or leave them as they are."""
Kind = Literal["documents", "messages", "instructions", "file"]
"""What a raw file holds: text to pretrain on, labelled messages, instruction records, or anything
else, kept as it is."""
Format = Literal["text", "jsonl", "parquet", "tsv", "csv", "json", "file"]
"""How a raw file is written. `text` is plain text, one document or several with a separator between
them; `jsonl` a JSON object a line; `parquet` a table; `tsv` a label, a tab and a text a line,
without CSV's quoting; `csv` a table with a header (RFC 4180); `json` a list of objects. All but
`parquet` may be compressed: gzip, zstd, bzip2 or xz."""
FORMATS: dict[Kind, tuple[Format, ...]] = {
    "documents": ("text", "jsonl", "csv", "parquet"),
    "messages": ("tsv", "csv", "jsonl", "json", "parquet"),
    "instructions": ("json", "jsonl", "parquet"),
    "file": ("file",),
}
"""How a file of each kind may be written."""

SOURCES = "sources.json"
T = TypeVar("T")

MOST_CLASSES = 1000
"""Of messages: each has a probability for every message, and figures of its own."""


def inside_path(path: str) -> str:
    """`path`, if it stays in its folder on every system.

    Raises:
        ValueError: it does not, or holds a character that no file name should have.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise ValueError(f"{path!r} must be a path inside its folder, with / between the parts")
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in path):
        raise ValueError(f"{path!r} has a character that no file name should have")
    return path


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
        name: the source's name; one source may have several files.
        file: the file's path in the folder, with / between its parts.
        kind: what it holds.
        format: how it is written.
        bytes: its size.
        sha256: of its bytes.
        url: where it is published.
        separator: what stands between the documents of a `text`.
        text_field: the field (column) of a document or message, in `jsonl`, `csv` and `parquet`.
        label_field: the field (column) of a message's label, in `jsonl`, `csv` and `parquet`.
        split: of messages or instructions as documents: only the training part is read.
        balance: how that split balances the classes of messages.
        records: the documents, messages or instruction records in it.
    """

    name: str
    file: Annotated[str, AfterValidator(inside_path)]
    kind: Kind
    format: Format
    bytes: int
    sha256: str
    url: str | None = None
    separator: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    split: Split | None = None
    balance: Balance = "none"
    records: int | None = None


class Turn(NamedTuple):
    """What was asked in a conversation, and what was answered."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """A task in words, its input (may be empty), and the answer.

    It may be the last turn of a conversation: then `earlier` holds the turns before it. `system`
    says how the assistant is to behave in all of them (may be empty).
    """

    instruction: str
    input: str
    output: str
    earlier: tuple[Turn, ...] = ()
    system: str = ""

    @property
    def task(self) -> str:
        """All questions, one line per turn; identifies the record."""
        prompts = [turn.prompt for turn in self.earlier]
        return "\n".join([*prompts, self.instruction, self.input])

    @property
    def text(self) -> str:
        """All that is said, as a document."""
        turns = [text for turn in self.earlier for text in turn]
        said = (self.system, *turns, self.instruction, self.input, self.output)
        return "\n".join(filter(None, said))


@dataclass(frozen=True, slots=True)
class Preference(Instruction):
    """A record that also holds two answers of which one is the better (neither is blank)."""

    chosen: str = ""
    rejected: str = ""


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
        raise InputError(f"{path}: {first_problem(error)}; run the stage download again") from None
    for file in files:
        if not (folder / file.file).is_file():
            raise InputError(f"{folder / file.file}: no such file; run the stage download again")
    return files


# --- documents ------------------------------------------------------------------------------------


def read_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """The documents of a raw folder, each with its source's name, in the order of the sources.

    A document is never blank. One that is longer than `gpt.text.formats.LONGEST_DOCUMENT` comes in
    parts, each a document of its own; the files are read piece by piece, and no more than about
    that much of them is held.

    Raises:
        InputError: a file is not what its format says; file, line and remedy are named.
    """
    for file in read_sources(folder):
        for text in documents_in(folder / file.file, file):
            yield file.name, text


def documents_in(path: Path, file: RawFile) -> Iterator[str]:
    """The documents of one file; `read_documents` says more."""
    if file.kind == "messages":
        frame = messages_in(path, file)
        if file.split:
            frame = split_messages(frame, file.split, file.balance)["train"]
        texts = iter(frame["text"].tolist())
    elif file.kind == "instructions":
        records = instructions_in(path, file)
        if file.split:
            records = split_instructions(records, file.split)["train"]
        texts = (record.text for record in records)
    elif file.kind == "documents":
        _check_format(path, file)
        if file.format == "text":
            texts = texts_in(path, file.separator)
        else:
            texts = (part for text in _field_texts(path, file) for part in parts_of(text))
    else:
        raise InputError(f"{path}: a {file.kind!r} holds no documents; use another kind")
    return (text for text in texts if text and not text.isspace())


def _check_format(path: Path, file: RawFile) -> None:
    if file.format not in FORMATS[file.kind]:
        raise InputError(
            f"{path}: {file.kind} cannot be read from the format {file.format!r}; use one of "
            f"{', '.join(FORMATS[file.kind])}"
        )


def _field_texts(path: Path, file: RawFile) -> Iterator[str]:
    for number, (text,) in fields_in(path, file.format, [file.text_field]):
        if not isinstance(text, str) or not _is_unicode(text):
            place = PLACES[file.format]
            raise InputError(
                f"{path}: {place} {number}: not an object with a text in its field "
                f'"{file.text_field}"; correct or remove the {place}'
            )
        yield text


def _is_unicode(text: str) -> bool:
    """JSON can spell unpaired surrogates, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- labelled messages ----------------------------------------------------------------------------


def read_messages(folder: Path) -> pd.DataFrame:
    """The labelled messages of a raw folder: string columns `label` and `text`, in file order.

    Raises:
        InputError: a file is not what its format says, a message lacks its label or text, all
            messages have one label, or there are more than `MOST_CLASSES`.
    """
    import pandas as pd

    frames = [messages_in(folder / file.file, file) for file in read_sources(folder)]
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"label": []})
    n = frame["label"].nunique()
    if n < 2:
        found = in_short(frame["label"].unique().tolist()) or "none"
        raise InputError(
            f"{folder}: the messages have {n} class ({found}); a classifier needs two or more"
        )
    if n > MOST_CLASSES:
        raise InputError(
            f"{folder}: {len(frame):,} messages have {n:,} classes "
            f"({in_short(frame['label'].unique().tolist())}), and a classifier takes "
            f"{MOST_CLASSES:,} at most; see that label and text are not mixed up, or put rare "
            "classes together"
        )
    return frame


def messages_in(path: Path, file: RawFile) -> pd.DataFrame:
    """The messages of one file; `read_messages` says more, but for the number of classes."""
    import pandas as pd

    _check_format(path, file)
    place, names = PLACES[file.format], [file.label_field, file.text_field]
    tsv = file.format == "tsv"
    labels, texts = [], []
    for number, (label, text) in _tsv_rows(path) if tsv else fields_in(path, file.format, names):
        if isinstance(label, int):  # as JSON spells it: bools are ints
            label = json.dumps(label)
        if isinstance(label, str):
            label = plain_label(label)
        for what, name, value in zip(("label", "text"), names, (label, text), strict=True):
            if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
                raise InputError(
                    f"{path}: {place} {number}: the field {name!r} is not a {what}; correct or "
                    f"remove the {place}"
                )
        labels.append(label)
        texts.append(text)
    return pd.DataFrame({"label": labels, "text": texts}, dtype="str")


def _tsv_rows(path: Path) -> Iterator[tuple[int, Sequence[Any]]]:
    # Not a reader of CSV: it reads quotes as CSV's and joins lines between them.
    for number, line in lines_in(path):
        parts = line.rstrip("\r\n").split("\t")
        if not line.strip(" \r\n"):
            continue
        if len(parts) != 2:
            raise InputError(
                f"{path}: line {number}: not a label, a tab and a text; correct or remove the "
                "line, or set its source's format if it is none of tsv"
            )
        yield number, parts


# --- instructions ---------------------------------------------------------------------------------


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("empty; fill it in")
    return text


# with a constraint, pydantic refuses half a surrogate pair, which no encoding can write
_Text = Annotated[str, Field(min_length=0)]
_Words = Annotated[_Text, AfterValidator(_not_blank)]


class _Message(TypedDict):
    role: str
    content: _Text


class _Task(TypedDict):
    """An instruction record as files have it."""

    instruction: _Words
    input: _Text
    output: _Words


class _Answers(TypedDict):
    chosen: _Words
    rejected: _Words


_MESSAGE, _TASK, _PAIR = TypeAdapter(_Message), TypeAdapter(_Task), TypeAdapter(_Answers)
_FIELDS = ("instruction", "input", "output")
_ANSWERS = ("chosen", "rejected")


def read_instructions(folder: Path) -> list[Instruction]:
    """The instruction records of a raw folder, in file order.

    A record has the texts instruction, input and output; or it is a conversation: a list of
    messages, each with a `role` and its `content`, or an object with that list as its `messages`.

    Raises:
        InputError: a file is not what its format says, or a record is neither.
    """
    return [
        record
        for file in read_sources(folder)
        for record in instructions_in(folder / file.file, file)
    ]


def instructions_in(path: Path, file: RawFile) -> list[Instruction]:
    """The instruction records of one file; `read_instructions` says more."""
    return [
        _record(f"{path}: {PLACES[file.format]} {number}", record)
        for number, record in _records_in(path, file)
    ]


def read_preferences(folder: Path) -> list[Instruction]:
    """The same records in the same order, those that hold two answers as a `Preference`.

    An object may have the texts chosen and rejected beside what makes it an instruction record: a
    better and a worse answer to the same task, its last turn. Null is as good as none.

    Raises:
        InputError: as `read_instructions`, or a record has one of the two answers alone, or one
            that is no text or blank.
    """
    return [
        _preference(f"{folder / file.file}: {PLACES[file.format]} {number}", record)
        for file in read_sources(folder)
        for number, record in _records_in(folder / file.file, file, _ANSWERS)
    ]


def _records_in(path: Path, file: RawFile, more: Sequence[str] = ()) -> Iterator[tuple[int, Any]]:
    _check_format(path, file)
    return objects_in(path, file.format, (*_FIELDS, "messages", *more))


def _checked(where: str, adapter: TypeAdapter[T], value: Any, remedy: str) -> T:
    """What was read, as the adapter describes it.

    Raises:
        InputError: it is something else.
    """
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}; {remedy}") from None


def _preference(where: str, record: Any) -> Instruction:
    plain = _record(where, record)
    given = {} if isinstance(record, list) else record
    answers = {name: given[name] for name in _ANSWERS if given.get(name) is not None}
    if not answers:
        return plain
    pair = _checked(where, _PAIR, answers, "give both answers or neither")
    values = {name: getattr(plain, name) for name in Instruction.__dataclass_fields__}
    return Preference(**values, **pair)


def _record(where: str, record: Any) -> Instruction:
    if not isinstance(record, list | dict):
        raise InputError(f"{where}: not an object with fields; correct the record")
    if isinstance(record, list) and not any(isinstance(e, dict) and "role" in e for e in record):
        raise InputError(
            f"{where}: a list, but of no messages: none has a role; if the file is one list of "
            "records, set its source's format: json"
        )
    if isinstance(record, dict) and "messages" not in record:
        remedy = "a record has the texts instruction, input (may be empty) and output, or messages"
        return Instruction(**_checked(where, _TASK, record, remedy))
    messages = record["messages"] if isinstance(record, dict) else record
    return _conversation(where, messages)


def _conversation(where: str, messages: Any) -> Instruction:
    """A record of messages: a system's, if any, then a user's and an assistant's in turn."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: no list of messages; give each a role and its content")
    remedy = "a message has the texts role and content"
    said = [
        _checked(f"{where}: message {i}", _MESSAGE, each, remedy)
        for i, each in enumerate(messages, start=1)
    ]
    systems = int(said[0]["role"] == "system")
    for i, message in enumerate(said[systems:]):
        at, expected = f"{where}: message {i + 1 + systems}", ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise InputError(
                f"{at}: from {message['role']!r}, where {expected!r} has its turn; "
                "after a system's message, if any, user and assistant take turns"
            )
        if not message["content"].strip():
            raise InputError(f"{at}: its content is empty; fill it in")
    texts = [message["content"] for message in said[systems:]]
    if not texts or len(texts) % 2:
        raise InputError(
            f"{where}: message {len(said)}: the last one, and not the assistant's; "
            "a conversation ends with an answer"
        )
    *earlier, last = map(Turn, texts[::2], texts[1::2])
    system = said[0]["content"] if systems else ""
    return Instruction(last.prompt, "", last.response, tuple(earlier), system)


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

    `undersample` first reduces every class to as many messages as the smallest one has; the other
    ways leave every message in.
    """
    if balance == "undersample":
        classes = frame.groupby("label").indices.values()
        n = min(len(rows) for rows in classes)
        texts = frame["text"].to_numpy()
        kept = [rows[_hash_order(texts[rows], split.seed, "balance")[:n]] for rows in classes]
        frame = frame.iloc[np.sort(np.concatenate(kept))]
    parts = split_by_hash(frame["text"].tolist(), split)
    return _parts([frame.iloc[part].reset_index(drop=True) for part in parts])


def usable_parts(
    folder: Path, split: Split, balance: Balance
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """The labelled messages of a raw folder (`read_messages`), whole and by part.

    Raises:
        InputError: as `read_messages`, or a part is empty.
    """
    frame = read_messages(folder)
    parts = split_messages(frame, split, balance)
    for name, part in parts.items():
        if part.empty:
            few = undersampled(frame, parts)
            remedy = few or "add messages or change finetune_classifier.split"
            raise InputError(
                f"{folder}: the {name} part of {len(frame)} messages is empty; {remedy}"
            )
    return frame, parts


def undersampled(frame: pd.DataFrame, parts: Mapping[str, pd.DataFrame]) -> str:
    """That undersampling left less than half of the messages, and the remedy; else empty."""
    kept = sum(map(len, parts.values()))
    if 2 * kept >= len(frame):
        return ""
    counts = frame["label"].value_counts()
    return (
        f"undersampling leaves {kept} of {len(frame)} messages, of each class as many as "
        f"{in_short([str(counts.index[-1])])} has ({counts.iloc[-1]}); add messages of that class "
        "or leave it out, or set finetune_classifier.balance to class_weights or none"
    )


def missing_classes(parts: Mapping[str, pd.DataFrame], labels: Sequence[str]) -> dict[str, str]:
    """Which parts lack which classes, in words; a part that holds all of them is not named."""
    said = {}
    for name, part in parts.items():
        found = set(part["label"].tolist())
        lacking = [label for label in labels if label not in found]
        if lacking:
            alone = f"messages of {in_short(sorted(found))} alone, and " if len(found) == 1 else ""
            said[name] = (
                f"the {name} part has {alone}no message of {len(lacking)} of {len(labels)} classes "
                f"({in_short(lacking)})"
            )
    return said


def split_instructions(
    records: Sequence[Instruction], split: Split
) -> dict[str, list[Instruction]]:
    """Records by part: `train`, `validation`, `test`; placed by their tasks, not their answers."""
    parts = split_by_hash([record.task for record in records], split)
    return _parts([[records[i] for i in part] for part in parts])


def split_preferences(records: Sequence[Instruction], split: Split) -> dict[str, list[Preference]]:
    """Those of the records that hold two answers, by part: where `split_instructions` has them."""
    return {
        name: [record for record in part if isinstance(record, Preference)]
        for name, part in split_instructions(records, split).items()
    }


def _parts(parts: Sequence[T]) -> dict[str, T]:
    return dict(zip(("train", "validation", "test"), parts, strict=True))


def _hash_order(keys: Iterable[str], seed: int, purpose: str) -> np.ndarray:
    positions = np.array([hash_position(key, seed, purpose) for key in keys], dtype=np.uint64)
    return np.argsort(positions, kind="stable")
