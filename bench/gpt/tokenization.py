"""Text to tokens: our tokenizer, the stage around it, tiktoken by itself; and growing texts."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

from bench.harness import Comparison, Machine, Settings, compare_in_workers, seconds_of
from bench.worker import Alternative, Job, as_ours
from gpt.base.files import sha256_of
from gpt.text.records import RawFile, documents_in, read_documents, write_sources
from gpt.tokens.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from stages.tokenize import TokenizeParams, tokenize

STORIES = Path(__file__).parents[2] / "samples" / "stories.txt"
SEPARATOR = END_OF_TEXT


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """The stage `tokenize`, end to end, against tiktoken's batch; then by itself, up to 1 GB."""
    stories = list(documents_in(STORIES, _raw_file(STORIES)))
    if settings.vocabulary is None:
        tokenizer, name = train_bpe(stories, 4096), "a vocabulary learnt from it"
    else:
        tokenizer, name = load_tokenizer(settings.vocabulary), "GPT-2's vocabulary"
    size = sum(len(story.encode()) for story in stories)
    texts = stories * max(1, round((1e6 if settings.quick else 4e7) / size))
    random.Random(123).shuffle(texts)
    n_bytes = sum(len(text.encode()) for text in texts)

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tokenizer.save(home / "vocabulary")
        _write_corpus(home / "corpus", texts)
        arguments = (home, settings.threads)
        runs = compare_in_workers(
            {
                "ours: the stage tokenize": Alternative(
                    build=_stage_job, arguments=arguments, setting=as_ours
                ),
                "tiktoken": Alternative(build=_tiktoken_job, arguments=arguments),
                "ours: Tokenizer.encode_batch": Alternative(
                    build=_encode_job, arguments=arguments, setting=as_ours
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
    yield _at_scale(stories, tokenizer, name, settings)


def _at_scale(
    stories: Sequence[str], tokenizer: Tokenizer, name: str, settings: Settings
) -> Comparison:
    """The stage on texts of growing size, each in a process of its own that is watched."""
    megabytes = (0.5, 1) if settings.quick else (1000, 100, 10)
    labels = {f"{size:,} MB": size for size in megabytes}
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    memory = dict.fromkeys(labels, 0)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tokenizer.save(home / "vocabulary")
        for label, size in labels.items():
            for _ in range(settings.rounds if size < 1000 else 1):
                _write_shuffled(home / "corpus", stories, size * 1e6)
                took, peak = _watched(home, settings.threads)
                seconds[label].append(took / size)
                memory[label] = max(memory[label], peak)
                shutil.rmtree(home / "corpus")
                shutil.rmtree(home / "tokens")
    most = max(map(len, seconds.values()))
    return Comparison(
        title=f"The stage tokenize on more and more text, {name}",
        work=1,
        unit="MB",
        seconds={label: (each * most)[:most] for label, each in seconds.items()},
        columns={
            "most memory of all its processes": {
                label: f"{peak / 1e6:,.0f} MB" for label, peak in memory.items()
            }
        },
        note=(
            "Stories repeated and shuffled with a seed. Memory is the highest sum of the "
            "processes' proportional shares (PSS), looked at ten times a second. 1,000 MB ran once."
        ),
    )


_STAGE = """
import sys, time
from pathlib import Path
from stages.tokenize import TokenizeParams, tokenize
if __name__ == "__main__":
    home, started = Path(sys.argv[1]), time.perf_counter()
    tokenize(
        TokenizeParams(tokenizer="gpt2", workers=int(sys.argv[2])),
        corpus=home / "corpus", vocabulary=home / "vocabulary", out=home / "tokens",
        metrics=home / "metrics.json", report=home / "report.json",
    )
    print(time.perf_counter() - started)
"""


def _watched(home: Path, workers: int) -> tuple[float, int]:
    """The seconds that the stage took, and the most bytes that it held with all its workers."""
    script = home / "stage.py"  # spawned workers import it again
    script.write_text(_STAGE)
    process = subprocess.Popen(
        [sys.executable, str(script), str(home), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2])),
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _held(process.pid))
        time.sleep(0.1)
    assert process.stdout is not None
    return float(process.stdout.read()), peak


def _held(pid: int) -> int:
    """The proportional shares of memory of a process and its children, together."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for each in [parent, *parent.children(recursive=True)]:
            total += each.memory_full_info().pss
    except psutil.NoSuchProcess:  # it came to its end meanwhile
        return 0
    return total


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
            TokenizeParams(tokenizer="gpt2", validation=0.5, workers=threads),
            corpus=home / "corpus",
            vocabulary=home / "vocabulary",
            out=home / "tokens",
            metrics=home / "metrics.json",
            report=home / "report.json",
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


def _write_shuffled(folder: Path, stories: Sequence[str], size: float) -> None:
    """A raw folder of about `size` bytes: the stories again and again, shuffled each time."""
    folder.mkdir()
    file, order = folder / "stories.txt", random.Random(123)
    texts, written = list(stories), 0
    with file.open("w", encoding="utf-8") as opened:
        while written < size:
            order.shuffle(texts)
            for text in texts:
                written += opened.write(f"{text}{SEPARATOR}")
    write_sources(folder, [_raw_file(file)])


def _raw_file(path: Path, records: int | None = None) -> RawFile:
    return RawFile(
        name="stories",
        file=path.name,
        kind="documents",
        format="text",
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        separator=SEPARATOR,
        records=records,
    )
