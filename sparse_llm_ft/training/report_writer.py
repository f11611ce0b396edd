"""`ReportWriter`: draws a run's report at its end, and after saves in a thread, so that training does not wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.report import is_live, write_report
from sparse_llm_ft.run_folder import RunFolder

REFRESH_SECONDS = 60
"""Least time between two drawings while a run trains, and after which their page reloads itself."""


class ReportWriter:
    """Draws on rank 0 if the run is to have a report; does nothing else. A failure is only logged.

    Args:
        wanted: whether this process draws.
        prepare: called before the last drawing; writes what only the complete run's report shows.
    """

    def __init__(
        self, folder: RunFolder, console: Console, wanted: bool, prepare: Callable[[], None] = lambda: None
    ) -> None:
        self._folder, self._console, self._wanted, self._prepare = folder, console, wanted, prepare
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._has_warned = False

    def refresh(self) -> None:
        """Draw what there is in a thread, unless the start of the run or the last drawing was within a minute."""
        drawing = self._thread is not None and self._thread.is_alive()
        if not self._wanted or drawing or time.monotonic() - self._last < REFRESH_SECONDS:
            return
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._draw, args=(REFRESH_SECONDS,), name="report", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Draw the complete run, whose page does not reload."""
        if not self._wanted:
            return
        with Wait(self._console, "drawing the report"):
            if self._thread is not None:
                self._thread.join()
            self._has_warned = False
            self._draw(None, self._prepare)

    def finish_late(self) -> None:
        """`finish` for a run that was killed after its end and before its report."""
        if not self._folder.report.is_dir() or is_live(self._folder.report):
            self.finish()

    def _draw(self, reload: int | None, prepare: Callable[[], None] = lambda: None) -> None:
        try:
            prepare()
            write_report([self._folder.path], self._folder.report, reload)
        except Exception as error:
            if not self._has_warned:
                self._console.log(
                    f"the report could not be drawn ({type(error).__name__}: {error}); the run does not need it, and "
                    f"`sparse-llm-ft report {self._folder.path}` tries again"
                )
            self._has_warned = True
