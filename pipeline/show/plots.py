"""Pictures of a stage for its MLflow run, drawn from what the stage wrote under `reports/`."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt.base.files import whole_file
from pipeline.show.markdown import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7.0, 4.2)  # inches
_MOST_BARS = 20
_MOST_PANELS = 12
_LABEL_LENGTH = 24  # of a source or class in a picture
_MOST_NAMED = 50  # classes whose names and numbers a confusion matrix has room for
_MOST_LETTERS = 40  # of all classes together, below a confusion matrix
_SPLITS = {"train": "train_{}", "validation": "validation_{}"}
_CURVES: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "loss": ("loss", "nats per target", _SPLITS),
    "accuracy": ("accuracy", "share of texts", _SPLITS),
    "reward_margin": ("reward margin", "nats", _SPLITS),
    "reward_accuracy": ("reward accuracy", "share of pairs", _SPLITS),
    # of both answers: a margin may grow while the chosen one's reward falls as well
    "rewards": (
        "rewards",
        "nats",
        {"chosen": "validation_reward_chosen", "rejected": "validation_reward_rejected"},
    ),
    "learning_rate": ("learning rate", "", {"learning rate": "learning_rate"}),
}
"""The pictures of a history: what is drawn, its unit, and each line's label and column."""


def draw_curves(
    history: Path, title: str, folder: Path, *, learning_rate: bool = True
) -> list[Path]:
    """Loss and learning rate over the steps, and what else was measured, as PNG files.

    Args:
        history: `reports/STAGE/history.csv`, a row an evaluation.
        title: what each picture's title begins with.
        folder: where the pictures go.
        learning_rate: draw it too.
    """
    import pandas as pd

    frame = pd.read_csv(history)
    pictures = []
    for stem, (name, unit, lines) in _CURVES.items():
        columns = {label: column.format(stem) for label, column in lines.items()}
        wanted = learning_rate or stem != "learning_rate"
        if not wanted or list(columns.values())[-1] not in frame:
            continue
        pictures.append(folder / f"{stem}.png")
        with _picture(pictures[-1], f"{title}: {name}") as axes:
            for label, column in columns.items():
                if column in frame:
                    axes.plot(frame["step"], frame[column], marker=".", label=label)
            axes.set(xlabel="optimizer step", ylabel=f"{name} ({unit})" if unit else name)
            axes.legend(frameon=False)
    return pictures


def draw_confusion(
    confusion: Path, folder: Path, *, parts: Collection[str] = ("test", "validation", "train")
) -> list[Path]:
    """Which classes were taken for which, a picture a part of the data.

    Args:
        confusion: a table of `part`, `actual`, `predicted` and how many `messages`; a pair that
            is not in it never occurred.
        folder: where the pictures go: `confusion_matrix.png` is of the test part.
        parts: those that are drawn.
    """
    import pandas as pd

    frame = pd.read_csv(confusion, dtype=str, keep_default_na=False)
    pictures = []
    for part, rows in frame[frame["part"].isin(parts)].groupby("part", sort=False):
        name = "confusion_matrix" if part == "test" else f"confusion_matrix_{part}"
        labels = list(dict.fromkeys([*rows["actual"], *rows["predicted"]]))
        table = rows.assign(n=rows["messages"].astype(int)).pivot_table(
            index="actual", columns="predicted", values="n", aggfunc="sum"
        )
        counts = table.reindex(index=labels, columns=labels).fillna(0).to_numpy(int)
        what = "held-out messages" if part == "test" else f"the {part} part"
        title = f"Classifier on {what}: {counts.trace()} of {counts.sum()} right"
        pictures.append(folder / f"{name}.png")
        with _picture(pictures[-1], title) as axes:
            _show_counts(axes, labels, counts)
    return pictures


def _show_counts(axes: Axes, labels: Sequence[str], counts: np.ndarray) -> None:
    axes.imshow(counts, cmap="Blues", vmin=0)
    axes.set(xlabel="predicted", ylabel="actual")
    axes.grid(False)
    if len(labels) > _MOST_NAMED:
        return
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if count > counts.max() / 2 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, size=14)
    names = [name_of(label, _LABEL_LENGTH) for label in labels]
    # long names side by side would overlap
    long = sum(map(len, names)) > _MOST_LETTERS
    rotation, alignment = (30, "right") if long else (0, "center")
    ticks = range(len(labels))  # a $ in a name begins no formula
    axes.set_xticks(ticks, names, parse_math=False, rotation=rotation, ha=alignment)
    axes.set_yticks(ticks, names, parse_math=False)


def draw_scores(
    path: Path,
    title: str,
    scores: Mapping[str, tuple[float, float | None, float | None]],
    unit: str,
    baseline: tuple[str, float] | None = None,
) -> Path:
    """A dot a name with its interval, on one axis from 0 to 1.

    Args:
        path: the picture.
        title: above it.
        scores: name -> a share of 0 to 1, and the ends of its interval where one is known.
        unit: what the shares are of.
        baseline: what all are compared with, as a line across: its name and its share.
    """
    with _picture(path, title, (_SIZE[0], 1.5 + 0.5 * max(len(scores), 2))) as axes:
        for row, (value, low, high) in enumerate(scores.values()):
            ends = [value if low is None else low, value if high is None else high]
            axes.plot(ends, [row, row], color="C0", linewidth=2.5, solid_capstyle="butt")
            axes.plot([value], [row], "o", color="C0", markersize=7)
            axes.annotate(
                f"{value:.1%}",
                (value, row),
                (0, 8),
                textcoords="offset points",
                ha="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the baseline
            )
        if baseline:
            label = f"{baseline[0]}: {baseline[1]:.1%}"
            axes.axvline(baseline[1], color="black", linewidth=1, linestyle="--", label=label)
            axes.figure.legend(frameon=False, loc="outside lower center")
        axes.set(xlabel=unit, xlim=(-0.03, 1.05))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _name_rows(axes, list(scores))
        axes.set_ylim(len(scores) - 0.5, -0.7)  # room for the figure above the first dot
    return path


