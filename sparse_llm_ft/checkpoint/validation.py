"""What a checkpoint claims beyond its checksums: that its phase, tensors and counters are of this model and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparse_llm_ft.adapters.masking import row_masks
from sparse_llm_ft.adapters.targets import check_modules
from sparse_llm_ft.adapters.tuners import TensorShape, tuner_of
from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.optim.rank_allocation import is_allocation_state, is_sensitivity
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, PlanError, Shape


@dataclass(frozen=True)
class Expected:
    """The real model and run, with which a checkpoint is compared.

    Attributes:
        targets: linear layers that may carry adapters -> (out_features, in_features).
        parameters: parameters of the base -> their shapes.
        methods: how many methods the run has.
    """

    targets: Mapping[str, Shape]
    parameters: Mapping[str, TensorShape]
    methods: int


def check_tensors(plan: AdapterPlan, shapes: Mapping[str, TensorShape], real: Expected) -> None:
    """Refuse tensors that do not fit the plan: all tensors of its adapters must be there, and beside them only tensors
    of fully trained modules.

    Args:
        shapes: short parameter name -> shape.

    Raises:
        PlanError: naming the first tensor that is missing, has another shape, or belongs to nothing that is trained.
    """
    expected = tuner_of(plan).shapes(plan, real.targets)
    for name in expected:
        if name not in shapes:
            raise PlanError(f"tensor {name!r} is missing")
    whole, rows = tuple(f"{name}." for name in plan.trained), row_masks(plan)
    for name, shape in shapes.items():
        right = expected.get(name)
        if right is None and (FULL_MODEL in plan.trained or name.startswith(whole)):
            right = real.parameters.get(name)
            if right is not None and (kept := rows.get(name)) is not None:
                right = (len(kept.indices), *right[1:]) if kept.size == right[0] else None
        if right is None:
            raise PlanError(f"tensor {name!r:.100} belongs to nothing that the plan trains")
        if shape != right:
            raise PlanError(f"tensor {name!r} has shape {shape!r:.60}; expected {right}")


def validate_state(state: TrainState, phase: Phase, real: Expected) -> None:
    """Refuse a state that this run could not have written.

    Raises:
        PlanError: naming the value that does not fit.
    """
    if phase.method >= real.methods:
        raise PlanError(f"method number {phase.method}; the run has {real.methods}")
    if phase.micro_batch_size < 1:
        raise PlanError("a phase without batch sizes")
    for plan in (phase.plan, phase.target_plan):
        if plan is not None:
            check_modules(plan, real.targets)
    check_tensors(phase.plan, {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}, real)
    _check_callback(state, phase, real)
    if state.record.current is None:
        raise PlanError("the record has no current phase")
    line = state.record.unvalidated
    if line is not None and (line.step, line.phase) != (state.progress.step, phase.name):
        raise PlanError(f"a line of step {line.step}, phase {line.phase!r:.60}, in a state of another one")


def _check_callback(state: TrainState, phase: Phase, real: Expected) -> None:
    plan, tuner = phase.plan, tuner_of(phase.plan)
    shapes = tuner.shapes(plan, real.targets) if tuner.allocates_ranks else {}
    for key, tensor in state.callback_tensors.items():
        if not is_sensitivity(key, tuple(tensor.shape), shapes):
            raise PlanError(f"tensor {key!r:.100} belongs to no callback of the phase")
    if state.callback is None:
        return
    if phase.cut is not None:
        fits = set(state.callback) == {"moved", "kept"} and all(_is_names(names) for names in state.callback.values())
    else:
        fits = tuner.allocates_ranks and is_allocation_state(state.callback, state.tensors)
    if not fits:
        raise PlanError(f"the state of its callback is {state.callback!r:.60}")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
