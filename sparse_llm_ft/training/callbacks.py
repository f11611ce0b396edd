"""What happens to a phase's parameters between optimizer steps: cuts of omega, AdaLoRA's pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from sparse_llm_ft.adapters import is_adapter, is_omega, tuner_of
from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.optim import StoIHT
from sparse_llm_ft.optim.rank_allocation import RankAllocation
from sparse_llm_ft.phase import Phase

Gradients = Mapping[str, torch.Tensor]


class Callback(Protocol):
    """Reads parameters by name after each step and overwrites some of them. All ranks call it together."""

    needs_gradients: bool

    def after_step(self, engine: Engine, step: int, gradients: Gradients) -> dict[str, Any]:
        """Act after update `step` (from 1) of the phase; returns what metrics.jsonl shall say."""
        ...

    def active_adapters(self, engine: Engine) -> int:
        """How many adapters change the output now."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides `tensors`."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that a checkpoint must hold."""
        ...


class OmegaPruning:
    """StoIHT on omega (WeightLoRA, section 3.3)."""

    needs_gradients = False

    def __init__(self, cut: StoIHT, names: list[str]) -> None:
        self.cut, self.names = cut, names

    def after_step(self, engine: Engine, step: int, gradients: Gradients) -> dict[str, Any]:
        """Cut omega if a cut is due; logs every omega, and once there was a cut how many adapters it swapped."""
        omega = {name: float(value) for name, value in engine.values(self.names).items()}
        zeroed, swaps = self.cut.after_step(step, omega)
        if zeroed:
            engine.load({name: torch.tensor([value]) for name, value in zeroed.items()})
        logged: dict[str, Any] = {"swaps": swaps} if self.cut.kept else {}
        return logged | {"omega": {name.rpartition(".")[0]: value for name, value in (omega | zeroed).items()}}

    def active_adapters(self, engine: Engine) -> int:
        """Those with omega > 0."""
        return sum(float(value) > 0 for value in engine.values(self.names).values())

    def to_dict(self) -> dict[str, Any]:
        """See `StoIHT.to_dict`."""
        return self.cut.to_dict()

    def tensors(self) -> dict[str, torch.Tensor]:
        """None."""
        return {}


class AdaLoraRankAllocation:
    """AdaLoRA's rank allocation."""

    needs_gradients = True

    def __init__(self, allocation: RankAllocation, names: list[str], adapters: int) -> None:
        self.allocation, self.names, self.adapters = allocation, names, adapters

    def after_step(self, engine: Engine, step: int, gradients: Gradients) -> dict[str, Any]:
        """Prune as the schedule says; logs how many singular values are left."""
        values = engine.values(self.names)
        pruned = self.allocation.after_step(step, values, {name: gradients[name] for name in self.names})
        if pruned:
            engine.load(pruned)
        pattern = self.allocation.rank_pattern
        return {} if pattern is None else {"ranks": sum(sum(row) for row in pattern.values())}

    def active_adapters(self, engine: Engine) -> int:
        """All: AdaLoRA prunes ranks."""
        return self.adapters

    def to_dict(self) -> dict[str, Any]:
        """See `RankAllocation.to_dict`."""
        return self.allocation.to_dict()

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `RankAllocation.tensors`."""
        return self.allocation.tensors()


def build_callback(phase: Phase, state: TrainState, engine: Engine) -> Callback | None:
    """The phase's rule, going on from `state`; None where it has none."""
    if phase.cut is not None:
        return OmegaPruning(StoIHT.from_dict(phase.cut, state.callback), [n for n in engine.parameters if is_omega(n)])
    tuner = tuner_of(phase.plan)
    if tuner.allocates_ranks:
        names = [name for name in engine.parameters if is_adapter(name)]
        config: Any = tuner.peft_config(phase.plan)
        allocation = RankAllocation(config, engine.values(names))
        allocation.restore(state.callback, state.callback_tensors)
        return AdaLoraRankAllocation(allocation, names, len(phase.plan.active))
    return None
