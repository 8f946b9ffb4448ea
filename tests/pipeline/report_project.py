"""A project whose pipeline ran to its end: figures, answers, verdicts and curves, no models."""

import json
import zlib
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from data_project import add_corpus, add_instructions, add_messages

from gpt.base.files import sha256_of, write_json

BASES = ("pretrain", "gpt2")
MD5 = "0123456789abcdef0123456789abcdef"


def figure(name: str) -> float:
    """A figure of its own for every name, in 0.2 … 0.8."""
    return 0.2 + 0.6 * zlib.crc32(name.encode()) / 2**32


def _measured(model: str, names: Iterable[str]) -> dict[str, float]:
    """Figures with their intervals."""
    found = {}
    for name in names:
        value = figure(f"{model} {name}")
        found |= {name: value, f"{name}_low": value - 0.0423, f"{name}_high": value + 0.0317}
    return found


def _plain(model: str, names: Iterable[str]) -> dict[str, float]:
    return {name: figure(f"{model} {name}") for name in names}


def evaluation(labels: Sequence[str], sources: Sequence[str]) -> dict[str, dict[str, float]]:
    """`reports/evaluation/metrics.json`."""
    figures: dict[str, dict[str, float]] = {}
    for name in BASES:
        methods = [f"{m}_shot_{s}" for m in ("zero", "few") for s in ("accuracy", "f1_macro")]
        parts = [f"{score}/{source}" for score in ("loss", "bits_per_byte") for source in sources]
        figures[name] = {
            **_measured(name, ["loss", "bits_per_byte", *methods]),
            **_plain(name, ["untrained_loss", *parts]),
            "perplexity": 100 * figure(f"{name} perplexity"),
            "few_shot_examples": 3.7,
        }
    each = [f"{score}_{label}" for score in ("precision", "recall", "f1") for label in labels]
    plain = ["majority_accuracy", "precision_macro", "recall_macro", "roc_auc", "calibration_error"]
    figures["classifier"] = {
        **_measured("classifier", ["accuracy", "f1_macro"]),
        **_plain("classifier", [*plain, *each]),
        **_plain("classifier", ["validation_accuracy", "train_accuracy"]),
        "rows": 260.0,
    }
    scores = ["loss", "exact_match", "rouge_l", "chrf"]
    figures["assistant"] = {"records": 9.0, "short_records": 5.0}
    for prefix in ("", "base_"):
        figures["assistant"] |= {
            **_measured("assistant", [prefix + name for name in scores]),
            **_plain("assistant", [f"{prefix}empty", f"{prefix}at_limit", f"{prefix}length_ratio"]),
            f"{prefix}perplexity": 100 * figure(f"{prefix}perplexity"),
            f"{prefix}length_mean": 10 * figure(f"{prefix}length_mean"),
        }
    return figures


def decision(model: str, **changes: Any) -> dict[str, Any]:
    """One of `.pipeline/promotion.json`."""
    return {
        "model": model,
        "version": 4,
        "champion": 3,
        "score": "accuracy",
        "new": 0.974,
        "old": 0.961,
        "difference": 0.013,
        "low": 0.0021,
        "high": 0.0252,
        "examples": 260,
        "promoted": True,
        "why": "the interval of the difference lies above 0",
        **changes,
    }


def make_report_project(
    root: Path,
    *,
    labels: Sequence[str] = ("ham", "spam"),
    sources: Sequence[str] = ("python-docs", "stories"),
    text: str = "",
) -> dict[str, dict[str, float]]:
    """All of it but promotion, judge and MLflow; `text` is put into whatever comes from outside.

    Returns:
        The figures of the evaluation.
    """
    figures = evaluation(labels, sources)
    folder = root / "reports" / "evaluation"
    write_json(folder / "metrics.json", figures)
    predictions = folder / "predictions"
    predictions.mkdir()
    pd.DataFrame(
        [
            {
                "instruction": f"Do task {i}.{text}",
                "input": "",
                "reference": f"reference {i}{text}",
                "answer": f"answer {i}\nin two lines{text}",
                "base_answer": f"[base] {i} " * 100 + text,
            }
            for i in range(9)
        ]
    ).to_csv(predictions / "assistant.csv", index=False)
    pd.DataFrame(
        [
            {
                "part": part,
                "text": f"{part} message {i}{text}",
                "actual": labels[0],
                "predicted": labels[-1],
                "probability_actual": 0.01 * (i + 1),
            }
            for part in ("test", "validation")
            for i in range(12)
        ]
    ).to_csv(predictions / "classifier_most_wrong.csv", index=False)
    pd.DataFrame(
        [
            {"part": part, "actual": actual, "predicted": predicted, "messages": 7}
            for part in ("test", "validation")
            for actual in labels
            for predicted in labels
        ]
    ).to_csv(predictions / "classifier_confusion.csv", index=False)
    _add_stages(root)
    add_corpus(root, [f"{source}{text}" for source in sources])
    add_messages(root, [(label, "a message") for label in labels])
    add_instructions(root, [{"instruction": "Do it.", "input": "", "output": "Done."}])
    (root / "LICENSE").write_text("MIT License\n\nCopyright\n")
    return figures


