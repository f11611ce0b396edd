"""A new tuner is one class in TUNERS: it trains, its checkpoint is valid, and stock PEFT loads what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftConfig, PeftModel

from helpers.tiny_models import IDS, MODELS
from sparse_llm_ft.adapters import (
    TUNERS,
    Tuner,
    add_adapters,
    change_plan,
    count_parameters,
    find_targets,
    save_peft_adapter,
    trained_parameters,
)
from sparse_llm_ft.adapters.masking import to_compact
from sparse_llm_ft.adapters.tuners import TensorShape, rank_settings
from sparse_llm_ft.checkpoint.validation import Expected, check_tensors
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, Shape, uniform_plan

LLAMA = MODELS["llama"]


class Gaussian(Tuner):
    """LoRA with A drawn from a normal distribution."""

    name = "gaussian_lora"
    lora_options: Mapping[str, Any] = {"init_lora_weights": "gaussian"}


class LoHa(Tuner):
    """No LoRA at all: ΔW is the Hadamard product of two products (Hyeon-Woo et al., 2022)."""

    name = "loha"
    prefix = "hada_"
    is_product = False

    def peft_config(self, plan: AdapterPlan) -> PeftConfig:
        settings = rank_settings(plan.active)
        return LoHaConfig(r=settings["r"], alpha=settings["lora_alpha"], target_modules=sorted(plan.active))

    def shapes(self, plan: AdapterPlan, targets: Mapping[str, Shape]) -> dict[str, TensorShape]:
        return {
            f"{name}.hada_{w}_{side}": shape
            for name, adapter in plan.active.items()
            for w in ("w1", "w2")
            for side, shape in (("a", (targets[name][0], adapter.r)), ("b", (adapter.r, targets[name][1])))
        }


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("tuner", [Gaussian(), LoHa()], ids=lambda tuner: tuner.name)
def test_a_new_tuner_is_one_entry(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TUNERS, tuner.name, tuner)
    torch.manual_seed(0)
    base = LLAMA.build()
    targets = find_targets(base, "all-linear")
    before = uniform_plan(targets, 4, 8.0)
    plan = AdapterPlan(dict.fromkeys(targets, ModuleAdapter(4, 8.0)), tuner=tuner.name)
    assert AdapterPlan.from_dict(plan.to_dict()) == replace(before, tuner=tuner.name)
    model = change_plan(add_adapters(base, before), before, plan).train()
    trained = trained_parameters(model)
    assert sum(p.numel() for p in trained.values()) == count_parameters(plan, targets)

    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    for _ in range(2):  # what begins at zero has a gradient first, and lets the others have one
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in trained.values())
    fresh = logits(LLAMA.build())
    assert (logits(model) - fresh).abs().max() > 1e-2

    state = to_compact(plan, {name: p.detach() for name, p in trained.items()})
    check_tensors(plan, {name: tuple(t.shape) for name, t in state.items()}, Expected(targets, {}, 1))
    save_peft_adapter(tmp_path, plan, state, "base", None)
    stock = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