def draw_bars(path: Path, title: str, values: Mapping[str, int], unit: str) -> Path:
    """One bar a name, in the given order, with its figure and share; the 20 largest if more.

    Args:
        path: the picture.
        title: above it.
        values: name -> how many.
        unit: what is counted.
    """
    largest = sorted(values, key=lambda name: -values[name])[:_MOST_BARS]
    bars = {name: n for name, n in values.items() if name in largest}
    if others := len(values) - len(bars):
        bars[f"{others} others"] = sum(values.values()) - sum(bars.values())
    total = max(sum(values.values()), 1)
    with _picture(path, title, (_SIZE[0], 1.1 + 0.36 * max(len(bars), 2))) as axes:
        drawn = axes.barh(range(len(bars)), list(bars.values()), height=0.7)
        axes.bar_label(drawn, [f"{n:,} ({n / total:.1%})" for n in bars.values()], padding=4)
        axes.set(xlabel=unit, xlim=(0, max(1, *bars.values()) * 1.45))
        axes.xaxis.set_major_formatter(_in_thousands)
        axes.locator_params(axis="x", nbins=6, integer=True)
        _name_rows(axes, list(bars))
    return path


def draw_lengths(
    path: Path,
    title: str,
    groups: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    length: str,
    counted: str,
) -> Path:
    """A panel a group: how many texts have which length, in bars on a logarithmic axis.

    Args:
        path: the picture.
        title: above it.
        groups: name -> the bars' edges and counts; the 12 largest groups are drawn. The last bar
            may have no edge of its own.
        length: what a length is measured in.
        counted: what has the lengths.
    """
    largest = sorted(groups, key=lambda name: -sum(groups[name][1]))[:_MOST_PANELS]
    panels = {name: groups[name] for name in groups if name in largest}
    if len(panels) < len(groups):
        title += f" (the {len(panels)} largest of {len(groups)})"
    columns = 2 if len(panels) == 4 else min(3, max(len(panels), 1))
    rows = math.ceil(len(panels) / columns)
    width, height = _SIZE
    size = (width + 2 * (columns - 1), height if rows == 1 else 1.0 + 2.1 * rows)
    with _figure(path, size) as figure:
        axes = None
        for i, (name, (edges, counts)) in enumerate(panels.items()):
            axes = _axes(figure, rows, columns, i + 1, sharex=axes)  # so that they can be compared
            ends = [*edges[1:], max(2 * edges[-1], 1)]
            for start, end, n in zip(edges, ends, counts, strict=False):
                if n:  # the axis reaches only as far as there is something to see
                    low = max(start, 0.5)  # 0 is left of a half
                    axes.bar(low, n, end - low, align="edge", color="C0", edgecolor="white")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(_in_thousands)
            axes.xaxis.set_minor_formatter("")
            axes.yaxis.set_major_formatter(_in_thousands)
            axes.locator_params(axis="y", nbins=6, integer=True)
            axes.set_title(name_of(name, _LABEL_LENGTH), size=10, parse_math=False)
            axes.tick_params(labelsize=8)
        figure.suptitle(title)
        figure.supxlabel(length, size=10)
        figure.supylabel(counted, size=10)
    return path


def draw_mixture(path: Path, title: str, shares: Mapping[str, tuple[float, float, float]]) -> Path:
    """Three bars a source: its share of the text there is, its weight, its share of the mixture.

    Args:
        path: the picture.
        title: above it.
        shares: name -> the three shares, 0 to 1.
    """
    names = ("of the text there is", "wanted (weight)", "of the training tokens")
    with _picture(path, title, (_SIZE[0], 1.7 + 0.62 * len(shares))) as axes:
        for i, label in enumerate(names):
            rows = [row + (i - 1) * 0.27 for row in range(len(shares))]
            values = [each[i] for each in shares.values()]
            drawn = axes.barh(rows, values, height=0.25, label=label)
            axes.bar_label(drawn, [f"{value:.1%}" for value in values], padding=3, size=8)
        axes.set(xlabel="share of tokens")
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.figure.legend(frameon=False, loc="outside lower center", ncols=3)
        _name_rows(axes, list(shares))
    return path


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    # as text: a name with dollar signs is no formula
    shown = [name_of(name, _LABEL_LENGTH) for name in names]
    axes.set_yticks(range(len(names)), shown, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _in_thousands(value: float, _: object = None) -> str:
    """`512`, `1.5k`, `2M`."""
    for size, unit in ((10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


@contextlib.contextmanager
def _picture(path: Path, title: str, size: tuple[float, float] = _SIZE) -> Iterator[Axes]:
    """The axes of a picture that is written after the block."""
    with _figure(path, size) as figure:
        axes = _axes(figure)
        axes.set_title(title)
        yield axes


def _axes(figure: Figure, *place: int, sharex: Axes | None = None) -> Axes:
    axes = figure.add_subplot(*place, sharex=sharex)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


@contextlib.contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that is written after the block: not pyplot's, which has global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure
    with whole_file(path) as partial, warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes; the tables have it in full
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(partial, dpi=120, format="png")
