"""How fast devices compute, and so how long a planned phase takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.model.flops import PEAK_TFLOPS
from sparse_llm_ft.planning.forecast import PhaseForecast, RunForecast

Rates = Mapping[str, float]
"""Phase -> model arithmetic that one device does in a second."""


def given_rate(forecast: RunForecast, tflops: float) -> Rates:
    """The same for all phases."""
    return {phase.name: 1e12 * tflops for phase in forecast.phases}


def card_rate(forecast: RunForecast, card: str, mfu: float) -> Rates:
    """A share of a known card's peak.

    Raises:
        UserError: the card is not known.
    """
    check_card(card)
    return given_rate(forecast, mfu * PEAK_TFLOPS[card])


def check_card(card: str) -> None:
    """Refuse a card that is not known.

    Raises:
        UserError: naming those that are.
    """
    if card not in PEAK_TFLOPS:
        raise UserError(f"--card {card}: expected one of {', '.join(PEAK_TFLOPS)}, or --tflops N")


def measured_rate(forecast: RunForecast, summary: Mapping[str, Any], model: str) -> Rates:
    """What a finished run's phases measured; a phase that it lacks gets that of its last one.

    Args:
        summary: the run's.
        model: of the planned run, whose arithmetic is taken for the finished run's.

    Raises:
        UserError: the run trained another model, or measured nothing.
    """
    if summary["model"] != model:
        raise UserError(f"--rate-of: that run trained {summary['model']}; expected one of {model}")
    measured = {phase["name"]: float(phase["tokens_per_second"]) for phase in summary["phases"]}
    if not any(measured.values()):
        raise UserError("--rate-of: that run measured no step; expected one that trained")
    last = summary["phases"][-1]["name"]
    rates = {}
    for phase in forecast.phases:
        if phase.flops_per_step is not None:
            tokens = phase.global_batch_size * forecast.samples.mean
            tokens_per_second = measured.get(phase.name) or measured[last]
            rates[phase.name] = tokens_per_second * phase.flops_per_step / tokens / int(summary["world_size"])
    return rates


def step_seconds(phase: PhaseForecast, rates: Rates, world_size: int) -> float | None:
    """Seconds of a step; None where its arithmetic or the rate is not known."""
    rate = rates.get(phase.name)
    return None if not rate or phase.flops_per_step is None else phase.flops_per_step / (rate * world_size)