def _add_stages(root: Path) -> None:
    """Results, curves, notes of runs, and `dvc.lock`."""
    header = "step,train_loss,validation_loss,learning_rate"
    for stage, results in (
        ("pretrain", {"parameters": 1334016, "tokens": 614400}),
        ("finetune_classifier", {"rows_train": 907.0, "contaminated_test": 2.0}),
        ("finetune_instruct", {"records_train": 601.0}),
    ):
        write_json(root / "reports" / stage / "metrics.json", results)
        history = root / "reports" / stage / "history.csv"
        history.write_text(f"{header}\n10,2.5,2.6,0.001\n20,2.1,2.3,0.0005\n")
        add_note(root, stage)
    (root / "dvc.yaml").write_text("stages: {}\n")
    path = root / "dvc.lock"
    stages: dict[str, Any] = {}
    for stage, inputs, output, base in (
        ("pretrain", ["data/tokens"], "models/pretrain", None),
        ("finetune_classifier", ["data/raw/messages", "models/gpt2"], "models/classifier", "gpt2"),
    ):
        section = {"base": base} if base else {"eval_windows": 64}
        stages[stage] = {
            "deps": [
                {"path": path, "md5": f"{MD5}.dir"} for path in [*inputs, "gpt/model/model.py"]
            ],
            "params": {"params.yaml": {stage: section}},
            "outs": [{"path": output, "md5": f"{MD5[::-1]}.dir"}],
        }
    path.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def add_note(root: Path, stage: str, seconds: float = 83.4, **more: Any) -> None:
    """`.pipeline/runs/STAGE.json`."""
    note = {"seconds": seconds, "status": "FINISHED", "run_id": "0", **more}
    write_json(root / ".pipeline" / "runs" / f"{stage}.json", note)


def add_verdicts(root: Path, *decisions: dict[str, Any]) -> None:
    write_json(root / ".pipeline" / "promotion.json", {"decisions": list(decisions)})


def add_judge(root: Path, model: str = "a-judge") -> None:
    counts = {"judged": 70, "unparsable": 1, "failed": 3, "n": 74}
    summaries = {
        "assistant": {"mean": 61.27, **counts},
        "base": {**counts, "mean": None, "judged": 0, "unparsable": 71},
    }
    judge = {"model": model, "prompt": "ab" * 32}
    answers = sha256_of(root / "reports/evaluation/predictions/assistant.csv")
    said = {"answers": answers, "judge": judge, "summaries": summaries}
    write_json(root / "reports" / "judge" / "summary.json", said)


def add_champion(root: Path, text: str = "", version: int = 3) -> None:
    """The champion's answers to all but the last of the test records."""
    rows = [
        {
            "example": i,
            "asked": f"Do task {i}.{text}",
            "answer": f"champion says {i}{text}",
            "champion": version,
        }
        for i in range(8)
    ]
    (root / ".pipeline" / "champion").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(root / ".pipeline" / "champion" / "assistant.csv", index=False)


class Page(HTMLParser):
    """What a browser makes of the page: its tags, pictures, links, tables, and the text in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.pictures += [given["src"] or ""] if tag == "img" else []
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src", "action", "srcset")
        ]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "every tag is closed in its place"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data
        if data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        """All that is read, a piece a line."""
        return "\n".join(self.texts)

    def table(self, *columns: str) -> list[list[str]]:
        """The rows of the table with these first columns, without its head."""
        for head, *rows in self.tables:
            if head[: len(columns)] == list(columns):
                return rows
        raise AssertionError(f"no table with the columns {columns}")

    def rows(self, *columns: str) -> dict[str, list[str]]:
        """The same by the first cell of each row."""
        return {row[0]: row[1:] for row in self.table(*columns)}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
