"""AdaLoRA's pruning on copies of values and gradients, against PEFT's own on the model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from sparse_llm_ft.adapters import trained_parameters, tuner_of
from sparse_llm_ft.adapters.masking import to_compact
from sparse_llm_ft.optim.rank_allocation import RankAllocation, is_sensitivity, is_singular_value
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter
from sparse_llm_ft.training.callbacks import AdaLoraRankAllocation

SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("interrupted_after", [None, 4, 9])
def test_the_same_singular_values_are_pruned(interrupted_after: int | None) -> None:
    config = AdaLoraConfig(target_modules=["first", "second"], **SCHEDULE)
    torch.manual_seed(1)
    model = get_peft_model(Tiny(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names = list(trained_parameters(model))
    allocation = RankAllocation(copy.deepcopy(config), {n: p.detach() for n, p in trained_parameters(model).items()})
    left = []
    for step in range(1, 13):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        parameters = trained_parameters(model)
        gradients = {name: parameters[name].grad.clone() for name in names}
        optimizer.step()
        values = {name: parameters[name].detach().clone() for name in names}
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        pruned = allocation.after_step(step, values, gradients)
        assert all(is_singular_value(name) for name in pruned)
        for name in names:
            torch.testing.assert_close(parameters[name].detach(), pruned.get(name, values[name]), rtol=0, atol=0)
        left.append(sum(int((p != 0).sum()) for n, p in parameters.items() if is_singular_value(n)))
        if step == interrupted_after:
            data, tensors = allocation.to_dict(), {key: t.clone() for key, t in allocation.tensors().items()}
            allocation = RankAllocation(copy.deepcopy(config), values)
            allocation.restore(data, tensors)
    assert left[0] == 12 and min(left) == left[-1] == 4  # in between a pruned value may come back


def test_a_budget_that_prunes_nothing_yet_is_no_error() -> None:
    """PEFT's threshold is the k-th smallest score, k = 0 for a step at which nothing has to go."""
    config = AdaLoraConfig(target_modules=["first"], **(SCHEDULE | {"total_step": 4000, "deltaT": 1, "tinit": 0}))
    model = get_peft_model(Tiny(), config)
    values = {name: p.detach() for name, p in trained_parameters(model).items()}
    allocation = RankAllocation(config, values)
    assert allocation.after_step(1, values, {n: torch.ones_like(v) for n, v in values.items()}) == {}


class Values:
    """Stands in for an engine: the values that a callback reads and overwrites."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.stored = values

    def values(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self.stored[name].clone() for name in names}

    def load(self, values: dict[str, torch.Tensor]) -> None:
        self.stored |= values


def test_a_masked_module_is_ranked_by_the_entries_that_it_keeps() -> None:
    """Kept entries of `masked` are more sensitive than those of `whole`, so `whole` loses its ranks first, although
    most of its entries are zeros that never change.
    """
    rows, cols = IndexMask(8, (1, 6)), IndexMask(8, (0, 3))
    modules = {"whole": ModuleAdapter(4, 8.0), "masked": ModuleAdapter(4, 8.0, rows=rows, cols=cols)}
    options = {"target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 4, "orth_reg_weight": 0.0}
    plan = AdapterPlan(modules, tuner="adalora", options=options, masking="optimizer")
    values, gradients = {}, {}
    for name, sensitivity in (("whole", 1.0), ("masked", 1.5)):
        kept_a, kept_b = torch.zeros(4, 8), torch.zeros(8, 4)
        kept_a[:, list(cols.indices) if name == "masked" else slice(None)] = 1.0
        kept_b[list(rows.indices) if name == "masked" else slice(None)] = 1.0
        values |= {f"{name}.lora_A": kept_a, f"{name}.lora_B": kept_b, f"{name}.lora_E": torch.ones(4, 1)}
        gradients |= {
            f"{name}.lora_A": sensitivity * torch.ones(4, 8),
            f"{name}.lora_B": sensitivity * torch.ones(8, 4),
        }
        gradients |= {f"{name}.lora_E": torch.full((4, 1), 0.1)}
    config = tuner_of(plan).peft_config(plan)
    allocation = RankAllocation(config, to_compact(plan, values))
    callback, engine = AdaLoraRankAllocation(allocation, list(values), plan), Values(values)
    assert callback.active_adapters(engine) == 2
    for step in range(1, 4):
        logged = callback.after_step(engine, step, engine.values(callback.reads), gradients)
    assert logged == {"ranks": 4}
    assert engine.stored["masked.lora_E"].bool().all() and not engine.stored["whole.lora_E"].any()
    shapes = tuner_of(plan).shapes(plan, {"whole": (8, 8), "masked": (8, 8)})
    assert all(is_sensitivity(key, tuple(t.shape), shapes) for key, t in callback.tensors().items())
