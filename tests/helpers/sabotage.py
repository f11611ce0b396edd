"""Faults put into a resumed run on purpose: a comparison that cannot fail shows nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _samples() -> None:
    """The stream goes on one sample too late."""
    from sparse_llm_ft.data.sampler import ShuffledSampler

    micro_batches = ShuffledSampler.micro_batches

    def shifted(self: ShuffledSampler, consumed: int, *args: Any) -> list[list[list[int]]]:
        return micro_batches(self, consumed + 1, *args)

    ShuffledSampler.micro_batches = shifted


def _moments() -> None:
    """The optimizer begins with moments of zero."""
    from sparse_llm_ft.engine.engine import Engine

    load = Engine.load

    def forgetful(self: Engine, values: Any, moments: Any = None, optimizer_steps: Any = None) -> None:
        load(self, values, None, optimizer_steps)

    Engine.load = forgetful


def _optimizer_steps() -> None:
    """Adam corrects its bias as if it had just begun."""
    from sparse_llm_ft.engine.engine import Engine

    load = Engine.load

    def forgetful(self: Engine, values: Any, moments: Any = None, optimizer_steps: Any = None) -> None:
        load(self, values, moments)

    Engine.load = forgetful


def _dropout() -> None:
    """Dropout draws anew instead of what the first run drew."""
    from sparse_llm_ft.training.loop import Loop

    Loop._seed_generators = lambda self, progress: None


def _metrics() -> None:
    """Lines of steps that are done again stay."""
    from sparse_llm_ft.run_folder import METRICS_FILE, RunFolder

    begin = RunFolder.begin

    def keeping(self: RunFolder, *args: Any) -> None:
        path = self.path / METRICS_FILE
        before = path.read_text()
        begin(self, *args)
        path.write_text(before)

    RunFolder.begin = keeping


SABOTAGES: dict[str, Callable[[], None]] = {
    "samples": _samples,
    "moments": _moments,
    "optimizer_steps": _optimizer_steps,
    "dropout": _dropout,
    "metrics": _metrics,
}
