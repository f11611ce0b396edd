"""The report's colours, in light and in dark: one table for the page and for its figures."""

from __future__ import annotations

from functools import cache
from typing import Any

APPEARANCES = ("light", "dark")
"""The order of every pair of colours below."""

COLOURS = {
    "ground": ("#f4f5f7", "#0c0f13"),
    "card": ("#ffffff", "#14181d"),
    "ink": ("#1f2328", "#e6e9ed"),
    "muted": ("#57606a", "#a3adb8"),
    "line": ("#d8dde3", "#2c333b"),
    "link": ("#0b5cad", "#7cc0f5"),
    "axis": ("#6b7580", "#8f99a4"),
    "grid": ("#e6e9ed", "#272d35"),
    "empty": ("#e3e7eb", "#2a3139"),  # a module without adapter
    "low": ("#e4eff8", "#1c2a38"),  # ends of the one-hue scale for magnitudes
    "high": ("#08406f", "#b5dcff"),
}

SERIES = (
    ("#0072b2", "#4da3e0"),
    ("#d55e00", "#f08a4b"),
    ("#009e73", "#35c79a"),
    ("#b8559a", "#e3a0c4"),
    ("#e69f00", "#f2c14e"),
    ("#56b4e9", "#a5dbf8"),
    ("#5c5c5c", "#c3c9d0"),
)
"""For lines and categories: after Okabe and Ito, so that the colour-blind tell them apart; lighter on the dark ground.
"""


def page_colours() -> str:
    """CSS that defines every colour as a variable, which follows the reader's preferred scheme."""
    light, dark = ("".join(f"--{name}: {pair[i]}; " for name, pair in COLOURS.items()) for i in range(2))
    return (
        f":root {{ color-scheme: light dark; {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
    )


@cache
def figure_settings(appearance: str) -> dict[Any, Any]:
    """The matplotlib settings that draw figures in ``light`` or ``dark``.

    Figures name no colour of a theme: they take ``C0`` to ``C6``, `image.cmap`, and the settings below, among them
    `patch.facecolor` for cells without an adapter.
    """
    from cycler import cycler
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

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
        "xtick.color": colour["axis"],
        "ytick.color": colour["axis"],
        "xtick.labelcolor": colour["ink"],
        "ytick.labelcolor": colour["ink"],
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
    }
