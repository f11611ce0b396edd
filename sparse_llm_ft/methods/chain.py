"""Methods one after the other: where one would train its plan to the end of the run, the next takes that plan over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.config.registry import find_method
from sparse_llm_ft.methods.method import Method, MethodInputs
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, Shape
from sparse_llm_ft.scoring.scores import Scores


def build_methods(config: RunConfig, total_steps: int) -> Chain:
    """The rules that `method` names, in order.

    Args:
        total_steps: optimizer steps of the run at its initial global batch.
    """
    inputs = MethodInputs(config.adapter.r, config.adapter.lora_alpha, config.seed, total_steps)
    return Chain([find_method(settings.name)(settings, inputs) for settings in config.method])


class Chain:
    """The methods of a run; usually one. A phase says by `Phase.method` whose it is."""

    def __init__(self, methods: Sequence[Method[Any]]) -> None:
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

    def resumed(self, phase: Phase) -> Phase:
        """As `Method.resumed`, by the method that the phase belongs to."""
        return self.methods[phase.method].resumed(phase)

    def _hand_on(
        self, index: int, phase: Phase, state: TrainState, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState]:
        while phase.open_ended and index + 1 < len(self.methods):
            index += 1
            phase, state = self.methods[index].begin(phase, state, targets)
        return replace(phase, method=max(index, 0)), state
