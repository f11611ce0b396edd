"""The searches of Algorithm 1 over all modules, layer by layer, shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from sparse_llm_ft.model.linear import LinearLayer
from sparse_llm_ft.scoring.ablation import SIDES, AblationEvaluator, Side, unsharded_biases, zeroed
from sparse_llm_ft.scoring.blocks import PrefixCache, find_blocks, group_by_block
from sparse_llm_ft.scoring.contracts import WorkShard
from sparse_llm_ft.scoring.importance import Importance, ranking
from sparse_llm_ft.scoring.search import find_crossing, most_tests


class Job(NamedTuple):
    """One search: the rows or the columns of one module."""

    name: str
    side: Side
    size: int

    @property
    def tests(self) -> int:
        """The largest number of tests that the search needs."""
        return most_tests(self.size)


class Stage(NamedTuple):
    """Modules that are searched together, after the same blocks were passed.

    Attributes:
        below: blocks to pass first, in addition to those of earlier stages.
    """

    below: list[str]
    names: list[str]


def distribute(jobs: Sequence[Job], loads: list[int]) -> list[list[Job]]:
    """The jobs of each rank. The longest comes first; each goes to the rank with the fewest tests so far.

    Args:
        loads: number of tests of each rank so far; updated in place.
    """
    shares: list[list[Job]] = [[] for _ in loads]
    for job in sorted(jobs, key=lambda job: -job.tests):
        rank = loads.index(min(loads))
        shares[rank].append(job)
        loads[rank] += job.tests
    return shares


class LayerSearch:
    """Runs the searches. The caller sets evaluation mode and `torch.no_grad`.

    Args:
        modules: target name -> linear layer.
        scores: module -> importance; the least important indices are zeroed first.
        good_enough: whether a sum of the evaluator's metric over D_t meets the floor.

    Attributes:
        notes: a sentence about each deviation from the plan of the search.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, LinearLayer],
        scores: Mapping[str, Importance],
        evaluator: AblationEvaluator,
        good_enough: Callable[[float], bool],
        shard: WorkShard,
    ) -> None:
        self._model, self._modules, self._scores = model, modules, scores
        self._evaluator, self._good_enough, self._shard = evaluator, good_enough, shard
        self._loads = [0] * shard.size
        self.notes: tuple[str, ...] = ()

    def run(self, report: Callable[[int, int], None] | None = None) -> dict[str, tuple[float, float]]:
        """Collective. Module -> (p_row, p_col), kept / size; the same on every rank.

        Args:
            report: called with the number of finished stages (numbered layers) and of all.
        """
        reference = self._evaluator.score(0, "loss")
        stages = self._stages()
        kept = {name: [0, 0] for name in self._modules}
        for done, stage in enumerate(stages, start=1):
            self._pass(stage.below, reference)
            jobs = [Job(name, side, len(getattr(self._scores[name], side))) for name in stage.names for side in SIDES]
            for job, count in self._searched(jobs):
                kept[job.name][SIDES.index(job.side)] = count
            if report is not None:
                report(done, len(stages))
        counts = self._shard.reduce(torch.tensor(list(kept.values()), dtype=torch.float64)).tolist()
        return {
            name: (rows / len(self._scores[name].rows), cols / len(self._scores[name].cols))
            for name, (rows, cols) in zip(kept, counts, strict=True)
        }

    def _stages(self) -> list[Stage]:
        """First the modules in no numbered layer, with complete passes; then layer by layer in the order of calls."""
        groups, whole = group_by_block(self._modules)
        blocks = find_blocks(self._model, self._modules)
        order = self._evaluator.call_order(blocks)
        if order is None:
            self._note("layers are called more than once in a forward pass")
            return [Stage([], list(self._modules))]
        self._evaluator.cache = PrefixCache(blocks, len(self._evaluator.batches))
        whole += [name for block, names in groups.items() if block not in order for name in names]
        stages = [Stage([], whole)] if whole else []
        below: list[str] = []
        for block in order:
            if block in groups:
                stages.append(Stage(below, groups[block]))
                below = []
            below.append(block)
        return stages

    def _pass(self, below: Sequence[str], reference: torch.Tensor) -> None:
        """Collective. Compute the blocks `below` once more, and check that the model gives the same without them."""
        evaluator = self._evaluator
        if not below or self.notes:
            return
        held = evaluator.cache.advance(below, lambda i: evaluator.score(i, evaluator.metric))
        same = held and torch.allclose(evaluator.score(0, "loss"), reference, rtol=1e-3, atol=1e-4)
        # If one rank must return to complete passes, all do: in lockstep they pass through the same layers.
        if float(self._shard.reduce(torch.tensor([0.0 if same else 1.0], dtype=torch.float64))) > 0:
            evaluator.cache.clear()
            self._note("a layer's output is used elsewhere than in the next layer")

    def _note(self, reason: str) -> None:
        self.notes += (f"{reason}: lower layers were recomputed for every test of a higher one",)

    def _searched(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
        """Collective if lockstep. This rank's jobs, each with the number of indices to keep."""
        shard = self._shard
        loads = [0] * shard.size if shard.lockstep else self._loads  # in lockstep, ranks wait at every layer
        shares = distribute(jobs, loads)
        biases = unsharded_biases({job.name: self._modules[job.name] for job in jobs}, shard)
        before = self._evaluator.forwards
        for job in shares[shard.rank]:
            passes = partial(self._test, job, biases.get(job.name))
            yield job, job.size - find_crossing(passes, job.size)
        if shard.lockstep:
            made = (self._evaluator.forwards - before) // len(self._evaluator.batches)
            for _ in range(max(loads) - made):
                self._evaluator.total(self._evaluator.metric)

    def _test(self, job: Job, bias: torch.Tensor | None, k: int) -> bool:
        """Whether the model is good enough with the k least important indices zeroed."""
        order = ranking(getattr(self._scores[job.name], job.side)).flip(0)
        keep = torch.ones(job.size, dtype=torch.bool)
        keep[order[:k]] = False
        with zeroed(self._modules[job.name], job.side, keep, bias):
            return self._good_enough(self._evaluator.total(self._evaluator.metric))
