"""Callbacks change a phase's parameters after an optimizer step: they cut omega or prune AdaLoRA's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from peft import AdaLoraConfig

from sparse_llm_ft.adapters import is_adapter, is_omega, tuner_of
from sparse_llm_ft.adapters.masking import to_compact
from sparse_llm_ft.checkpoint.state import Tensors, TrainState
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.optim import StoIHT
from sparse_llm_ft.optim.rank_allocation import RankAllocation
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan

Gradients = Mapping[str, torch.Tensor]


class Callback(Protocol):
    """Reads parameters by name after each step and overwrites some. Methods that take an engine are collectives.

    Attributes:
        reads: names of the parameters that `after_step` reads.
        needs_gradients: whether it reads the gradients of the update.
    """

    reads: list[str]
    needs_gradients: bool

    def may_change(self, step: int) -> bool:
        """Whether `after_step` may overwrite parameters after update `step` (from 1) of the phase. If not, the next
        step may begin before it. A callback that needs gradients says True: they are clipped by the last step's norm.
        """
        ...

    def after_step(self, engine: Engine, step: int, values: Tensors, gradients: Gradients) -> dict[str, object]:
        """Collective if it overwrites something. Act after update `step` (from 1) of the phase.

        Args:
            values: of the parameters `reads` as the update left them: unsharded, float32, on the CPU.

        Returns:
            Further entries for metrics.jsonl.
        """
        ...

    def at_end(self, engine: Engine, updates: int) -> None:
        """Collective. Act at the phase's end, after so many updates: fewer than planned if the run has ended first."""
        ...

    def active_adapters(self, engine: Engine) -> int:
        """Collective. How many adapters change the output now."""
        ...

    def to_dict(self) -> dict[str, object]:
        """A checkpoint's part of it, besides `tensors`: JSON values."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint holds of it, by name."""
        ...


class OmegaPruning:
    """StoIHT on omega (WeightLoRA, section 3.3)."""

    needs_gradients = False

    def __init__(self, cut: StoIHT, reads: list[str]) -> None:
        self.cut, self.reads = cut, reads
        self._active: int | None = None  # of the last update; reading omega is a message

    def may_change(self, step: int) -> bool:
        """See `StoIHT.may_cut`."""
        return self.cut.may_cut(step)

    def after_step(self, engine: Engine, step: int, values: Tensors, gradients: Gradients) -> dict[str, object]:
        """Cut omega if a cut is due. Logs every omega, and from the first cut on the number of swaps."""
        omega = {name: float(value) for name, value in values.items()}
        zeroed, swaps = self.cut.after_step(step, omega)
        if zeroed:
            zeros = torch.zeros(len(zeroed), device=engine.device)  # made there: the host would wait to send them
            engine.load(dict(zip(zeroed, zeros.split(1), strict=True)))
        omega |= dict.fromkeys(zeroed, 0.0)
        self._active = sum(value > 0 for value in omega.values())
        logged: dict[str, object] = {"swaps": swaps} if self.cut.kept else {}
        return logged | {"omega": {name.rpartition(".")[0]: value for name, value in omega.items()}}

    def at_end(self, engine: Engine, updates: int) -> None:
        """Collective. Make the last cut, if too many updates were skipped for it to be due before the run's end."""
        if updates < self.cut.rule.steps:
            self.after_step(engine, self.cut.rule.steps, engine.values(self.reads), {})

    def active_adapters(self, engine: Engine) -> int:
        """Collective before the first update. The number of adapters with omega > 0."""
        if self._active is None:
            self._active = sum(float(value) > 0 for value in engine.values(self.reads).values())
        return self._active

    def to_dict(self) -> dict[str, object]:
        """See `StoIHT.to_dict`."""
        return {**self.cut.to_dict()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """An empty dict: omega is a trained parameter."""
        return {}


class AdaLoraRankAllocation:
    """AdaLoRA's rank allocation, run on unsharded copies.

    The copies hold kept rows and columns alone: PEFT's allocator ranks a singular value by the mean sensitivity of its
    row of A and its column of B, and masked zeros would lower the means of strongly masked modules.
    """

    needs_gradients = True

    def __init__(self, allocation: RankAllocation, reads: list[str], plan: AdapterPlan) -> None:
        self.allocation, self.reads, self.plan = allocation, reads, plan

    def may_change(self, step: int) -> bool:
        """True: it has the gradients on the host before the update, so no step could begin meanwhile anyway."""
        return True

    def after_step(self, engine: Engine, step: int, values: Tensors, gradients: Gradients) -> dict[str, object]:
        """Prune on AdaLoRA's schedule. Logs how many singular values are left."""
        compact = to_compact(self.plan, values)
        kept = to_compact(self.plan, {name: gradients[name] for name in self.reads})
        pruned = self.allocation.after_step(step, compact, kept)
        if pruned:
            engine.load(pruned)
        pattern = self.allocation.rank_pattern
        return {} if pattern is None else {"ranks": sum(sum(row) for row in pattern.values())}

    def at_end(self, engine: Engine, updates: int) -> None:
        """Nothing: what is pruned by then stays pruned."""

    def active_adapters(self, engine: Engine) -> int:
        """The number of all adapters: AdaLoRA prunes ranks, not adapters."""
        return len(self.plan.active)

    def to_dict(self) -> dict[str, object]:
        """See `RankAllocation.to_dict`."""
        return {**self.allocation.to_dict()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `RankAllocation.tensors`."""
        return self.allocation.tensors()


def build_callback(phase: Phase, state: TrainState, engine: Engine) -> Callback | None:
    """Collective. The phase's callback, continuing from `state`; None if the phase has none."""
    if phase.cut is not None:
        omegas = [name for name in engine.parameters if is_omega(name)]
        may_stay = set(list(phase.plan.active)[phase.cut.first :])
        allowed = frozenset(name for name in omegas if name.rpartition(".")[0] in may_stay)
        return OmegaPruning(StoIHT.from_dict(phase.cut, state.callback, allowed), omegas)
    tuner = tuner_of(phase.plan)
    if tuner.allocates_ranks:
        names = [name for name in engine.parameters if is_adapter(name)]
        config = tuner.peft_config(phase.plan)
        assert isinstance(config, AdaLoraConfig), "only AdaLoRA allocates ranks"
        allocation = RankAllocation(config, to_compact(phase.plan, engine.values(names)))
        allocation.restore(state.callback, state.callback_tensors)
        return AdaLoraRankAllocation(allocation, names, phase.plan)
    return None
