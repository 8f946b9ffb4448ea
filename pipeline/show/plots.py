"""Pictures of a stage for its MLflow run, drawn from what the stage wrote under `reports/`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt.base.files import whole_file
from pipeline.show.markdown import name_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

_SIZE = (7.0, 4.2)  # inches
_MOST_BARS = 20
_MOST_PANELS = 12
_NAME_LENGTH = 24  # of a source or class in a picture
_MOST_NAMED = 50  # classes whose names and numbers a confusion matrix has room for
_MOST_LETTERS = 40  # of all classes together, below a confusion matrix
_MEASURES = {
    "loss": ("loss", "nats per target"),
    "accuracy": ("accuracy", "share of texts"),
    "reward_margin": ("reward margin", "nats"),
    "reward_accuracy": ("reward accuracy", "share of pairs"),
}
"""What a history may hold of a split: its name in words, and its unit."""


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
    pictures = [
        _curve(folder / f"{measure}.png", f"{title}: {name}", unit, frame, measure)
        for measure, (name, unit) in _MEASURES.items()
        if f"validation_{measure}" in frame
    ]
    if "validation_reward_chosen" in frame:
        pictures.append(_rewards(folder / "rewards.png", f"{title}: rewards", frame))
    if not learning_rate:
        return pictures

    def rates(axes: Axes) -> None:
        axes.plot(frame["step"], frame["learning_rate"], marker=".")
        axes.set(xlabel="optimizer step", ylabel="learning rate")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)

    pictures.append(_draw(folder / "learning_rate.png", f"{title}: learning rate", rates))
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
        places = pd.Index(labels)
        counts = np.zeros((len(labels), len(labels)), int)
        at = places.get_indexer(rows["actual"]), places.get_indexer(rows["predicted"])
        counts[at] = rows["messages"].astype(int)
        what = "held-out messages" if part == "test" else f"the {part} part"
        right = f"{counts.trace()} of {counts.sum()} right"
        title = f"Classifier on {what}: {right}"
        pictures.append(_confusion(folder / f"{name}.png", title, labels, counts))
    return pictures


def _confusion(picture: Path, title: str, labels: list[str], counts: np.ndarray) -> Path:
    shown = [name_of(label, _NAME_LENGTH) for label in labels]

    def cells(axes: Axes) -> None:
        axes.imshow(counts, cmap="Blues", vmin=0)
        axes.set(xlabel="predicted", ylabel="actual")
        axes.grid(False)
        if len(labels) > _MOST_NAMED:
            return
        for row, column in ((i, j) for i in range(len(labels)) for j in range(len(labels))):
            count = counts[row, column]
            colour = "white" if count > counts.max() / 2 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, size=14)
        axes.set(xticks=range(len(labels)), yticks=range(len(labels)))
        # long names side by side would lie upon each other; a $ in one begins no formula
        long = sum(map(len, shown)) > _MOST_LETTERS
        axes.set_xticklabels(
            shown, rotation=30 if long else 0, ha="right" if long else "center", parse_math=False
        )
        axes.set_yticklabels(shown, parse_math=False)

    return _draw(picture, title, cells)


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

    def dots(axes: Axes) -> None:
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
            name, share = baseline
            label = f"{name}: {share:.1%}"
            axes.axvline(share, color="black", linewidth=1, linestyle="--", label=label)
            axes.figure.legend(frameon=False, loc="outside lower center")
        axes.set(xlabel=unit, xlim=(-0.03, 1.05))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _name_rows(axes, list(scores))
        axes.set_ylim(len(scores) - 0.5, -0.7)  # room for the figure above the first dot

    width, _ = _SIZE
    return _draw(path, title, dots, (width, 1.5 + 0.5 * max(len(scores), 2)))


def draw_bars(path: Path, title: str, values: Mapping[str, int], unit: str) -> Path:
    """One bar a name, in the given order, with its figure and share; the 20 largest if more.

    Args:
        path: the picture.
        title: above it.
        values: name -> how many.
        unit: what is counted.
    """
    shown = dict(values)
    if len(shown) > _MOST_BARS:
        largest = sorted(shown, key=lambda name: -shown[name])[: _MOST_BARS - 1]
        rest = [n for name, n in shown.items() if name not in largest]
        shown = {name: shown[name] for name in largest}
        shown[f"{len(rest)} others"] = sum(rest)
    total = max(sum(shown.values()), 1)

    def bars(axes: Axes) -> None:
        drawn = axes.barh(range(len(shown)), list(shown.values()), height=0.7)
        axes.bar_label(drawn, [f"{n:,} ({n / total:.1%})" for n in shown.values()], padding=4)
        axes.set(xlabel=unit, xlim=(0, max(1, *shown.values()) * 1.45))
        axes.xaxis.set_major_formatter(_in_thousands)
        axes.xaxis.set_major_locator(_whole_numbers())
        _name_rows(axes, list(shown))

    return _draw(path, title, bars, _height_for(len(shown)))


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
        groups: name -> the bars' edges and counts; the 12 largest groups are drawn.
        length: what a length is measured in.
        counted: what has the lengths.
    """
    largest = sorted(groups, key=lambda name: -sum(groups[name][1]))[:_MOST_PANELS]
    shown = {name: groups[name] for name in groups if name in largest}
    # all panels alike, so that they can be compared; only as far as there is something to see
    filled = [
        (edges[i], _end_of(edges, i))
        for edges, counts in shown.values()
        for i, n in enumerate(counts)
        if n
    ]
    limits = (
        max(min((low for low, _ in filled), default=1), 0.5),
        max((high for _, high in filled), default=2),
    )
    if len(shown) < len(groups):
        title += f" (the {len(shown)} largest of {len(groups)})"

    def panel(name: str) -> Callable[[Axes], None]:
        edges, counts = shown[name]

        def bars(axes: Axes) -> None:
            starts = [max(edge, 0.5) for edge in edges[: len(counts)]]  # 0 is left of a half
            widths = [_end_of(edges, i) - start for i, start in enumerate(starts)]
            axes.bar(starts, counts, widths, align="edge", edgecolor="white")
            axes.set_xscale("log", base=2)
            axes.set_xlim(*limits)
            axes.xaxis.set_major_formatter(_doubled)
            axes.xaxis.set_minor_formatter("")
            axes.yaxis.set_major_formatter(_in_thousands)
            axes.yaxis.set_major_locator(_whole_numbers())
            axes.set_ylim(bottom=0)

        return bars

    panels = {name: panel(name) for name in shown}
    return _draw_panels(path, title, panels, xlabel=length, ylabel=counted)


