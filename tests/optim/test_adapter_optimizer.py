"""The optimizer against torch's own, and its state before the first step."""

from __future__ import annotations

import pytest
import torch

from sparse_llm_ft.optim import AdapterOptimizer


def gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_updates_equal_torch(algorithm: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    ours, reference = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = AdapterOptimizer([{"params": [ours], "algorithm": algorithm}], lr=0.1, weight_decay=0.2)
    optimizer.allocate_for(ours, algorithm)
    optimizer.gradient_scale = 0.5
    torch_optimizer = (
        torch.optim.AdamW([reference], lr=0.1, weight_decay=0.2)
        if algorithm == "adamw"
        else torch.optim.SGD([reference], lr=0.1, weight_decay=0.2)
    )
    for gradient in gradients((4, 3), 6):
        ours.grad, reference.grad = gradient.clone(), gradient * 0.5
        optimizer.step()
        torch_optimizer.step()
        assert torch.equal(ours, reference)
    assert float(optimizer.state[ours]["step"]) == 6


def test_a_loaded_state_continues_as_if_never_interrupted() -> None:
    """Moments and step count of one optimizer, put into a fresh one: the next updates are equal."""
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = AdapterOptimizer([parameter], lr=0.1)
    optimizer.allocate_for(parameter, "adamw")
    optimizer.gradient_scale = 1.0
    grads = gradients((5,), 6)
    for gradient in grads[:3]:
        parameter.grad = gradient
        optimizer.step()
    other = torch.nn.Parameter(parameter.detach().clone())
    fresh = AdapterOptimizer([other], lr=0.1)
    fresh.allocate_for(other, "adamw")
    fresh.gradient_scale = 1.0
    for key in ("step", "exp_avg", "exp_avg_sq"):
        fresh.state[other][key].copy_(optimizer.state[parameter][key])
    for gradient in grads[3:]:
        parameter.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        fresh.step()
    assert torch.equal(parameter, other)


def test_groups_keep_their_own_rule_and_a_parameter_without_gradient_stays() -> None:
    a, b, idle = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = AdapterOptimizer(
        [{"params": [a, idle], "lr": 0.5}, {"params": [b], "algorithm": "sgd", "lr": 0.25, "name": "omega"}]
    )
    for parameter, algorithm in ((a, "adamw"), (idle, "adamw"), (b, "sgd")):
        optimizer.allocate_for(parameter, algorithm)
    optimizer.gradient_scale = 1.0
    a.grad = b.grad = torch.full((2,), 2.0)
    optimizer.step()
    assert torch.allclose(a, torch.full((2,), 0.5))  # Adam's first step is the learning rate
    assert torch.allclose(b, torch.full((2,), 0.5))  # 1 - 0.25 * 2
    assert torch.equal(idle, torch.ones(2))
    assert set(optimizer.state[b]) == {"step"}


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="algorithm is 'adam'; known: adamw, sgd"):
        AdapterOptimizer([{"params": [torch.nn.Parameter(torch.ones(1))], "algorithm": "adam"}])


def test_nothing_changes_without_a_scale() -> None:
    """While DeepSpeed is built, and after gradients that are not finite."""
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdapterOptimizer([{"params": [a]}, {"params": [b], "algorithm": "sgd"}], lr=0.1)
    assert not optimizer.state
    a.grad = b.grad = torch.ones(2)
    optimizer.step()  # no state yet
    optimizer.allocate_for(a, "adamw")
    optimizer.allocate_for(b, "sgd")
    optimizer.step()
    assert torch.equal(a, torch.ones(2)) and torch.equal(b, torch.ones(2))
    assert float(optimizer.state[a]["step"]) == float(optimizer.state[b]["step"]) == 0
