"""Turn the corpus into token files for training and validation."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from gpt.data import Counts, Manifest, SplitManifest, SplitName, token_dtype
from gpt.errors import InputError
from gpt.events import Log, Message, Progress, discard
from gpt.files import sha256_of, whole_directory, write_json
from gpt.text import hash_position, read_documents, read_sources
from gpt.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

_CHUNK = 1 << 20
"""Characters that are encoded together: what is in memory at a time."""

# A tail begins here, so that no word is halved: the two parts have the tokens of the whole.
_WORD_START = re.compile(r"(?<=\S) (?=\S)")


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class TokenizeParams:
    """How text becomes tokens.

    Attributes:
        tokenizer: `gpt2` is the published vocabulary, `bpe` is learnt from the training split,
            `bytes` are bytes.
        vocab_size: of a `bpe`, `<|endoftext|>` among them.
        validation: the share that is kept for validation.
        split: `documents` draws whole documents by a hash of their text, so that new documents
            never move old ones; `tail` keeps the last characters of each source.
        seed: of the draw.
        threads: that encode; 0 means every core. The tokens do not depend on it.
    """

    tokenizer: Literal["gpt2", "bpe", "bytes"] = "gpt2"
    vocab_size: Annotated[int, Field(ge=257, lt=1 << 32)] = 4096
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split: Literal["documents", "tail"] = "documents"
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 123
    threads: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """A document, or the part of one that is in `split`."""

    split: SplitName
    source: str
    text: str
    continued: bool = False  # the rest of a document that is in the other split too


def tokenize(
    params: TokenizeParams,
    *,
    corpus: Path,
    vocabulary: Path | None,
    out: Path,
    metrics: Path,
    log: Log = discard,
) -> dict[str, float]:
    """Write the folder of token files `out`, with its tokenizer and its manifest.

    `<|endoftext|>` stands between documents. Text is read and encoded in chunks; but for a single
    document that is larger, no more than a chunk is in memory.

    Args:
        params: the tokenizer and the split.
        corpus: the raw folder of documents.
        vocabulary: the folder of the published vocabulary, for the tokenizer `gpt2`.
        out: written: `train.bin`, `validation.bin`, `manifest.json`, `vocab.json`, `merges.txt`.
        metrics: written: the figures that are returned, as JSON.
        log: told of the progress.

    Returns:
        Documents, bytes, tokens and bytes per token, in all and of each split. A document that a
        tail begins in counts in both splits, and once in all.

    Raises:
        InputError: the corpus or a split of it is empty, or the vocabulary cannot be read.
    """
    sources = read_sources(corpus)
    cuts = _cuts(corpus, params) if params.split == "tail" else {}
    tokenizer = _tokenizer(params, corpus, cuts, vocabulary, log)
    dtype = token_dtype(tokenizer.vocab_size)
    n_documents = sum(source.records or 0 for source in sources)

    with whole_directory(out) as folder:
        with (
            (folder / "train.bin").open("wb") as train,
            (folder / "validation.bin").open("wb") as validation,
        ):
            writers: dict[SplitName, _Writer] = {
                "train": _Writer(train, dtype, tokenizer.eot),
                "validation": _Writer(validation, dtype, tokenizer.eot),
            }
            done = 0
            for chunk in _chunks(_pieces(corpus, params, cuts)):
                encoded = tokenizer.encode_batch(
                    [piece.text for piece in chunk], params.threads or os.cpu_count() or 1
                )
                for piece, ids in zip(chunk, encoded, strict=True):
                    writers[piece.split].add(piece, ids)
                done += sum(not piece.continued for piece in chunk)
                log(Progress("tokenize", done, n_documents, "document"))
        _refuse_empty(params, corpus, writers)
        splits = {name: writer.manifest(folder) for name, writer in writers.items()}
        manifest = Manifest(
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.hash,
            splits=splits,
        )
        write_json(folder / "manifest.json", TypeAdapter(Manifest).dump_python(manifest))
        tokenizer.save(folder)

    figures: dict[str, float] = {"vocab_size": tokenizer.vocab_size}
    totals = {f"{name}_": writer.total for name, writer in writers.items()}
    for prefix, count in {"": sum(totals.values(), Counter[str]()), **totals}.items():
        figures |= {f"{prefix}{key}": n for key, n in count.items()}
        figures[f"{prefix}bytes_per_token"] = count["bytes"] / count["tokens"]
    figures["documents"] = done
    write_json(metrics, figures)
    return figures


def _tokenizer(
    params: TokenizeParams, corpus: Path, cuts: dict[str, int], vocabulary: Path | None, log: Log
) -> Tokenizer:
    if params.tokenizer == "bytes":
        return byte_tokenizer()
    if params.tokenizer == "bpe":
        log(Message(f"tokenize: learning a vocabulary of {params.vocab_size} from the corpus"))
        # The validation split stays unseen by everything that is learnt.
        pieces = _pieces(corpus, params, cuts)
        return train_bpe((p.text for p in pieces if p.split == "train"), params.vocab_size)
    if vocabulary is None:
        raise InputError(
            "tokenize.tokenizer: gpt2 needs the folder of its vocabulary; name it, or choose "
            "bpe or bytes"
        )
    return load_tokenizer(vocabulary)


def _cuts(corpus: Path, params: TokenizeParams) -> dict[str, int]:
    """Where the tail of each source begins, in characters."""
    lengths: Counter[str] = Counter()
    for source, text in read_documents(corpus):
        lengths[source] += len(text)
    return {source: int((1 - params.validation) * n) for source, n in lengths.items()}


def _pieces(corpus: Path, params: TokenizeParams, cuts: dict[str, int]) -> Iterator[_Piece]:
    """The documents in order, each in its split; the one that a tail begins in comes in two."""
    seen: Counter[str] = Counter()
    for source, text in read_documents(corpus):
        if params.split == "documents":
            drawn = hash_position(text, params.seed) < params.validation * 2**64
            yield _Piece("validation" if drawn else "train", source, text)
            continue
        cut = max(cuts[source] - seen[source], 0)
        seen[source] += len(text)
        if 0 < cut < len(text):
            word = _WORD_START.search(text, cut, cut + 200)
            cut = word.start() if word else cut
        if text[:cut]:
            yield _Piece("train", source, text[:cut])
        if text[cut:]:
            yield _Piece("validation", source, text[cut:], continued=cut > 0)


def _chunks(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in lists of about `_CHUNK` characters."""
    chunk: list[_Piece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece.text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _refuse_empty(
    params: TokenizeParams, corpus: Path, writers: Mapping[SplitName, _Writer]
) -> None:
    n_documents = sum(writer.total["documents"] for writer in writers.values())
    if n_documents == 0:
        raise InputError(f"{corpus}: the corpus is empty; add a source of text to download.corpus")
    for name, writer in writers.items():
        if not writer.total:
            raise InputError(
                f"{corpus}: none of the {n_documents} documents falls into the {name} split; "
                "change tokenize.validation or tokenize.seed, or set tokenize.split: tail"
            )


@dataclass(slots=True)
class _Writer:
    """A token file being written, with the counts of what is in it."""

    file: IO[bytes]
    dtype: str
    eot: int
    sources: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def total(self) -> Counter[str]:
        return sum(self.sources.values(), Counter())

    def add(self, piece: _Piece, ids: list[int]) -> None:
        """Append a piece, after `<|endoftext|>` if another one is before it."""
        if self.sources:
            ids = [self.eot, *ids]
        np.array(ids, dtype=np.dtype(self.dtype).newbyteorder("<")).tofile(self.file)
        counts = self.sources.setdefault(piece.source, Counter())
        counts.update(documents=1, bytes=len(piece.text.encode()), tokens=len(ids))

    def manifest(self, folder: Path) -> SplitManifest:
        """What the manifest says of the file, which is closed by now."""
        name = Path(self.file.name).name
        return SplitManifest(
            file=name,
            sha256=sha256_of(folder / name),
            total=Counts(**self.total),
            sources={source: Counts(**counts) for source, counts in self.sources.items()},
        )
