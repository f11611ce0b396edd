"""`Wait`: shows that something takes a while. Whatever is no training step is shown by it."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from sparse_llm_ft.io.console import Console, clock

GIB = 2**30
FIRST_SECONDS, EVERY_SECONDS = 2.0, 10.0


class Wait:
    """A context that shows on rank 0 what its body is at: nothing in the first two seconds; then a bar on a terminal,
    and elsewhere a line, with another one every ten seconds.

    A thread shows it, so the body may be one long call.

    Args:
        what: such as ``loading``.
        unit: of what `at` counts; ``bytes`` are shown in GiB.
        first, every: seconds until the first line or the bar, and between two lines.
    """

    def __init__(
        self, console: Console, what: str, unit: str = "", first: float = FIRST_SECONDS, every: float = EVERY_SECONDS
    ) -> None:
        self._console, self._what, self._unit = console, what, unit
        self._first, self._every = first, every
        self._state: tuple[int, int, str] = 0, 0, ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="wait", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._console.enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, done: int, total: int, note: str = "") -> None:
        """The body has `done` so much of `total`.

        Args:
            note: shown beside it.
        """
        self._state = done, total, note  # one assignment: the thread reads a whole state

    def _show(self) -> None:
        if self._ended.wait(self._first):
            return
        if self._console.live:
            self._show_bar()
            return
        while True:
            self._console.log(f"{self._what}: {', '.join(filter(None, self._parts()))}")
            if self._ended.wait(self._every):
                return

    def _show_bar(self) -> None:
        bar = self._console.add_bar(self._what)
        while not self._ended.wait(0.1):
            done, total, _ = self._state
            status = ", ".join(filter(None, self._parts()[:-1]))
            self._console.update_bar(bar, completed=done, total=total or None, status=status)
        self._console.remove_bar(bar)

    def _parts(self) -> tuple[str, str, str]:
        """How much is done; the note; and the time left, or so far where nothing says how much is left."""
        (done, total, note), passed = self._state, time.monotonic() - self._began
        if not done:
            return "", note, f"{clock(passed)} so far"
        counted = f"{done}/{total} {self._unit}"
        if self._unit == "bytes":
            counted = f"{done / GIB:.1f} of {total / GIB:.1f} GiB"
        return counted, note, f"{clock((total - done) * passed / done)} left"
