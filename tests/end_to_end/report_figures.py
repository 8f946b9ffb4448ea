"""Every figure of a report, computed anew from the predictions that the evaluation stored."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from report_project import Page
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from gpt.scores.bootstrap import Interval, accuracy, interval, macro_f1, mean, mean_loss
from gpt.scores.text_scores import length_statistics

SEED, RESAMPLES = 123, 2000
"""The defaults of `evaluate`."""


class Figures:
    """The page of a project, and what stands in its tables of predictions.

    Each method asserts that a part of the page says what follows from the tables, and returns how
    many figures that were.
    """

    def __init__(self, root: Path) -> None:
        self.page = Page((root / "reports/report.html").read_text(encoding="utf-8"))
        self.folder = root / "reports/evaluation/predictions"
        self.test = self.read("classifier")
        self.labels = sorted(set(self.test["actual"]))

    def read(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"{name}.csv", keep_default_na=False, dtype=str)

    def numbers(self, column: pd.Series) -> list[int]:
        return [self.labels.index(label) for label in column]

    def bases(self) -> int:
        told = self.page.rows("model", "loss")
        parts = self.page.rows("source of the text")
        n = 0
        for place, name in enumerate(("pretrain", "gpt2")):
            table = pd.read_csv(self.folder / f"{name}.csv")
            windows = table.groupby("window")[["loss", "tokens"]].sum()
            loss = of(mean_loss(windows["loss"], windows["tokens"]))
            assert told[name][:2] == [decimal(loss), decimal(math.exp(loss.value), 1)]
            n += 4
            for source, rows in table.groupby("source"):
                own = float(rows["loss"].sum() / rows["tokens"].sum())
                assert parts[str(source)][2 * place] == decimal(own)
                n += 1
        return n

    def what_fine_tuning_buys(self) -> int:
        told = {row[0]: row[1:] for row in self.page.table("model", "accuracy", "F1 (macro)")}
        most = self.test["actual"].value_counts().max() / len(self.test)
        assert told.pop("always the most frequent class")[0] == percent(most)
        n = 1
        tables = [
            (f"{model}, {method}", rows)
            for (model, method), rows in self.read("likelihood").groupby(["model", "method"])
        ]
        (tuned,) = [name for name in told if name.endswith("fine-tuned")]
        for name, rows in [*tables, (tuned, self.test)]:
            classes = [self.numbers(rows[column]) for column in ("actual", "predicted")]
            if name.endswith("few-shot"):
                name += f" ({rows['shown'].astype(int).mean():,.1f} examples)"
            scores = (accuracy(*classes), macro_f1(*classes, len(self.labels)))
            assert told.pop(name) == [percent(of(score)) for score in scores]
            n += 6
        assert not told
        return n

    def classes(self) -> int:
        told = self.page.rows("class", "precision")
        found = precision_recall_fscore_support(
            self.test["actual"], self.test["predicted"], labels=self.labels, zero_division=0
        )
        for label, *scores in zip(self.labels, *found[:3], strict=True):
            assert told[label] == [percent(float(score)) for score in scores]
        said = self.test[[f"probability_{label}" for label in self.labels]].astype(float).to_numpy()
        actual, predicted = (self.numbers(self.test[c]) for c in ("actual", "predicted"))
        right = np.array(actual) == np.array(predicted)
        bins = np.digitize(said.max(1), np.linspace(0, 1, 16)[1:-1], right=True)
        error = sum(
            (bins == i).mean() * abs(right[bins == i].mean() - said.max(1)[bins == i].mean())
            for i in set(bins)
        )
        scores = (accuracy(actual, predicted), macro_f1(actual, predicted, len(self.labels)))
        words = [percent(of(score)) for score in scores]
        area = float(roc_auc_score(actual, said[:, 1]))
        assert (
            f"On messages it never saw, {len(self.test):,} messages: accuracy {words[0]}, macro F1 "
            f"{words[1]}, area under the ROC curve {decimal(area)}, calibration error "
            f"{percent(float(error))}."
        ) in self.page.texts
        return 3 * len(self.labels) + 9

    def assistant(self) -> int:
        told = self.page.rows("", "before fine-tuning", "after")
        table = self.read("assistant")
        references = table["reference"].str.strip().tolist()
        n = 2
        for place, prefix in enumerate(("base_", "")):
            sums = table[f"{prefix}loss"].astype(float)
            tokens = table[f"{prefix}tokens"].astype(int)
            loss = of(mean_loss(sums[tokens > 0], tokens[tokens > 0]))
            lengths = length_statistics(
                table[f"{prefix}answer"].tolist(),
                references,
                at_limit=[flag == "1" for flag in table[f"{prefix}at_limit"]],
            )
            expected = {
                "loss (nats a token)": decimal(loss),
                "perplexity": decimal(math.exp(loss.value), 1),
                "words an answer": decimal(lengths["length_mean"], 1),
                "length beside the reference's": percent(lengths["length_ratio"]),
                "empty answers": percent(lengths["empty"]),
                "answers cut at the token limit": percent(lengths["at_limit"]),
            }
            for words, score in (
                ("exact match", "exact_match"),
                ("ROUGE-L", "rouge_l"),
                ("chrF", "chrf"),
            ):
                values = pd.to_numeric(table[f"{prefix}{score}"]).dropna()
                expected[words] = percent(of(mean(values)))
            assert {words: row[place] for words, row in told.items()} == expected
            n += len(expected) + 8
        short = (table["exact_match"] != "").sum()
        assert f"{len(table):,} records; exact match over the {short:,} whose" in self.page.text
        return n

    def confusion_and_what_was_most_wrong(self) -> int:
        confusion = self.read("classifier_confusion")
        confusion = confusion[confusion["part"] == "test"]
        for row in confusion.itertuples():
            pairs = (self.test["actual"] == row.actual) & (self.test["predicted"] == row.predicted)
            assert int(row.messages) == pairs.sum()
        missed = self.test[self.test["actual"] != self.test["predicted"]]
        rows = sorted(
            (float(row[f"probability_{row['actual']}"]), i) for i, row in missed.iterrows()
        )
        worst = [
            [*self.test.loc[i, ["text", "actual", "predicted"]], percent(probability)]
            for probability, i in rows[:10]
        ]
        if worst:
            told = self.page.table("message", "labelled")
            assert [row[1:] for row in told] == [row[1:] for row in worst]
        return len(confusion) + len(worst)


def of(score: object) -> Interval:
    return interval(score, resamples=RESAMPLES, seed=SEED)


def percent(value: float | Interval) -> str:
    if isinstance(value, Interval):
        return f"{percent(value.value)} ({value.low * 100:.1f}–{value.high * 100:.1f})"
    return f"{value * 100:.1f} %"


def decimal(value: float | Interval, digits: int = 3) -> str:
    if isinstance(value, Interval):
        low, high = decimal(value.low, digits), decimal(value.high, digits)
        return f"{decimal(value.value, digits)} ({low}–{high})"
    return f"{value:,.{digits}f}"
