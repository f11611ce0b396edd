"""What the methods are compared with: PEFT's own tuners, one shared pair for all layers, full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.config import AdaLoraMethod, LoraPlusMethod, RunConfig, VeraMethod
from sparse_llm_ft.config.methods import AdaLoraSettings, RsLoraMethod
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, ModuleAdapter, Shape, group_name, module_kind
from sparse_llm_ft.scoring.scores import Scores


class _OnePhase:
    """A method that trains one plan to the end of the run."""

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """Nothing follows."""
        return None


class PeftBaseline(_OnePhase):
    """LoRA (Hu et al., 2021), LoRA+, rsLoRA, DoRA, VeRA and AdaLoRA by PEFT itself."""

    def __init__(self, config: RunConfig, index: int, total_steps: int) -> None:
        self.method, self.adapter, self.total_steps = config.method[index], config.adapter, total_steps

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The incoming plan's modules, with PEFT's tuner."""
        method, plan = self.method, phase.plan
        if isinstance(method, AdaLoraMethod):
            plan = adalora_plan(plan, method, self.adapter.r, self.adapter.lora_alpha, self.total_steps)
        elif isinstance(method, VeraMethod):
            modules = {name: a and replace(a, r=method.r) for name, a in plan.modules.items()}
            plan = replace(plan, modules=modules, tuner="vera")
        elif isinstance(method, RsLoraMethod):  # a rank that a small matrix cut keeps lora_alpha: its factor follows
            modules = {name: a and replace(a, lora_alpha=self.adapter.lora_alpha) for name, a in plan.modules.items()}
            plan = replace(plan, modules=modules, tuner="rslora")
        else:
            plan = replace(plan, tuner="dora" if method.name == "dora" else "lora")
        factor = method.lr_ratio if isinstance(method, LoraPlusMethod) else 1.0
        return replace(phase, plan=plan, lora_b_lr_factor=factor), state


def adalora_plan(
    plan: AdapterPlan, settings: AdaLoraSettings, r: int, lora_alpha: float, total_steps: int
) -> AdapterPlan:
    """The plan with AdaLoRA's layers: every adapter begins with rank r, beyond a matrix's sides too; masks stay."""
    tinit, tfinal = settings.schedule(total_steps)
    options = {
        "target_r": settings.target_r,
        "tinit": tinit,
        "tfinal": tfinal,
        "deltaT": settings.delta_t,
        "total_step": total_steps,
        "orth_reg_weight": settings.orth_reg_weight,
    }
    modules = {name: a and replace(a, r=r, lora_alpha=lora_alpha) for name, a in plan.modules.items()}
    return replace(plan, modules=modules, tuner="adalora", options=options)


class TiedLora(_OnePhase):
    """Tied-LoRA: one pair for all layers, per module type and shape."""

    def __init__(self, config: RunConfig, index: int, total_steps: int) -> None:
        pass

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """Every module in the group of its kind."""
        modules: dict[str, ModuleAdapter | None] = {
            name: replace(adapter, group=group_name(module_kind(name), targets[name]))
            for name, adapter in phase.plan.active.items()
        }
        return replace(phase, plan=replace(phase.plan, modules=modules)), state


class Full(_OnePhase):
    """Full fine-tuning: no adapters, every parameter of the base trained."""

    def __init__(self, config: RunConfig, index: int, total_steps: int) -> None:
        pass

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """Everything."""
        nothing: dict[str, ModuleAdapter | None] = dict.fromkeys(phase.plan.modules)
        return replace(phase, plan=AdapterPlan(nothing, trained=(FULL_MODEL,))), state
