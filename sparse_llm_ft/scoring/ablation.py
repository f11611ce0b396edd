"""Evaluates the model on D_t, with some rows or columns of one weight ablated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Never

import torch
from torch import nn

from sparse_llm_ft.config.derivation import FloorMetric
from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.model.linear import LinearLayer
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.scoring.blocks import PrefixCache, recorded_calls
from sparse_llm_ft.scoring.contracts import WorkShard

Side = Literal["rows", "cols"]
SIDES: tuple[Side, Side] = ("rows", "cols")


@contextmanager
def zeroed(module: nn.Module, side: Side, keep: torch.Tensor, bias: torch.Tensor | None = None) -> Iterator[None]:
    """A context in which `module` computes as if rows or columns of W were zero; the weight itself is not modified.

    Zeroing row i sets output i to its bias; zeroing column j sets input j to 0. Forward hooks do both, so it works for
    4-bit and sharded weights.

    Args:
        keep: (d_out,) or (d_in,) bool; false where zeroed.
        bias: (d_out,), the layer's unsharded bias, if it has one; for `rows`.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    keep = keep.to(weight.device)  # once: in a hook, every call would wait for the GPU

    def mask_input(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = args
        return (torch.where(keep, x, x.new_zeros(())), *others)

    def mask_output(_: nn.Module, args: object, y: torch.Tensor) -> torch.Tensor:
        rest = y.new_zeros(()) if bias is None else bias.to(y)
        return torch.where(keep, y, rest)

    if side == "cols":
        handle = module.register_forward_pre_hook(mask_input)
    else:
        handle = module.register_forward_hook(mask_output)
    try:
        yield
    finally:
        handle.remove()


def unsharded_biases(modules: Mapping[str, LinearLayer], shard: WorkShard) -> dict[str, torch.Tensor]:
    """Collective if lockstep. Module -> a copy of its bias, (d_out,); without those that have none."""
    biases = {}
    for name, linear in modules.items():
        if linear.bias is not None:
            with shard.gather(linear):
                biases[name] = linear.bias.detach().clone()
    return biases


class AblationEvaluator:
    """Runs the model over the micro-batches of D_t. The caller sets evaluation mode and `torch.no_grad`.

    Attributes:
        cache: outputs of blocks that are not computed again.
        metric: the metric that the floor limits.
        forwards: forward passes made so far.
    """

    def __init__(
        self, model: nn.Module, objective: Objective[Never], batches: Sequence[Batch], metric: FloorMetric
    ) -> None:
        self.batches = batches
        self.cache = PrefixCache({}, len(batches))
        self.forwards = 0
        self._model = model
        self._objective = objective
        self.metric = metric

    def score(self, i: int, metric: FloorMetric) -> torch.Tensor:
        """Collective under ZeRO-3. (batch,) float64 on the CPU: `correct` or `losses` of micro-batch i."""
        measure = self._objective.correct if metric == "accuracy" else self._objective.losses
        self.forwards += 1
        with self.cache.replaced(i):
            return measure(self._model, self.batches[i]).detach().double().cpu()

    def total(self, metric: FloorMetric) -> float:
        """Collective under ZeRO-3. The metric's sum over D_t."""
        return float(sum(self.score(i, metric).sum() for i in range(len(self.batches))))

    def call_order(self, blocks: Mapping[str, nn.Module]) -> list[str] | None:
        """The blocks in the order in which a forward pass calls them; None if it calls one more than once."""
        with recorded_calls(blocks) as calls:
            self.score(0, self.metric)
        return calls if len(set(calls)) == len(calls) else None
