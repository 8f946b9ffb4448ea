"""A project with data: raw folders, a tokenizer, and what the stage tokenize says of a corpus."""

import json
from pathlib import Path
from typing import Any

from gpt.base.files import sha256_of, write_json
from gpt.text.records import RawFile, write_sources
from gpt.tokens.tokenizer import byte_tokenizer

HOSTILE = "x|y`z <script>alert(1)</script> [a](http://b.c) **d** $e$ &amp; www.f.g\n\n# h\x1b\u202e"


def add_messages(root: Path, rows: list[tuple[str, str]], name: str = "sms") -> None:
    folder = root / "data" / "raw" / "messages"
    folder.mkdir(parents=True)
    path = folder / "messages.tsv"
    path.write_text("".join(f"{label}\t{text}\n" for label, text in rows), encoding="utf-8")
    write_sources(folder, [raw_file(path, name, "messages", "tsv", len(rows))])


def add_instructions(root: Path, records: list[dict[str, Any]], name: str = "tasks") -> None:
    folder = root / "data" / "raw" / "instructions"
    folder.mkdir(parents=True)
    path = folder / "instructions.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    write_sources(folder, [raw_file(path, name, "instructions", "json", len(records))])


def add_corpus(root: Path, names: list[str]) -> None:
    """A source a name, of one file; all but the first are from the web."""
    folder = root / "data" / "raw" / "corpus"
    folder.mkdir(parents=True)
    files = []
    for i, name in enumerate(names):
        path = folder / f"{i}.txt"
        path.write_text(f"the text of source {i}\n" * (i + 1))
        url = f"https://example.org/{i}.txt" if i else None
        files.append(raw_file(path, name, "documents", "text", 100 * (i + 1), url))
    write_sources(folder, files)


def raw_file(
    path: Path, name: str, kind: Any, form: Any, records: int, url: str | None = None
) -> RawFile:
    return RawFile(
        name=name,
        file=path.name,
        kind=kind,
        format=form,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        url=url,
        records=records,
    )


def corpus_facts(root: Path, names: list[str], **changes: Any) -> dict[str, Any]:
    """What the stage tokenize says of the corpus of `add_corpus`."""
    sources = []
    for i, name in enumerate(names):
        path = root / "data" / "raw" / "corpus" / f"{i}.txt"
        n = 100 * (i + 1)
        sources.append(
            {
                "name": name,
                "url": f"https://example.org/{i}.txt" if i else None,
                "files": 1,
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
                "read": n,
                "kept": n - 7,
                "text_bytes": 4321 * n,
                "tokens": 1000 * n,
                "removed": {"min_chars": 3, "exact duplicate": 4},
                "changed": {"mojibake": 5},
                "train": {"documents": n - 17, "bytes": 4000 * n, "tokens": 900 * n},
                "validation": {"documents": 10, "bytes": 321 * n, "tokens": 100 * n},
                "lengths": {
                    "edges": [0, 1, 2, 4, 8, 16],
                    "counts": [0, 3, 10 * i, n // 2, 20],
                    "min": 1,
                    "median": 5.0,
                    "mean": 5.5,
                    "p95": 14.0,
                    "max": 15,
                },
                "contamination": {"documents": 2, "tokens": 40},
            }
        )
    return {
        "tokenizer": "bytes",
        "vocab_size": 257,
        "sources": sources,
        "mixture": None,
        "contamination": {
            "ngram": 50,
            "documents": 2 * len(names),
            "of": 10 * len(names),
            "tokens": 40 * len(names),
            "examples": [{"source": names[0], "text": "shared text"}],
        },
        "examples": {
            "changed": [
                {"source": names[0], "step": "mojibake", "before": "cafÃ©", "after": "café"}
            ],
            "removed": [{"source": names[0], "filter": "min_chars", "text": "short"}],
        },
        "longest": [{"source": names[0], "tokens": 15, "bytes": 60, "text": "a long text"}],
        "oddest": [{"source": names[0], "bytes_per_token": 1.03, "tokens": 7, "text": "§§§"}],
        **changes,
    }


def add_tokens(root: Path, facts: dict[str, Any]) -> None:
    byte_tokenizer().save(root / "data" / "tokens")
    write_json(root / "reports" / "tokenize" / "corpus.json", facts)


def make_data_project(root: Path, names: list[str], **changes: Any) -> dict[str, Any]:
    """All of it; the facts of the corpus."""
    add_corpus(root, names)
    add_messages(
        root,
        [
            ("ham", "See you at noon then"),
            ("ham", "see YOU at  noon then"),
            ("ham", "Yes"),
            ("ham", "Yes"),
            ("spam", "yes"),
            ("spam", "WIN £££ now at www.example.org!!!"),
        ],
    )
    record = {"instruction": "Name a colour", "input": "", "output": "Red"}
    add_instructions(
        root,
        [
            record,
            record,
            {**record, "instruction": "name a Colour", "output": "Blue"},
            {"instruction": "Translate", "input": "Guten Tag", "output": "Good day"},
        ],
    )
    facts = corpus_facts(root, names, **changes)
    add_tokens(root, facts)
    return facts
