"""A forecast as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sparse_llm_ft.planning.devices import Device
from sparse_llm_ft.planning.forecast import PhaseForecast, RunForecast
from sparse_llm_ft.planning.others import OtherMethod
from sparse_llm_ft.planning.rates import Rates, step_seconds

LINES = {
    "base": "base",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer: masters, moments, indices",
    "kept_for_backward": "kept for backward",
    "logits_and_loss": "logits and loss",
    "dequantisation": "workspace: a 4-bit weight, dequantised",
    "gathered_weights": "workspace: gathered weights",
    "communication_buckets": "workspace: communication buckets",
    "device_overhead": "CUDA context, NCCL, allocator (assumed, see docs/planning.md)",
}
"""Line -> what people read."""

PEAKS = {
    "load": "peak of loading",
    "step": "peak of a step",
    "change": "peak of the change to the next phase",
    "save": "peak of a save",
    "evaluate": "peak of evaluation and generation",
}


def to_json(forecast: RunForecast, fits: bool) -> dict[str, Any]:
    """The contract of ``plan --json``."""
    return {"fits": fits, "phases": phases_to_json(forecast)}


def phases_to_json(forecast: RunForecast) -> list[dict[str, Any]]:
    """The phases in that contract."""
    return [_phase_json(phase) for phase in forecast.phases]


def _phase_json(phase: PhaseForecast) -> dict[str, Any]:
    return {
        "name": phase.name,
        "micro_batch_size": phase.micro_batch_size,
        "lines": dict(phase.lines),
        "peak_bytes": phase.peak_bytes,
        "peaks": dict(phase.peaks),
        "flops_per_step": phase.flops_per_step,
        "communicated_bytes_per_step": phase.communicated_bytes_per_step,
    }


def memory_line(forecast: RunForecast, device: Device) -> str:
    """The largest peak of each phase, in a line."""
    peaks = [f"phase {phase.name} {size_text(phase.peak_bytes)} ({phase.highest})" for phase in forecast.phases]
    limit = "" if device.memory is None else f", of {size_text(device.memory)}"
    return f"planned memory of each {device.noun}: {', '.join(peaks)}{limit}"


def phase_table(phase: PhaseForecast, ranks: int, rates: Rates) -> str:
    """One phase, for people: the memory of one device, then work and time."""
    batch = f"micro-batch {phase.micro_batch_size}, global batch {phase.global_batch_size}"
    lines = [f"phase {phase.name}: {phase.plan}, {phase.trainable:,} values; {batch}"]
    lines += [f"  assumed: {phase.assumption}"] if phase.assumption else []
    rows = [(LINES[key], size_text(size)) for key, size in phase.lines.items() if size]
    rows += [(PEAKS[key], size_text(size)) for key, size in phase.peaks.items() if size]
    rows += [("in the host's memory: optimizer", size_text(phase.offloaded))] if phase.offloaded else []
    rows.append(("sent in a step by one rank", size_text(phase.communicated_bytes_per_step)))
    if phase.flops_per_step is not None:
        rows.append(("arithmetic of a step, all ranks", f"{phase.flops_per_step / 1e12:,.2f} TFLOP"))
    seconds = step_seconds(phase, rates, ranks)
    if seconds is not None:
        rows.append(("a step", f"{seconds:,.3g} s"))
        if phase.steps is not None:
            whole = seconds * phase.steps
            rows.append((f"{phase.steps:,} steps", f"{whole / 3600:,.3g} h, {whole * ranks / 3600:,.3g} GPU hours"))
    elif phase.steps is not None:
        rows.append(("steps", f"{phase.steps:,}"))
    return "\n".join([*lines, *aligned(rows)])


def others_table(own: RunForecast, others: Iterable[OtherMethod], name: str) -> str:
    """What other methods would change, one line each: the peak of all phases, and a step of the last one."""
    rows = [("method", "peak", "a step's arithmetic", "values"), _method_row(name, own, own)]
    for other in others:
        rows.append(
            (other.name, other.reason, "", "")
            if other.forecast is None
            else _method_row(other.name, other.forecast, own)
        )
    return "\n".join(["other methods at their defaults", *aligned(rows)])


def _method_row(name: str, forecast: RunForecast, own: RunForecast) -> tuple[str, str, str, str]:
    last, mine = forecast.phases[-1].flops_per_step, own.phases[-1].flops_per_step
    share = "" if last is None or not mine else f"{last / mine:.2f} x"
    return name, size_text(forecast.peak_bytes), share, f"{forecast.phases[-1].trainable:,}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their cells below each other: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
