"""`Method`: the interface of all methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.model.step_cost import StepCost
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.scoring import Derivation
    from sparse_llm_ft.scoring.scores import Scores

S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True)
class MethodInputs:
    """The run's values that a method may use besides its own settings.

    Attributes:
        r, lora_alpha: of the run's initial adapters.
        seed: the run's seed.
        total_steps: the run's optimizer steps at its initial global batch.
        cost: the base's arithmetic; None where no base is known.
        memory: plan -> bytes that its phase needs on each device at the configured micro-batch; None where nothing can
            be planned.
        derived: phase -> the derivation at its end, if an earlier run has left it in the cache. For planning alone.
    """

    r: int
    lora_alpha: float
    seed: int
    total_steps: int
    cost: StepCost | None = None
    memory: Callable[[AdapterPlan], int] | None = None
    derived: Callable[[Phase], Derivation | None] | None = None


class Method(ABC, Generic[S]):
    """A rule that turns one phase's scores into the next phase's plan. It knows neither engine nor loop.

    A method expands one open-ended phase, which would train its plan to the end of the run, into several. That plan is
    the uniform one or the last plan of another method.

    Attributes:
        settings_class: the class of the ``method`` section. It also declares with which methods this one composes.
    """

    settings_class: ClassVar[type[MethodSettings]]

    def __init__(self, settings: S, inputs: MethodInputs) -> None:
        self.settings, self.inputs = settings, inputs

    @abstractmethod
    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The first phase in place of `phase`, which would start from `state` and last to the end of the run.

        Args:
            state: without tensors if nothing is trained yet.
            targets: every target module, in the model's order: name -> (out_features, in_features).

        Raises:
            ConfigError: the method's settings do not fit the number of adapters.
        """

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """The phase after `phase`, which ended in `state` with `scores`, and its start state. None: the run ends here.

        The new state's tensors and moments belong to the new plan. Missing moments start at zero, and missing values as
        in a new run.
        """
        return None

    def foresee(self, phase: Phase, targets: Mapping[str, Shape]) -> tuple[Phase, str] | None:
        """The phase after `phase` as far as it is known before anything is measured, and in words what it assumes will
        be measured; None: the run ends here. For planning alone: `next` decides.
        """
        return None

    def resumed(self, phase: Phase) -> Phase:
        """A phase of this method from a checkpoint, with the present values of the free settings
        (`MethodSettings.free`).
        """
        return phase

    def outlook(self, phase: Phase, targets: Mapping[str, Shape]) -> str | None:
        """A line for the log when `phase`, a phase of this method, begins; None: nothing."""
        return None

    def remark(self, before: Phase, after: Phase, targets: Mapping[str, Shape]) -> str | None:
        """A line for log and summary on the change from `before`, a phase of this method, to `after`; None: nothing."""
        return None
