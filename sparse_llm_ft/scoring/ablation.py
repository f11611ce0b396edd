"""The model on D_t with some rows or columns of one weight zeroed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sparse_llm_ft.config.derivation import FloorMetric
from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.scoring.blocks import PrefixCache, recorded_calls

Side = Literal["rows", "cols"]


@contextmanager
def zeroed(module: nn.Module, side: Side, keep: torch.Tensor, bias: torch.Tensor | None = None) -> Iterator[None]:
    """The linear layer `module` as it is with rows or columns of W zero; the weight is not touched.

    With row i of W zero, output feature i is the bias; with column j zero, input feature j counts as 0. So this
    works for 4-bit and for sharded weights.

    Args:
        keep: (d_out,) or (d_in,) bool.
        bias: (d_out,), the layer's bias, whole, where it has one; for `rows`.
    """

    def mask_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        return (torch.where(keep.to(x.device), x, x.new_zeros(())), *others)

    def mask_output(_: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        rest = y.new_zeros(()) if bias is None else bias.to(y)
        return torch.where(keep.to(y.device), y, rest)

    if side == "cols":
        handle = module.register_forward_pre_hook(mask_input)
    else:
        handle = module.register_forward_hook(mask_output)
    try:
        yield
    finally:
        handle.remove()


class AblationEvaluator:
    """Runs the model over the micro-batches of D_t; evaluation mode and `torch.no_grad` are the caller's.

    Attributes:
        cache: what is not computed again.
        metric: that of the floor.
        forwards: forward passes made so far.
    """

    def __init__(
        self, model: nn.Module, objective: Objective[Any], batches: Sequence[Batch], metric: FloorMetric
    ) -> None:
        self.batches = batches
        self.cache = PrefixCache({}, len(batches))
        self.forwards = 0
        self._model = model
        self._objective = objective
        self.metric = metric

    def score(self, i: int, metric: FloorMetric) -> torch.Tensor:
        """(batch,) float64 on the CPU: `correct` (accuracy) or `losses` (loss) of micro-batch i."""
        measure = self._objective.correct if metric == "accuracy" else self._objective.losses
        self.forwards += 1
        with self.cache.replaced(i):
            return measure(self._model, self.batches[i]).detach().double().cpu()

    def total(self, metric: FloorMetric) -> float:
        """Sum over D_t with the model as it is."""
        return float(sum(self.score(i, metric).sum() for i in range(len(self.batches))))

    def call_order(self, blocks: Mapping[str, nn.Module]) -> list[str] | None:
        """The blocks that one micro-batch calls, in order; None if it calls one more than once."""
        with recorded_calls(blocks) as calls:
            self.score(0, self.metric)
        return calls if len(set(calls)) == len(calls) else None
