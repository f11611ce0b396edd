"""Partial-LoRA (Damirchi et al., 2024): delta W = (u_row · B)(u_col · A) with masks u drawn by derived ratios (eq. 6).

phase "head":    only where a classification head is fresh and importance or accuracy needs one: the head alone, on D_t
phase "derive":  no step; importance of rows and columns, and Algorithm 1, on D_t
phase "train":   the unmasked entries of A and B
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from sparse_llm_ft.checkpoint.state import Tensors, TrainState
from sparse_llm_ft.config import PartialLoraMethod, RunConfig, SparseAdapterMethod
from sparse_llm_ft.methods.baselines import adalora_plan
from sparse_llm_ft.phase import Phase, ScoringSpec, Subset
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, Shape
from sparse_llm_ft.scoring import (
    Derivation,
    Importance,
    balanced,
    draw_masks,
    preserve_flow,
    pyramidal,
    ratios_from_file,
)
from sparse_llm_ft.scoring.scores import Scores

Ratios = Mapping[str, tuple[float, float]]


class PartialLora:
    """Every selection and every rule for ratios; also Sparse Adapter, which is one of them."""

    def __init__(self, config: RunConfig, index: int, total_steps: int) -> None:
        method = config.method[index]
        if isinstance(method, SparseAdapterMethod):
            method = method.as_partial()
        assert isinstance(method, PartialLoraMethod)
        self.method, self.adapter, self.seed, self.total_steps = method, config.adapter, config.seed, total_steps

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """Measure first, where masks need it."""
        method, plan = self.method, phase.plan
        if not method.ranks:
            return self._masked(phase, plan, state, None, targets)
        shots = method.shots if method.sample_fraction else method.shots or method.DEFAULT_SHOTS
        measuring = replace(
            phase,
            subset=Subset(method.sample_fraction, shots, self.seed),
            scoring=ScoringSpec(
                "derivation",
                method.derivation,
                search=method.derives,
                compare=method.compare_importance,
                cache_dir=method.cache_dir,
            ),
        )
        needs_head = bool(plan.trained) and not state.tensors and (method.derives or method.importance != "svd")
        if needs_head:
            nothing: dict[str, ModuleAdapter | None] = dict.fromkeys(plan.modules)
            head = replace(plan, modules=nothing)
            fit = replace(measuring, epochs=method.head_epochs, learning_rate=method.head_learning_rate, is_warmup=True)
            return replace(fit, name="head", plan=head, target_plan=plan), state
        return replace(measuring, name="derive", steps=0), state

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """Draw the masks and cut the plan, and what was trained before, down to them."""
        if phase.scoring is None:
            return None
        assert isinstance(scores, Derivation)
        after = replace(phase, name="train", steps=None, epochs=None, subset=None, is_warmup=False, scoring=None)
        after = replace(after, learning_rate=None, target_plan=None)
        if phase.target_plan is None:
            return self._masked(after, phase.plan, state, scores, targets)
        # The head was fitted to measure the base with; the run itself starts from a fresh one, as any method's does.
        return self._masked(after, phase.target_plan, state.fresh(), scores, targets)

    def _masked(
        self,
        phase: Phase,
        plan: AdapterPlan,
        state: TrainState,
        scores: Derivation | None,
        targets: Mapping[str, Shape],
    ) -> tuple[Phase, TrainState]:
        method = self.method
        ratios = _of_owners(self._ratios(list(plan.active), scores), plan)
        importance = None if scores is None else self._importance(scores, plan)
        shapes = {owner: targets[name] for owner, name in plan.matrix_owners().items()}
        drawn = draw_masks(shapes, ratios, method.selection, importance, method.temperature, self.seed)
        modules: dict[str, ModuleAdapter | None] = dict(plan.modules)
        for name, adapter in plan.active.items():
            rows, cols = drawn[plan.owners[name]]
            d_out, d_in = targets[name]
            modules[name] = replace(adapter, rows=IndexMask.of(d_out, rows), cols=IndexMask.of(d_in, cols))
        masked = replace(plan, modules=modules, masking=method.masking)
        if method.base == "dora":
            masked = replace(masked, tuner="dora")
        if method.base == "adalora":
            masked = adalora_plan(masked, method.adalora, self.adapter.r, self.adapter.lora_alpha, self.total_steps)
            return replace(phase, plan=masked), state.fresh()  # AdaLoRA's matrices are other ones
        return replace(phase, plan=masked), _cut(state, masked)

    def _importance(self, scores: Derivation, plan: AdapterPlan) -> dict[str, Importance]:
        measured = preserve_flow(scores.importance) if self.method.flow_preservation else scores.importance
        return _importance_of_owners(measured, plan)

    def _ratios(self, names: list[str], scores: Derivation | None) -> Ratios:
        method = self.method
        if method.derives:
            assert scores is not None
            return scores.ratios
        if method.ratios == "balanced":
            return balanced(names, float(method.ratio or 0.0))
        if method.ratios == "pyramidal":
            return pyramidal(names, float(method.ratio or 0.0))
        return ratios_from_file(method.ratios, names)


def _of_owners(ratios: Ratios, plan: AdapterPlan) -> dict[str, tuple[float, float]]:
    """One ratio per pair: a module's own, or the mean over those that share."""
    members = _members(plan)
    return {
        owner: (sum(ratios[n][0] for n in names) / len(names), sum(ratios[n][1] for n in names) / len(names))
        for owner, names in members.items()
    }


def _importance_of_owners(importance: Mapping[str, Importance], plan: AdapterPlan) -> dict[str, Importance]:
    """Scores per pair: the sum over those that share, each scaled to sum to one."""

    def total(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([part / part.sum().clamp(min=1e-30) for part in parts]).sum(0)

    return {
        owner: importance[names[0]]
        if len(names) == 1
        else Importance(total([importance[n].rows for n in names]), total([importance[n].cols for n in names]))
        for owner, names in _members(plan).items()
    }


def _members(plan: AdapterPlan) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for name, owner in plan.owners.items():
        members.setdefault(owner, []).append(name)
    return members


def _cut(state: TrainState, plan: AdapterPlan) -> TrainState:
    """The kept rows of every trained B and columns of every trained A, with their moments."""
    first = {owner: plan.active[name] for owner, name in plan.matrix_owners().items()}

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        owner, _, part = name.rpartition(".")
        if owner not in first or part not in ("lora_A", "lora_B"):
            return tensor
        kept, dimension = (first[owner].cols, 1) if part == "lora_A" else (first[owner].rows, 0)
        return tensor if kept is None else tensor.index_select(dimension, torch.tensor(kept.indices))

    tensors: Tensors = {name: cut(name, tensor) for name, tensor in state.tensors.items()}
    moments = {n: {key: cut(n, moment) for key, moment in entry.items()} for n, entry in state.moments.items()}
    return replace(state, tensors=tensors, moments=moments)
