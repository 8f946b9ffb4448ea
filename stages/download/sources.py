"""What can be fetched: the sources of each data set, as `params.yaml` lists them."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from gpt.text import SOURCES, Balance, Format, Split


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise ValueError(f"{path!r} must be a path inside its folder, with / between the parts")
    return path


def _plain_name(name: str) -> str:
    if _inside(name) != PurePosixPath(name).name or name.startswith(".") or name == SOURCES:
        raise ValueError(f"{name!r} cannot be the name of a data file")
    return name


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} must begin with https:// or http:// and a host")
    return url


InsidePath = Annotated[str, AfterValidator(_inside)]
PlainName = Annotated[str, AfterValidator(_plain_name)]
Url = Annotated[str, AfterValidator(_web_address)]
_CONFIG = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Source:
    """One file to fetch.

    Attributes:
        name: what reports call it.
        file: a path in the folder of local sources, or
        urls: where it is published; tried in this order, after the mirror; or
        builtin: `python-docs`, the documentation inside the running Python (a corpus only).
        sha256: of the file, or of the archive's member; required for `urls`.
        bytes: its size; without it and without sha256 only a general bound holds.
        member: the one to take out of a zip archive.
        save_as: its name in the output folder; by default the name it has.
        mirror_names: other names (or paths) that a mirror may keep it under.
    """

    name: Annotated[str, Field(min_length=1)]
    file: InsidePath | None = None
    urls: tuple[Url, ...] = ()
    builtin: Literal["python-docs"] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    bytes: Annotated[int, Field(gt=0)] | None = None
    member: InsidePath | None = None
    save_as: PlainName | None = None
    mirror_names: tuple[InsidePath, ...] = ()

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if sum(map(bool, (self.file, self.urls, self.builtin))) != 1:
            raise ValueError(f"source {self.name!r}: give one of file, urls and builtin")
        if self.urls and self.sha256 is None:
            raise ValueError(f"source {self.name!r}: a download needs its sha256")
        _plain_name(self.saved_name)
        return self

    @property
    def saved_name(self) -> str:
        """The file's name in the output folder."""
        if self.save_as or self.builtin:
            return self.save_as or f"{self.builtin}.jsonl"
        return PurePosixPath(self.member or self.file or self._url_name).name

    @property
    def read_as(self) -> Format:
        """How to read the file."""
        return "file"

    @property
    def sought_names(self) -> tuple[str, ...]:
        """The names under which a mirror may have it, the likeliest first."""
        names = [*self.mirror_names, self.saved_name]
        names += [name for name in (self.member, self._url_name) if name]
        names += [PurePosixPath(name).name for name in names]
        return tuple(dict.fromkeys(names))

    @property
    def _url_name(self) -> str:
        return PurePosixPath(unquote(urlsplit(self.urls[0]).path)).name if self.urls else ""


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class CorpusSource(Source):
    """Text to pretrain on.

    Attributes:
        format: `text`, `jsonl` (a field "text" a line), or labelled data as text: `messages`,
            `instructions`.
        separator: what stands between the documents of a `text`; without it a file is one.
        split: of labelled data: the same as the stage that trains on it has, so that
        part: only the training part becomes text to pretrain on.
        balance: of `messages`, again as in the stage that trains on them.
    """

    format: Literal["text", "jsonl", "messages", "instructions"] | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None
    split: Split | None = None
    part: Literal["train"] | None = None
    balance: Balance = "none"

    @model_validator(mode="after")
    def _fitting_options(self) -> CorpusSource:
        where = f"source {self.name!r}:"
        if self.builtin and (self.format or self.sha256 or self.bytes or self.member):
            raise ValueError(f"{where} builtin takes no format, sha256, bytes or member")
        if self.separator and self.read_as != "text":
            raise ValueError(f"{where} only the format text has a separator")
        if (self.split is None) != (self.part is None):
            raise ValueError(f"{where} split and part: train go together")
        if self.split and self.read_as not in ("messages", "instructions"):
            raise ValueError(f"{where} only messages and instructions have a split")
        if self.balance != "none" and (self.read_as != "messages" or self.split is None):
            raise ValueError(f"{where} balance is for messages with a split")
        return self

    @property
    def read_as(self) -> Format:
        """How to read the file: a builtin's form, or `format`."""
        return self.format or ("jsonl" if self.builtin else "text")


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class MessagesSource(Source):
    """Labelled messages: `tsv` is a label, a tab and a text a line, without CSV's quoting."""

    builtin: None = None
    format: Literal["tsv"] = "tsv"

    @property
    def read_as(self) -> Format:
        """How to read the file."""
        return "messages"


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class InstructionsSource(Source):
    """Instruction records: `json` is a list of objects with instruction, input and output."""

    builtin: None = None
    format: Literal["json"] = "json"

    @property
    def read_as(self) -> Format:
        """How to read the file."""
        return "instructions"


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class ModelSource(Source):
    """A file of a published model, kept as it is under GPT-2's name for it (`save_as`)."""

    builtin: None = None
