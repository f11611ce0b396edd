"""What lets a forked rank write down what it tokenises and which samples it learns: `before` of a world.

In a folder each rank leaves ``encoded-RANK.txt``, a prompt a line, and ``steps-RANK.jsonl``, for each optimizer step
the rank's micro-batches: of samples, or of packs of samples, as [prompt, completion].
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def watch(folder: str, die_before_step: int | None = None) -> Callable[[int], None]:
    """What patches a rank. Before the given step, rank 0 kills itself. The cache of data sets is a new one."""
    logs = Path(folder)

    def before(rank: int) -> None:
        import datasets

        datasets.config.HF_DATASETS_CACHE = logs.parent / "cache"
        from sparse_llm_ft.checkpoint.state import Progress
        from sparse_llm_ft.data.tokenization import CausalLMPreprocessor
        from sparse_llm_ft.training.batches import ShareMaker
        from sparse_llm_ft.training.loop import Loop

        encode, step = CausalLMPreprocessor.__call__, Loop._step
        make, read = ShareMaker.__call__, ShareMaker.read
        chosen: dict[int, Any] = {}  # by the samples consumed before: they are read some steps ahead
        at: list[int] = []

        def counted(self: CausalLMPreprocessor, example: Any) -> Any:
            with (logs / f"encoded-{rank}.txt").open("a") as file:
                file.write(example.prompt + "\n")
            return encode(self, example)

        def made(self: ShareMaker, progress: Progress) -> Any:
            at[:] = [progress.samples]  # one thread makes all of them
            return make(self, progress)

        def remembered(self: ShareMaker, indices: Any) -> Any:
            chosen[at[0]] = read(self, indices)
            return chosen[at[0]]

        def told(self: Loop, progress: Progress, thread: Any) -> Any:
            if rank == 0 and progress.step + 1 == die_before_step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = step(self, progress, thread)
            with (logs / f"steps-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([[shown(u) for u in micro] for micro in chosen[progress.samples]]) + "\n")
            return result

        CausalLMPreprocessor.__call__, Loop._step = counted, told
        ShareMaker.__call__, ShareMaker.read = made, remembered

    return before


def shown(unit: Any) -> list[Any]:
    return [[sample.prompt_ids, sample.completion_ids] for sample in getattr(unit, "samples", (unit,))]


def interrupt(at_step: int, number: int = signal.SIGINT) -> Callable[[int], None]:
    """What sends rank 1 a signal when it has made the given step; all ranks catch signals, as the command does."""

    def before(rank: int) -> None:
        from sparse_llm_ft.distributed.signals import catch_signals

        catch_signals()
        if rank == 1:
            _after_step(at_step, lambda: os.kill(os.getpid(), number))

    return before


def interrupt_validation(number: int, function: str = "mean_loss", call: int = 2) -> Callable[[int], None]:
    """What sends rank 1 a signal when the loop validates: at the given call (from 1) of `mean_loss` or `predict`."""

    def before(rank: int) -> None:
        from sparse_llm_ft.distributed.signals import catch_signals
        from sparse_llm_ft.evaluation.evaluator import Evaluator
        from sparse_llm_ft.training import phase_training

        catch_signals()
        owner: Any = Evaluator if function == "predict" else phase_training
        original, calls = getattr(owner, function), []

        def called(*args: Any) -> Any:
            calls.append(1)
            if rank == 1 and len(calls) == call:
                os.kill(os.getpid(), number)
            return original(*args)

        setattr(owner, function, called)

    return before


def lose_output(at_step: int) -> Callable[[int], None]:
    """What takes the reader of rank 0's output away when it has made the given step, and prints a line then."""

    def lose() -> None:
        read, write = os.pipe()
        for descriptor in (1, 2):
            os.dup2(write, descriptor)
        os.close(read)
        sys.stdout.write("for nobody\n")
        sys.stdout.flush()

    def before(rank: int) -> None:
        if rank == 0:
            _after_step(at_step, lose)

    return before


def _after_step(number: int, act: Callable[[], None]) -> None:
    from sparse_llm_ft.training.loop import Loop

    finish = Loop._finish

    def finished(self: Loop, *args: Any) -> Any:
        step = finish(self, *args)
        if self.progress.step == number:
            act()
        return step

    Loop._finish = finished
