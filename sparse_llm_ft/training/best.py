"""The best validation of a run: which step it was, and when to stop looking for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_llm_ft.checkpoint.record import BestStep
from sparse_llm_ft.config.schema import LOSS, TrainingConfig


@dataclass
class BestWatch:
    """Follows `training.keep_best` and `training.early_stopping` over the validations of a run's last phase.

    Attributes:
        metric: ``loss``, which is better when smaller, or a metric of the task, better when larger; None: nothing is
            followed.
        keeps: whether the best step's checkpoint is kept, measured and exported.
        patience: validations without a better value after which training stops; None: it does not.
        found: the best one so far, from the checkpoint if the run is resumed.
    """

    metric: str | None
    keeps: bool
    patience: int | None
    found: BestStep | None = None

    @classmethod
    def of(cls, training: TrainingConfig, found: BestStep | None) -> BestWatch:
        """As the settings say."""
        stopping = training.early_stopping
        patience = None if stopping is None else stopping.patience
        return cls(training.watched_metric, training.keep_best is not None, patience, found)

    @property
    def measures(self) -> bool:
        """Whether a validation needs more than its loss."""
        return self.metric not in (None, LOSS)

    @property
    def stops(self) -> bool:
        """Whether training has stopped."""
        return self.patience is not None and self.found is not None and self.found.waited >= self.patience

    def note(self, step: int, value: float) -> bool:
        """Take a validation's value. Returns whether it is the best so far; a value that is not finite never is."""
        assert self.metric is not None
        before = self.found
        better = math.isfinite(value) and (
            before is None or before.value is None or self._sign * value > self._sign * before.value
        )
        if better:
            self.found = BestStep(step=step, value=value)
        elif before is None:
            self.found = BestStep(step=step, value=None, waited=1)
        else:
            self.found = before.model_copy(update={"waited": before.waited + 1})
        return better

    @property
    def _sign(self) -> float:
        return -1.0 if self.metric == LOSS else 1.0

    @property
    def kept_step(self) -> int | None:
        """The step whose checkpoint must stay."""
        return self.found.step if self.keeps and self.found is not None and self.found.value is not None else None

    def describe(self) -> str:
        """For people: the best value, its step, and how long ago that was."""
        if self.found is None or self.found.value is None:
            return f"no validation {self.metric} is finite"
        since = f", {self.found.waited} validations before the last one" if self.found.waited else ""
        return f"the best validation {self.metric} is {self.found.value:.4f}, of step {self.found.step}{since}"


NOTHING_WATCHED = BestWatch(None, False, None)
"""For phases that are not the run's last one."""
