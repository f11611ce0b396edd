"""Figures over the model's layers and module types: the plan, its importance scores, masks and residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sparse_llm_ft.plan import ModuleAdapter, Shape
from sparse_llm_ft.report.data import PhaseRecord, RunReport
from sparse_llm_ft.report.descriptions import kept_share, plan_line
from sparse_llm_ft.report.grid import ModuleGrid, module_grid
from sparse_llm_ft.report.style import Theme, layer_axis, legend_above, new_figure

_BAND = 40
"""Most layers side by side where each cell holds a number; deeper models go on below."""
_PANELS = 4
"""Most phases drawn as plans; of more, the first and the last ones."""
_ROW = 0.24
"""Height of a module type in inches."""


def plan(report: RunReport, theme: Theme) -> Figure | None:
    """Layer × type for each phase: own adapter, shared, or none; the rank; how much of it a mask keeps."""
    shown = [phase for phase in report.phases if phase.plan.active]
    if not shown:
        return None
    if len(shown) > _PANELS:
        shown = [shown[0], *shown[1 - _PANELS :]]
    grid = module_grid(dict.fromkeys(name for phase in shown for name in phase.plan.modules))
    bands = range(0, len(grid.layers), _BAND)
    panels = [(phase, start) for phase in shown for start in bands]
    height = len(panels) * (len(grid.kinds) * _ROW + 0.42) + len(shown) * 0.2 + 0.7
    figure = new_figure(height)
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (phase, start) in zip(all_axes, panels, strict=True):
        _draw_plan(axes, phase, grid, start, theme)
        if start == 0:
            axes.set_title(plan_line(phase))
        if start != bands[-1] or phase is not shown[-1]:
            axes.set_xlabel("")
    legend_above(figure, all_axes[0], _plan_legend(shown, theme))
    return figure


def importance(report: RunReport, theme: Theme) -> Figure | None:
    """What LoRA-drop or WeightLoRA chose by: layer × type, with a dot on what stayed."""
    choice = report.choice
    if choice is None:
        return None
    label = "importance y, share within its type" if choice.symbol == "y" else "adapter weight ω"
    return _heat_map(choice.values, choice.kept, label, theme)


def kept_fraction(report: RunReport, theme: Theme) -> Figure | None:
    """Partial-LoRA's rows and columns by layer."""
    fractions = report.kept_fractions
    if fractions is None:
        return None
    grid = module_grid(fractions)
    figure = new_figure(5.6)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for side, (panel, name) in enumerate(zip(axes, ("rows of B (outputs)", "columns of A (inputs)"), strict=True)):
        _draw_by_layer(panel, grid, {n: pair[side] for n, pair in fractions.items()}, theme)
        panel.set_title(name)
        panel.set_ylabel("fraction kept")
    _label_layers(axes, grid)
    axes[0].set_ylim(bottom=0)
    legend_above(figure, axes[0])
    return figure


def overlap(report: RunReport, theme: Theme) -> Figure | None:
    """How far importance measures agree: mean over the types of a layer, with smallest and largest."""
    scores = report.partial_scores
    if scores is None or not scores.overlap:
        return None
    grid = module_grid(dict.fromkeys(name for values in scores.overlap.values() for name in values))
    figure = new_figure(5.6)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for side, (panel, name) in enumerate(zip(axes, ("rows (outputs)", "columns (inputs)"), strict=True)):
        for i, (pair, values) in enumerate(scores.overlap.items()):
            style = theme.line(i)
            layers, stacked = _by_layer(grid, {n: both[side] for n, both in values.items()})
            low, high = [min(v) for v in stacked], [max(v) for v in stacked]
            panel.fill_between(layers, low, high, color=style["color"], alpha=0.1, linewidth=0)
            label = pair.upper().replace("-", " and ")
            panel.plot(layers, [sum(v) / len(v) for v in stacked], label=label, **style)
        panel.set_title(name)
        panel.set_ylabel("overlap (fraction)")
        panel.grid(axis="y")
    _label_layers(axes, grid)
    axes[0].set_ylim(0, 1.02)
    legend_above(figure, axes[0])
    return figure


def residual_norms(report: RunReport, theme: Theme) -> Figure | None:
    """How far training moved each module, of the last phase where that was measured.

    Lines by layer; a heat map where many modules have no adapter and lines would be mostly gaps.
    """
    norms = report.residual_norms
    if norms is None:
        return None
    label = "residual norm ‖ΔW‖ (Frobenius)"
    names = list(dict.fromkeys([*(name for phase in report.phases for name in phase.plan.modules), *norms]))
    if len(norms) < 0.75 * len(names):
        return _heat_map(norms, frozenset(), label, theme, names)
    grid = module_grid(names)
    figure = new_figure(3.9)
    axes = figure.add_subplot()
    _draw_by_layer(axes, grid, norms, theme)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    _label_layers([axes], grid)
    legend_above(figure, axes)
    return figure


