"""What each figure shows, in words and numbers: the text for readers who cannot see it."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_llm_ft.plan import ModuleAdapter, Shape
from sparse_llm_ft.report.data import PhaseRecord, RunReport
from sparse_llm_ft.report.grid import module_grid


def loss(report: RunReport) -> str:
    """First and last values."""
    first, last = report.steps[0], report.steps[-1]
    text = f"Line chart: training loss {first.loss:.3g} at step {first.step}, {last.loss:.3g} at step {last.step}."
    validated = [line for line in report.steps if line.validation_loss is not None]
    if validated:
        text += f" Validation loss {validated[-1].validation_loss:.3g} at step {validated[-1].step}."
    return text


def phases(report: RunReport) -> str:
    """The table beside it has the numbers."""
    return f"Bar charts of the {len(report.totals)} phases; their numbers are in the table of phases."


def plan(report: RunReport) -> str:
    """One sentence a phase."""
    lines = "; ".join(plan_line(phase) for phase in report.phases if phase.plan.active)
    return f"Map of layers and module types: {lines}."


def plan_line(phase: PhaseRecord) -> str:
    """How many modules a phase's plan trains, with which ranks and how much of them."""
    active = phase.plan.active.values()
    ranks = sorted({adapter.r for adapter in active})
    own = sum(adapter.group is None for adapter in active)
    parts = [f"{own} of {len(phase.plan.modules)} modules with their own adapter"]
    if own < len(active):
        parts.append(f"{len(active) - own} sharing {len(phase.plan.groups)}")
    if ranks:
        parts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
    shares = [kept_share(a, phase.shapes[name]) for name, a in phase.plan.active.items() if name in phase.shapes]
    if shares and min(shares) < 1:
        parts.append(f"{min(shares):.0%} to {max(shares):.0%} of their rows and columns")
    if phase.plan.trained:
        parts.append(f"{', '.join(phase.plan.trained)} trained whole")
    return f"phase {phase.index + 1}, {phase.name}: {', '.join(parts)}"


def kept_share(adapter: ModuleAdapter, shape: Shape) -> float:
    """Which part of an unmasked adapter's A and B the masks of `adapter` leave."""
    return sum(adapter.shape(shape)) / sum(shape)


def omega(report: RunReport) -> str:
    """How many lines, how many are left."""
    lines = [line for line in report.steps if line.omega]
    first, last = lines[0].omega or {}, lines[-1].omega or {}
    left = sum(value > 0 for value in last.values())
    return f"Line chart: ω of {len(first)} adapters up to step {lines[-1].step}, where {left} are above 0."


def importance(report: RunReport) -> str:
    """Number kept, and the largest."""
    assert report.choice is not None
    values, kept = report.choice.values, report.choice.kept
    return f"Heat map of {len(values)} modules, {len(kept)} of which stay. {_largest(values)}"


def kept_fraction(report: RunReport) -> str:
    """Ranges of rows and columns."""
    assert report.kept_fractions is not None
    rows, columns = zip(*report.kept_fractions.values(), strict=True)
    return (
        f"Line charts by layer: {min(rows):.0%} to {max(rows):.0%} of the rows and "
        f"{min(columns):.0%} to {max(columns):.0%} of the columns are kept."
    )


def overlap(report: RunReport) -> str:
    """Mean overlap of each pair of measures."""
    assert report.partial_scores is not None
    means = []
    for pair, values in report.partial_scores.overlap.items():
        both = [value for sides in values.values() for value in sides]
        means.append(f"{pair.upper().replace('-', ' and ')} share {sum(both) / len(both):.0%} on average")
    return f"Line charts by layer: {', '.join(means)}."


def residual_norms(report: RunReport) -> str:
    """The range and the largest."""
    assert report.residual_norms is not None
    norms = report.residual_norms
    return f"By layer and module type: residual norms of {len(norms)} modules. {_largest(norms)}"


def _largest(values: Mapping[str, float]) -> str:
    grid = module_grid(values)
    name = max(values, key=lambda module: values[module])
    layer, kind = grid.places[name]
    low = min(values.values())
    return f"Smallest {low:.3g}, largest {values[name]:.3g} (layer {grid.layers[layer]}, {grid.kinds[kind]})."
