"""What all figures share: matplotlib settings, size, axes of layers, legends, short numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from cycler import cycler
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from sparse_llm_ft.report.theme import APPEARANCES, COLOURS, SERIES

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


@cache
def figure_settings(appearance: str) -> dict[Any, Any]:
    """The matplotlib settings that draw figures in ``light`` or ``dark``.

    Figures name no colour themselves: they use ``C0`` to ``C6``, `image.cmap`, and the settings below;
    `patch.facecolor` is for cells without an adapter.
    """
    index = APPEARANCES.index(appearance)
    colour = {name: pair[index] for name, pair in COLOURS.items()}
    scale = LinearSegmentedColormap.from_list(f"report-{appearance}", [colour["low"], colour["high"]])
    colormaps.register(scale, force=True)
    return {
        "figure.facecolor": colour["card"],
        "axes.facecolor": colour["card"],
        "axes.edgecolor": colour["axis"],
        "axes.labelcolor": colour["ink"],
        "axes.prop_cycle": cycler(color=[pair[index] for pair in SERIES]),
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.family": ["DejaVu Sans"],
        "grid.color": colour["grid"],
        "image.cmap": scale.name,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 1.6,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "patch.facecolor": colour["empty"],
        "text.color": colour["ink"],
        "text.parse_math": False,  # runs, phases and modules may have a $ in their names
        "xtick.color": colour["axis"],
        "ytick.color": colour["axis"],
        "xtick.labelcolor": colour["ink"],
        "ytick.labelcolor": colour["ink"],
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
    }


def new_figure(height: float) -> Figure:
    """An empty figure of the report's width and `height` inches; its layout avoids overlap."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of line number `index`; the first 21 all differ."""
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
    """Label the layers along x, or every second, fifth, tenth if there are many. `first`: index of ``layers[0]``."""
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
    """The number with up to four digits and a prefix: ``1.41 M``, ``103.7 kB``."""
    number, _, rest = EngFormatter(unit=unit, places=2)(value).partition(" ")
    return f"{float(number):.4g} {rest}".strip()
