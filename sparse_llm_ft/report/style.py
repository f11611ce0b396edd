"""What all figures share: a drawing and its texts, one size, axes of layers, legends, short numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from sparse_llm_ft.report.theme import SERIES

WIDTH = 9.6
MARKERS = "osD^vPX"


class Drawing(NamedTuple):
    """A figure and its texts.

    Attributes:
        caption: what the figure shows and how to read it, one sentence.
        alt: the figure's content in words and numbers, for readers who cannot see it.
    """

    figure: Figure
    title: str
    caption: str
    alt: str


def new_figure(height: float) -> Figure:
    """An empty figure of the report's width and `height` inches, whose parts are laid out without overlap."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the line number `index`: no two of the first 21 are alike."""
    dash = ("-", "--", ":")[index // len(SERIES) % 3]
    return {"color": f"C{index}", "marker": MARKERS[index % len(MARKERS)], "linestyle": dash}


def legend_above(figure: Figure, axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """One legend above all axes, in as many columns as the width has room for."""
    found, labels = axes.get_legend_handles_labels()
    if handles is not None:
        found, labels = list(handles), [str(handle.get_label()) for handle in handles]
    if found:
        columns = max(1, min(len(labels), int(110 // (max(map(len, labels)) + 6))))
        figure.legend(found, labels, loc="outside upper left", ncols=columns, columnspacing=1.4)


def layer_axis(axes: Axes, layers: Sequence[str], first: int = 0) -> None:
    """Name the layers along x; of many, every second, fifth or tenth. `first` is the index of ``layers[0]``."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, len(layers)) if len(layers) / s <= 20)
    ticks = [i for i in range(len(layers)) if (first + i) % step == 0]
    axes.set_xticks(ticks, [layers[i] for i in ticks])
    if max(len(layers[i]) for i in ticks) > 4:
        axes.tick_params(axis="x", labelrotation=40)
        for text in axes.get_xticklabels():
            text.set_horizontalalignment("right")
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("layer")


def compact(value: float, unit: str = "") -> str:
    """``1.41 M``, ``103.7 kB``: up to four digits and a prefix."""
    number, _, rest = EngFormatter(unit=unit, places=2)(value).partition(" ")
    return f"{float(number):.4g} {rest}".strip()
