"""Figures over optimizer steps and over phases: loss, omega, sizes and speed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from sparse_llm_ft.report.data import Record, RunReport
from sparse_llm_ft.report.grid import module_grid
from sparse_llm_ft.report.style import Drawing, compact, legend_above, line_style, new_figure

_FEW = 100
"""Up to this many logged steps, losses are drawn as they are; more get a running mean."""
_DRAWN = 400
"""About how many steps of omega are drawn: of more, every n-th."""


def loss(report: RunReport) -> Drawing | None:
    """Training loss, coloured by phase, and validation loss."""
    if not report.steps:
        return None
    figure, axes = _step_figure(3.9, "loss (nats)")
    start = 0
    for i, (name, group) in enumerate(groupby(report.steps, key=lambda line: line["phase"])):
        lines = list(group)
        if i % 2:
            axes.axvspan(start, lines[-1]["step"], color=rcParams["grid.color"], alpha=0.5, linewidth=0, zorder=0)
        _draw_loss(axes, lines, f"C{i}", f"training, phase {name}")
        start = lines[-1]["step"]
    first, last = report.steps[0], report.steps[-1]
    alt = (
        f"Line chart: training loss {first['loss']:.3g} at step {first['step']}, "
        f"{last['loss']:.3g} at step {last['step']}."
    )
    validated = [line for line in report.steps if line["validation_loss"] is not None]
    if validated:
        steps, values = ([line[key] for line in validated] for key in ("step", "validation_loss"))
        ink = rcParams["text.color"]
        axes.plot(steps, values, "D--", label="validation", color=ink, markersize=5, linewidth=1.0, zorder=4)
        alt += f" Validation loss {values[-1]:.3g} at step {steps[-1]}."
    legend_above(figure, axes)
    caption = "Loss over optimizer steps: each phase in its colour, a diamond for each validation."
    return Drawing(figure, "Loss", caption, alt)


def compare_losses(reports: Sequence[tuple[str, RunReport]]) -> Drawing | None:
    """Training losses of several runs, given with their names."""
    if not any(report.steps for _, report in reports):
        return None
    figure, axes = _step_figure(4.2, "training loss (nats)")
    ends = []
    for i, (name, report) in enumerate(reports):
        if report.steps:
            style = line_style(i)
            label = f" {name}" if name.startswith("_") else name  # matplotlib lists no label that begins with _
            _draw_loss(axes, report.steps, style["color"], label, style["linestyle"])
            ends.append(f"{name} ends at {report.steps[-1]['loss']:.3g}")
    legend_above(figure, axes)
    alt = f"Line chart: {', '.join(ends)}."
    return Drawing(figure, "Loss of all runs", "Training loss over optimizer steps.", alt)


def omega(report: RunReport) -> Drawing | None:
    """Every adapter's omega over time: survivors coloured by module type, the others pale."""
    lines = [line for line in report.steps if line["omega"]]
    if not lines:
        return None
    every = -(-len(lines) // _DRAWN)
    lines = lines[: len(lines) - 1 : every] + lines[-1:]
    courses = {name: [line["omega"].get(name, np.nan) for line in lines] for name in lines[0]["omega"]}
    kept = report.choice.kept if report.choice else {name for name, course in courses.items() if course[-1] > 0}
    grid = module_grid(courses)
    pale = {"color": rcParams["axes.edgecolor"], "linestyle": "-", "linewidth": 0.7, "alpha": 0.5}
    groups = [("not kept", [name for name in courses if name not in kept], pale)]
    for i, kind in enumerate(grid.kinds):
        style = {**line_style(i), "linewidth": 1.7 if len(kept) <= 80 else 0.9, "alpha": 0.9}
        del style["marker"]
        groups.append((kind, [name for name in grid.of_kind(i) if name in kept], style))
    figure, axes = _step_figure(4.2, "adapter weight ω")
    handles = []
    for label, names, style in groups:
        if names:
            curves = [np.column_stack([[line["step"] for line in lines], courses[name]]) for name in names]
            axes.add_collection(LineCollection(curves, **style))
            handles.append(Line2D([], [], **style, label=f"{label} ({len(names)})"))
    axes.autoscale_view()
    axes.axhline(0, color=rcParams["axes.edgecolor"], linewidth=0.8, zorder=1)
    legend_above(figure, axes, handles)
    left = sum(value > 0 for value in lines[-1]["omega"].values())
    return Drawing(
        figure,
        "Adapter weights ω while they are chosen",
        "One line per adapter: coloured by module type where it stayed, pale where it was disconnected.",
        f"Line chart: ω of {len(courses)} adapters up to step {lines[-1]['step']}, where {left} are above 0.",
    )


def phases(report: RunReport) -> Drawing | None:
    """Trained parameters, optimizer memory and speed of each phase."""
    totals = report.totals
    if len(totals) < 2:
        return None
    panels = {
        "trainable_parameters": ("trainable parameters", ""),
        "optimizer_bytes_per_rank": ("optimizer memory per rank (bytes)", "B"),
        "tokens_per_second": ("throughput (tokens/s)", ""),
    }
    known = [key for key in panels if key in totals[0]]
    figure = new_figure(0.95 + 0.42 * len(totals))
    for axes, key in zip(figure.subplots(1, len(known), sharey=True), known, strict=True):
        label, unit = panels[key]
        _draw_bars(axes, [total["name"] for total in totals], [total[key] for total in totals], unit)
        axes.set_xlabel(label)
    return Drawing(
        figure,
        "Size and speed of each phase",
        "What a change of phase saves or costs; percentages are against the first phase.",
        f"Bar charts of the {len(totals)} phases; their numbers are in the table of phases.",
    )


def _draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float], unit: str) -> None:
    places = range(len(names))
    axes.barh(places, values, height=0.62, color=[f"C{i}" for i in places])
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for i, value in enumerate(values):
        change = f"  ({value / values[0] - 1:+.0%})" if i and values[0] else ""
        text = f"{compact(value, unit)}{change}".replace("-", "\N{MINUS SIGN}")
        axes.annotate(text, (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, (max(values) or 1.0) * 1.75)
    axes.xaxis.set_major_formatter(EngFormatter(unit=unit))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(axis="y", length=0)


def _draw_loss(axes: Axes, lines: Sequence[Record], colour: str, label: str, dash: str = "-") -> None:
    """Every logged loss; many losses are drawn pale behind their running mean."""
    steps, values = [line["step"] for line in lines], np.array([line["loss"] for line in lines])
    if len(lines) <= _FEW:
        marker = "o" if len(lines) <= 30 else ""
        axes.plot(steps, values, color=colour, linestyle=dash, marker=marker, markersize=3.5, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    width = len(lines) // 40 | 1
    padded = np.pad(values, width // 2, mode="edge")
    mean = np.convolve(padded, np.ones(width) / width, "valid")
    axes.plot(steps, mean, color=colour, linestyle=dash, label=label, zorder=3)


def _step_figure(height: float, label: str) -> tuple[Figure, Axes]:
    figure = new_figure(height)
    axes = figure.add_subplot()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.margins(x=0.01)
    return figure, axes
