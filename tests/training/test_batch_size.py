"""Batch sizes of phases: growth into freed memory, and resuming on another number of ranks."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig

from helpers.contexts import open_context
from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
from sparse_llm_ft.engine.memory import state_bytes, step_bytes
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.model.loading import empty_model
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, uniform_plan
from sparse_llm_ft.planning import batch_size
from sparse_llm_ft.planning.batch_size import (
    grown_batch,
    largest_micro_batch,
    nearest_global_batch,
    resumed_batch,
    settle_growth,
)
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


def grown(change, **settings) -> tuple[Phase, str | None]:
    config, targets, before, phase = change
    return grown_batch(replace(phase, **settings), before, config, targets, 16, 1, CAUSAL_LM, {})


def needed(change, phase: Phase) -> int:
    """Bytes at the peak of a step of this phase, with adapters and their optimizer state."""
    config, targets, _, _ = change
    peak = step_bytes(config.model, phase.plan, 16, samples=phase.micro_batch_size).peak
    return peak + state_bytes(phase.plan, targets, config.deepspeed.zero_stage, 1)


def test_no_growth_keeps_both(change) -> None:
    phase, remark = grown(change)
    assert (phase.micro_batch_size, phase.global_batch_size, phase.lr_factor) == (2, 8, 0.5) and remark is None


def test_keep_global_turns_accumulation_into_micro_batch(change) -> None:
    phase, remark = grown(change, batch_growth="keep_global")
    assert phase.micro_batch_size == 4 and phase.global_batch_size == 8 and phase.lr_factor == 0.5
    before = change[2]
    sizes = " -> ".join(f"{needed(change, of) / 2**20:.1f}" for of in (before, phase))
    assert remark == f"planned peak of a step with adapters and optimizer state: {sizes} MiB"
    assert needed(change, phase) <= needed(change, before) < needed(change, replace(phase, micro_batch_size=8))


@pytest.mark.parametrize(("scaling", "exponent"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_grow_global_fills_the_freed_memory_and_scales_the_rate(change, scaling: str, exponent: float) -> None:
    phase, _ = grown(change, batch_growth="grow_global", lr_scaling=scaling)
    micro, before = phase.micro_batch_size, change[2]
    assert needed(change, phase) <= needed(change, before) < needed(change, replace(phase, micro_batch_size=micro + 1))
    assert micro > 2 and phase.global_batch_size == 4 * micro  # the accumulation steps stay
    assert phase.lr_factor == pytest.approx(0.5 * (phase.global_batch_size / 8) ** exponent)


def test_where_none_divides_the_log_suggests_a_global_batch(change) -> None:
    """Of 22 samples only 1, 2, 11 and 22 divide."""
    config, targets, before, phase = change
    odd = (config, targets, before.with_batch(2, 22), phase)
    after, remark = grown(odd, batch_growth="keep_global")
    assert after.micro_batch_size == 2 and remark is not None
    found = re.fullmatch(
        r"micro-batches up to (\d+) fit, and none of them divides the global batch; with training.global_batch_size "
        r"(\d+) it would grow to (\d+)",
        remark,
    )
    assert found is not None
    limit, size, larger = map(int, found.groups())
    assert 2 < larger <= limit < 11
    again, remark = grown((config, targets, before.with_batch(2, size), phase), batch_growth="keep_global")
    assert again.micro_batch_size == larger and remark is not None and remark.startswith("planned peak")


def test_where_none_fits_the_log_says_so(change) -> None:
    config, targets, before, _ = change
    phase, remark = grown((config, targets, before, Phase("train", before.plan)), batch_growth="keep_global")
    assert phase.micro_batch_size == 2 and remark == "no larger micro-batch fits"


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_global_batch_is_found_by_trying_all(seed: int) -> None:
    draw = random.Random(seed)
    world, micro = draw.randint(1, 3), draw.randint(1, 6)
    limit, total = micro + draw.randint(0, 5), micro * world * draw.randint(1, 9)
    fitting = [
        (abs(size - total), -larger)
        for size in range(world * micro, 40 * total)
        for larger in range(micro + 1, limit + 1)
        if size % (larger * world) == 0 and size % (micro * world) == 0
    ]
    found = nearest_global_batch(total, world, micro, limit)
    assert (found is None) == (not fitting)
    if found is not None:
        assert (abs(found[0] - total), -found[1]) == min(fitting)
        assert found[0] % (micro * world) == found[0] % (found[1] * world) == 0


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

    monkeypatch.setattr(batch_size, "cached_step_bytes", fails)
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
