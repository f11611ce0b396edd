"""Console output on rank 0: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import codecs
import logging
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import TextIOWrapper
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparse_llm_ft.errors import one_line

_ESCAPE = "sparse_llm_ft.escape"


class Console:
    """Shows a run's progress on rank 0, and nothing on other ranks.

    Args:
        stderr: show it on standard error, for commands whose standard output is a result.
    """

    def __init__(self, rank: int, seconds_between_lines: float = 2.0, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        self.enabled = rank == 0
        self.rich = RichConsole(stderr=stderr, highlight=False, width=None if stream.isatty() else 120)
        self.live = self.enabled and stream.isatty()
        self._between = seconds_between_lines
        self._last = float("-inf")
        self._lock = threading.Lock()  # waits (wait.py) show themselves from threads
        self._bars: Progress | None = None
        self._phase: TaskID | None = None

    def log(self, text: str) -> None:
        """Print one line, with access tokens masked."""
        if self.enabled:
            self.rich.print(one_line(text), markup=False, soft_wrap=True)

    def begin(self, phase: str, step: int, total: int) -> None:
        """Start a phase at `step` of the run's `total`."""
        if self.live:
            self._phase = self.add_bar(phase, total, step, f"{step}/{total}")
        self._started, self._first = time.monotonic(), step

    def step(self, record: Mapping[str, Any], total: int) -> None:
        """Show a logged step. Plain lines are at least a few seconds apart; the last step always prints."""
        if not self.enabled:
            return
        loss = "update skipped" if record["loss"] is None else f"loss {record['loss']:.4f}"
        status = f"{loss}  {record['tokens_per_second']:,.0f} tokens/s  {record['active_adapters']} adapters"
        if "validation_loss" in record:
            status += f"  validation loss {record['validation_loss']:.4f}"
        if self._phase is not None:
            text = f"{record['step']}/{total}  {status}"
            self.update_bar(self._phase, completed=record["step"], total=total, status=text)
            return
        now, done = time.monotonic(), record["step"] - self._first
        special = record["loss"] is None or "validation_loss" in record
        if now - self._last < self._between and record["step"] < total and not special:
            return
        self._last = now
        left = (total - record["step"]) * (now - self._started) / max(done, 1)
        self.log(f"{record['phase']} {record['step']}/{total}  {status}  {clock(left)} left")

    def show_ratios(self, title: str | None, ratios: Mapping[str, tuple[float, float]]) -> None:
        """Kept shares of rows and columns by module."""
        if not self.enabled:
            return
        table = Table(title=title)
        for column in ("module", "rows kept", "columns kept"):
            table.add_column(column, justify="left" if column == "module" else "right")
        for name, (rows, cols) in ratios.items():
            table.add_row(name, f"{rows:.3f}", f"{cols:.3f}")
        self.rich.print(table)

    def end(self) -> None:
        """A phase is over. Its bar stays on the screen."""
        self._phase = None
        with self._lock:
            bars, self._bars = self._bars, None
        if bars is not None:
            bars.stop()

    def add_bar(self, what: str, total: int | None = None, done: int = 0, status: str = "") -> TaskID:
        """A further bar on the terminal, below those that are there; without `total` one that only moves."""
        with self._lock:
            if self._bars is None:
                texts = [TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[status]")]
                self._bars = Progress(texts[0], BarColumn(), texts[1], TimeRemainingColumn(), console=self.rich)
                self._bars.start()
            return self._bars.add_task(one_line(what), total=total, completed=done, status=status)

    def update_bar(self, bar: TaskID, **values: Any) -> None:
        """Set a bar's ``completed``, ``total`` and ``status``, if it is still there."""
        with self._lock:
            if self._bars is not None and bar in self._bars.task_ids:
                self._bars.update(bar, **values)

    def remove_bar(self, bar: TaskID) -> None:
        """Take a bar off the terminal."""
        with self._lock:
            if self._bars is None or bar not in self._bars.task_ids:
                return
            self._bars.remove_task(bar)
            if not self._bars.task_ids:
                self._bars.stop()
                self._bars = None


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours from one on: ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def escape_unencodable() -> None:
    """Let standard output escape the characters that its encoding lacks, with one warning on standard error."""
    if isinstance(sys.stdout, TextIOWrapper):
        codecs.register_error(_ESCAPE, _escape)
        sys.stdout.reconfigure(errors=_ESCAPE)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    _warn_of_encoding()
    return codecs.backslashreplace_errors(error)


@cache
def _warn_of_encoding() -> None:
    sys.stderr.write(
        f"warning: standard output is {sys.stdout.encoding}, and what it cannot encode is escaped; set "
        "PYTHONIOENCODING=utf-8\n"
    )


def silence_libraries() -> None:
    """Call before torch is imported.

    It silences bitsandbytes' note on an optional CPU kernel, and warnings about calls inside torch and transformers.
    (DeepSpeed sets its own log level on import; engine/settings.py resets it.)
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")


@contextmanager
def ended_by_reader() -> Iterator[None]:
    """End as other commands do, without a traceback, if nobody reads standard output any more
    (``| head``): with status 141, a shell's for SIGPIPE.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, and not when the interpreter ends
    except BrokenPipeError:
        if sys.stdout is None or not _without_reader(sys.stdout.fileno()):
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
        raise SystemExit(128 + signal.SIGPIPE) from None


def _without_reader(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
