"""What a method must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.scoring.scores import Scores

S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True)
class MethodInputs:
    """What a method may use of a run besides its own settings.

    Attributes:
        r, lora_alpha: of the adapters that the run starts from.
        seed: of the run.
        total_steps: optimizer steps of the run at its initial global batch.
    """

    r: int
    lora_alpha: float
    seed: int
    total_steps: int


class Method(ABC, Generic[S]):
    """A rule that turns what one phase measured into the next phase's plan. It knows no engine and no loop.

    A method expands one open-ended phase, which would train a plan to the end of the run, into several. That plan is
    the uniform one, or the plan that another method has come to.

    Attributes:
        settings_class: of the ``method`` section; it also declares what the method composes with and excludes.
    """

    settings_class: ClassVar[type[MethodSettings]]

    def __init__(self, settings: S, inputs: MethodInputs) -> None:
        self.settings, self.inputs = settings, inputs

    @abstractmethod
    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The first phase in place of `phase`, which would start from `state` and go to the end of the run.

        Args:
            state: without tensors if nothing has been trained.
            targets: every target module, in the model's order: name -> (out_features, in_features).

        Raises:
            ConfigError: the method's settings do not fit this many adapters.
        """

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """The phase after `phase`, which ended in `state` and measured `scores`. None: the run ends with `phase`.

        The new state's tensors and moments belong to the new plan. A missing moment starts at zero, a missing value as
        it would in a new run.
        """
        return None

    def resumed(self, phase: Phase) -> Phase:
        """A phase of this method from a checkpoint, with the free settings that have changed since.

        `MethodSettings.free` names them.
        """
        return phase
