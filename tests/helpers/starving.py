"""What lets one forked rank run out of memory in a step: `before` of a world, and a patch for cases."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

FOR_GOOD = ExitStack()
"""Of the process: a context that nothing refers to would end at once."""


@contextmanager
def starving(where: str, steps: tuple[int, ...], most: int = 1) -> Iterator[None]:
    """Micro-batches of more than `most` samples fail in these steps, in the last micro-step of each.

    Args:
        where: ``forward``: in the second layer; ``backward``: after the second layer's part.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from sparse_llm_ft.checkpoint.state import Progress
    from sparse_llm_ft.training.loop import Loop

    forward, step = LlamaDecoderLayer.forward, Loop._step
    now = {"step": 0, "left": 0}

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    def failing(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        first = self.self_attn.layer_idx == 0
        now["left"] -= first
        due = now["step"] in steps and now["left"] == 0 and len(hidden_states) > most and torch.is_grad_enabled()
        if due and where == "forward" and not first:
            fail()
        output = forward(self, hidden_states, *args, **kwargs)
        if due and where == "backward" and first:
            output.register_hook(fail)
        return output

    def counted(self: Loop, progress: Progress, thread: Any) -> Any:
        now["step"], now["left"] = progress.step + 1, self.engine.settings.accumulation_steps
        return step(self, progress, thread)

    with mock.patch.object(LlamaDecoderLayer, "forward", failing), mock.patch.object(Loop, "_step", counted):
        yield


def starve(
    rank: int, where: str, steps: list[int], most: int = 1, die_before_step: int | None = None
) -> Callable[[int], None]:
    """What patches this rank. Before the given step, rank 0 kills itself."""

    def before(own: int) -> None:
        from sparse_llm_ft.training.loop import Loop

        if own == rank:
            FOR_GOOD.enter_context(starving(where, tuple(steps), most))
        step = Loop._step

        def mortal(self: Loop, progress: Any, thread: Any) -> Any:
            if own == 0 and progress.step + 1 == die_before_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, progress, thread)

        Loop._step = mortal

    return before
