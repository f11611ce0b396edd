"""LoRA-drop (Zhou et al., 2024): keep the adapters with large outputs, and let the others share one.

phase "pilot":  LoRA on every target module, n epochs on a stratified sample; then g_i = mean ||delta W_i x_i||²
phase "train":  fresh adapters. Per module type, the layers with the largest shares y_i = g_i / sum(g), until these sum
                to T, have their own; the others share one pair per type and shape (section 3.3)
"""

from __future__ import annotations

import random
from collections.abc import Container, Mapping, Sequence
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
            allows get no adapter, neither their own nor a shared one; of those above, as many keep their own as would
            without a budget, chosen in the same way. A number is a `Budget.step_time`.
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
            self._within_budget(phase.plan, self._importance_of_most(phase.plan)[0], targets)
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
        if not any(scores.values()):
            raise TrainingError(
                "every adapter's output is 0 after the pilot, so none is more important than another: its updates were "
                "skipped; lower training.learning_rate"
            )
        y = importance_by_type(scores, module_kind)
        return self._after(phase, self._within_budget(phase.plan, y, targets)), state.fresh()

    def foresee(self, phase: Phase, targets: Mapping[str, Shape]) -> tuple[Phase, str] | None:
        """As if importance were such that the most modules keep their own adapters."""
        if phase.scoring is None:
            return None
        y, words = self._importance_of_most(phase.plan)
        after = self._after(phase, self._within_budget(phase.plan, y, targets))
        own = sum(adapter.group is None for adapter in after.plan.active.values())
        return after, f"{own} of {len(phase.plan.active)} adapters stay, as if {words}"

    def _importance_of_most(self, plan: AdapterPlan) -> tuple[dict[str, float], str]:
        """Importance with which the most modules keep their own adapters, and in words."""
        types: dict[str, list[str]] = {}
        for name in plan.active:
            types.setdefault(module_kind(name), []).append(name)
        if self.settings.choose == "inverted":  # all but the important ones
            alone = {name: float(name == names[0]) for names in types.values() for name in names}
            return alone, "one of each type were important"
        return {name: 1 / len(names) for names in types.values() for name in names}, "all were equally important"

    def _after(self, phase: Phase, plan: AdapterPlan) -> Phase:
        return replace(
            phase, name="train", plan=plan, steps=None, epochs=None, subset=None, is_warmup=False, scoring=None
        )

    def choose(self, y: Mapping[str, float], among: Container[str] | None = None) -> set[str]:
        """The modules that keep their own adapter: per type as many as importance says, chosen by `choose`.

        Args:
            y: module -> share of the importance of its type.
            among: those that may; None: all. The number does not depend on it, as long as there are so many.
        """
        from sparse_llm_ft.scoring import select_layers

        types: dict[str, list[str]] = {}
        for name in y:
            types.setdefault(module_kind(name), []).append(name)
        kept: set[str] = set()
        for kind, names in types.items():
            count = len(select_layers({name: y[name] for name in names}, self.settings.threshold))
            ranked = [n for n in sorted(names, key=lambda name: -y[name]) if among is None or n in among]
            allowed = [name for name in names if among is None or name in among]
            kept |= set(self._instead(kind, names, allowed, ranked, count))
        return kept

    def _instead(
        self, kind: str, names: Sequence[str], allowed: Sequence[str], ranked: Sequence[str], count: int
    ) -> Sequence[str]:
        """Those of the modules `names` of one type that keep their own adapter: `count`, or all but so many.

        Args:
            allowed, ranked: those of them that may, in the model's order and by falling importance.
        """
        if self.settings.choose == "inverted":
            return ranked[count:]
        if self.settings.choose == "random":  # one order for every budget
            drawn = random.Random(f"{self.inputs.seed} {kind}").sample(list(names), len(names))
            return [name for name in drawn if name in allowed][:count]
        if self.settings.choose == "top":
            return allowed[max(0, len(allowed) - count) :]
        return ranked[:count]

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

    def _within_budget(self, plan: AdapterPlan, y: Mapping[str, float], targets: Mapping[str, Shape]) -> AdapterPlan:
        """The plan after the pilot, with adapters from the lowest layer up from which the budget allows them.

        The lower this layer, the more modules there are to choose from: the importance of those that keep their own
        adapter falls as it rises (cost_choice.py), and so do cost and memory.

        Args:
            y: module -> importance, as `choose` takes it.
        """
        budget, cost = self.settings.budget, self.inputs.cost
        if budget is None:
            return self._shared(plan, self.choose(y), targets)
        assert cost is not None, "a run's context knows its base"
        whole, planned = cost.of(plan, targets), self.inputs.memory
        plans: dict[int, AdapterPlan] = {}
        for layer in sorted({cost.depths[name] for name in plan.active}):
            upper = {name: a if a and cost.depths[name] >= layer else None for name, a in plan.modules.items()}
            kept = self.choose(y, among=[name for name, adapter in upper.items() if adapter is not None])
            if kept or self.settings.share or not plans:
                plans[layer] = self._shared(replace(plan, modules=upper), kept, targets)
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
