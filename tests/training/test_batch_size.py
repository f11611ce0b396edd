"""Batch sizes of phases: growth into freed memory, and resuming on another number of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
from sparse_llm_ft.engine.memory import activation_bytes, state_bytes
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.model.loading import empty_model
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, uniform_plan
from sparse_llm_ft.training import batch_size
from sparse_llm_ft.training.batch_size import check_growth, grown_batch, largest_micro_batch, resumed_batch


@pytest.mark.parametrize(
    ("total", "world", "limit", "size"), [(16, 2, 3, 2), (16, 2, 100, 8), (12, 1, 5, 4), (7, 1, 6, 1)]
)
def test_the_largest_micro_batch_divides(total: int, world: int, limit: int, size: int) -> None:
    assert largest_micro_batch(total, world, limit) == size


def test_ranks_that_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 is not a multiple of the 3 processes"):
        largest_micro_batch(16, 3, 4)


@pytest.fixture
def change(settings: dict):
    """Config, targets, the phase before with 14 adapters and the phase after with one in the last layer."""
    config = parse_config(merge(settings, {"method": {"name": "weight_lora", "keep": 1, "steps": 2}}))
    targets = find_targets(empty_model(config.model), "all-linear")
    before = build_methods(config, 8).first(uniform_plan(targets, 4, 8.0), targets).with_batch(2, 8, 0.5)
    last = list(targets)[-1]
    plan = AdapterPlan({name: before.plan.modules[name] if name == last else None for name in targets})
    return config, targets, before, Phase("train", plan)


def test_no_growth_keeps_both(change) -> None:
    config, targets, before, phase = change
    grown = grown_batch(phase, before, config, targets, 16, 1, CAUSAL_LM)
    assert (grown.micro_batch_size, grown.global_batch_size, grown.lr_factor) == (2, 8, 0.5)


def test_keep_global_turns_accumulation_into_micro_batch(change) -> None:
    config, targets, before, phase = change
    grown = grown_batch(replace(phase, batch_growth="keep_global"), before, config, targets, 16, 1, CAUSAL_LM)
    assert grown.micro_batch_size in (4, 8) and grown.global_batch_size == 8 and grown.lr_factor == 0.5


@pytest.mark.parametrize(("scaling", "exponent"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_grow_global_fills_the_freed_memory_and_scales_the_rate(change, scaling: str, exponent: float) -> None:
    config, targets, before, phase = change
    after = replace(phase, batch_growth="grow_global", lr_scaling=scaling)
    grown = grown_batch(after, before, config, targets, 16, 1, CAUSAL_LM)
    old, new = (activation_bytes(config.model, plan, 16) for plan in (before.plan, phase.plan))
    freed = state_bytes(before.plan, targets, 2, 1) - state_bytes(phase.plan, targets, 2, 1)
    assert grown.micro_batch_size == (2 * old + freed) // new > 2
    assert grown.global_batch_size == 4 * grown.micro_batch_size  # the accumulation steps stay
    assert grown.lr_factor == pytest.approx(0.5 * (grown.global_batch_size / 8) ** exponent)


def test_resuming_elsewhere_keeps_the_global_batch(change) -> None:
    phase = change[3].with_batch(8, 16, 0.7)
    assert resumed_batch(phase, 1) == phase
    moved = resumed_batch(phase, 4)
    assert (moved.micro_batch_size, moved.global_batch_size, moved.lr_factor) == (4, 16, 0.7)
    assert resumed_batch(phase, 1, limit=3).micro_batch_size == 2  # set anew, after a lack of memory for instance


def test_growth_that_cannot_be_planned_is_refused_at_the_start(change, monkeypatch) -> None:
    config, _, before, _ = change
    check_growth(config, before, CAUSAL_LM)

    def fails(*args: object, **kwargs: object) -> int:
        raise RuntimeError("no meta kernel\nfor this")

    monkeypatch.setattr(batch_size, "activation_bytes", fails)
    with pytest.raises(ConfigError, match=r"method.batch_growth: .* \(no meta kernel for this\); expected none"):
        check_growth(config, before, CAUSAL_LM)
