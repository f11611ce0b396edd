"""Figures over the model's layers and module types: the plan, its importance scores, masks and residuals."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sparse_llm_ft.plan import ModuleAdapter, Shape
from sparse_llm_ft.report.data import Pair, Record, RunReport
from sparse_llm_ft.report.grid import ModuleGrid, module_grid
from sparse_llm_ft.report.style import Drawing, layer_axis, legend_above, line_style, new_figure

_BAND = 40
"""Most layers in one row of panels; deeper models continue below."""
_PANELS = 4
"""Most phases drawn as plans: the first, and the last ones."""
_ROW = 0.24
"""Height of a module type in inches."""
_OWN, _SHARED = "C0", "C1"


def plan(report: RunReport) -> Drawing | None:
    """Layer × type for each phase: own adapter, shared, or none; the rank; how much of it a mask keeps."""
    phases = [phase for phase in report.phases if phase["plan"].active]
    if not phases:
        return None
    shown = phases if len(phases) <= _PANELS else [phases[0], *phases[1 - _PANELS :]]
    grid = module_grid(dict.fromkeys(name for phase in shown for name in phase["plan"].modules))
    panels = [(phase, start) for phase in shown for start in range(0, len(grid.layers), _BAND)]
    figure = new_figure(len(panels) * (len(grid.kinds) * _ROW + 0.42) + len(shown) * 0.2 + 0.7)
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (phase, start) in zip(all_axes, panels, strict=True):
        _draw_plan(axes, phase, grid, start)
        if start == 0:
            axes.set_title(_plan_line(phase))
        if axes is not all_axes[-1]:
            axes.set_xlabel("")
    legend_above(figure, all_axes[0], _plan_legend(shown))
    return Drawing(
        figure,
        "Adapters by layer and module type",
        "Which modules carry an adapter in each phase; a number is the rank where ranks differ.",
        f"Map of layers and module types: {'; '.join(map(_plan_line, phases))}.",
    )


def importance(report: RunReport) -> Drawing | None:
    """The scores of LoRA-drop or WeightLoRA: layer × type, with a dot on the modules that were chosen."""
    choice = report.choice
    if choice is None:
        return None
    label = "importance y, share within its type" if choice.symbol == "y" else "adapter weight ω"
    return Drawing(
        _heat_map(choice.values, label, choice.kept),
        "Importance of the modules",
        "What the choice was made from; a dot marks a module that keeps its own adapter.",
        f"Heat map of {len(choice.values)} modules, {len(choice.kept)} of which stay. {_extremes(choice.values)}",
    )


def kept_fraction(report: RunReport) -> Drawing | None:
    """The fractions of rows and columns that Partial-LoRA keeps, by layer."""
    fractions = report.kept_fractions
    if fractions is None:
        return None
    grid = module_grid(fractions)
    figure, panels = _layer_figure(5.6, grid, "fraction kept", ("rows of B (outputs)", "columns of A (inputs)"))
    for side, panel in enumerate(panels):
        _draw_by_layer(panel, grid, {name: pair[side] for name, pair in fractions.items()})
    panels[0].set_ylim(bottom=0)
    legend_above(figure, panels[0])
    rows, columns = zip(*fractions.values(), strict=True)
    return Drawing(
        figure,
        "Rows and columns kept",
        "Which fraction of each module's outputs and inputs its adapter reaches, by layer and module type."
        + _ratios_of_zero(report),
        f"Line charts by layer: {min(rows):.0%} to {max(rows):.0%} of the rows and "
        f"{min(columns):.0%} to {max(columns):.0%} of the columns are kept.",
    )


def _ratios_of_zero(report: RunReport) -> str:
    """A sentence about derived ratios of 0; empty without any."""
    ratios = [share for pair in (report.partial_scores or {"ratios": {}})["ratios"].values() for share in pair]
    if 0 not in ratios:
        return ""
    return (
        f" {ratios.count(0)} of {len(ratios)} derived ratios are 0: the model stays within the floor if each of "
        "these modules is zeroed entirely, so their ratios carry no information."
    )


def overlap(report: RunReport) -> Drawing | None:
    """How far importance measures agree: mean, minimum and maximum over a layer's modules."""
    scores = report.partial_scores
    if scores is None or not scores["overlap"]:
        return None
    pairs: dict[str, Mapping[str, Pair]] = {
        pair.upper().replace("-", " and "): shares for pair, shares in scores["overlap"].items()
    }
    grid = module_grid(dict.fromkeys(name for shares in pairs.values() for name in shares))
    figure, panels = _layer_figure(5.6, grid, "overlap (fraction)", ("rows (outputs)", "columns (inputs)"))
    for side, panel in enumerate(panels):
        for i, (label, shares) in enumerate(pairs.items()):
            by_layer: dict[int, list[float]] = {}
            for name, both in shares.items():
                by_layer.setdefault(grid.places[name][0], []).append(both[side])
            layers = sorted(by_layer)
            low, high, mean = (np.array([of(by_layer[n]) for n in layers]) for of in (min, max, np.mean))
            panel.fill_between(layers, low, high, color=f"C{i}", alpha=0.1, linewidth=0)
            panel.plot(layers, mean, label=label, **line_style(i))
    panels[0].set_ylim(0, 1.02)
    legend_above(figure, panels[0])
    means = [f"{label} share {np.mean(list(shares.values())):.0%} on average" for label, shares in pairs.items()]
    return Drawing(
        figure,
        "Agreement of importance measures",
        "Shared fraction of the most important rows and columns for each pair of measures: mean over the layer's "
        "modules, and the range between the lowest and the highest.",
        f"Line charts by layer: {', '.join(means)}.",
    )


