"""The optimizer of the adapters: AdamW for A and B, AdamW or SGD for omega, with state on request.

The arithmetic is torch's own. What is added is `allocate`: state that exists before the first step. The hand-over
from one phase to the next and the resume of a run both write moments into an engine that has not stepped yet, and
DeepSpeed's `safe_set_full_optimizer_state` fails there with an optimizer that makes its state in the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

MOMENTS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""Names of the per-entry state that each algorithm keeps."""


class AdapterOptimizer(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) or plain SGD, chosen per parameter group by its ``algorithm``.

    A group is a dict with ``params`` and optionally ``name``, ``algorithm``, ``lr``, ``weight_decay``, ``betas``,
    ``eps``. State of an AdamW parameter: ``step`` (a float32 scalar), ``exp_avg`` and ``exp_avg_sq`` (as the
    parameter); of an SGD parameter: ``step``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"algorithm": "adamw", "name": "adapter"})
        for group in self.param_groups:
            if group["algorithm"] not in MOMENTS:
                raise ValueError(f"algorithm is {group['algorithm']!r}; known: {', '.join(MOMENTS)}")

    def allocate(self, parameter: torch.Tensor, algorithm: str, steps: int = 0) -> None:
        """Zero state for `parameter`, as after `steps` steps; what was there is dropped.

        Under ZeRO the parameters are the flat partitions that DeepSpeed put in place of the model's.
        """
        state: dict[str, torch.Tensor] = {"step": torch.tensor(float(steps))}
        state |= {key: torch.zeros_like(parameter) for key in MOMENTS[algorithm]}
        self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for parameter in params:
                if parameter not in self.state:
                    self.allocate(parameter, group["algorithm"])
            if params:
                _UPDATES[group["algorithm"]](params, [p.grad for p in params], [self.state[p] for p in params], group)
        return loss


def _adamw_update(params: list[Any], grads: list[Any], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        params,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _sgd_update(params: list[Any], grads: list[Any], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    sgd(
        params,
        grads,
        [None] * len(params),
        weight_decay=group["weight_decay"],
        momentum=0.0,
        lr=group["lr"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    for state in states:
        state["step"] += 1


_UPDATES = {"adamw": _adamw_update, "sgd": _sgd_update}
