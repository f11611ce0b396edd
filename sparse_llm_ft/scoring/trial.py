"""The model on D_t with some rows or columns of one weight zeroed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.scoring.blocks import PrefixCache, recorded_calls
from sparse_llm_ft.scoring.contracts import Metric

Side = Literal["rows", "cols"]


@contextmanager
def zeroed(module: nn.Module, side: Side, keep: torch.Tensor, bias: torch.Tensor | None = None) -> Iterator[None]:
    """The linear layer `module` as it is with rows or columns of W zero; the weight is not touched.

    With row i of W zero, output feature i is the bias; with column j zero, input feature j counts as 0. So this
    works for 4-bit and for sharded weights.

    Args:
        keep: (repeats, d_out) or (repeats, d_in) bool. With several repetitions the layer's input must have
            ``repeats * batch`` as dimension 0, repetition by repetition.
        bias: (d_out,), the layer's bias, whole, where it has one; for `rows`.
    """

    def mask_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        return (torch.where(_spread(keep, x), x, x.new_zeros(())), *others)

    def mask_output(_: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        rest = y.new_zeros(()) if bias is None else bias.to(y)
        return torch.where(_spread(keep, y), y, rest)

    if side == "cols":
        handle = module.register_forward_pre_hook(mask_input)
    else:
        handle = module.register_forward_hook(mask_output)
    try:
        yield
    finally:
        handle.remove()


def _spread(keep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`keep` (repeats, size) in a shape that broadcasts over x (repeats * batch, ..., size)."""
    keep = keep.to(x.device)
    repeats, size = keep.shape
    if repeats == 1:
        return keep[0]
    if len(x) % repeats:
        raise ValueError(f"an input of shape {tuple(x.shape)} cannot hold {repeats} repetitions of a batch")
    return keep.repeat_interleave(len(x) // repeats, dim=0).view(len(x), *[1] * (x.dim() - 2), size)


class Trial:
    """Runs the model over the micro-batches of D_t; evaluation mode and `torch.no_grad` are the caller's.

    Attributes:
        cache: what is not computed again.
        metric: that of the floor.
        forwards: forward passes made so far.
    """

    def __init__(self, model: nn.Module, objective: Objective[Any], batches: Sequence[Batch], metric: Metric) -> None:
        self.batches = batches
        self.cache = PrefixCache({}, len(batches))
        self.forwards = 0
        self._model = model
        self._objective = objective
        self.metric = metric

    def score(self, i: int, metric: Metric, repeats: int = 1) -> torch.Tensor:
        """(repeats * batch,) float64 on the CPU: `correct` (accuracy) or `losses` (loss) of micro-batch i."""
        batch = self.batches[i]
        if repeats > 1:
            batch = {key: torch.cat([tensor] * repeats) for key, tensor in batch.items()}
        measure = self._objective.correct if metric == "accuracy" else self._objective.losses
        self.forwards += 1
        with self.cache.replaced(i, repeats):
            return measure(self._model, batch).detach().double().cpu()

    def total(self, metric: Metric) -> float:
        """Sum over D_t with the model as it is."""
        return float(sum(self.score(i, metric).sum() for i in range(len(self.batches))))

    def totals(self, repeats: int) -> torch.Tensor:
        """(repeats,) float64: the sum of the floor's metric over D_t, for each repetition."""
        sums = torch.zeros(repeats, dtype=torch.float64)
        for i in range(len(self.batches)):
            sums += self.score(i, self.metric, repeats).view(repeats, -1).sum(1)
        return sums

    def call_order(self, blocks: Mapping[str, nn.Module]) -> list[str] | None:
        """The blocks that one micro-batch calls, in order; None if it calls one more than once."""
        with recorded_calls(blocks) as calls:
            self.score(0, self.metric)
        return calls if len(set(calls)) == len(calls) else None

    def batched(self, modules: Mapping[str, nn.Module]) -> set[str]:
        """The modules whose inputs have the batch as dimension 0; seen from one forward pass of a doubled batch."""
        wide: dict[str, bool] = dict.fromkeys(modules, True)
        length = 2 * len(next(iter(self.batches[0].values())))

        def look(name: str, args: tuple[Any, ...]) -> None:
            wide[name] &= args[0].dim() > 1 and len(args[0]) == length

        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: look(name, args))
            for name, module in modules.items()
        ]
        try:
            self.score(0, "loss", repeats=2)
        finally:
            for handle in handles:
                handle.remove()
        return {name for name, is_wide in wide.items() if is_wide}
