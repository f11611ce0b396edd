"""`Phase`: one stretch of training with one plan; and what a method must offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from sparse_llm_ft.optim import CutRule
from sparse_llm_ft.plan import AdapterPlan, Shape
from sparse_llm_ft.state import TrainState

BatchGrowth = Literal["none", "keep_global", "grow_global"]
LrScaling = Literal["none", "sqrt", "linear"]


@dataclass(frozen=True)
class Phase:
    """One phase, as plain values: a checkpoint holds it, so that a resumed run need not derive it again.

    Attributes:
        name: for people; nothing decides by it but the method itself.
        plan: what is trained.
        steps: optimizer steps of the phase; None: to the end of the run.
        cut: how omega is cut after each step, if it is.
        omega_lr, omega_algorithm: step rule of trained omegas, constant over the phase.
        batch_growth: what the memory freed since the phase before is used for.
        lr_scaling: how the learning rate follows a grown global batch.
        micro_batch_size, global_batch_size: filled in when the phase begins.
        lr_factor: multiplies the schedule's learning rate; filled in when the phase begins.
    """

    name: str
    plan: AdapterPlan
    steps: int | None = None
    cut: CutRule | None = None
    omega_lr: float = 0.0
    omega_algorithm: Literal["adamw", "sgd"] = "sgd"
    batch_growth: BatchGrowth = "none"
    lr_scaling: LrScaling = "none"
    micro_batch_size: int = 0
    global_batch_size: int = 0
    lr_factor: float = 1.0

    def with_batch(self, micro_batch_size: int, global_batch_size: int, lr_factor: float = 1.0) -> Phase:
        """The phase with its batch sizes settled."""
        return replace(
            self, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, lr_factor=lr_factor
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the same phase back."""
        data = {name: value for name, value in vars(self).items() if name not in ("plan", "cut")}
        return data | {"plan": self.plan.to_dict(), "cut": asdict(self.cut) if self.cut else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Phase:
        """Read what `to_dict` wrote."""
        cut = CutRule(**data["cut"]) if data["cut"] else None
        return cls(**{**data, "plan": AdapterPlan.from_dict(data["plan"]), "cut": cut})


class Method(Protocol):
    """A rule that turns what one phase measured into the next phase's plan. It knows no engine and no loop."""

    def first(self, targets: Mapping[str, Shape]) -> Phase:
        """The phase a run begins with.

        Args:
            targets: every target module, in the model's order: name -> (out_features, in_features).

        Raises:
            ConfigError: the method's settings do not fit this many adapters.
        """
        ...

    def next(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState] | None:
        """What follows `phase`, which ended in `state`: the next phase and the state it starts from.

        The new state's tensors and moments are exactly those of the new plan; a moment that is missing starts at
        zero. None: the run is over when `phase` is.
        """
        ...
