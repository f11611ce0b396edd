"""The engine's optimizer: `SparseAdamW` for adapters, AdamW or SGD for omega, clipping included.

State exists before the first step, since the hand-over from one phase to the next and the resume of a run both write
moments into an engine that has not stepped yet. It is allocated by the engine and not here: under ZeRO the tensors that
are updated are flat partitions which DeepSpeed puts in place of the model's parameters only after this is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.sgd import sgd

from sparse_llm_ft.optim.sparse_adamw import SparseAdamW

MOMENTS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""Names of the per-entry state that each algorithm keeps."""


class AdapterOptimizer(SparseAdamW):
    """AdamW on kept entries or plain SGD, chosen per parameter group by its ``algorithm``.

    A group is a dict with ``params`` and optionally ``name``, ``algorithm``, ``lr``, ``weight_decay``, ``betas``,
    ``eps``. State of an SGD parameter is ``step`` alone.

    Attributes:
        gradient_scale: multiplies every gradient; set before each step, 1 leaves them alone. None, as at first: steps
            change nothing, not even step counts. So it is while DeepSpeed is built, which tries a step on some
            wrappers, and where a gradient is not finite. DeepSpeed clips by a norm that counts masked entries;
            therefore the engine clips, and does it here, once the gradients are float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, algorithm="adamw", name="adapter")
        self.gradient_scale: float | None = None
        for group in self.param_groups:
            if group["algorithm"] not in MOMENTS:
                raise ValueError(f"algorithm is {group['algorithm']!r}; known: {', '.join(MOMENTS)}")

    def _build_state(self, masks: dict[torch.Tensor, torch.Tensor]) -> None:
        """Nothing yet; see above."""

    def allocate_for(self, parameter: torch.Tensor, algorithm: str, kept: torch.Tensor | None = None) -> None:
        """`allocate`, with the state of `algorithm`."""
        self.allocate(parameter, kept)
        wanted = ("step", *MOMENTS[algorithm])
        self.state[parameter] = {key: value for key, value in self.state[parameter].items() if key in wanted}

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        if self.gradient_scale is None:
            return
        if self.gradient_scale != 1.0:
            for parameter in params:
                assert parameter.grad is not None
                parameter.grad.mul_(self.gradient_scale)
        if group["algorithm"] == "adamw":
            super()._update(group, params)
        else:
            _sgd_update(group, params, [self.state[p] for p in params])


def _sgd_update(group: dict[str, Any], params: list[Any], states: list[dict[str, Any]]) -> None:
    sgd(
        params,
        [p.grad for p in params],
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
