"""Progress of loading a base: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from sparse_llm_ft.io.console import Console, clock

GIB = 2**30


class LoadingBar:
    """Shows on rank 0 how many tensors and bytes of a checkpoint are loaded. A context, which ends the bar.

    Args:
        tensors: how many there are.
        size: their bytes.
        seconds_between_lines: where no terminal shows a bar.
    """

    def __init__(self, console: Console, tensors: int, size: int, seconds_between_lines: float = 10.0) -> None:
        self._console, self._tensors, self._size, self._between = console, tensors, size, seconds_between_lines
        self._done_tensors = self._done = 0
        self._began = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._console.live:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
            count = TextColumn("{task.fields[count]}")
            self._bar = Progress(*columns, count, TimeRemainingColumn(), console=self._console.rich)
            self._task = self._bar.add_task("loading", total=self._size, count=self._count())
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, tensors: int, size: int) -> None:
        """Further `tensors` of together `size` bytes are loaded."""
        self._done_tensors, self._done = self._done_tensors + tensors, self._done + size
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, count=self._count())
            return
        now = time.monotonic()
        if now - self._last < self._between:
            return
        self._last = now
        left = (self._size - self._done) * (now - self._began) / max(self._done, 1)
        sizes = f"{self._done / GIB:.1f} of {self._size / GIB:.1f} GiB"
        self._console.log(f"loading: {self._count()}, {sizes}, {clock(left)} left")

    def _count(self) -> str:
        return f"{self._done_tensors}/{self._tensors} tensors"
