"""Batch sizes of phases: growth into freed memory, and resuming on another number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig

from helpers.contexts import open_context
from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
from sparse_llm_ft.engine.memory import activation_bytes, state_bytes
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.model.loading import empty_model
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, uniform_plan
from sparse_llm_ft.training import batch_size
from sparse_llm_ft.training.batch_size import grown_batch, largest_micro_batch, resumed_batch, settle_growth
from sparse_llm_ft.training.run import Run


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
    grown = grown_batch(phase, before, config, targets, 16, 1, CAUSAL_LM, {})
    assert (grown.micro_batch_size, grown.global_batch_size, grown.lr_factor) == (2, 8, 0.5)


def test_keep_global_turns_accumulation_into_micro_batch(change) -> None:
    config, targets, before, phase = change
    grown = grown_batch(replace(phase, batch_growth="keep_global"), before, config, targets, 16, 1, CAUSAL_LM, {})
    assert grown.micro_batch_size in (4, 8) and grown.global_batch_size == 8 and grown.lr_factor == 0.5


@pytest.mark.parametrize(("scaling", "exponent"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_grow_global_fills_the_freed_memory_and_scales_the_rate(change, scaling: str, exponent: float) -> None:
    config, targets, before, phase = change
    after = replace(phase, batch_growth="grow_global", lr_scaling=scaling)
    grown = grown_batch(after, before, config, targets, 16, 1, CAUSAL_LM, {})
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


class _Console(Console):
    """Keeps its lines."""

    def __init__(self) -> None:
        super().__init__(0)
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def test_growth_that_cannot_be_planned_is_skipped_or_refused(settings: dict, change, monkeypatch) -> None:
    """It is on by default; only who asks for it is refused."""
    config, _, before, _ = change
    console = _Console()
    assert settle_growth(config, before, CAUSAL_LM, 16, console) is config and not console.lines

    def fails(*args: object, **kwargs: object) -> int:
        raise KeyError("no meta kernel\nfor this")

    monkeypatch.setattr(batch_size, "activation_bytes", fails)
    settled = settle_growth(config, before, CAUSAL_LM, 16, console)
    assert [method.model_dump()["batch_growth"] for method in settled.method] == ["none"]
    assert len(console.lines) == 1 and console.lines[0].startswith("method.batch_growth is none: the memory of this")
    for growth in ("keep_global", "grow_global"):
        method = {"name": "weight_lora", "keep": 1, "steps": 2, "batch_growth": growth}
        asked = parse_config(merge(settings, {"method": method}))
        with pytest.raises(ConfigError, match=rf"^method.batch_growth: {growth}, but .*\(KeyError.*\); expected none"):
            settle_growth(asked, before, CAUSAL_LM, 16, console)


def test_a_model_with_its_own_attention_trains_without_growth(
    settings: dict, model_folder: Path, tmp_path: Path
) -> None:
    """Falcon. config.yaml says what ran, and the settings as typed resume it."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(FalconConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    model.save_pretrained(tmp_path / "falcon")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "falcon")
    changes = {
        "model": {"name": str(tmp_path / "falcon")},
        "method": {"name": "weight_lora", "keep": 1, "steps": 2},
    }
    typed = parse_config(merge(settings, changes))
    run = Run.prepare(open_context(typed))
    assert run.config is run.context.config and not any(method.grows_batch for method in run.config.method)
    run.folder.path.mkdir()
    run.folder.begin(run.config, 0)
    Run.prepare(open_context(typed))
    with pytest.raises(ConfigError, match=r"batch_growth: 'none' there, 'keep_global' here"):
        run.folder.check(typed, resolved=True)
    asked = merge(settings, merge(changes, {"method": {"batch_growth": "keep_global"}}))
    with pytest.raises(ConfigError, match=r"batch_growth: 'none' there, 'keep_global' here"):
        Run.prepare(open_context(parse_config(asked)))
