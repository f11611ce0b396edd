"""The cases of `compare.py`: what each method trains, and the floors that its figures are held against."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from sparse_llm_ft.phase import CutRule
from sparse_llm_ft.plan import (
    AdapterPlan,
    IndexMask,
    ModuleName,
    Shape,
    group_name,
    module_kind,
    uniform_plan,
    with_omega,
)

RANK, ALPHA = 8, 16
Shapes = Mapping[str, Shape]
Settings = Mapping[str, object]


def masked(plan: AdapterPlan, shapes: Shapes, keep: float) -> AdapterPlan:
    """Partial-LoRA: each adapter keeps this share of its rows and columns, drawn at random."""
    draw, modules = random.Random(0), dict(plan.modules)
    for name, adapter in plan.active.items():
        rows, columns = (
            IndexMask(size, tuple(sorted(draw.sample(range(size), max(1, round(keep * size))))))
            for size in shapes[name]
        )
        modules[name] = replace(adapter, rows=rows, cols=columns)
    return replace(plan, modules=modules)


def half_shared(plan: AdapterPlan, shapes: Shapes) -> AdapterPlan:
    """LoRA-drop: every second layer's adapters share one pair for each type of module."""
    modules = dict(plan.modules)
    for name, adapter in plan.active.items():
        if (ModuleName.parse(name).number or 0) % 2:
            modules[name] = replace(adapter, group=group_name(module_kind(name), shapes[name]))
    return replace(plan, modules=modules)


def top_tenth(plan: AdapterPlan, shapes: Shapes) -> AdapterPlan:
    """Adapters in the highest tenth of the layers alone, at least in one."""
    numbers = {name: ModuleName.parse(name).number or 0 for name in plan.modules}
    layers = max(numbers.values()) + 1
    return _only(plan, {name for name, number in numbers.items() if number >= layers - max(1, layers // 10)})


def spread(plan: AdapterPlan, shapes: Shapes) -> AdapterPlan:
    """Every fifth adapter, from the lowest layer on."""
    return _only(plan, set(list(plan.modules)[::5]))


def _only(plan: AdapterPlan, kept: set[str]) -> AdapterPlan:
    return replace(plan, modules={name: a if name in kept else None for name, a in plan.modules.items()})


@dataclass(frozen=True)
class Floors:
    """The most that a case's ratios should be: SmolLM2, 2 samples of 256 tokens, half of the positions supervised.
    None: no such floor.
    """

    step_to_stock: float | None
    step_to_bare: float | None
    kept_to_stock: float | None


@dataclass(frozen=True)
class Case:
    """One method, as this toolkit runs it. Stock and tuned PEFT have LoRA with the same dropout on every module, and
    the bare base goes backward to the lowest layer that has an adapter here.

    Attributes:
        change: makes the method's plan from LoRA's.
        cut: how omega is cut, if it is trained.
        tuner: of the plan; ``lora`` is PEFT's.
        model, training: further settings of these sections of a run.
    """

    name: str
    change: Callable[[AdapterPlan, Shapes], AdapterPlan] = lambda plan, shapes: plan
    dropout: float = 0.0
    floors: Floors | None = None
    cut: CutRule | None = None
    tuner: str = "sparse_lora"
    model: Settings = field(default_factory=dict)
    training: Settings = field(default_factory=dict)

    def plan(self, shapes: Shapes) -> AdapterPlan:
        """The plan on modules of these shapes."""
        plan = replace(uniform_plan(shapes, RANK, ALPHA, self.dropout), tuner=self.tuner)
        return self.change(plan, shapes)


def _keep(share: float) -> Callable[[AdapterPlan, Shapes], AdapterPlan]:
    return lambda plan, shapes: masked(plan, shapes, share)


CASES = {
    case.name: case
    for case in (
        Case("lora", floors=Floors(0.75, 1.20, 0.30)),
        Case("lora, dropout .05", dropout=0.05, floors=Floors(0.60, 1.25, 0.25)),
        Case("partial_lora, 13 % kept", _keep(0.13), floors=Floors(0.70, 1.15, 0.25)),
        Case("partial_lora, 1 % kept", _keep(0.01)),
        Case("lora_drop, half the layers shared", half_shared, floors=Floors(0.75, 1.20, 0.30)),
        Case("weight_lora before T", lambda plan, _: with_omega(plan), cut=CutRule(keep=21, steps=10**6)),
        Case("weight_lora after T, top tenth", top_tenth, floors=Floors(0.35, 1.10, 0.05)),
        Case(
            "weight_lora after T, top tenth, with prefix cache",
            top_tenth,
            floors=Floors(0.12, None, 0.05),
            training={"prefix_cache": "memory"},
        ),
        Case("weight_lora after T, 20 % spread", spread, floors=Floors(0.60, 1.15, 0.20)),
    )
}


def lowest_layer(plan: AdapterPlan) -> int:
    """The number of the lowest layer that has an adapter."""
    return min(ModuleName.parse(name).number or 0 for name in plan.active)
