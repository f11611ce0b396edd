"""A derivation on several ranks that are threads, with what each of them computes."""

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager

import torch
from torch import nn

from helpers.scored_models import RowObjective, linears
from sparse_llm_ft.scoring import Derivation, WorkShard, derive


class Together:
    """Sum over ranks that are threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: dict[int, torch.Tensor] = {}

    def reducer(self, rank: int):
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            self._given[rank] = tensor
            self._barrier.wait()
            total = sum(self._given[r] for r in sorted(self._given))
            self._barrier.wait()
            return total

        return reduce


def derive_on(size: int, lockstep: bool, model: nn.Module, endings: tuple[str, ...], rows: list, settings):
    """The derivation of each rank, and each rank's trace of layers, forward passes and gathers."""
    together = Together(size)
    results: dict[int, Derivation] = {}
    traces: dict[int, list] = {rank: [] for rank in range(size)}
    copies = [copy.deepcopy(model) for _ in range(size)]

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        own, trace = copies[rank], traces[rank]
        modules = linears(own, *endings)
        names = {module: name for name, module in modules.items()}
        own.register_forward_pre_hook(lambda *_: trace.append("forward"))
        for i, layer in enumerate(own.model.layers):
            layer.input_layernorm.register_forward_hook(lambda *_, i=i: trace.append(i))

        @contextmanager
        def gather(module):
            trace.append(names[module])
            yield

        shard = WorkShard(rank, size, lockstep, gather, together.reducer(rank))
        results[rank] = derive(own, modules, rows, RowObjective(), settings, shard)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == size
    return results, traces
