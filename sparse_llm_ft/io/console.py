"""Console output on rank 0: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import codecs
import logging
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import TextIOWrapper
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparse_llm_ft.errors import one_line

_ESCAPE = "sparse_llm_ft.escape"


class Console:
    """Shows a run's progress on rank 0, and nothing on other ranks."""

    def __init__(self, rank: int, seconds_between_lines: float = 2.0) -> None:
        self.enabled = rank == 0
        self.rich = RichConsole(highlight=False, width=None if sys.stdout.isatty() else 120)
        self.live = self.enabled and sys.stdout.isatty()
        self._between = seconds_between_lines
        self._last = float("-inf")
        self._bar: Progress | None = None

    def log(self, text: str) -> None:
        """Print one line, with access tokens masked."""
        if self.enabled:
            self.rich.print(one_line(text), markup=False, soft_wrap=True)

    def begin(self, phase: str, step: int, total: int) -> None:
        """Start a phase at `step` of the run's `total`."""
        if self.live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.rich)
            self._task = self._bar.add_task(phase, total=total, completed=step, status="")
            self._bar.start()
        self._started, self._first = time.monotonic(), step

    def step(self, record: Mapping[str, Any], total: int) -> None:
        """Show a logged step. Plain lines are at least a few seconds apart; the last step always prints."""
        if not self.enabled:
            return
        loss = "update skipped" if record["loss"] is None else f"loss {record['loss']:.4f}"
        status = f"{loss}  {record['tokens_per_second']:,.0f} tokens/s  {record['active_adapters']} adapters"
        if "validation_loss" in record:
            status += f"  validation loss {record['validation_loss']:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], total=total, status=status)
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
        """A phase is over."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


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
    (DeepSpeed sets its own log level on import; engine.py resets it.)
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
