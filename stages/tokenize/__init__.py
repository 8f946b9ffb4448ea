"""Turn the corpus into token files for training and validation.

Text is cleaned and encoded in blocks by worker processes (`blocks`); then it is known how long each
document is, which ones repeat others, and so which split each belongs to (`splits`); then the
token files are
copied together from the blocks (`shards`) and looked through for validation text (`contamination`).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError
from gpt.base.events import Log, Message, Progress, discard
from gpt.base.files import whole_directory, write_json
from gpt.clean.cleaning import Cleaner, CleanParams
from gpt.clean.duplicates import duplicates, near_duplicates
from gpt.text.records import RawFile, hash_position, read_documents, read_sources
from gpt.tokens.token_files import (
    Counts,
    Manifest,
    Shard,
    SplitManifest,
    SplitName,
    open_tokens,
    token_dtype,
)
from gpt.tokens.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from stages.tokenize import blocks, contamination, shards, splits
from stages.tokenize.blocks import Cleaning, Table
from stages.tokenize.facts import facts
from stages.tokenize.splits import Mixture, Part, Share
from stages.tokenize.workers import Workers, available_cores

_SMALL = 1 << 23
"""Below so many bytes of raw text starting worker processes takes longer than they save."""

_NGRAM = {"gpt2": 13, "bpe": 13, "bytes": 50}


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class TokenizeParams:
    """How text becomes tokens.

    Attributes:
        tokenizer: `gpt2` is the published vocabulary, `bpe` is learnt from the training split,
            `bytes` are bytes.
        vocab_size: of a `bpe`, `<|endoftext|>` among them.
        bpe_sample: characters of training text that a `bpe` is learnt from, at most; of each source
            as much as its share of the text, or of the mixture.
        clean: what is done to each document, and which are left out.
        validation: the share that is kept for validation.
        split: `documents` draws whole documents by a hash of their text, so that new documents
            never move old ones; `tail` keeps the last tokens of each source.
        seed: of the draws.
        mixture: how much of the training tokens comes from which source; without it, all there is,
            once.
        contamination_ngram: tokens in a row that validation and training text must share to be
            counted; None is 13, or 50 of the tokenizer `bytes`; 0 is not looking.
        shard_tokens: about so many tokens a file.
        workers: processes that clean and encode; 0 means one for each core. The tokens do not
            depend on it.
    """

    tokenizer: Literal["gpt2", "bpe", "bytes"] = "gpt2"
    vocab_size: Annotated[int, Field(ge=257, le=1 << 24)] = 4096
    bpe_sample: Annotated[int, Field(gt=0, le=1 << 50)] = 100_000_000
    clean: CleanParams = CleanParams()
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split: Literal["documents", "tail"] = "documents"
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 123
    mixture: Mixture | None = None
    contamination_ngram: Annotated[int, Field(ge=0, le=1000)] | None = None
    shard_tokens: Annotated[int, Field(ge=1024, le=1 << 40)] = 1 << 26
    workers: Annotated[int, Field(ge=0, le=1024)] = 0

    @model_validator(mode="after")
    def _ngrams_of_two(self) -> TokenizeParams:
        if self.contamination_ngram == 1:
            raise ValueError("contamination_ngram: one token is no run of tokens; 0 is not looking")
        return self

    @property
    def ngram(self) -> int:
        """Tokens of an n-gram that is looked for; 0 where none is."""
        if self.contamination_ngram is None:
            return _NGRAM[self.tokenizer]
        return self.contamination_ngram


def tokenize(
    params: TokenizeParams,
    *,
    corpus: Path,
    vocabulary: Path | None,
    out: Path,
    metrics: Path,
    report: Path,
    state: Path | None = None,
    log: Log = discard,
) -> dict[str, float]:
    """Write the folder of token files `out`, with its tokenizer and its manifest.

    `<|endoftext|>` stands between documents. No more than a few blocks of text are in memory at a
    time, and a few numbers for each document. A run that was cut off leaves its blocks in `state`,
    where the next one finds them.

    Args:
        params: the tokenizer, the cleaning, the split and the mixture.
        corpus: the raw folder of documents.
        vocabulary: the folder of the published vocabulary, for the tokenizer `gpt2`.
        out: written: `SPLIT-NNNNN.bin`, `manifest.json`, `vocab.json`, `merges.txt`.
        metrics: written: the figures that are returned, as JSON.
        report: written: the facts of the data report, as JSON.
        state: a folder for what is done so far; it must belong to these params and this corpus.
        log: told of the progress.

    Returns:
        Documents, bytes, tokens and bytes per token, in all and of each split; what was read and
        removed; and what validation shares with training. A document that a tail begins in counts
        in both splits, and once in all.

    Raises:
        InputError: the corpus or a split of it is empty, or the vocabulary cannot be read.
        RunError: a worker process was killed.
    """
    files = read_sources(corpus)
    names = list(dict.fromkeys(file.name for file in files))
    if params.mixture and (problem := splits.weights_problem(params.mixture.weights, names)):
        raise InputError(f"tokenize.mixture.weights: {problem}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(whole_directory(out))
        if state is None:
            out.parent.mkdir(parents=True, exist_ok=True)
            state = Path(
                stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent, prefix=".blocks-"))
            )
        state.mkdir(parents=True, exist_ok=True)
        for path in state.glob("*.partial"):  # what a killed process was writing
            path.unlink()
        tokenizer = _tokenizer(params, corpus, files, names, vocabulary, state, log)
        n_workers = params.workers or available_cores()
        if sum(file.bytes for file in files) < _SMALL:
            n_workers = 1
        workers = stack.enter_context(
            Workers(n_workers, blocks.prepare, state / "tokenizer", params.clean, params.seed)
        )
        n_blocks = _encode(corpus, files, names, state, workers, log)
        if n_blocks == 0:
            raise InputError(
                f"{corpus}: the corpus is empty; add a source of text to download.corpus"
            )
        table, cleaning = blocks.read_tables(state, n_blocks)
        _mark_duplicates(table, params.clean, cleaning, log)
        parts, shares = _split(params, table, names, state, tokenizer, corpus, log)
        plans = list(shards.plan(parts, table, names, params.shard_tokens))
        manifest = _write(plans, state, folder, tokenizer, workers, log)
        tokenizer.save(folder)
        overlap = None
        if params.ngram:
            overlap = _overlap(params.ngram, folder, manifest, state, tokenizer, workers, log)
        said = facts(files, names, table, state, cleaning, manifest, shares, overlap, tokenizer) | {
            "tokenizer": params.tokenizer,
            "clean": asdict(params.clean),
        }
    figures = _figures(said, manifest, overlap[1] if overlap else None)
    figures["documents"] -= sum(int(part.start[0] > 1) for part in parts)  # in both splits
    if overlap and figures["contaminated_documents"]:
        log(
            Message(
                f"tokenize: {int(figures['contaminated_documents']):,} of {overlap[1].of:,} "
                f"validation documents share {params.ngram} tokens in a row with training"
            )
        )
    write_json(report, said)
    write_json(metrics, figures)
    return figures


# --- the tokenizer --------------------------------------------------------------------------------


def _tokenizer(
    params: TokenizeParams,
    corpus: Path,
    files: Sequence[RawFile],
    names: Sequence[str],
    vocabulary: Path | None,
    state: Path,
    log: Log,
) -> Tokenizer:
    """The tokenizer, which lies in `state` then for the workers; a learnt one is learnt once."""
    place = state / "tokenizer"
    if params.tokenizer == "bpe" and (place / "vocab.json").is_file():
        return load_tokenizer(place)
    if params.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    elif params.tokenizer == "bpe":
        log(Message(f"tokenize: learning a vocabulary of {params.vocab_size} from the corpus"))
        tokenizer = train_bpe(_sample(params, corpus, names), params.vocab_size)
    elif vocabulary is None:
        raise InputError(
            "tokenize.tokenizer: gpt2 needs the folder of its vocabulary; name it, or choose "
            "bpe or bytes"
        )
    else:
        tokenizer = load_tokenizer(vocabulary)
    with whole_directory(place) as folder:
        tokenizer.save(folder)
    return tokenizer


def _sample(params: TokenizeParams, corpus: Path, names: Sequence[str]) -> Iterator[str]:
    """Cleaned training text to learn a vocabulary from; validation stays unseen by all learning."""
    lengths = dict.fromkeys(names, 0)
    for name, text in read_documents(corpus):
        lengths[name] += len(text)
    weights = params.mixture.weights if params.mixture else lengths
    scale = params.bpe_sample / (sum(weights.values()) or 1)
    share = {name: min(1.0, scale * weights[name] / (lengths[name] or 1)) for name in names}
    clean = Cleaner(params.clean)
    held_out = int(params.validation * 2**64) if params.split == "documents" else 0
    seen = dict.fromkeys(names, 0)
    for name, text in read_documents(corpus):
        seen[name] += len(text)
        if params.split == "tail":
            over = seen[name] - int((1 - params.validation) * lengths[name])
            text = text[: len(text) - over] if over > 0 else text
        cleaned = clean(text)
        if (
            cleaned.removed is None
            and hash_position(cleaned.text, params.seed) >= held_out
            and hash_position(cleaned.text, params.seed, "bpe") < share[name] * 2**64
        ):
            yield cleaned.text


# --- the steps ------------------------------------------------------------------------------------


def _encode(
    corpus: Path,
    files: Sequence[RawFile],
    names: Sequence[str],
    state: Path,
    workers: Workers,
    log: Log,
) -> int:
    """Leave the blocks of the corpus in `state`; return how many there are."""
    total = sum(file.records or 0 for file in files)
    number_of = {name: number for number, name in enumerate(names)}
    documents = ((number_of[name], text) for name, text in read_documents(corpus))
    pieces = ((state, number, *block) for number, block in enumerate(blocks.cut_blocks(documents)))
    n_blocks = done = kept = 0
    for n_documents, was_there in workers.map(blocks.encode, pieces):
        n_blocks += 1
        if kept and not was_there:
            log(Message(f"tokenize: continuing after {kept:,} documents"))
        kept = kept + n_documents if was_there else 0
        done += n_documents
        log(Progress("tokenize", done, total, "document"))
    return n_blocks


def _mark_duplicates(table: Table, params: CleanParams, cleaning: Cleaning, log: Log) -> None:
    """Take out the documents that repeat an earlier one."""
    finders: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = []
    if params.exact_duplicates:
        finders.append(("exact duplicate", lambda rows: duplicates(table.hash[rows])))
    if (threshold := params.near_duplicates) is not None:
        log(Message("tokenize: looking for near-duplicates"))
        finders.append(
            ("near duplicate", lambda rows: near_duplicates(table.signature[rows], threshold))
        )
    for name, find in finders:
        rows = np.flatnonzero(table.kept)
        again = rows[find(rows) >= 0]
        table.kept[again] = False
        for source, n in Counter(table.source[again].tolist()).items():
            cleaning.add("removed", source, name, n)


def _split(
    params: TokenizeParams,
    table: Table,
    names: Sequence[str],
    state: Path,
    tokenizer: Tokenizer,
    corpus: Path,
    log: Log,
) -> tuple[list[Part], dict[str, Share] | None]:
    if params.split == "documents":
        parts = splits.by_hash(table, len(names), params.validation)
    else:
        parts = splits.by_tail(
            table,
            len(names),
            params.validation,
            lambda row, at: _word_start(blocks.document_ids(state, table, row), at, tokenizer),
        )
    n_documents = int(table.kept.sum())
    if n_documents == 0:
        raise InputError(
            f"{corpus}: none of the {len(table)} documents is left; clean less (tokenize.clean)"
        )
    for name in ("train", "validation"):
        if not any(part.split == name for part in parts):
            raise InputError(
                f"{corpus}: none of the {n_documents} documents falls into the {name} split; "
                "change tokenize.validation or tokenize.seed, or set tokenize.split: tail"
            )
    if not params.mixture:
        return splits.without_first_end(parts), None
    parts, shares = splits.mix(parts, names, params.mixture, table, params.seed)
    drawn = sum(share.tokens for share in shares.values())
    wanted = params.mixture.tokens
    if wanted and drawn < wanted - len(names):
        log(
            Message(
                f"tokenize: {drawn:,} training tokens instead of {wanted:,}: with more, a "
                "source would be seen more often than tokenize.mixture.max_epochs",
                level="warning",
            )
        )
    return parts, shares


def _word_start(ids: np.ndarray, at: int, tokenizer: Tokenizer) -> int:
    """The first place from `at` on where a word begins, so that a cut there halves none.

    Where none begins soon, the next place where a character does.
    """
    near = ids[at - 1 : at + 200].tolist()
    pieces = [tokenizer.decode_bytes([i]) for i in near]
    for place in range(1, len(pieces)):
        after = b"".join(pieces[place : place + 2])[1:2]
        if pieces[place][:1] == b" " and after.strip() and pieces[place - 1][-1:].strip():
            return at - 1 + place
    for place in range(1, len(pieces)):
        if pieces[place][0] & 0xC0 != 0x80:  # no later byte of a UTF-8 character
            return at - 1 + place
    return len(ids)


def _write(
    plans: Sequence[tuple[SplitName, shards.ShardPlan]],
    state: Path,
    folder: Path,
    tokenizer: Tokenizer,
    workers: Workers,
    log: Log,
) -> Manifest:
    """Write the shards and the manifest."""
    dtype = token_dtype(tokenizer.vocab_size)
    written: dict[SplitName, list[Shard]] = {"train": [], "validation": []}
    pieces = ((state, dtype, folder, plan) for _, plan in plans)
    for done, shard in enumerate(workers.map(shards.write, pieces)):
        written[plans[done][0]].append(shard)
        log(Progress("tokenize: writing", done + 1, len(plans), "file"))
    manifest = Manifest(
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.hash,
        splits={split: SplitManifest(shards=tuple(each)) for split, each in written.items()},
    )
    write_json(folder / "manifest.json", TypeAdapter(Manifest).dump_python(manifest))
    return manifest


def _overlap(
    n: int,
    folder: Path,
    manifest: Manifest,
    state: Path,
    tokenizer: Tokenizer,
    workers: Workers,
    log: Log,
) -> tuple[int, contamination.Overlap, Any]:
    """Look for the validation text in the training text."""
    ids = open_tokens(folder, "validation")
    held = contamination.Held(ids[: contamination.MOST_TOKENS + 1], tokenizer.eot, n)
    hashes = state / "held.npy"
    held.save(hashes)
    found = np.zeros(len(held.hashes), bool)
    train = manifest.splits["train"].shards
    pieces = ((hashes, folder / shard.file, manifest.dtype, n) for shard in train)
    for done, places in enumerate(workers.map(contamination.found, pieces), start=1):
        found[places] = True
        log(Progress("tokenize: comparing the splits", done, len(train), "file"))
    return n, held.overlap(found), ids


def _figures(
    said: dict[str, Any], manifest: Manifest, overlap: contamination.Overlap | None
) -> dict[str, float]:
    read, kept = (sum(source[key] for source in said["sources"]) for key in ("read", "kept"))
    figures: dict[str, float] = {
        "vocab_size": manifest.vocab_size,
        "read_documents": read,
        "removed_documents": read - kept,
    }
    totals = {f"{name}_": split.total for name, split in manifest.splits.items()}
    for prefix, count in {"": sum(totals.values(), Counts()), **totals}.items():
        figures |= {
            f"{prefix}documents": count.documents,
            f"{prefix}bytes": count.bytes,
            f"{prefix}tokens": count.tokens,
            f"{prefix}bytes_per_token": count.bytes / count.tokens,
        }
    if overlap is not None:
        figures["contaminated_documents"] = len(overlap.documents)
        figures["contaminated_tokens"] = int(overlap.tokens.sum())
    return figures