def residual_norms(report: RunReport) -> Drawing | None:
    """How far training moved each module, in the last phase that measured it.

    Lines by layer; a heat map if so many modules have no adapter that lines would be mostly gaps.
    """
    norms = report.residual_norms
    if norms is None:
        return None
    label = "residual norm ‖ΔW‖ (Frobenius)"
    names = list(dict.fromkeys([*(name for phase in report.phases for name in phase["plan"].modules), *norms]))
    if len(norms) < 0.75 * len(names):
        figure = _heat_map(norms, label, names=names)
    else:
        grid = module_grid(names)
        figure, [axes] = _layer_figure(3.9, grid, label)
        _draw_by_layer(axes, grid, norms)
        axes.set_ylim(bottom=0)
        legend_above(figure, axes)
    return Drawing(
        figure,
        "Size of the trained residuals",
        "How far training moved each module's weight by the end of the last phase; nothing where it has no adapter.",
        f"By layer and module type: residual norms of {len(norms)} modules. {_extremes(norms)}",
    )


def _plan_line(phase: Record) -> str:
    """A phase's plan in words: modules with adapters, ranks, kept rows and columns."""
    plan = phase["plan"]
    adapters = plan.active.values()
    ranks = sorted({adapter.r for adapter in adapters})
    shares = [_kept_share(adapter, phase["shapes"][name]) for name, adapter in plan.active.items()]
    own = sum(adapter.group is None for adapter in adapters)
    parts = [f"{own} of {len(plan.modules)} modules with their own adapter"]
    if own < len(adapters):
        parts.append(f"{len(adapters) - own} sharing {len(plan.groups)}")
    parts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
    if min(shares) < 1:
        parts.append(f"{min(shares):.0%} to {max(shares):.0%} of their rows and columns")
    if plan.trained:
        parts.append(f"{', '.join(plan.trained)} trained whole")
    return f"phase {phase['index'] + 1}, {phase['name']}: {', '.join(parts)}"


def _kept_share(adapter: ModuleAdapter, shape: Shape) -> float:
    """The fraction of A and B that the masks of `adapter` keep."""
    return sum(adapter.shape(shape)) / sum(shape)


def _draw_plan(axes: Axes, phase: Record, grid: ModuleGrid, start: int) -> None:
    """One phase, one band of layers: grey without adapter, and paler the less the masks keep."""
    width = min(len(grid.layers), _BAND)  # the last band has cells of the same size
    image = np.full((len(grid.kinds), width, 3), to_rgb(rcParams["axes.facecolor"]))
    uniform = len({adapter.r for adapter in phase["plan"].active.values()}) == 1
    for name, adapter in phase["plan"].modules.items():
        layer, kind = grid.places[name][0] - start, grid.places[name][1]
        if not 0 <= layer < _BAND:
            continue
        if adapter is None:
            image[kind, layer] = to_rgb(rcParams["patch.facecolor"])
            continue
        share = _kept_share(adapter, phase["shapes"][name])
        image[kind, layer] = _blend(_OWN if adapter.group is None else _SHARED, 0.3 + 0.7 * share)
        if not uniform:
            ink = "black" if image[kind, layer] @ (0.299, 0.587, 0.114) > 0.55 else "white"
            size = 8 if width <= 34 else 7
            axes.text(layer, kind, str(adapter.r), ha="center", va="center", fontsize=size, color=ink)
    axes.imshow(image, aspect="auto", interpolation="nearest")
    layer_axis(axes, grid.layers[start : start + _BAND], start)
    axes.set_xlim(-0.5, width - 0.5)
    _label_kinds(axes, grid)


