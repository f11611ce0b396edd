"""The colours of page and figures, for light and dark, and the page's CSS."""

from __future__ import annotations

import re

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
"""Colours of lines and categories, after Okabe and Ito: colour-blind readers can tell them apart."""

_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 0 0 .25rem; }
figure h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
p { margin: 0 0 1rem; color: var(--muted); overflow-wrap: anywhere; }
a { color: var(--link); }
figure, .scroll { margin: 0 0 1.25rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figcaption { color: var(--muted); margin: 0 0 .75rem; max-width: 60rem; }
.scroll, .picture { overflow-x: auto; }
.picture img { display: block; width: 100%; min-width: 44rem; height: auto; }
.tables { display: flex; flex-wrap: wrap; gap: 0 1.25rem; align-items: flex-start; }
.tables .scroll { max-width: 100%; flex: 1 1 auto; }
.tables table { width: 100%; max-width: 42rem; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; white-space: nowrap; }
th, td { padding: .3rem .75rem .3rem 0; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--muted); font-weight: 500; }
th:first-child { text-align: left; font-weight: 500; }
td { max-width: 24rem; overflow-wrap: break-word; }
"""


def page_css() -> str:
    """The page's CSS. Every colour is a variable, which follows the reader's preferred scheme."""
    light, dark = ("".join(f"--{name}: {pair[i]}; " for name, pair in COLOURS.items()) for i in range(2))
    scheme = f":root {{ color-scheme: light dark; {light}}} @media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
    return re.sub(r"\s+", " ", scheme + _CSS).strip()
