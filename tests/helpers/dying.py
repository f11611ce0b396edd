"""What lets a forked rank die: `before` of a world, for fork_server.run_worlds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

DIED = 42


def die_after(steps: int) -> Callable[[int], None]:
    """End a rank when so many optimizer steps are done, before anything is saved of the last."""

    def before(rank: int) -> None:
        from sparse_llm_ft.training.loop import Loop

        step, done = Loop._step, 0

        def counted(self: Loop, *args: Any) -> Any:
            nonlocal done
            result = step(self, *args)
            done += 1
            if done == steps:
                os._exit(DIED)
            return result

        Loop._step = counted

    return before