def _blend(colour: str, part: float) -> tuple[float, float, float]:
    """`part` of the way from the grey of an empty cell to `colour`."""
    empty = np.array(to_rgb(rcParams["patch.facecolor"]))
    red, green, blue = empty + (np.array(to_rgb(colour)) - empty) * part
    return red, green, blue


def _plan_legend(shown: Sequence[Record]) -> list[Patch]:
    """Legend entries for what occurs."""
    adapters = [adapter for phase in shown for adapter in phase["plan"].modules.values()]
    entries = [
        ("own adapter", _blend(_OWN, 1), any(a and a.group is None for a in adapters)),
        ("shared adapter", _blend(_SHARED, 1), any(a and a.group is not None for a in adapters)),
        ("no adapter", _blend(_OWN, 0), None in adapters),
        ("paler: fewer rows and columns kept", _blend(_OWN, 0.4), any(a and (a.rows or a.cols) for a in adapters)),
    ]
    return [Patch(facecolor=colour, label=label) for label, colour, occurs in entries if occurs]


def _heat_map(
    values: Mapping[str, float], label: str, kept: Collection[str] = (), names: Iterable[str] | None = None
) -> Figure:
    """Layer × type, with a dot on `kept`. A module of `names` without a value shows the background."""
    grid = module_grid(names or values)
    image = np.full((len(grid.kinds), len(grid.layers)), np.nan)
    for name, value in values.items():
        layer, kind = grid.places[name]
        image[kind, layer] = value
    figure = new_figure(max(2.3, len(grid.kinds) * 0.3 + 1.3))
    axes = figure.add_subplot()
    drawn = axes.imshow(image, aspect="auto", interpolation="nearest", vmin=min(0.0, np.nanmin(image)))
    layer_axis(axes, grid.layers)
    axes.set_xlim(-0.5, len(grid.layers) - 0.5)
    _label_kinds(axes, grid)
    places = [grid.places[name] for name in values if name in kept]
    if places:
        layers, kinds = zip(*places, strict=True)
        edge = {"edgecolors": rcParams["axes.facecolor"], "linewidths": 0.8}
        axes.scatter(layers, kinds, s=26 if len(grid.layers) <= 40 else 10, color="C1", label="stays", **edge)
    bar = figure.colorbar(drawn, ax=axes, pad=0.015, aspect=14)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label(label if len(grid.kinds) >= 5 else label.replace(", ", ",\n"))
    legend_above(figure, axes)
    return figure


def _layer_figure(
    height: float, grid: ModuleGrid, label: str, titles: Sequence[str] = ("",)
) -> tuple[Figure, Sequence[Axes]]:
    """A figure and its panels over the layers of `grid`: one for each title, one below the other."""
    figure = new_figure(height)
    panels = figure.subplots(len(titles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, title in zip(panels, titles, strict=True):
        layer_axis(panel, grid.layers)
        panel.set_title(title)
        panel.set_ylabel(label)
        panel.grid(axis="y")
        if panel is not panels[-1]:
            panel.set_xlabel("")
    return figure, list(panels)


def _draw_by_layer(axes: Axes, grid: ModuleGrid, values: Mapping[str, float]) -> None:
    """One line per type, with gaps at layers that have no value."""
    for i, kind in enumerate(grid.kinds):
        course = np.full(len(grid.layers), np.nan)
        for name in grid.of_kind(i):
            course[grid.places[name][0]] = values.get(name, np.nan)
        if not np.isnan(course).all():
            axes.plot(range(len(course)), course, label=kind, **line_style(i))


def _label_kinds(axes: Axes, grid: ModuleGrid) -> None:
    """Types along y, and thin lines of the background between cells."""
    axes.set_yticks(range(len(grid.kinds)), grid.kinds)
    columns, rows = np.arange(-0.5, axes.get_xlim()[1] + 0.5), np.arange(-0.5, len(grid.kinds))
    axes.set_xticks(columns, minor=True)
    axes.set_yticks(rows, minor=True)
    axes.grid(which="minor", color=rcParams["axes.facecolor"], linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _extremes(values: Mapping[str, float]) -> str:
    grid = module_grid(values)
    name = max(values, key=lambda module: values[module])
    layer, kind = grid.places[name]
    low = min(values.values())
    return f"Smallest {low:.3g}, largest {values[name]:.3g} (layer {grid.layers[layer]}, {grid.kinds[kind]})."
