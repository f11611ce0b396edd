"""What lets a forked rank write down what it tokenises and which samples it learns: `before` of a world.

In a folder each rank leaves ``encoded-RANK.txt``, a prompt a line, and ``steps-RANK.jsonl``, for each optimizer step
the rank's micro-batches: of samples, or of packs of samples, as [prompt, completion].
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def watch(folder: str, die_before_step: int | None = None) -> Callable[[int], None]:
    """What patches a rank. Before the given step, rank 0 kills itself. The cache of data sets is a new one."""
    logs = Path(folder)

    def before(rank: int) -> None:
        import datasets

        datasets.config.HF_DATASETS_CACHE = logs.parent / "cache"
        from sparse_llm_ft.data.tokenization import CausalLMPreprocessor
        from sparse_llm_ft.training.loop import Loop

        encode, read = CausalLMPreprocessor.__call__, Loop._read_samples

        def counted(self: CausalLMPreprocessor, example: Any) -> Any:
            with (logs / f"encoded-{rank}.txt").open("a") as file:
                file.write(example.prompt + "\n")
            return encode(self, example)

        def told(self: Loop, shares: Any) -> Any:
            if rank == 0 and self.progress.step + 1 == die_before_step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = read(self, shares)
            with (logs / f"steps-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([[shown(unit) for unit in micro] for micro in result[0]]) + "\n")
            return result

        CausalLMPreprocessor.__call__, Loop._read_samples = counted, told

    return before


def shown(unit: Any) -> list[Any]:
    return [[sample.prompt_ids, sample.completion_ids] for sample in getattr(unit, "samples", (unit,))]
