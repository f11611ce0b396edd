"""All figures of a run in the page's order, as PNG files for light and for dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib import rc_context

from sparse_llm_ft.report import memory_figure, module_figures, step_figures
from sparse_llm_ft.report.data import RunReport
from sparse_llm_ft.report.style import Drawing, figure_settings
from sparse_llm_ft.report.theme import APPEARANCES

FIGURES: Mapping[str, Callable[[RunReport], Drawing | None]] = {
    "loss": step_figures.loss,
    "phases": step_figures.phases,
    "memory": memory_figure.memory,
    "plan": module_figures.plan,
    "omega": step_figures.omega,
    "importance": module_figures.importance,
    "kept-fraction": module_figures.kept_fraction,
    "overlap": module_figures.overlap,
    "residual-norms": module_figures.residual_norms,
}
"""File name without suffix -> function that draws the figure, or returns None if the run has no data for it."""


@dataclass(frozen=True)
class Picture:
    """A drawing's texts (see `Drawing`), and the drawing as a light and a dark PNG file."""

    key: str
    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes


def run_pictures(report: RunReport) -> list[Picture]:
    """Every figure that the run has data for."""
    pictures = [_picture(key, partial(draw, report)) for key, draw in FIGURES.items()]
    return [picture for picture in pictures if picture is not None]


def comparison_picture(reports: Sequence[tuple[str, RunReport]]) -> Picture | None:
    """The losses of several runs, given with their names, in one figure."""
    return _picture("compare-loss", partial(step_figures.compare_losses, reports))


def _picture(key: str, draw: Callable[[], Drawing | None]) -> Picture | None:
    files = []
    for appearance in APPEARANCES:
        with rc_context(figure_settings(appearance)):
            drawing = draw()
            if drawing is None:
                return None
            buffer = io.BytesIO()
            drawing.figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})  # only what is drawn
        files.append(buffer.getvalue())
        title, caption, alt = drawing[1:]
    return Picture(key, title, caption, alt, *files)
