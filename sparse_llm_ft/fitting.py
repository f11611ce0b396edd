"""A plan and its tensors against the model they claim to be of: checked before anything of their sizes is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparse_llm_ft.plan import EVERYTHING, AdapterPlan, PlanError, Shape

TensorShape = tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """What model and run really have.

    Attributes:
        targets: linear layers that may carry adapters -> (out_features, in_features).
        parameters: parameters of the base -> their shapes.
        methods: how many the run applies.
    """

    targets: Mapping[str, Shape]
    parameters: Mapping[str, TensorShape]
    methods: int


def check_modules(plan: AdapterPlan, targets: Mapping[str, Shape]) -> None:
    """Refuse a plan that names modules the model lacks, or ranks and masks that do not fit their matrices.

    Raises:
        PlanError: naming the first such module.
    """
    for group, names in plan.groups.items():
        if len(shapes := {targets[name] for name in names if name in targets}) > 1:
            raise PlanError(f"group {group!r}: its modules have different shapes ({sorted(shapes)})")
    for name, adapter in plan.modules.items():
        if name not in targets:
            raise PlanError(
                f"the plan names module {name!r}, which is not a linear layer of the model; "
                f"the model has {name_endings(targets)}"
            )
        if adapter is None:
            continue
        out_features, in_features = targets[name]
        for kept, size in ((adapter.rows, out_features), (adapter.cols, in_features)):
            if kept is not None and kept.size != size:
                raise PlanError(f"module {name!r}: a mask of size {kept.size} where its matrix has {size}")
        # AdaLoRA starts with more than it ends with, VeRA's rank is that of fixed projections.
        if plan.tuner not in ("adalora", "vera") and adapter.r > min(targets[name]):
            raise PlanError(
                f"module {name!r}: rank {adapter.r} is larger than its matrix ({out_features} × {in_features})"
            )


def check_tensors(plan: AdapterPlan, shapes: Mapping[str, TensorShape], real: Expected) -> None:
    """Refuse tensors that are not those of the plan: all of its adapters', and else only of what it trains whole.

    Args:
        shapes: short parameter name -> shape.

    Raises:
        PlanError: naming the first tensor that is missing, of another shape, or of nothing that the plan trains.
    """
    expected = adapter_shapes(plan, real.targets)
    for name in expected:
        if name not in shapes:
            raise PlanError(f"tensor {name!r} is missing")
    whole = tuple(f"{name}." for name in plan.trained)
    for name, shape in shapes.items():
        right = expected.get(name)
        if right is None and (EVERYTHING in plan.trained or name.startswith(whole)):
            right = real.parameters.get(name)
        if right is None:
            raise PlanError(f"tensor {name!r:.100} is of nothing that the plan trains")
        if shape != right:
            raise PlanError(f"tensor {name!r} has shape {shape!r:.60}; expected {right}")


def adapter_shapes(plan: AdapterPlan, targets: Mapping[str, Shape]) -> dict[str, TensorShape]:
    """Short name -> shape of every trained tensor of the plan's adapters, whosever tuner carries them."""
    found: dict[str, TensorShape] = {}
    active = plan.active
    if plan.tuner == "vera":
        for name, adapter in active.items():
            found |= {f"{name}.vera_lambda_d": (adapter.r,), f"{name}.vera_lambda_b": (targets[name][0],)}
        return found
    for owner, name in plan.matrix_owners().items():
        adapter = active[name]
        rows, columns = adapter.shape(targets[name])  # a state holds the kept ones alone, wherever masks live
        found |= {f"{owner}.lora_A": (adapter.r, columns), f"{owner}.lora_B": (rows, adapter.r)}
        if plan.tuner == "adalora":
            found[f"{owner}.lora_E"] = (adapter.r, 1)
        if plan.tuner == "dora":
            found[f"{owner}.lora_magnitude_vector"] = (targets[name][0],)
    return found | {f"{name}.lora_omega": (1,) for name, adapter in active.items() if adapter.train_omega}


def name_endings(names: Mapping[str, object]) -> str:
    """The distinct last parts of the names, in order: ``q_proj, k_proj, ...``."""
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(endings[:20]) + (", ..." if len(endings) > 20 else "") if endings else "no linear layer at all"
