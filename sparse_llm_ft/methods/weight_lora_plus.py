"""WeightLoRA+ (Veprikov et al., section 3.4): WeightLoRA whose survivors' ranks grow into the freed parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from sparse_llm_ft.methods.weight_lora import WeightLora, WeightLoraSettings
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, Shape, is_matrix

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState


class WeightLoraPlusSettings(WeightLoraSettings):
    """WeightLoRA's settings, and how ranks grow.

    Attributes:
        expansion: ``gaussian`` adds random rows to A and zero columns to B; ``qr`` orthonormalises A first.
    """

    expansion: Literal["qr", "gaussian"] = "qr"


class WeightLoraPlus(WeightLora):
    """WeightLoRA whose ranks grow into the parameter budget of all adapters."""

    settings_class = WeightLoraPlusSettings
    settings: WeightLoraPlusSettings

    def grown(
        self, plan: AdapterPlan, state: TrainState, targets: Mapping[str, Shape], budget: int
    ) -> tuple[AdapterPlan, TrainState]:
        """The survivors with larger ranks and the same output. ``qr`` drops the moments of A and B."""
        from sparse_llm_ft.methods import rank_growth

        expansion = self.settings.expansion
        shapes = {name: a.shape(targets[name]) for name, a in plan.active.items()}
        ranks = rank_growth.grow_ranks({name: a.r for name, a in plan.active.items()}, shapes, budget)
        expand = rank_growth.expand_qr if expansion == "qr" else rank_growth.expand_gaussian
        modules: dict[str, ModuleAdapter | None] = dict(plan.modules)
        tensors = dict(state.tensors)
        moments = {name: entry for name, entry in state.moments.items() if not is_matrix(name)}
        for name, adapter in plan.active.items():
            rank, keys = ranks[name], (f"{name}.lora_A", f"{name}.lora_B")
            pair = (tensors[keys[0]], tensors[keys[1]])
            if adapter.r <= min(shapes[name]):  # else a mask left fewer rows or columns than the rank, which stays
                pair = expand(*pair, rank, rank_growth.module_generator(self.inputs.seed, name))
            # The scaling lora_alpha / r stays: growing r alone would shrink what the adapter computes.
            modules[name] = replace(adapter, r=rank, lora_alpha=adapter.scaling * rank)
            for key, tensor in zip(keys, pair, strict=True):
                tensors[key] = tensor
                if expansion == "gaussian":  # qr changes the basis: old moments would belong to other entries
                    moments[key] = rank_growth.pad_moments(state.moments[key], tensor.shape)
        steps = {g: n for g, n in state.optimizer_steps.items() if expansion == "gaussian" or g != "adapter"}
        return (
            replace(plan, modules=modules),
            replace(state, tensors=tensors, moments=moments, optimizer_steps=steps),
        )
