"""The joint reading of Algorithm 1 (ours): all modules are cut together, at growing shares of their importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch

from sparse_llm_ft.model.linear import LinearLayer
from sparse_llm_ft.scoring.ablation import SIDES, AblationEvaluator, Side, unsharded_biases, zeroed
from sparse_llm_ft.scoring.contracts import WorkShard
from sparse_llm_ft.scoring.importance import Importance, ranking
from sparse_llm_ft.scoring.search import find_crossing

STEPS = 256
"""The share of importance that is zeroed grows in this many equal steps; a search takes 8 tests of the whole model."""


def least_holding(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The least important indices that together hold at most `share` of the scores' sum.

    Scores of different modules have no common scale: svd's grow with the square of the weight's norm, snip's and imp's
    with the gradient that reaches the layer. A threshold on raw scores would empty whole modules first, and so would
    one on ranks over all modules. A share of a side's own sum means the same for each, and empties none below share 1.
    Sides whose importance lies in few indices keep fewer.

    Args:
        scores: (size,), not negative.
        share: 0 to 1.

    Returns:
        (zeroed,) int64, the least important first. All of them at share 1, and none at share 0 but those that hold
        nothing.
    """
    order = ranking(scores).flip(0)
    if share >= 1:
        return order
    held = scores.double()[order].cumsum(0)
    if held[-1] == 0:  # nothing tells the indices apart
        held = torch.arange(1.0, len(held) + 1, dtype=torch.float64)
    return order[: int(torch.searchsorted(held, share * held[-1], right=True))]


class JointSearch:
    """Two searches, over the rows and over the columns of all modules, as Algorithm 1 takes the two sides apart.

    The caller sets evaluation mode and `torch.no_grad`. Every test is a complete pass over D_t: nothing below the
    modules is left to cache.

    Args:
        modules: target name -> linear layer.
        scores: module -> importance.
        good_enough: whether a sum of the evaluator's metric over D_t meets the floor.
    """

    def __init__(
        self,
        modules: Mapping[str, LinearLayer],
        scores: Mapping[str, Importance],
        evaluator: AblationEvaluator,
        good_enough: Callable[[float], bool],
        shard: WorkShard,
    ) -> None:
        self._modules, self._scores = modules, scores
        self._evaluator, self._good_enough, self._shard = evaluator, good_enough, shard

    def run(self, report: Callable[[int, int], None] | None = None) -> dict[str, tuple[float, float]]:
        """Collective. Module -> (p_row, p_col), kept / size; the same on every rank.

        Args:
            report: called with the number of finished searches and of both.
        """
        kept: dict[str, list[float]] = {name: [] for name in self._modules}
        for done, side in enumerate(SIDES, start=1):
            biases = unsharded_biases(self._modules, self._shard) if side == "rows" else {}
            share = find_crossing(partial(self._passes, side, biases), STEPS) / STEPS
            for name in self._modules:
                scores = getattr(self._scores[name], side)
                kept[name].append(1 - len(least_holding(scores, share)) / len(scores))
            if report is not None:
                report(done, len(SIDES))
        return {name: (rows, cols) for name, (rows, cols) in kept.items()}

    def _passes(self, side: Side, biases: Mapping[str, torch.Tensor], k: int) -> bool:
        """Collective. Whether the model is good enough without the indices that hold the share k / STEPS."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                scores = getattr(self._scores[name], side)
                keep = torch.ones(len(scores), dtype=torch.bool)
                keep[least_holding(scores, k / STEPS)] = False
                stack.enter_context(zeroed(module, side, keep, biases.get(name)))
            return self._good_enough(self._total())

    def _total(self) -> float:
        """Collective. The metric's sum over D_t, the same on every rank.

        The ranks share the micro-batches. In lockstep a forward pass needs all ranks: each computes every micro-batch,
        and the sum of rank 0 counts, so that ranks cannot decide differently.
        """
        shard, count = self._shard, len(self._evaluator.batches)
        mine = range(count) if shard.lockstep else range(shard.rank, count, shard.size)
        own = sum((self._evaluator.score(i, self._evaluator.metric).sum() for i in mine), torch.zeros(()).double())
        if shard.lockstep and shard.rank > 0:
            own = torch.zeros_like(own)
        return float(shard.reduce(own.reshape(1)))
