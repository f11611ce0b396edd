"""LoRA-drop (Zhou et al., 2024): keep the adapters with large outputs, and let the others share one.

phase "pilot":  LoRA on every target module, n epochs on a stratified sample; then g_i = mean ||delta W_i x_i||²
phase "train":  fresh adapters. Per module type, the layers with the largest shares y_i = g_i / sum(g), until these sum
                to T, have their own; the others share one pair per type and shape (section 3.3)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, StrictBool

from sparse_llm_ft.config.budget import GivenBudget
from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.config.types import Float, Share
from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.methods.cost_choice import lowest_within
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.phase import Phase, ScoringSpec, Subset
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, Shape, group_name, module_kind

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.scoring.scores import Scores


class LoraDropSettings(MethodSettings):
    """A pilot scores every layer's LoRA output; unimportant layers share one LoRA.

    Attributes:
        sample_fraction: alpha, the stratified share of the training set on which the pilot trains and is scored.
        pilot_epochs: n, passes of the pilot over the sample.
        threshold: T; each module type keeps its most important layers until their shares sum to T.
        share: whether the others share one LoRA per type and shape; false removes them.
        choose: which layers keep their own (section 4.4): the k of highest ``importance``; k ``random`` ones; the k
            ``top`` layers; or ``inverted``, all but the k important ones, which share instead.
        budget: what the phase after the pilot may need (ours, cost_choice.py): modules below the lowest layer that it
            allows get no adapter, neither their own nor a shared one. A number is a `Budget.step_time`.
    """

    composes = "shares"

    sample_fraction: Share = 0.1
    pilot_epochs: Float = Field(3.0, gt=0)
    threshold: Share = 0.9
    share: StrictBool = True
    choose: Literal["importance", "inverted", "random", "top"] = "importance"
    budget: GivenBudget = None

    @property
    def memory_budget(self) -> int | None:
        """Of `budget`."""
        return None if self.budget is None else self.budget.memory

    @property
    def draws_samples(self) -> bool:
        """True, because the pilot's sample is stratified."""
        return True


class LoraDrop(Method[LoraDropSettings]):
    """The paper's method and its ablations."""

    settings_class = LoraDropSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The pilot: the incoming plan on the sample."""
        settings = self.settings
        if settings.budget is not None:  # refuse at once what no layer is within
            self._within_budget(phase.plan, set(phase.plan.active), targets)
        pilot = replace(
            phase,
            name="pilot",
            epochs=settings.pilot_epochs,
            subset=Subset(settings.sample_fraction, None, self.inputs.seed),
            is_warmup=True,
            scoring=ScoringSpec("lora_output"),
        )
        return pilot, state

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """Fresh adapters: own ones for the chosen layers, shared ones or none for the others."""
        from sparse_llm_ft.scoring import importance_by_type

        if phase.scoring is None:
            return None
        assert isinstance(scores, dict)
        kept = self.choose(importance_by_type(scores, module_kind))
        return self._after(phase, self._within_budget(phase.plan, kept, targets)), state.fresh()

    def foresee(self, phase: Phase, targets: Mapping[str, Shape]) -> tuple[Phase, str] | None:
        """As if all layers were equally important: then the most of them keep their own adapters."""
        if phase.scoring is None:
            return None
        types: dict[str, int] = {}
        for name in phase.plan.active:
            types[module_kind(name)] = types.get(module_kind(name), 0) + 1
        kept = self.choose({name: 1 / types[module_kind(name)] for name in phase.plan.active})
        after = self._after(phase, self._within_budget(phase.plan, kept, targets))
        return after, f"{len(kept)} of {len(phase.plan.active)} adapters stay, as if all were equally important"

    def _after(self, phase: Phase, plan: AdapterPlan) -> Phase:
        return replace(
            phase, name="train", plan=plan, steps=None, epochs=None, subset=None, is_warmup=False, scoring=None
        )

    def choose(self, y: Mapping[str, float]) -> set[str]:
        """The modules that keep their own adapter: per type as many as importance says, chosen by `choose`."""
        from sparse_llm_ft.scoring import select_layers

        types: dict[str, list[str]] = {}
        for name in y:
            types.setdefault(module_kind(name), []).append(name)
        kept: set[str] = set()
        for kind, names in types.items():
            important = select_layers({name: y[name] for name in names}, self.settings.threshold)
            kept |= set(self._instead(kind, names, important))
        return kept

    def _instead(self, kind: str, names: Sequence[str], important: Sequence[str]) -> list[str]:
        k = len(important)
        if self.settings.choose == "inverted":
            return [name for name in names if name not in important]
        if self.settings.choose == "random":
            return random.Random(f"{self.inputs.seed} {kind}").sample(list(names), k)
        if self.settings.choose == "top":
            return list(names[len(names) - k :])
        return list(important)

    def remark(self, before: Phase, after: Phase, targets: Mapping[str, Shape]) -> str | None:
        """Under a budget: from where on there are adapters, and what a step then costs."""
        cost = self.inputs.cost
        if self.settings.budget is None or before.scoring is None or cost is None:
            return None
        plan = after.target_plan or after.plan
        share = cost.of(plan, targets) / cost.of(before.plan, targets)
        return (
            f"method.budget {self.settings.budget}: adapters from {cost.layer(cost.lowest(plan.active))} up; a step "
            f"costs {share:.3f} of one with all adapters, by arithmetic"
        )

    def _within_budget(self, plan: AdapterPlan, kept: set[str], targets: Mapping[str, Shape]) -> AdapterPlan:
        """`_shared`, with adapters from the lowest layer up from which the budget allows them."""
        budget, cost = self.settings.budget, self.inputs.cost
        if budget is None or not (kept or self.settings.share):
            return self._shared(plan, kept, targets)
        assert cost is not None, "a run's context knows its base"
        whole, planned = cost.of(plan, targets), self.inputs.memory

        def from_layer(layer: int) -> AdapterPlan:
            upper = {name: a if a and cost.depths[name] >= layer else None for name, a in plan.modules.items()}
            return self._shared(replace(plan, modules=upper), kept, targets)

        layers = {cost.depths[name] for name in (kept if not self.settings.share else plan.active)}
        plans = {layer: from_layer(layer) for layer in layers}
        shares = {layer: cost.of(found, targets) / whole for layer, found in plans.items()}
        lowest = lowest_within(shares, budget, None if planned is None else lambda layer: planned(plans[layer]))
        if lowest is None:
            top = max(shares)
            needs = "" if planned is None else f" and {planned(plans[top]) / 2**30:.3g}GiB"
            raise ConfigError(
                "method.budget",
                f"{budget}, but a step with adapters in {cost.layer(top)} alone costs {shares[top]:.3f} of one with "
                f"all adapters{needs}, as planned",
                "expected more, or a smaller training.micro_batch_size",
            )
        return plans[lowest]

    def _shared(self, plan: AdapterPlan, kept: set[str], targets: Mapping[str, Shape]) -> AdapterPlan:
        """The plan in which all modules but the `kept` ones share, or are left without adapter."""
        if not kept and not self.settings.share:
            raise TrainingError(
                f"every layer is among the important ones at method.threshold {self.settings.threshold:g}, so inverted "
                "keeps none and none shares; lower method.threshold, or set method.share=true"
            )
        modules: dict[str, ModuleAdapter | None] = dict(plan.modules)
        for name, adapter in plan.active.items():
            if name not in kept:
                group = group_name(module_kind(name), targets[name])
                modules[name] = replace(adapter, group=group) if self.settings.share else None
        return replace(plan, modules=modules)