def draw_mixture(path: Path, title: str, shares: Mapping[str, tuple[float, float, float]]) -> Path:
    """Three bars a source: its share of the text there is, its weight, its share of the mixture.

    Args:
        path: the picture.
        title: above it.
        shares: name -> the three shares, 0 to 1.
    """
    names = ("of the text there is", "wanted (weight)", "of the training tokens")

    def bars(axes: Axes) -> None:
        for i, label in enumerate(names):
            rows = [row + (i - 1) * 0.27 for row in range(len(shares))]
            values = [each[i] for each in shares.values()]
            drawn = axes.barh(rows, values, height=0.25, label=label)
            axes.bar_label(drawn, [f"{value:.1%}" for value in values], padding=3, size=8)
        largest = max((max(each) for each in shares.values()), default=0)
        axes.set(xlabel="share of tokens", xlim=(0, max(largest * 1.15, 0.01)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.figure.legend(frameon=False, loc="outside lower center", ncols=3)
        _name_rows(axes, list(shares))

    width, _ = _SIZE
    return _draw(path, title, bars, (width, 1.7 + 0.62 * len(shares)))


def _curve(path: Path, title: str, unit: str, frame: pd.DataFrame, measure: str) -> Path:
    def lines(axes: Axes) -> None:
        for split in ("train", "validation"):
            if (column := f"{split}_{measure}") in frame:
                axes.plot(frame["step"], frame[column], marker=".", label=split)
        axes.set(xlabel="optimizer step", ylabel=f"{_MEASURES[measure][0]} ({unit})")
        axes.legend(frameon=False)

    return _draw(path, title, lines)


def _rewards(path: Path, title: str, frame: pd.DataFrame) -> Path:
    """Of both answers: a margin may grow while the chosen one's falls as well."""

    def lines(axes: Axes) -> None:
        for answer in ("chosen", "rejected"):
            axes.plot(frame["step"], frame[f"validation_reward_{answer}"], marker=".", label=answer)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="optimizer step", ylabel="reward (nats)")
        axes.legend(frameon=False)

    return _draw(path, title, lines)


def _whole_numbers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True, min_n_ticks=1)


def _height_for(n_bars: int) -> tuple[float, float]:
    width, _ = _SIZE
    return width, 1.1 + 0.36 * max(n_bars, 2)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)))
    # as text: a name with dollar signs is no formula
    axes.set_yticklabels([name_of(name, _NAME_LENGTH) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.grid(False, axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


def _doubled(value: float, _: object = None) -> str:
    """On an axis that doubles: `512`, `1K` for 1,024, `2M`."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _in_thousands(value: float, _: object = None) -> str:
    """`512`, `1.5k`, `2M`."""
    for size, unit in ((10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _end_of(edges: Sequence[int], i: int) -> int:
    """Where a bar ends: the last one may have no edge of its own, and is as wide as it is far."""
    return edges[i + 1] if i + 1 < len(edges) else max(2 * edges[i], 1)


def _draw(
    path: Path,
    title: str,
    content: Callable[[Axes], None],
    size: tuple[float, float] = _SIZE,
) -> Path:
    figure = _figure(size)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    content(axes)
    axes.set_title(title)
    return _save(figure, path)


def _draw_panels(
    path: Path,
    title: str,
    panels: Mapping[str, Callable[[Axes], None]],
    *,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Pictures side by side, each under its name, with one scale for the x axis."""
    columns = 2 if len(panels) == 4 else min(3, max(len(panels), 1))
    rows = math.ceil(len(panels) / columns)
    width, height = _SIZE
    figure = _figure((width + 2 * (columns - 1), height if rows == 1 else 1.0 + 2.1 * rows))
    for i, (name, content) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        content(axes)
        axes.set_title(name_of(name, _NAME_LENGTH), size=10, parse_math=False)
        axes.tick_params(labelsize=8)
    figure.suptitle(title)
    figure.supxlabel(xlabel, size=10)
    figure.supylabel(ylabel, size=10)
    return _save(figure, path)


def _figure(size: tuple[float, float]) -> Figure:
    # a figure of our own instead of pyplot's: no global state, no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as partial, warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes; the tables have it in full
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(partial, dpi=120, format="png")
    return path
