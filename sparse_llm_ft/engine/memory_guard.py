"""Passes that may run out of memory on one rank and not on another (``training.on_oom: shrink``).

No collective can be interrupted: a rank that left a step half done would leave the others waiting in it. So a rank
computes its gradients first, with nothing of DeepSpeed's: `torch.autograd.grad` runs none of the hooks on parameters
that reduce gradients. Then it hands them to DeepSpeed, by the backward pass of a function that only returns them. That
pass makes every collective of the micro-step, and allocates no more than gradients. A rank that ran out of memory hands
over NaN. Their norm over all ranks is NaN too, so no rank makes the update, as with any gradients that are not finite:
parameters, moments and step counts stay as they were. It hands over nothing else from then on, because all ranks may
have begun the next step before the others learn of it.

The update itself is not guarded: its memory does not depend on the micro-batch, and a rank cannot undo half of it.

Stages 0 to 2 alone: at stage 3 the forward pass itself gathers weights, and a rank that leaves it cannot make the
gathers that the others still wait for.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import torch

from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.errors import lacks_device_memory, lacks_host_memory

Losses = Callable[[Callable[..., Any]], tuple[torch.Tensor, torch.Tensor]]
"""From a forward pass to a micro-batch's loss, detached, and the loss to differentiate: two scalars."""


class MemoryGuard:
    """The passes of one engine.

    Attributes:
        failed: whether this rank has run out of memory. No update is made from then on.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine.settings.zero_stage < 3, "config/load.py refuses stage 3"
        self.failed = False
        self._engine = engine

    def backward(self, losses: Losses) -> torch.Tensor:
        """Collective. A micro-batch's forward and backward pass; returns its loss, detached: 0 where memory failed.

        Once memory has failed, nothing more is computed.
        """
        parameters = list(self._engine.parameters.values())
        computed = None
        if not self.failed:
            try:
                computed = self._compute(losses, parameters)
            except RuntimeError as error:
                if not (lacks_device_memory(error) or lacks_host_memory(error)):
                    raise
                self.failed = True
        if computed is None:  # here, where the error's traceback no longer holds the tensors of the passes
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            nothing = torch.zeros((), device=parameters[0].device)
            computed = nothing, [torch.full_like(parameter, math.nan) for parameter in parameters]
        loss, gradients = computed
        del computed
        self._engine.backward_given(gradients)
        return loss

    def _compute(self, losses: Losses, parameters: list[torch.nn.Parameter]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss, and its gradients divided by the accumulation steps, as DeepSpeed divides them.

        A parameter without gradient has zeros: every rank hands over the same parameters.
        """
        loss, differentiated = losses(self._engine.forward_apart)
        scaled = differentiated / self._engine.settings.accumulation_steps
        found = torch.autograd.grad(scaled, parameters, allow_unused=True)
        return loss, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
