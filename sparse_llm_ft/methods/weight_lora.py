"""WeightLoRA and WeightLoRA+ (Veprikov et al.): train omega and cut it, disconnect, optionally grow ranks, train on.

phase "select":  h_i x = W_i x + omega_i (alpha / r) B_i A_i x, omega trained and cut to the K largest (eq. 3-4)
phase "train":   the survivors with their omega fixed, the others gone; for WeightLoRA+ with grown ranks (eq. 5)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sparse_llm_ft.adapters import is_omega
from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.config import RunConfig, WeightLoraMethod, WeightLoraPlusMethod
from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.methods.rank_growth import expand_gaussian, expand_qr, grow_ranks, module_generator, pad_moments
from sparse_llm_ft.phase import CutRule, Phase
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, Shape, with_omega
from sparse_llm_ft.scoring.scores import Scores


class WeightLora:
    """Both variants: what the method's settings class has decides."""

    def __init__(self, config: RunConfig, index: int, total_steps: int) -> None:
        method = config.method[index]
        assert isinstance(method, WeightLoraMethod)
        self.method, self.seed = method, config.seed

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """All n adapters, each with a trained omega that starts at 1."""
        method, n = self.method, len(phase.plan.active)
        if method.keep > n:
            raise ConfigError(
                "method.keep",
                f"{method.keep} is more than the {n} adapters that adapter.target_modules gives",
                f"expected 1 to {n}",
            )
        cut = CutRule(method.keep, method.steps, method.cut_every, method.cut_after, method.choose, self.seed)
        select = replace(
            phase,
            name="select",
            plan=with_omega(phase.plan),
            steps=method.steps,
            cut=cut,
            omega_lr=method.omega_lr,
            omega_algorithm=method.omega_optimizer,
        )
        return select, state

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """Fix omega, disconnect what has omega <= 0, and for WeightLoRA+ grow the survivors' ranks."""
        if phase.cut is None:
            return None
        plan = _disconnect(phase.plan, state)
        state = _only(plan, state)
        if isinstance(self.method, WeightLoraPlusMethod):
            budget = sum(a.matrices(targets[name]) for name, a in phase.plan.active.items())
            plan, state = self._grow(plan, state, targets, budget, self.method.expansion)
        after = replace(
            phase,
            name="train",
            plan=plan,
            steps=None,
            cut=None,
            omega_lr=0.0,
            batch_growth=self.method.batch_growth,
            lr_scaling=self.method.lr_scaling,
        )
        return after, state

    def _grow(
        self, plan: AdapterPlan, state: TrainState, targets: Mapping[str, Shape], budget: int, expansion: str
    ) -> tuple[AdapterPlan, TrainState]:
        shapes = {name: a.shape(targets[name]) for name, a in plan.active.items()}
        ranks = grow_ranks({name: a.r for name, a in plan.active.items()}, shapes, budget)
        expand = expand_qr if expansion == "qr" else expand_gaussian
        modules: dict[str, ModuleAdapter | None] = dict(plan.modules)
        tensors = dict(state.tensors)
        moments = {name: entry for name, entry in state.moments.items() if not _is_matrix(name)}
        for name, adapter in plan.active.items():
            rank, keys = ranks[name], (f"{name}.lora_A", f"{name}.lora_B")
            pair = (tensors[keys[0]], tensors[keys[1]])
            if adapter.r <= min(shapes[name]):  # else a mask left fewer rows or columns than the rank: it stays
                pair = expand(*pair, rank, module_generator(self.seed, name))
            # The scaling lora_alpha / r stays: growing r alone would shrink what the adapter computes.
            modules[name] = replace(adapter, r=rank, lora_alpha=adapter.scaling * rank)
            for key, tensor in zip(keys, pair, strict=True):
                tensors[key] = tensor
                if expansion == "gaussian":  # qr turns the coordinates: old moments would belong to other entries
                    moments[key] = pad_moments(state.moments[key], tensor.shape)
        steps = {g: n for g, n in state.optimizer_steps.items() if expansion == "gaussian" or g != "adapter"}
        return (
            replace(plan, modules=modules),
            replace(state, tensors=tensors, moments=moments, optimizer_steps=steps),
        )


def _disconnect(plan: AdapterPlan, state: TrainState) -> AdapterPlan:
    """Survivors with omega as a constant; None for the rest."""
    modules: dict[str, ModuleAdapter | None] = {}
    for name, adapter in plan.modules.items():
        omega = float(state.tensors[f"{name}.lora_omega"]) if adapter is not None else 0.0
        modules[name] = replace(adapter, omega=omega, train_omega=False) if adapter and omega > 0 else None
    if not any(modules.values()):
        raise TrainingError(
            "every omega is 0 or negative after method.steps: no adapter is left to train; "
            "lower method.omega_lr or raise method.cut_after"
        )
    return replace(plan, modules=modules)


def _only(plan: AdapterPlan, state: TrainState) -> TrainState:
    """The part of the state that lives on: the survivors' A and B, and modules trained whole; no omega."""
    names = [n for n in state.tensors if (not _is_matrix(n) or n.rpartition(".")[0] in plan.active) and not is_omega(n)]
    steps = {group: count for group, count in state.optimizer_steps.items() if group != "omega"}
    return replace(
        state,
        tensors={n: state.tensors[n] for n in names},
        moments={n: state.moments[n] for n in names},
        optimizer_steps=steps,
        callback=None,
    )


def _is_matrix(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))
