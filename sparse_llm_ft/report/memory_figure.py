"""The figure of memory: what each phase's step was planned to need beside what it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.ticker import EngFormatter, MaxNLocator

from sparse_llm_ft.report.data import Record, RunReport
from sparse_llm_ft.report.style import Drawing, compact, legend_above, new_figure

PARTS = (
    "base",
    "adapters",
    "optimizer",
    "the step: activations, gradients, workspaces",
    "beside tensors",
)
"""Parts of a bar, from the left."""


class Bar(NamedTuple):
    """A bar of the figure.

    Attributes:
        parts: bytes of each of `PARTS`.
    """

    label: str
    parts: tuple[int, int, int, int, int]

    @property
    def total(self) -> int:
        """Bytes of the whole bar."""
        return sum(self.parts)


def memory(report: RunReport) -> Drawing | None:
    """A stacked bar for each phase's forecast, and one for what its steps took, where that is known."""
    bars = memory_bars(report)
    if not bars:
        return None
    figure = new_figure(1.35 + 0.36 * len(bars))
    axes = figure.add_subplot()
    places, left = range(len(bars)), [0] * len(bars)
    for i, part in enumerate(PARTS):
        sizes = [bar.parts[i] for bar in bars]
        if any(sizes):
            axes.barh(places, sizes, height=0.66, left=left, color=f"C{i if i < 4 else 6}", label=part)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for i, bar in enumerate(bars):
        text = compact(bar.total, "B")
        axes.annotate(text, (bar.total, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, max(bar.total for bar in bars) * 1.14)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("peak of a step on each device")
    axes.tick_params(axis="y", length=0)
    legend_above(figure, axes)
    on_gpu = any(line["reserved_memory_bytes"] is not None for line in report.steps)
    alt = ", ".join(f"{bar.label} {compact(bar.total, 'B')}" for bar in bars)
    return Drawing(
        figure, "Memory of a step: forecast and fact", _ON_GPU if on_gpu else _ON_CPU, f"Stacked bars: {alt}."
    )


_ON_GPU = (
    "What the planner expects of the settings and the samples, and PyTorch's own peak in the steps. Beside tensors: in "
    "the forecast the assumed CUDA context, NCCL buffers and allocator's blocks; in the fact the allocator's blocks "
    "alone."
)
_ON_CPU = (
    "What the planner expects of the settings and the samples, and the peak of rank 0's resident memory in the steps. "
    "Beside tensors: what the process held before it loaded the base, in both; memory that torch has freed and not "
    "returned to the system counts as the step's."
)


def memory_bars(report: RunReport) -> list[Bar]:
    """The bars in the phases' order: each forecast, and behind it the fact of a phase that has come as foreseen."""
    bars = []
    for i, planned in enumerate(report.forecast):
        name, process = planned["name"], report.process_bytes
        bars.append(_planned_bar(planned, process))
        lines = [line for line in report.steps if line["phase"] == name and line["peak_memory_bytes"] is not None]
        for total in report.totals[i : i + 1]:
            if total["name"] == name and total.get("base_bytes_per_rank") and lines:
                bars.append(_measured_bar(planned, total, lines, process))
    return bars


def _planned_bar(planned: Record, process: int) -> Bar:
    lines = planned["lines"]
    held = lines["base"], lines["adapters"], lines["optimizer"]
    step = max(0, planned["peaks"]["step"] - sum(held) - lines["device_overhead"])
    return Bar(f"{planned['name']}, forecast", (*held, step, lines["device_overhead"] + process))


def _measured_bar(planned: Record, total: Record, lines: Sequence[Record], process: int) -> Bar:
    peak = max(line["peak_memory_bytes"] for line in lines)
    reserved = max(line["reserved_memory_bytes"] or 0 for line in lines)
    # An offloaded optimizer is in the host's memory, and the forecast has none of it on the device.
    optimizer = int(total["optimizer_bytes_per_rank"]) if planned["lines"]["optimizer"] else 0
    held = total["base_bytes_per_rank"], total["adapter_bytes_per_rank"], optimizer
    beside = max(0, reserved - peak) if reserved else process
    step = max(0, peak - sum(held) - (0 if reserved else process))
    size, foreseen = int(total["micro_batch_size"]), planned["micro_batch_size"]
    other = "" if size == foreseen else f" at micro-batch {size}, not {foreseen}"
    return Bar(f"{planned['name']}, fact{other}", (*held, step, beside))
