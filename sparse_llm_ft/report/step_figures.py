"""Figures over optimizer steps, and of phases as a whole: loss, omega, sizes and speed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from sparse_llm_ft.report.data import PhaseTotals, RunReport, Step
from sparse_llm_ft.report.grid import module_grid
from sparse_llm_ft.report.style import Theme, compact, legend_above, new_figure

_FEW = 100
"""Up to so many logged steps the losses are drawn as they are; a running mean helps only beyond."""
_DRAWN = 400
"""Of longer courses of omega every n-th step is drawn, so that about so many are left."""


def loss(report: RunReport, theme: Theme) -> Figure | None:
    """Training loss, coloured by phase, and validation loss."""
    if not report.steps:
        return None
    figure = new_figure(3.9)
    axes = _step_axes(figure, "loss (nats)")
    start = 0
    for i, (name, group) in enumerate(groupby(report.steps, key=lambda line: line.phase)):
        lines = list(group)
        colour = theme.series[i % len(theme.series)]
        if i % 2:
            axes.axvspan(start, lines[-1].step, color=theme.grid, alpha=0.5, linewidth=0, zorder=0)
        _draw_loss(axes, lines, colour, f"training, phase {name}")
        start = lines[-1].step
    validated = [(line.step, line.validation_loss) for line in report.steps if line.validation_loss is not None]
    if validated:
        style: dict[str, Any] = {
            "color": theme.ink,
            "marker": "D",
            "markersize": 5,
            "linewidth": 1.0,
            "linestyle": "--",
        }
        axes.plot(*zip(*validated, strict=True), label="validation", zorder=4, **style)
    legend_above(figure, axes)
    return figure


def compare_losses(reports: Sequence[tuple[str, RunReport]], theme: Theme) -> Figure | None:
    """Training losses of several runs, given with their names."""
    if not any(report.steps for _, report in reports):
        return None
    figure = new_figure(4.2)
    axes = _step_axes(figure, "training loss (nats)")
    for i, (name, report) in enumerate(reports):
        if report.steps:
            style = theme.line(i)
            _draw_loss(axes, report.steps, style["color"], name, style["linestyle"])
    legend_above(figure, axes)
    return figure


def omega(report: RunReport, theme: Theme) -> Figure | None:
    """The course of every adapter's omega; survivors by module type, the others pale."""
    lines = [line for line in report.steps if line.omega is not None]
    if not lines:
        return None
    every = -(-len(lines) // _DRAWN)
    lines = lines[: len(lines) - 1 : every] + lines[-1:]
    courses = {name: [(line.omega or {}).get(name, np.nan) for line in lines] for name in lines[0].omega or {}}
    kept = report.choice.kept if report.choice else {name for name, course in courses.items() if course[-1] > 0}
    grid = module_grid(courses)
    width = 1.7 if len(kept) <= 80 else 0.9
    styles = [{**theme.line(i), "linewidth": width, "alpha": 0.9} for i in range(len(grid.kinds))]
    groups = [(kind, [n for n in grid.of_kind(i) if n in kept], styles[i]) for i, kind in enumerate(grid.kinds)]
    pale = {"color": theme.muted, "linestyle": "-", "linewidth": 0.7, "alpha": 0.5}
    groups.insert(0, ("not kept", [name for name in courses if name not in kept], pale))
    figure = new_figure(4.2)
    axes = _step_axes(figure, "adapter weight ω")
    handles = []
    for label, names, style in groups:
        if names:
            style = {key: value for key, value in style.items() if key != "marker"}
            curves = [np.column_stack([[line.step for line in lines], courses[name]]) for name in names]
            axes.add_collection(LineCollection(curves, **style))
            handles.append(Line2D([], [], **style, label=f"{label} ({len(names)})"))
    axes.autoscale_view()
    axes.axhline(0, color=theme.muted, linewidth=0.8, zorder=1)
    legend_above(figure, axes, handles)
    return figure


def phases(report: RunReport, theme: Theme) -> Figure | None:
    """Adapters, trained parameters, optimizer memory and speed, phase beside phase."""
    totals = report.totals
    if len(totals) < 2:
        return None
    panels: list[tuple[str, str, list[float]]] = [
        ("trainable parameters", "", [total.trainable_parameters for total in totals]),
        ("throughput (tokens/s)", "", [total.tokens_per_second for total in totals]),
    ]
    if all(total.optimizer_bytes is not None for total in totals):
        panels.insert(1, ("optimizer memory per rank (bytes)", "B", [total.optimizer_bytes or 0 for total in totals]))
    figure = new_figure(0.95 + 0.42 * len(totals))
    for axes, (label, unit, values) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        _draw_bars(axes, totals, values, unit, theme)
        axes.set_xlabel(label)
    return figure


def _draw_bars(axes: Axes, totals: Sequence[PhaseTotals], values: Sequence[float], unit: str, theme: Theme) -> None:
    places = range(len(totals))
    colours = [theme.series[i % len(theme.series)] for i in places]
    axes.barh(places, values, height=0.62, color=colours)
    axes.set_yticks(places, [total.name for total in totals])
    axes.set_ylim(len(totals) - 0.5, -0.5)
    largest = max(values) or 1.0
    for i, value in enumerate(values):
        change = f"  ({value / values[0] - 1:+.0%})" if i and values[0] else ""
        axes.annotate(
            f"{compact(value, unit)}{change}".replace("-", "\N{MINUS SIGN}"),
            (value, i),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=9,
        )
    axes.set_xlim(0, largest * 1.75)
    axes.xaxis.set_major_formatter(EngFormatter(unit=unit))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(axis="y", length=0)


def _draw_loss(axes: Axes, lines: Sequence[Step], colour: str, label: str, dash: str = "-") -> None:
    """Every logged loss; of many, pale behind their running mean."""
    steps, values = [line.step for line in lines], np.array([line.loss for line in lines])
    if len(lines) <= _FEW:
        marker = "o" if len(lines) <= 30 else ""
        axes.plot(steps, values, color=colour, linestyle=dash, marker=marker, markersize=3.5, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    width = len(lines) // 40 | 1
    padded = np.pad(values, width // 2, mode="edge")
    axes.plot(
        steps, np.convolve(padded, np.ones(width) / width, "valid"), color=colour, linestyle=dash, label=label, zorder=3
    )


def _step_axes(figure: Figure, label: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.margins(x=0.01)
    return axes