def _draw_plan(axes: Axes, phase: PhaseRecord, grid: ModuleGrid, start: int, theme: Theme) -> None:
    """One band of layers of one phase."""
    layers = grid.layers[start : start + _BAND]
    width = min(len(grid.layers), _BAND)  # the last band has cells of the same size
    image = np.full((len(grid.kinds), width, 3), to_rgb(theme.surface))
    uniform = len({adapter.r for adapter in phase.plan.active.values()}) == 1
    for name, adapter in phase.plan.modules.items():
        layer, kind = grid.places[name]
        if not start <= layer < start + _BAND:
            continue
        colour = _plan_colour(adapter, phase.shapes.get(name), theme)
        image[kind, layer - start] = colour
        if adapter is not None and not uniform:
            size = 8 if width <= 34 else 7
            ink = theme.ink_on(colour)
            axes.text(layer - start, kind, str(adapter.r), ha="center", va="center", fontsize=size, color=ink)
    axes.imshow(image, aspect="auto", interpolation="nearest")
    layer_axis(axes, layers, start)
    axes.set_xlim(-0.5, width - 0.5)
    _label_kinds(axes, grid, theme)


def _plan_colour(adapter: ModuleAdapter | None, shape: Shape | None, theme: Theme) -> tuple[float, float, float]:
    """Grey without adapter; else the colour of own or shared, the paler the less the masks keep."""
    if adapter is None:
        return to_rgb(theme.empty)
    share = 1.0 if shape is None else kept_share(adapter, shape)
    return _blend(theme, theme.series[0] if adapter.group is None else theme.series[1], 0.3 + 0.7 * share)


def _blend(theme: Theme, colour: str, part: float) -> tuple[float, float, float]:
    """`part` of the way from grey to `colour`."""
    empty = np.array(to_rgb(theme.empty))
    red, green, blue = empty + (np.array(to_rgb(colour)) - empty) * part
    return red, green, blue


def _plan_legend(shown: Sequence[PhaseRecord], theme: Theme) -> list[Patch]:
    """Only what occurs."""
    adapters = [adapter for phase in shown for adapter in phase.plan.modules.values()]
    masked = any(adapter and (adapter.rows or adapter.cols) for adapter in adapters)
    entries = [
        ("own adapter", to_rgb(theme.series[0]), any(a and a.group is None for a in adapters)),
        ("shared adapter", to_rgb(theme.series[1]), any(a and a.group is not None for a in adapters)),
        ("no adapter", to_rgb(theme.empty), any(a is None for a in adapters)),
        ("paler: fewer rows and columns kept", _blend(theme, theme.series[0], 0.4), masked),
    ]
    return [Patch(facecolor=colour, label=label) for label, colour, occurs in entries if occurs]


def _heat_map(
    values: Mapping[str, float], kept: frozenset[str], label: str, theme: Theme, names: Sequence[str] = ()
) -> Figure:
    """Layer × type; the ground shows through where a module of `names` has no value."""
    grid = module_grid(names or values)
    image = np.full((len(grid.kinds), len(grid.layers)), np.nan)
    for name, value in values.items():
        layer, kind = grid.places[name]
        image[kind, layer] = value
    figure = new_figure(max(2.3, len(grid.kinds) * 0.3 + 1.3))
    axes = figure.add_subplot()
    drawn = axes.imshow(
        image, aspect="auto", interpolation="nearest", cmap=theme.scale, vmin=min(0.0, np.nanmin(image))
    )
    layer_axis(axes, grid.layers)
    axes.set_xlim(-0.5, len(grid.layers) - 0.5)
    _label_kinds(axes, grid, theme)
    places = [grid.places[name] for name in values if name in kept]
    size = 26 if len(grid.layers) <= 40 else 10
    if places:
        layers, kinds = zip(*places, strict=True)
        axes.scatter(
            layers, kinds, s=size, color=theme.series[1], edgecolors=theme.surface, linewidths=0.8, label="stays"
        )
    bar = figure.colorbar(drawn, ax=axes, pad=0.015, aspect=14)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label(label if len(grid.kinds) >= 5 else label.replace(", ", ",\n"))
    legend_above(figure, axes)
    return figure


def _draw_by_layer(axes: Axes, grid: ModuleGrid, values: Mapping[str, float], theme: Theme) -> None:
    """One line per type, with a gap where a layer has no value."""
    axes.grid(axis="y")
    for i, kind in enumerate(grid.kinds):
        course = np.full(len(grid.layers), np.nan)
        for name in grid.of_kind(i):
            course[grid.places[name][0]] = values.get(name, np.nan)
        if not np.isnan(course).all():
            axes.plot(range(len(course)), course, label=kind, **theme.line(i))


def _by_layer(grid: ModuleGrid, values: Mapping[str, float]) -> tuple[list[int], list[list[float]]]:
    """Layer indices, and the values of all modules of each."""
    stacked: dict[int, list[float]] = {}
    for name, value in values.items():
        stacked.setdefault(grid.places[name][0], []).append(value)
    layers = sorted(stacked)
    return layers, [stacked[layer] for layer in layers]


def _label_layers(axes: Sequence[Axes], grid: ModuleGrid) -> None:
    for panel in axes:
        layer_axis(panel, grid.layers)
        if panel is not axes[-1]:
            panel.set_xlabel("")


def _label_kinds(axes: Axes, grid: ModuleGrid, theme: Theme) -> None:
    """Types along y, and cells parted by thin lines of the ground."""
    axes.set_yticks(range(len(grid.kinds)), grid.kinds)
    columns, rows = np.arange(-0.5, axes.get_xlim()[1] + 0.5), np.arange(-0.5, len(grid.kinds))
    axes.set_xticks(columns, minor=True)
    axes.set_yticks(rows, minor=True)
    axes.grid(which="minor", color=theme.surface, linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
