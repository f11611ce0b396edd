"""A chain of methods: where one would train its plan to the end of the run, the next takes the plan over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.config.registry import find_method
from sparse_llm_ft.methods.method import Method, MethodInputs
from sparse_llm_ft.model.step_cost import StepCost
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, Shape
from sparse_llm_ft.scoring import Derivation
from sparse_llm_ft.scoring.scores import Scores


def build_methods(
    config: RunConfig,
    total_steps: int,
    cost: StepCost | None = None,
    memory: Callable[[AdapterPlan], int] | None = None,
    derived: Callable[[Phase], Derivation | None] | None = None,
) -> Chain:
    """The methods of the config, in order.

    Args:
        total_steps: the run's optimizer steps at its initial global batch.
        cost, memory, derived: see `MethodInputs`; `RunContext.methods` has the first.
    """
    inputs = MethodInputs(config.adapter.r, config.adapter.lora_alpha, config.seed, total_steps, cost, memory, derived)
    return Chain([find_method(settings.name)(settings, inputs) for settings in config.method])


class Chain:
    """A run's methods, usually one. `Phase.method` tells to which one a phase belongs."""

    def __init__(self, methods: Sequence[Method[Any]]) -> None:
        self.methods = methods

    def first(self, plan: AdapterPlan, targets: Mapping[str, Shape]) -> Phase:
        """The run's first phase.

        Args:
            plan: the uniform plan over `targets`.

        Raises:
            ConfigError: a method's settings do not fit the number of adapters.
        """
        nothing = TrainState({}, {}, {}, Progress(), {})
        phase, _ = self._expand(-1, Phase("train", plan), nothing, targets)
        return phase

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """As `Method.next`, for the chain."""
        following = self.methods[phase.method].next(phase, state, scores, targets)
        if following is None:
            return None
        return self._expand(phase.method, *following, targets)

    def foresee(self, phase: Phase, targets: Mapping[str, Shape]) -> tuple[Phase, str] | None:
        """As `Method.foresee`, for the chain. What follows a method's first phase is expanded as by `next`."""
        following = self.methods[phase.method].foresee(phase, targets)
        if following is None:
            return None
        after, assumption = following
        nothing = TrainState({}, {}, {}, Progress(), {})
        return self._expand(phase.method, after, nothing, targets)[0], assumption

    def outlook(self, phase: Phase, targets: Mapping[str, Shape]) -> str | None:
        """As `Method.outlook`, by the phase's own method."""
        return self.methods[phase.method].outlook(phase, targets)

    def remark(self, before: Phase, after: Phase, targets: Mapping[str, Shape]) -> str | None:
        """As `Method.remark`, by the method of the phase `before`."""
        return self.methods[before.method].remark(before, after, targets)

    def resumed(self, phase: Phase) -> Phase:
        """As `Method.resumed`, by the phase's own method."""
        return self.methods[phase.method].resumed(phase)

    def _expand(
        self, index: int, phase: Phase, state: TrainState, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState]:
        """Let the methods after `index` expand the phase, as long as it is open-ended."""
        while phase.open_ended and index + 1 < len(self.methods):
            index += 1
            phase, state = self.methods[index].begin(phase, state, targets)
        return replace(phase, method=max(index, 0)), state
