"""A module in the place of wandb that writes what it is told into a file, for tests with Accelerate's own class."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class Run:
    """A run that logs into ``ID.jsonl``; each line is written at once."""

    def __init__(self, folder: Path, own: str, kill_at: int | None) -> None:
        self.id, self._file, self._kill_at = own, folder / f"{own}.jsonl", kill_at

    def write(self, **line: Any) -> None:
        """Append one line."""
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """A step's values; dies in the middle if it is asked to."""
        self.write(step=step, values=values)
        if step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self) -> None:
        """The end."""
        self.write(end=True)


class _Config:
    def __init__(self, run: Run) -> None:
        self._run = run

    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:
        self._run.write(config=values)


def install(folder: str, kill_at: int | None = None) -> None:
    """Put the module in place.

    Args:
        kill_at: the step behind whose log the process is killed.
    """
    module: Any = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)

    def init(project: str, **options: Any) -> Run:
        run = Run(Path(folder), options["id"], kill_at)
        run.write(project=project, options=options)
        module.config = _Config(run)
        return run

    module.init = init
    sys.modules["wandb"] = module


def in_ranks(folder: str, kill_at: int | None) -> Callable[[int], None]:
    """`install` in each process of a world."""
    return lambda rank: install(folder, kill_at)


def written(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Id of each run -> its lines."""
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")}
