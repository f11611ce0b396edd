"""Methods one after the other: where one would train its plan to the end of the run, the next takes that plan over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, Shape
from sparse_llm_ft.scoring.scores import Scores


class Chain:
    """The methods of a run; usually one. A phase says by `Phase.method` whose it is."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = methods

    def first(self, plan: AdapterPlan, targets: Mapping[str, Shape]) -> Phase:
        """The phase a run begins with.

        Args:
            plan: the uniform plan over `targets`.

        Raises:
            ConfigError: a method's settings do not fit this many adapters.
        """
        nothing = TrainState({}, {}, {}, Progress(), {})
        phase, _ = self._hand_on(-1, Phase("train", plan), nothing, targets)
        return phase

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """As `Method.next`, for the whole chain."""
        following = self.methods[phase.method].next(phase, state, scores, targets)
        if following is None:
            return None
        return self._hand_on(phase.method, *following, targets)

    def _hand_on(
        self, index: int, phase: Phase, state: TrainState, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState]:
        while phase.open_ended and index + 1 < len(self.methods):
            index += 1
            phase, state = self.methods[index].begin(phase, state, targets)
        return replace(phase, method=max(index, 0)), state
