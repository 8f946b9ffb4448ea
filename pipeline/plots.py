"""Pictures of a stage for its MLflow run, drawn from what the stage wrote under `reports/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from gpt.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (7.0, 4.2)  # inches
_TITLES = {
    "pretrain": "Pretraining",
    "finetune_classifier": "Fine-tuning the classifier",
    "finetune_instruct": "Fine-tuning the assistant",
}


def draw_curves(history: Path, stage: str, folder: Path) -> list[Path]:
    """Loss and learning rate over the steps (and accuracy, where it was measured), as PNG files.

    Args:
        history: `reports/STAGE/history.csv`, a row an evaluation.
        stage: whose history it is, for the titles.
        folder: where the pictures go.
    """
    frame = pd.read_csv(history)
    title = _TITLES.get(stage, stage)
    pictures = [
        _curve(folder / f"{measure}.png", f"{title}: {measure}", unit, frame, measure)
        for measure, unit in (("loss", "nats per target"), ("accuracy", "share of texts"))
        if f"validation_{measure}" in frame
    ]

    def learning_rate(axes: Axes) -> None:
        axes.plot(frame["step"], frame["learning_rate"], marker=".")
        axes.set(xlabel="optimizer step", ylabel="learning rate")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)

    pictures.append(_draw(folder / "learning_rate.png", f"{title}: learning rate", learning_rate))
    return pictures


def draw_confusion(predictions: Path, picture: Path) -> Path:
    """The confusion matrix of a table of predictions: columns `actual` and `predicted`."""
    frame = pd.read_csv(predictions, dtype=str, keep_default_na=False)
    labels = sorted({*frame["actual"], *frame["predicted"]})
    counts = (
        pd.crosstab(frame["actual"], frame["predicted"])
        .reindex(index=labels, columns=labels, fill_value=0)
        .to_numpy()
    )

    def cells(axes: Axes) -> None:
        axes.imshow(counts, cmap="Blues", vmin=0)
        for row, column in ((i, j) for i in range(len(labels)) for j in range(len(labels))):
            count = counts[row, column]
            colour = "white" if count > counts.max() / 2 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, size=14)
        axes.set(xticks=range(len(labels)), yticks=range(len(labels)))
        axes.set_xticklabels(labels)
        axes.set_yticklabels(labels)
        axes.set(xlabel="predicted", ylabel="actual")
        axes.grid(False)

    right = int(counts.trace())
    title = f"Classifier on held-out messages: {right} of {len(frame)} right"
    return _draw(picture, title, cells)


def _curve(path: Path, title: str, unit: str, frame: pd.DataFrame, measure: str) -> Path:
    def lines(axes: Axes) -> None:
        for split in ("train", "validation"):
            if (column := f"{split}_{measure}") in frame:
                axes.plot(frame["step"], frame[column], marker=".", label=split)
        axes.set(xlabel="optimizer step", ylabel=f"{measure} ({unit})")
        axes.legend(frameon=False)

    return _draw(path, title, lines)


def _draw(path: Path, title: str, content: Callable[[Axes], None]) -> Path:
    # a figure of our own instead of pyplot's: no global state, no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    content(axes)
    axes.set_title(title)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return path
