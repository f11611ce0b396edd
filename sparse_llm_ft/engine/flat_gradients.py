"""Gradients of stages 1 and 2 in one tensor for each parameter group, averaged over the ranks once a step.

DeepSpeed calls a hook for each parameter in each backward pass, which copies its gradient into a bucket and later out
of it. Adapters are hundreds of small parameters, and for them the calls take longer than the copies. Here every
parameter's ``grad`` is a view of its group's tensor from the beginning of a step's first backward pass, and autograd
adds to it. The last backward pass ends with one reduce-scatter for each group, which leaves each rank the part that its
optimizer needs (Rajbhandari et al., 2020, section 5). DeepSpeed's own path reduces in every micro-step at stage 2, and
hands every rank the whole sum.

The tensor has the size of the bucket that DeepSpeed would allocate. Where it would reduce in several buckets, and where
its settings say how to reduce, its own path stays (`EngineSettings.has_flat_gradients`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class FlatGradients:
    """The gradients of one engine of stage 1 or 2, in place of DeepSpeed's hooks.

    Args:
        engine: a `DeepSpeedEngine`, whose hooks on parameters are removed.
    """

    def __init__(self, engine: Any) -> None:
        self._wrapped = engine.optimizer
        engine.enable_backward_allreduce = False  # as in DeepSpeed's pipelines, which reduce by themselves too
        for hook in self._wrapped._grad_acc_hooks:
            hook.remove()
        self._wrapped._grad_acc_hooks.clear()
        self._whole: list[torch.Tensor] = []

    def begin(self) -> None:
        """Before a backward pass: give every parameter its view, unless an earlier pass of the step did."""
        if self._whole:
            return
        wrapped = self._wrapped
        for parameters, values in zip(wrapped.round_robin_bit16_groups, wrapped.bit16_groups_flat, strict=True):
            whole = torch.zeros_like(values, requires_grad=False)
            views = wrapped.unflatten(whole, parameters)
            for parameter, view in zip(parameters, views, strict=True):
                parameter.grad = view
            self._whole.append(whole)

    def average(self) -> None:
        """Collective. After the last backward pass of a step: leave each rank its part of the averaged gradients, which
        the next update takes.
        """
        wrapped = self._wrapped
        wrapped.zero_grad(set_to_none=True)
        for number, group in enumerate(wrapped.real_dp_process_group):
            ranks, whole = dist.get_world_size(group), self._whole.pop(0)
            part = whole
            if ranks > 1:
                part = whole.new_empty(whole.numel() // ranks)
                _reduce_scatter(part, whole.div_(ranks), group=group)
            wrapped.averaged_gradients[number] = [part]
