"""Text to tokens: our tokenizer, the stage around it, and tiktoken by itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

from bench.harness import Comparison, Machine, Settings, compare_in_workers, seconds_of
from bench.worker import Alternative, Job, as_ours
from gpt.files import sha256_of
from gpt.text import RawFile, documents_in, read_documents, write_sources
from gpt.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from stages.tokenize import TokenizeParams, tokenize

STORIES = Path(__file__).parents[1] / "samples" / "stories.txt"
SEPARATOR = END_OF_TEXT


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """`Tokenizer.encode_batch` and the stage `tokenize`, end to end, against tiktoken's batch."""
    stories = list(documents_in(STORIES, _raw_file(STORIES)))
    if settings.vocabulary is None:
        tokenizer, name = train_bpe(stories, 4096), "a vocabulary learnt from it"
    else:
        tokenizer, name = load_tokenizer(settings.vocabulary), "GPT-2's vocabulary"
    size = sum(len(story.encode()) for story in stories)
    texts = stories * max(1, round((1e6 if settings.quick else 1e7) / size))
    n_bytes = sum(len(text.encode()) for text in texts)

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tokenizer.save(home / "vocabulary")
        _write_corpus(home / "corpus", texts)
        arguments = (home, settings.threads)
        runs = compare_in_workers(
            {
                "ours: Tokenizer.encode_batch": Alternative(
                    build=_encode_job, arguments=arguments, setting=as_ours
                ),
                "tiktoken": Alternative(build=_tiktoken_job, arguments=arguments),
                "ours: the stage tokenize": Alternative(
                    build=_stage_job, arguments=arguments, setting=as_ours
                ),
            },
            settings,
            agree=int.__eq__,
        )
    yield Comparison(
        title=f"Tokenization, {n_bytes / 1e6:.1f} MB of prose, {name}",
        work=n_bytes / 1e6,
        unit="MB",
        seconds=seconds_of(runs),
    )


# --- in the workers: each run gives the number of tokens ------------------------------------------


def _encode_job(home: Path, threads: int) -> Job:
    tokenizer, texts = _start(home)
    return Job(run=lambda: _count(tokenizer.encode_batch(texts, threads)))


def _tiktoken_job(home: Path, threads: int) -> Job:
    tokenizer, texts = _start(home)
    raw = _tiktoken(tokenizer)
    return Job(run=lambda: _count(raw.encode_ordinary_batch(texts, num_threads=threads)))


def _stage_job(home: Path, threads: int) -> Job:
    def run() -> int:
        figures = tokenize(
            # half and half, so that no draw leaves a split empty
            TokenizeParams(tokenizer="gpt2", validation=0.5, threads=threads),
            corpus=home / "corpus",
            vocabulary=home / "vocabulary",
            out=home / "tokens",
            metrics=home / "metrics.json",
        )
        # without the <|endoftext|> between the documents of each split
        return int(figures["tokens"] - (figures["documents"] - 2))

    return Job(run=run)


def _start(home: Path) -> tuple[Tokenizer, list[str]]:
    """The same vocabulary and the same texts in every worker."""
    texts = [text for _, text in read_documents(home / "corpus")]
    return load_tokenizer(home / "vocabulary"), texts


def _count(rows: list[list[int]]) -> int:
    return sum(map(len, rows))


def _tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """The same vocabulary under tiktoken's own pattern for GPT-2."""
    return tiktoken.Encoding(
        "raw",
        pat_str=r50k_pat_str,
        mergeable_ranks={
            tokenizer.decode_bytes([rank]): rank
            for rank in range(tokenizer.vocab_size)
            if rank != tokenizer.eot
        },
        special_tokens={END_OF_TEXT: tokenizer.eot},
    )


def _write_corpus(folder: Path, texts: list[str]) -> None:
    """A raw folder as the stage `download` leaves it."""
    folder.mkdir()
    file = folder / "stories.txt"
    file.write_text(SEPARATOR.join(texts), encoding="utf-8")
    write_sources(folder, [_raw_file(file, records=len(texts))])


def _raw_file(path: Path, records: int | None = None) -> RawFile:
    return RawFile(
        name="stories",
        file=path.name,
        format="text",
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        separator=SEPARATOR,
        records=records,
    )
