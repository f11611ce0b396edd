"""The optimizer against torch's own, and its state before the first step."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_llm_ft.optim import AdapterOptimizer, adapter_optimizer, sparse_adamw


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
    optimizer.gradient_scale = torch.tensor(0.5)
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
    optimizer.gradient_scale = torch.tensor(1.0)
    grads = gradients((5,), 6)
    for gradient in grads[:3]:
        parameter.grad = gradient
        optimizer.step()
    other = torch.nn.Parameter(parameter.detach().clone())
    fresh = AdapterOptimizer([other], lr=0.1)
    fresh.allocate_for(other, "adamw")
    fresh.gradient_scale = torch.tensor(1.0)
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
    optimizer.gradient_scale = torch.tensor(1.0)
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


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_kernels_clip_and_skip_on_the_device(
    algorithm: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, here on the CPU's own fused kernels: equal to the other ones, and a scale that is NaN changes
    neither values nor moments nor step counts.
    """

    def trained(fused: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(sparse_adamw, "FUSED", {"cpu"} if fused else set())
        monkeypatch.setattr(adapter_optimizer, "FUSED", {"cpu"} if fused else set())
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(4, 3))
        optimizer = AdapterOptimizer([{"params": [parameter], "algorithm": algorithm}], lr=0.1, weight_decay=0.2)
        optimizer.allocate_for(parameter, algorithm, torch.tensor([1, 2, 7], dtype=torch.int32) if masked else None)
        for scale, gradient in zip((0.5, math.nan, 1.0, math.nan, 0.1), gradients((4, 3), 5), strict=True):
            before = [t.clone() for t in (parameter.detach(), *optimizer.state[parameter].values())]
            parameter.grad = gradient if scale == scale else gradient * math.inf
            optimizer.gradient_scale = torch.tensor(scale, dtype=torch.float64)
            optimizer.step()
            after = (parameter.detach(), *optimizer.state[parameter].values())
            assert all(map(torch.equal, before, after)) == math.isnan(scale)
        assert float(optimizer.state[parameter]["step"]) == 3
        return list(after)

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-6, atol=1e-7)
