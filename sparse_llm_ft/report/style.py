"""How figures look, in light and in dark: colours told apart by the colour-blind, one size, little ink."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

WIDTH = 9.6
DPI = 110
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance.

    Attributes:
        empty: a module without adapter, an adapter that was cut.
        series: for lines and categories (after Okabe and Ito; lightened for a dark ground).
        low, high: ends of the one-hue scale for magnitudes.
    """

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    empty: str
    series: tuple[str, ...]
    low: str
    high: str

    @property
    def scale(self) -> Colormap:
        """From `low` to `high`."""
        return LinearSegmentedColormap.from_list(f"{self.name}-scale", [self.low, self.high])

    def line(self, index: int) -> dict[str, Any]:
        """Colour, marker and dash of the line number `index`: no two of the first 21 are alike."""
        colour = self.series[index % len(self.series)]
        dash = ("-", "--", ":")[index // len(self.series) % 3]
        return {"color": colour, "marker": MARKERS[index % len(MARKERS)], "linestyle": dash}

    def ink_on(self, colour: str | Sequence[float]) -> str:
        """Black or white, whichever reads better on `colour`."""
        red, green, blue = to_rgb(colour)  # type: ignore[arg-type]
        return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#ffffff"

    def settings(self) -> dict[Any, Any]:
        """As matplotlib's own settings."""
        return {
            "figure.facecolor": self.surface,
            "savefig.facecolor": self.surface,
            "axes.facecolor": self.surface,
            "axes.edgecolor": self.muted,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "axes.labelsize": 10,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": False,
            "grid.color": self.grid,
            "grid.linewidth": 0.8,
            "text.color": self.ink,
            "xtick.color": self.muted,
            "ytick.color": self.muted,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "legend.handlelength": 1.6,
            "lines.linewidth": 1.6,
            "lines.markersize": 4.5,
            "font.family": ["DejaVu Sans"],
            "font.size": 10,
        }


LIGHT = Theme(
    name="light",
    surface="#ffffff",
    ink="#1f2328",
    muted="#6b7580",
    grid="#e6e9ed",
    empty="#e3e7eb",
    series=("#0072b2", "#d55e00", "#009e73", "#b8559a", "#e69f00", "#56b4e9", "#5c5c5c"),
    low="#e4eff8",
    high="#08406f",
)
DARK = Theme(
    name="dark",
    surface="#14181d",
    ink="#e6e9ed",
    muted="#8f99a4",
    grid="#272d35",
    empty="#2a3139",
    series=("#4da3e0", "#f08a4b", "#35c79a", "#e3a0c4", "#f2c14e", "#a5dbf8", "#c3c9d0"),
    low="#1c2a38",
    high="#b5dcff",
)


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of the report's width (inches), whose parts are laid out without overlap."""
    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Figure, theme: Theme) -> bytes:
    """The figure as a PNG file that depends on nothing but the figure."""
    buffer = io.BytesIO()
    with rc_context(theme.settings()):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def legend_above(figure: Figure, axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """One legend above all axes, in as many columns as the width has room for."""
    found, labels = axes.get_legend_handles_labels()
    if handles is not None:
        found, labels = list(handles), [str(handle.get_label()) for handle in handles]
    if found:
        columns = max(1, min(len(labels), int(110 // (max(map(len, labels)) + 6))))
        figure.legend(found, labels, loc="outside upper left", ncols=columns, columnspacing=1.4)


def layer_axis(axes: Axes, layers: Sequence[str], first: int = 0, label: str = "layer") -> None:
    """Name the layers along x; of many, every second, fifth or tenth. `first` is the index of ``layers[0]``."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, len(layers)) if len(layers) / s <= 20)
    ticks = [i for i in range(len(layers)) if (first + i) % step == 0]
    axes.set_xticks(ticks, [layers[i] for i in ticks])
    if max(len(layers[i]) for i in ticks) > 4:
        axes.tick_params(axis="x", labelrotation=40)
        for text in axes.get_xticklabels():
            text.set_horizontalalignment("right")
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel(label)


def compact(value: float, unit: str = "") -> str:
    """``1.41 M``, ``103.7 kB``: up to four digits and a prefix."""
    number, _, rest = EngFormatter(unit=unit, places=2)(value).partition(" ")
    return f"{float(number):.4g} {rest}".strip()
