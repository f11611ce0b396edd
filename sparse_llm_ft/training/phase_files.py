"""``phases/<NN>-<name>.json``: every phase's plan and what was measured at its end, for people and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_llm_ft.adapters import is_omega, residual_norms
from sparse_llm_ft.methods import Phase, Scores
from sparse_llm_ft.plan import AdapterPlan, Shape, module_kind
from sparse_llm_ft.progress import Progress
from sparse_llm_ft.scoring import Derivation, importance_by_type
from sparse_llm_ft.state import TrainState


def phase_file(phase: Phase, progress: Progress, targets: Mapping[str, Shape]) -> tuple[str, dict[str, Any]]:
    """Name and content of a phase's file when it begins."""
    content = {
        "index": progress.phase,
        "name": phase.name,
        "start_step": progress.step - progress.phase_step,
        "plan": phase.plan.to_dict(),
        "shapes": {name: list(shape) for name, shape in targets.items()},
        "scores": None,
        "delta_norms": None,
    }
    return f"phases/{progress.phase:02d}-{phase.name}.json", content


def finished_phase_file(
    phase: Phase, state: TrainState, scores: Scores, following: AdapterPlan | None, targets: Mapping[str, Shape]
) -> tuple[str, dict[str, Any]]:
    """Name and content of a phase's file when it is over.

    Args:
        following: the next phase's plan, if there is one.
    """
    name, content = phase_file(phase, state.progress, targets)
    content["scores"] = describe_scores(phase, state, scores, following)
    content["delta_norms"] = residual_norms(phase.plan, state.tensors) or None
    return name, content


def describe_scores(
    phase: Phase, state: TrainState, scores: Scores, following: AdapterPlan | None
) -> dict[str, Any] | None:
    """What was measured, as JSON values; None: nothing."""
    if isinstance(scores, Derivation):
        return scores.summary() | {"head_fitted": phase.name == "head"}
    if scores is not None:
        own = [name for name, a in following.active.items() if a.group is None] if following else []
        return {"kind": "lora_output", "g": scores, "y": importance_by_type(scores, module_kind), "kept": own}
    omega = {n.rpartition(".")[0]: float(t) for n, t in state.tensors.items() if is_omega(n)}
    return {"kind": "omega", "omega": omega} if omega else None


def in_brief(scores: Scores, phase: Phase) -> str | None:
    """What was measured, in a line for the run's summary."""
    if isinstance(scores, Derivation):
        how = "the head fitted on them first" if phase.name == "head" else "no head fitted"
        return f"{scores.describe()}, {how}"
    return None if scores is None else f"LoRA outputs of {len(scores)} modules"
