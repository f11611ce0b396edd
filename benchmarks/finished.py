"""`Finished`: the results of finished runs, in a file that outlives their folders."""

from __future__ import annotations

import json
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any


class Finished:
    """A file with one line of JSON for each finished run.

    Args:
        file: need not exist.
        key: names of the values that tell one run from another.
    """

    def __init__(self, file: Path, key: Sequence[str]) -> None:
        self.file, self.key, self._lock = file, tuple(key), threading.Lock()
        lines = file.read_text().splitlines() if file.is_file() else []
        self._known: dict[tuple[Hashable, ...], dict[str, Any]] = {}
        for result in map(json.loads, lines):
            self._known[tuple(result.pop(name) for name in self.key)] = result

    def of(self, key: tuple[Hashable, ...]) -> dict[str, Any] | None:
        """The run's result; None if it is not finished."""
        return self._known.get(key)

    def add(self, key: tuple[Hashable, ...], result: dict[str, Any]) -> None:
        """Write the run's result at the end of the file."""
        named = dict(zip(self.key, key, strict=True))
        with self._lock, self.file.open("a") as file:
            file.write(json.dumps(named | result) + "\n")
            self._known[key] = result
