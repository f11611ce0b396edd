"""WeightLoRA+ (Veprikov et al., section 3.4): WeightLoRA whose survivors' ranks grow into the freed parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, StrictInt

from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.weight_lora import WeightLora, WeightLoraSettings
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import MAX_RANK, AdapterPlan, ModuleAdapter, Shape, is_matrix
from sparse_llm_ft.serving.ranks import LARGEST_RANK

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.config.schema import RunConfig


class WeightLoraPlusSettings(WeightLoraSettings):
    """WeightLoRA's settings, and how ranks grow.

    Attributes:
        expansion: ``gaussian`` adds random rows to A and zero columns to B; ``qr`` orthonormalises A first.
        max_rank: no rank grows beyond it, and what the budget would allow is left over. The default is the largest rank
            that servers of adapters take.
    """

    expansion: Literal["qr", "gaussian"] = "qr"
    max_rank: StrictInt = Field(LARGEST_RANK, ge=1, le=MAX_RANK)

    def check_run(self, config: RunConfig) -> None:
        """Refuse a `max_rank` below the rank that adapters begin with; the default only keeps them from growing."""
        super().check_run(config)
        if self.max_rank < min(config.adapter.r, LARGEST_RANK):
            raise ConfigError(
                "method.max_rank",
                f"{self.max_rank} is less than adapter.r ({config.adapter.r}), with which the adapters begin",
                f"expected {config.adapter.r} or more",
            )


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
        ranks = self.grown_ranks(plan, targets, budget)
        modules: dict[str, ModuleAdapter | None] = dict(plan.modules)
        tensors = dict(state.tensors)
        moments = {name: entry for name, entry in state.moments.items() if not is_matrix(name)}
        for name, adapter in plan.active.items():
            rank, keys = ranks[name], (f"{name}.lora_A", f"{name}.lora_B")
            pair = (tensors[keys[0]], tensors[keys[1]])
            if adapter.r <= min(shapes[name]):  # else a mask left fewer rows or columns than the rank, which stays
                generator = rank_growth.module_generator(self.inputs.seed, name)
                if expansion == "qr":
                    pair = rank_growth.expand_qr(*pair, rank, generator)
                else:
                    pair = rank_growth.expand_gaussian(*pair, rank, generator, targets[name][1])
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

    def grown_ranks(self, plan: AdapterPlan, targets: Mapping[str, Shape], budget: int) -> dict[str, int]:
        """The largest ranks within the budget, see `rank_growth.grow_ranks`."""
        from sparse_llm_ft.methods import rank_growth

        shapes = {name: a.shape(targets[name]) for name, a in plan.active.items()}
        before = {name: a.r for name, a in plan.active.items()}
        return rank_growth.grow_ranks(before, shapes, budget, self.settings.max_rank)

    def survivors_work(self, works: Mapping[str, float], stay: Sequence[bool]) -> float:
        """That of all adapters, into whose parameters the survivors' ranks grow."""
        return sum(works.values())

    def remark(self, before: Phase, after: Phase, targets: Mapping[str, Shape]) -> str | None:
        """As WeightLoRA's, and what `max_rank` leaves of the budget."""
        from sparse_llm_ft.methods import rank_growth

        if before.cut is None:
            return None
        lowest = super().remark(before, after, targets)
        budget = sum(a.matrices(targets[name]) for name, a in before.plan.active.items())
        grown = (after.target_plan or after.plan).active  # a method after this one may add masks, but changes no rank
        ranks = {name: a.r for name, a in grown.items()}
        shapes = {name: before.plan.active[name].shape(targets[name]) for name in ranks}
        left = rank_growth.left_over(ranks, shapes, budget, self.settings.max_rank)
        limit = self.settings.max_rank
        line = f"ranks stop at method.max_rank {limit}: {left:,} of the budget's {budget:,} parameters are left over"
        return "; ".join(filter(None, [lowest, line if left else None])) or None
