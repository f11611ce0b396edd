"""What a method must offer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import Shape
from sparse_llm_ft.scoring.scores import Scores


class Method(Protocol):
    """A rule that turns what one phase measured into the next phase's plan. It knows no engine and no loop.

    A method refines a phase that would train a plan to the end of the run: the uniform plan, or what another method
    has come to.
    """

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """What to do in place of `phase`, which would begin in `state` and go to the end of the run.

        Args:
            state: without tensors where nothing has been trained.
            targets: every target module, in the model's order: name -> (out_features, in_features).

        Raises:
            ConfigError: the method's settings do not fit this many adapters.
        """
        ...

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """What follows `phase`, which ended in `state` and measured `scores`.

        The new state's tensors and moments are of the new plan; a moment that is missing starts at zero, and a value
        that is missing as it would in a new run. None: the run is over when `phase` is.
        """
        ...
