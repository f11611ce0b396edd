"""Ranks that live in different years: `before` of a world, for fork_server.run_worlds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path


def years(first: int, folder: str) -> Callable[[int], None]:
    """Rank 0 lives in the year `first`, rank 1 in the next. Each writes into `folder` the date that its run has, and
    has its own cache there: nobody finds what others have tokenised.
    """

    def before(rank: int) -> None:
        import datasets

        from sparse_llm_ft.context.context import RunContext
        from sparse_llm_ft.data import chat

        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return datetime(first + rank, 5, 1, 12, 30)

        chat.datetime = Clock
        Path(folder).mkdir(exist_ok=True)
        datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
        dated = RunContext.dated

        def noted(self: RunContext, *arguments: object) -> RunContext:
            context = dated(self, *arguments)
            Path(folder, f"date-{rank}").write_text(str(context.config.task.date))
            return context

        RunContext.dated = noted

    return before
