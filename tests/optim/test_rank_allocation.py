"""AdaLoRA's pruning on copies of values and gradients, against PEFT's own on the model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from sparse_llm_ft.adapters import trained_parameters
from sparse_llm_ft.optim.rank_allocation import RankAllocation, is_singular_value

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
