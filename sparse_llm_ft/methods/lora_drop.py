"""LoRA-drop (Zhou et al., 2024): keep the adapters whose output matters, let the others share one.

phase "pilot":  LoRA on every target module, n epochs on a stratified sample; then g_i = mean ||delta W_i x_i||²
phase "train":  fresh adapters; per module type the layers with the largest shares y_i = g_i / sum(g), until they sum
                to T, have their own, the others share one pair per type and shape (section 3.3)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.config import LoraDropMethod, RunConfig
from sparse_llm_ft.phase import Phase, ScoringSpec, Subset
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, Shape, group_name, module_kind
from sparse_llm_ft.scoring import importance_by_type, select_layers
from sparse_llm_ft.scoring.scores import Scores


class LoraDrop:
    """The paper's method and its ablations."""

    def __init__(self, config: RunConfig, index: int, total_steps: int) -> None:
        method = config.method[index]
        assert isinstance(method, LoraDropMethod)
        self.method, self.seed = method, config.seed

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The pilot: the incoming plan on the sample."""
        method = self.method
        pilot = replace(
            phase,
            name="pilot",
            epochs=method.pilot_epochs,
            subset=Subset(method.sample_fraction, None, self.seed),
            is_warmup=True,
            scoring=ScoringSpec("lora_output"),
        )
        return pilot, state

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """Own adapters for the chosen layers, shared ones or none for the others; all of them fresh."""
        if phase.scoring is None:
            return None
        assert isinstance(scores, dict)
        kept = self.choose(importance_by_type(scores, module_kind))
        plan = self._shared(phase.plan, kept, targets)
        after = replace(
            phase, name="train", plan=plan, steps=None, epochs=None, subset=None, is_warmup=False, scoring=None
        )
        return after, state.fresh()

    def choose(self, y: Mapping[str, float]) -> set[str]:
        """The modules that keep an adapter of their own: per type as many as importance says, chosen by `choose`."""
        types: dict[str, list[str]] = {}
        for name in y:
            types.setdefault(module_kind(name), []).append(name)
        kept: set[str] = set()
        for kind, names in types.items():
            important = select_layers({name: y[name] for name in names}, self.method.threshold)
            kept |= set(self._instead(kind, names, important, y))
        return kept

    def _instead(self, kind: str, names: Sequence[str], important: Sequence[str], y: Mapping[str, float]) -> list[str]:
        k = len(important)
        if self.method.choose == "inverted":
            return sorted(names, key=lambda name: y[name])[:k]
        if self.method.choose == "random":
            return random.Random(f"{self.seed} {kind}").sample(list(names), k)
        if self.method.choose == "top":
            return list(names[len(names) - k :])
        return list(important)

    def _shared(self, plan: AdapterPlan, kept: set[str], targets: Mapping[str, Shape]) -> AdapterPlan:
        modules: dict[str, ModuleAdapter | None] = dict(plan.modules)
        for name, adapter in plan.active.items():
            if name not in kept:
                group = group_name(module_kind(name), targets[name])
                modules[name] = replace(adapter, group=group) if self.method.share else None
        return replace(plan, modules=modules)
