"""StoIHT against a ten-line reference, and the trap of B = 0."""

from __future__ import annotations

import random

import pytest
import torch

from sparse_llm_ft.optim import StoIHT, keep_largest
from sparse_llm_ft.phase import CutRule


def reference_cut(omega: list[float], k: int) -> list[float]:
    """Nguyen et al. (2014), the hard-thresholding half step, as plainly as it can be written."""
    order = sorted(range(len(omega)), key=lambda i: omega[i], reverse=True)
    kept = set(order[:k])
    return [value if i in kept else 0.0 for i, value in enumerate(omega)]


@pytest.mark.parametrize("k", [1, 3, 7, 8])
def test_sgd_with_cuts_equals_the_reference(k: int) -> None:
    """f(omega) = |omega - target|² / 2 by gradient steps, cut after each: the same iterates, steps 1 to 30."""
    generator = random.Random(0)
    target = [generator.uniform(-1, 2) for _ in range(8)]
    names = [f"m{i}.lora_omega" for i in range(8)]
    rule, ours, plain = StoIHT(CutRule(keep=k, steps=30)), [1.0] * 8, [1.0] * 8
    for step in range(1, 31):
        ours = [w - 0.1 * (w - t) for w, t in zip(ours, target, strict=True)]
        plain = [w - 0.1 * (w - t) for w, t in zip(plain, target, strict=True)]
        values = dict(zip(names, ours, strict=True))
        zeroed, _ = rule.after_step(step, values)
        ours = list((values | zeroed).values())
        plain = reference_cut(plain, k)
        assert ours == plain
    assert sum(value != 0 for value in ours) <= k


def test_the_largest_are_signed_and_ties_go_to_the_earlier() -> None:
    assert keep_largest({"a": -5.0, "b": 0.1, "c": 0.2}, 2) == {"b", "c"}
    assert keep_largest({"a": 1.0, "b": 1.0, "c": 1.0}, 2) == {"a", "b"}


def test_nothing_is_cut_before_every_omega_has_moved() -> None:
    """With B = 0 the first gradients are 0: a cut then would choose by index and could not be undone."""
    rule = StoIHT(CutRule(keep=1, steps=10))
    assert rule.after_step(1, {"a": 1.0, "b": 1.0}) == ({}, 0)
    assert rule.after_step(2, {"a": 1.1, "b": 1.0}) == ({}, 0)
    assert rule.after_step(3, {"a": 1.1, "b": 1.2}) == ({"a": 0.0}, 0)


def test_the_trap_itself_with_b_zero_the_first_omega_gradient_is_zero() -> None:
    """y = omega B A x: d y / d omega = B A x = 0 while B = 0, and not after B's first step."""
    torch.manual_seed(0)
    a, b, omega = torch.randn(2, 3), torch.zeros(4, 2), torch.ones(1)
    for parameter in (a, b, omega):
        parameter.requires_grad_()
    x = torch.randn(5, 3)

    def loss() -> torch.Tensor:
        return ((x @ a.T @ b.T * omega) - 1).square().sum()

    loss().backward()
    assert omega.grad is not None and float(omega.grad) == 0.0
    with torch.no_grad():
        b -= 0.1 * b.grad
    omega.grad = None
    loss().backward()
    assert float(omega.grad) != 0.0


def test_the_last_cut_does_not_wait_and_a_dead_adapter_ranks_last() -> None:
    rule = StoIHT(CutRule(keep=2, steps=5))
    omega = {"dead": 1.0, "low": 0.3, "high": 0.9}
    for step in range(1, 5):
        assert rule.after_step(step, omega)[0] == {}
    assert rule.after_step(5, omega)[0] == {"dead": 0.0}


def test_after_and_every_say_when_and_a_cut_adapter_can_come_back() -> None:
    rule = StoIHT(CutRule(keep=1, steps=99, every=3, after=4))
    cut_steps = [step for step in range(1, 14) if rule.after_step(step, {"a": 2.0, "b": 3.0})[0]]
    assert cut_steps == [7, 10, 13] == [step for step in range(1, 14) if rule.may_cut(step)]
    assert rule.may_cut(99) and not rule.may_cut(98)  # the last cut comes whatever `every` says
    zeroed, swaps = rule.after_step(16, {"a": 4.0, "b": 3.0})
    assert (zeroed, swaps) == ({"b": 0.0}, 1)


def test_what_may_not_stay_is_cut_every_time_however_large() -> None:
    rule = StoIHT(CutRule(keep=1, steps=9, first=1), allowed=frozenset("bc"))
    assert rule.after_step(1, {"a": 9.0, "b": 1.5, "c": 1.2}) == ({"a": 0.0, "c": 0.0}, 0)
    assert rule.after_step(2, {"a": 9.0, "b": 1.5, "c": 1.7}) == ({"a": 0.0, "b": 0.0}, 1)
    again = StoIHT.from_dict(rule.rule, rule.to_dict(), rule.allowed)
    assert again == rule and again.after_step(9, {"a": 9.0, "b": 0.1, "c": -1.0})[0] == {"a": 0.0, "c": 0.0}


def test_the_random_choice_is_drawn_once() -> None:
    omega = {name: float(i) for i, name in enumerate("abcdefgh", 2)}
    rule = StoIHT(CutRule(keep=3, steps=50, choose="random", seed=1))
    kept = [frozenset(omega) - set(rule.after_step(step, omega)[0]) for step in (1, 2, 50)]
    assert len(set(kept)) == 1 and len(kept[0]) == 3
    others = {
        frozenset(StoIHT(CutRule(keep=3, steps=1, choose="random", seed=s)).after_step(1, omega)[0]) for s in range(9)
    }
    assert len(others) > 1


def test_a_saved_rule_continues() -> None:
    rule = CutRule(keep=1, steps=9)
    first = StoIHT(rule)
    first.after_step(1, {"a": 1.5, "b": 1.0})
    second = StoIHT.from_dict(rule, first.to_dict())
    assert second == first
    assert second.after_step(2, {"a": 1.5, "b": 1.2})[0] == {"b": 0.0}
