"""Standard output and error of a run, which outlives their reader: a closed terminal, an ssh connection, a pipe."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)
"""How a write to a pipe without reader fails, and one to a terminal that was closed."""


@contextmanager
def outlived(when_gone: Callable[[], None]) -> Iterator[None]:
    """While the body runs, what is printed for nobody is dropped, and does not end the process.

    Args:
        when_gone: called when standard output or error turns out to have no reader any more.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Outlived(stream, when_gone) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Outlived:
    """A stream in place of `sys.stdout` or `sys.stderr`."""

    def __init__(self, stream: TextIO, when_gone: Callable[[], None]) -> None:
        self._stream, self._when_gone = stream, when_gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's.

        Raises:
            OSError: the text cannot be written for another reason than that nobody reads it.
        """
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """As the stream's; raises what `write` does."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # takes what is still buffered, and all that follows
        os.close(nowhere)
        self._when_gone()
