"""The engine's optimizer: `SparseAdamW` for adapters, AdamW or SGD for omega, clipping included.

State exists before the first step, because a phase change and a resumed run write moments into an engine that has not
stepped yet. The engine allocates it: under ZeRO the optimizer updates flat partitions, which DeepSpeed puts in place of
the model's parameters only after the optimizer is built.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from sparse_llm_ft.optim.sparse_adamw import FUSED, ParamGroup, SparseAdamW

MOMENTS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""Algorithm -> names of its per-entry state."""


class AdapterOptimizer(SparseAdamW):
    """AdamW on kept entries, or plain SGD; each parameter group chooses by its ``algorithm``.

    A group is a dict with ``params`` and optionally ``name``, ``algorithm``, ``lr``, ``weight_decay``, ``betas``,
    ``eps``. A parameter's state under SGD is ``step`` alone.

    Attributes:
        gradient_scale: scalar that multiplies every gradient; set before each step. NaN, or None, the initial value: a
            step changes nothing, not even step counts. It is None while DeepSpeed is built, because some wrappers try
            a step, and NaN when a gradient is not finite. On a GPU it stays there: the host waits for no value. The
            engine clips with it, once gradients are float32: DeepSpeed's own norm would count masked entries.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, algorithm="adamw", name="adapter")
        self.gradient_scale: torch.Tensor | None = None
        for group in self.param_groups:
            if group["algorithm"] not in MOMENTS:
                raise ValueError(f"algorithm is {group['algorithm']!r}; known: {', '.join(MOMENTS)}")

    def _build_state(self, masks: dict[torch.Tensor, torch.Tensor]) -> None:
        """Allocate nothing: the engine does, see the module's docstring."""

    def allocate_for(self, parameter: torch.Tensor, algorithm: str, kept: torch.Tensor | None = None) -> None:
        """As `allocate`, with the state that `algorithm` needs."""
        self.allocate(parameter, kept)
        wanted = ("step", *MOMENTS[algorithm])
        self.state[parameter] = {key: value for key, value in self.state[parameter].items() if key in wanted}

    def _update(self, group: ParamGroup, params: list[torch.Tensor], not_finite: torch.Tensor | None = None) -> None:
        if self.gradient_scale is None:
            return
        scale = self.gradient_scale.to(params[0].device, torch.float32)
        if params[0].device.type in FUSED:
            not_finite = scale.isnan().float()
        elif scale.isnan():
            return
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], scale)
        if group["algorithm"] == "adamw":
            super()._update(group, params, not_finite)
        else:
            _sgd_update(group, params, [self.state[p]["step"] for p in params], not_finite)


def _sgd_update(
    group: ParamGroup, params: list[torch.Tensor], steps: list[torch.Tensor], not_finite: torch.Tensor | None
) -> None:
    sgd(
        params,
        [p.grad for p in params if p.grad is not None],
        [None] * len(params),
        weight_decay=group["weight_decay"],
        momentum=0.0,
        lr=group["lr"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
        fused=not_finite is not None,
        found_inf=not_finite,
    )
    torch._foreach_add_(steps, 1)
    if not_finite is not None:
        torch._foreach_sub_(steps, [not_finite] * len(steps))
