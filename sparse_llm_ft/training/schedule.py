"""A run's length and its learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run over a training set.

    With `max_steps` a run is measured in optimizer steps, otherwise in samples: then a growing global batch shortens
    the rest of the run and leaves the curve as it is. A position in samples is converted to steps of the initial global
    batch. A warmup phase (`Phase.is_warmup`) has a schedule of its own.
    """

    settings: TrainingConfig
    train_samples: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run at the initial global batch."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        return math.ceil(self._total_samples / self.settings.global_batch_size)

    def last_step(self, progress: Progress, global_batch_size: int) -> int:
        """The run's last step, if it continues with this global batch."""
        if self.settings.max_steps is not None:
            return progress.start_step + self.settings.max_steps
        return progress.step + math.ceil(max(0, self._total_samples - progress.position) / global_batch_size)

    def finished(self, progress: Progress) -> bool:
        """Whether the run is over."""
        if self.settings.max_steps is not None:
            return progress.counted_steps >= self.settings.max_steps
        return progress.position >= self._total_samples

    def learning_rate(self, progress: Progress) -> float:
        """Learning rate of the next step. It rises linearly over `warmup_steps`, the last of which has the full rate.
        Then it stays constant, or falls towards 0 linearly or as half a cosine.
        """
        settings = self.settings
        counted = settings.max_steps is not None
        position = progress.counted_steps if counted else progress.position / settings.global_batch_size
        if position < settings.warmup_steps:
            factor = min(1.0, (position + 1) / settings.warmup_steps)
        elif settings.schedule == "constant":
            factor = 1.0
        else:
            rest = max(1, self.total_steps - settings.warmup_steps)
            done = min(1.0, (position - settings.warmup_steps) / rest)
            factor = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return settings.learning_rate * factor

    def for_warmup(self, steps: int, samples: int, learning_rate: float | None) -> Schedule:
        """The same schedule scaled down to a warmup phase of `steps` steps on `samples` samples.

        Args:
            learning_rate: None: that of the run.
        """
        settings = self.settings
        update = {
            "max_steps": steps,
            "warmup_steps": settings.warmup_steps * steps // max(self.total_steps, 1),
            "learning_rate": learning_rate or settings.learning_rate,
        }
        return Schedule(settings.model_copy(update=update), samples)

    @property
    def _total_samples(self) -> int:
        return math.ceil(round(self.settings.epochs * self.train_samples, 9))  # 0.07 * 100 is a little more than 7
