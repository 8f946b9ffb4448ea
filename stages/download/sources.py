"""What can be fetched: the sources of each data set, as `params.yaml` lists them."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from gpt.text.formats import PACKINGS
from gpt.text.records import FORMATS, SOURCES, Balance, Format, Kind, Split, inside_path

_BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
_ARCHIVES = (
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tzst"),
    *(f".tar{suffix}" for suffix in (".gz", ".bz2", ".xz", ".zst")),
)


def format_of(kind: Kind, name: str) -> Format:
    """The format that a file's name tells, `.gz` and its like at its end apart.

    It may be one that files of the kind cannot have.
    """
    path = PurePosixPath(name.lower())
    if path.suffix in PACKINGS:
        path = path.with_suffix("")
    told = _BY_SUFFIX.get(path.suffix)
    if kind == "documents":  # as some write lines of JSON, and whose rows are text like any other
        told = "jsonl" if told == "json" else None if told == "tsv" else told
    # the first one of a kind is that of a file whose name tells none
    return FORMATS[kind][0] if told is None or kind == "file" else told


def _refuse_source(name: str, *checks: tuple[object, str]) -> None:
    """Raise the first complaint whose condition holds."""
    for holds, complaint in checks:
        if holds:
            raise ValueError(f"source {name!r}: {complaint}")


def _plain_name(name: str) -> str:
    if inside_path(name) != PurePosixPath(name).name or name.startswith(".") or name == SOURCES:
        raise ValueError(f"{name!r} cannot be the name of a data file")
    return name


def _pattern(pattern: str) -> str:
    parts = PurePosixPath(inside_path(pattern)).parts
    if any("**" in part and part != "**" for part in parts):
        raise ValueError(f"{pattern!r}: ** stands for folders, alone between two /")
    return pattern


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} must begin with https:// or http:// and a host")
    return url


InsidePath = Annotated[str, AfterValidator(inside_path)]
PlainName = Annotated[str, AfterValidator(_plain_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Url = Annotated[str, AfterValidator(_web_address)]
FieldName = Annotated[str, Field(min_length=1)]
_CONFIG = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Source:
    """One file to fetch, or several that belong together.

    Several files keep their paths, in a folder that is called as the source; very many plain texts
    become one file in it (`stages.download.joined`).

    Attributes:
        name: what reports call it.
        file: a path in the folder of local sources, or
        folder: a folder in there, with all below it but what is hidden, or
        glob: a pattern of paths in there (`*` within a name, `**` for any folders), or
        urls: where it is published; tried in this order, after the mirror; or
        builtin: `python-docs`, the documentation inside the running Python (a corpus only).
        sha256: of the file; with `member` of that member, with `members` of the archive. A
            download without it is not checked, which a warning says.
        bytes: its size, or with `members` the most that they may have together; without it only
            a general bound holds for what comes from the web or out of an archive.
        member: the one to take out of an archive: zip, or tar as it is or in gz, bz2, xz or zst.
        members: a pattern of those to take out of an archive.
        save_as: its name in the output folder; by default the name it has.
        mirror_names: other names (or paths) that a mirror may keep it under.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    file: InsidePath | None = None
    folder: InsidePath | None = None
    glob: Pattern | None = None
    urls: tuple[Url, ...] = ()
    builtin: Literal["python-docs"] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    bytes: Annotated[int, Field(gt=0, le=1 << 50)] | None = None
    member: InsidePath | None = None
    members: Pattern | None = None
    save_as: PlainName | None = None
    mirror_names: tuple[InsidePath, ...] = ()

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        places = (self.file, self.folder, self.glob, self.urls, self.builtin)
        checks = (self.sha256, self.bytes, self.member, self.members, self.mirror_names)
        file = self.file or self._url_name
        packed = file.lower().endswith(_ARCHIVES)
        _refuse_source(
            self.name,
            (sum(map(bool, places)) != 1, "give one of file, folder, glob, urls and builtin"),
            (self.member and self.members, "give either member or members"),
            (
                (self.folder or self.glob) and any(checks),
                "folder and glob take no sha256, bytes, member, members or mirror_names",
            ),
            (self.save_as and self.gives_several, "only a single file can be saved as another"),
            (
                packed and not (self.member or self.members),
                f"{file} is an archive; name its member, or members by a pattern",
            ),
        )
        _plain_name(self.saved_name)
        return self

    @property
    def gives_several(self) -> bool:
        """Whether its files go into a folder of their own."""
        return bool(self.folder or self.glob or self.members)

    @property
    def saved_name(self) -> str:
        """The name of the file, or of the folder of its files, in the output folder."""
        if self.gives_several:
            return self.name
        if self.save_as or self.builtin:
            return self.save_as or f"{self.builtin}.jsonl"
        return PurePosixPath(self.member or self.file or self._url_name).name

    @property
    def read_as(self) -> Kind:
        """What its files hold."""
        kind: Kind = getattr(self, "kind", "file")
        return kind

    def format_of(self, name: str) -> Format:
        """How one of its files is written, from the file's name where nothing else says it."""
        return format_of(self.read_as, name)

    @property
    def sought_names(self) -> tuple[str, ...]:
        """The names under which a mirror may have it, the likeliest first."""
        names = [*self.mirror_names]
        if not self.gives_several:
            names.append(self.saved_name)
        names += [name for name in (self.member, self._url_name) if name]
        names += [PurePosixPath(name).name for name in names]
        return tuple(dict.fromkeys(names))

    @property
    def _url_name(self) -> str:
        return PurePosixPath(unquote(urlsplit(self.urls[0]).path)).name if self.urls else ""


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class TextSource(Source):
    """Files with texts in them.

    Attributes:
        format: how they are written; by default what the names say: `.jsonl`, `.ndjson`,
            `.json`, `.parquet`, `.csv` (`.gz` and its like behind it apart), else plain text, a
            `tsv` of messages or a `json` of instructions.
        text_field: the field (column) of the text, in `jsonl`, `json`, `parquet` and `csv`.
        label_field: the field (column) of a message's label, in the same.
    """

    format: Format | None = None
    text_field: FieldName | None = None
    label_field: FieldName | None = None

    @model_validator(mode="after")
    def _fitting_format(self) -> TextSource:
        kind = self.read_as
        told = self.format or (None if self.gives_several else format_of(kind, self.saved_name))
        fields = self._may_be("jsonl", "json", "parquet", "csv")
        _refuse_source(
            self.name,
            (
                told and told not in FORMATS[kind],
                f"{kind} have one of the formats {', '.join(FORMATS[kind])}, not {told}"
                + " as its name says; set its format" * (not self.format),
            ),
            (
                self.text_field and (kind == "instructions" or not fields),
                "only documents in jsonl, parquet or csv, and messages in these or json, have a "
                "text_field",
            ),
            (
                self.label_field and (kind != "messages" or not fields),
                "only messages in jsonl, json, parquet or csv have a label_field",
            ),
        )
        return self

    def _may_be(self, *formats: Format) -> bool:
        """Whether one of its files can be in one of `formats`."""
        if self.format or not self.gives_several:
            return self.format_of(self.saved_name) in formats
        return True

    def format_of(self, name: str) -> Format:
        """How one of its files is written."""
        return self.format or format_of(self.read_as, name)


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class CorpusSource(TextSource):
    """Text to pretrain on.

    Attributes:
        kind: documents, or labelled data as text: `messages`, `instructions`.
        separator: what stands between the documents of a `text`; without it a file is one.
        split: of labelled data: the same as the stage that trains on it has, so that
        part: only the training part becomes text to pretrain on.
        balance: of `messages`, again as in the stage that trains on them.
    """

    kind: Literal["documents", "messages", "instructions"] = "documents"
    separator: Annotated[str, Field(min_length=1)] | None = None
    split: Split | None = None
    part: Literal["train"] | None = None
    balance: Balance = "none"

    @model_validator(mode="after")
    def _fitting_options(self) -> CorpusSource:
        documents = self.kind == "documents"
        options = (self.format, self.text_field, self.sha256, self.bytes, self.member, self.members)
        _refuse_source(
            self.name,
            (
                self.builtin and (any(options) or not documents),
                "builtin takes no kind, format, text_field, sha256, bytes, member or members",
            ),
            (
                self.separator and not (documents and self._may_be("text")),
                "only documents in the format text have a separator",
            ),
            ((self.split is None) != (self.part is None), "split and part: train go together"),
            (self.split and documents, "only messages and instructions have a split"),
            (
                self.balance != "none" and (self.kind != "messages" or self.split is None),
                "balance is for messages with a split",
            ),
        )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class MessagesSource(TextSource):
    """Labelled messages: `tsv` is a label, a tab and a text a line, without CSV's quoting."""

    builtin: None = None
    kind: Literal["messages"] = "messages"


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class InstructionsSource(TextSource):
    """Instruction records: objects with instruction, input and output, listed or a line each."""

    builtin: None = None
    kind: Literal["instructions"] = "instructions"


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class ModelSource(Source):
    """A file of a published model, kept as it is under GPT-2's name for it (`save_as`)."""

    builtin: None = None


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class DownloadParams:
    """What to fetch, and from where.

    Attributes:
        local: the folder that sources with `file`, `folder` and `glob` are in.
        mirror: a folder or web address that is asked before a source's own addresses.
        offline: never open a connection.
        parallel: how many sources are fetched at the same time.
        timeout_seconds: for one file from one address, all attempts together.
        corpus: text to pretrain on.
        messages: labelled messages for the classifier.
        instructions: records for the assistant.
        gpt2: the files of the published model; may be empty where it is not used.
    """

    local: str
    mirror: str | None = None
    offline: bool = False
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    timeout_seconds: Annotated[float, Field(gt=0, le=1_000_000)] = 3600.0
    corpus: Annotated[tuple[CorpusSource, ...], Field(min_length=1)]
    messages: Annotated[tuple[MessagesSource, ...], Field(min_length=1)]
    instructions: Annotated[tuple[InstructionsSource, ...], Field(min_length=1)]
    gpt2: tuple[ModelSource, ...] = ()

    @field_validator("corpus", "messages", "instructions", "gpt2")
    @classmethod
    def _distinct(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        for kind, names in (
            ("name", [source.name for source in sources]),
            ("file name", [source.saved_name for source in sources]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two sources have the {kind} {twice!r}; set another for one")
        return sources
