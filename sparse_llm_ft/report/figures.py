"""All figures of a run in the order of the page, with what stands under them, rendered in both appearances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib import rc_context
from matplotlib.figure import Figure

from sparse_llm_ft.report import descriptions, module_figures, step_figures
from sparse_llm_ft.report.data import RunReport
from sparse_llm_ft.report.style import DARK, LIGHT, Theme, to_png


@dataclass(frozen=True)
class FigureKind:
    """A figure that a run may have.

    Attributes:
        key: file name without suffix.
        caption: what it shows and how to read it, one sentence.
        draw: gives None where the run has nothing for it.
        describe: its content in words, where it is drawn.
    """

    key: str
    title: str
    caption: str
    draw: Callable[[RunReport, Theme], Figure | None]
    describe: Callable[[RunReport], str]


@dataclass(frozen=True)
class Picture:
    """A figure as PNG files, one per appearance."""

    key: str
    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes


FIGURES = (
    FigureKind(
        "loss",
        "Loss",
        "Loss over optimizer steps: each phase in its colour, a diamond for each validation.",
        step_figures.loss,
        descriptions.loss,
    ),
    FigureKind(
        "phases",
        "Size and speed of each phase",
        "What a change of phase saves or costs; percentages are against the first phase.",
        step_figures.phases,
        descriptions.phases,
    ),
    FigureKind(
        "plan",
        "Adapters by layer and module type",
        "Which modules carry an adapter in each phase; a number is the rank where ranks differ.",
        module_figures.plan,
        descriptions.plan,
    ),
    FigureKind(
        "omega",
        "Adapter weights ω while they are chosen",
        "One line per adapter: coloured by module type where it stayed, pale where it was disconnected.",
        step_figures.omega,
        descriptions.omega,
    ),
    FigureKind(
        "importance",
        "Importance of the modules",
        "What the choice was made from; a dot marks a module that keeps its own adapter.",
        module_figures.importance,
        descriptions.importance,
    ),
    FigureKind(
        "kept-fraction",
        "Rows and columns kept",
        "Which fraction of each module's outputs and inputs its adapter reaches, by layer and module type.",
        module_figures.kept_fraction,
        descriptions.kept_fraction,
    ),
    FigureKind(
        "overlap",
        "Agreement of importance measures",
        "Shared fraction of the most important rows and columns for each pair of measures: mean over the layer's "
        "modules, and the range between the lowest and the highest.",
        module_figures.overlap,
        descriptions.overlap,
    ),
    FigureKind(
        "residual-norms",
        "Size of the trained residuals",
        "How far training moved each module's weight by the end of the last phase; nothing where it has no adapter.",
        module_figures.residual_norms,
        descriptions.residual_norms,
    ),
)


def run_pictures(report: RunReport) -> list[Picture]:
    """Every figure that the run has something for."""
    pictures = []
    for kind in FIGURES:
        files = _render(partial(kind.draw, report))
        if files is not None:
            pictures.append(Picture(kind.key, kind.title, kind.caption, kind.describe(report), *files))
    return pictures


def comparison_picture(reports: Sequence[tuple[str, RunReport]]) -> Picture | None:
    """The losses of several runs, given with their names, in one figure."""
    files = _render(partial(step_figures.compare_losses, reports))
    if files is None:
        return None
    alt = "Line chart: " + ", ".join(
        f"{name} ends at {report.steps[-1].loss:.3g}" for name, report in reports if report.steps
    )
    caption = "Training loss over optimizer steps."
    return Picture("compare-loss", "Loss of all runs", caption, f"{alt}.", *files)


def _render(draw: Callable[[Theme], Figure | None]) -> tuple[bytes, bytes] | None:
    files = []
    for theme in (LIGHT, DARK):
        with rc_context(theme.settings()):
            figure = draw(theme)
        if figure is None:
            return None
        files.append(to_png(figure, theme))
    return files[0], files[1]
