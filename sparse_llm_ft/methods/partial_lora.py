"""Partial-LoRA (Damirchi et al., 2024): delta W = (u_row · B)(u_col · A) with masks u drawn by derived ratios (eq. 6).

phase "head":    only where a classification head is fresh and importance or accuracy needs one: the head alone, on D_t
phase "derive":  no step; importance of rows and columns, and Algorithm 1, on D_t
phase "train":   the unmasked entries of A and B
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt

from sparse_llm_ft.config.derivation import DerivationSettings, ForwardPasses
from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.config.types import FilePath, Float, Share
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.adalora import AdaLoraSchedule, adalora_plan
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.methods.peft_baselines import check_dora
from sparse_llm_ft.phase import Phase, ScoringSpec, Subset
from sparse_llm_ft.plan import AdapterPlan, Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.config import RunConfig
    from sparse_llm_ft.scoring import Derivation
    from sparse_llm_ft.scoring.scores import Scores


class MaskSettings(ForwardPasses, MethodSettings):
    """What a method needs that measures the base before it draws masks.

    Attributes:
        head_epochs, head_learning_rate: passes over D_t that a fresh classification head is fitted for, alone, before
            the measurement, and their learning rate.
        cache_dir: where measurements are kept, by content; null: the user's cache folder.
    """

    composes = "masks"
    free = frozenset({"cache_dir", "micro_batch_size"})

    head_epochs: Float = Field(20.0, gt=0)
    head_learning_rate: Float = Field(0.01, gt=0)
    cache_dir: FilePath | None = None


class PartialLoraSettings(DerivationSettings, MaskSettings):
    """Random row and column masks, whose ratios are derived from the base as `DerivationSettings` say.

    Attributes:
        shots: samples per class in D_t, the few-shot set that ratios are derived from.
        sample_fraction: a share of the training set instead, stratified.
        selection: ``random`` draws each index with its ratio; ``targeted`` takes the most important ones;
            ``inverted`` their complement; ``stochastic`` samples by softmax(importance / temperature).
        ratios: ``derived`` (Algorithm 1); ``balanced``, `ratio` everywhere; ``pyramidal``, ratio to the power of the
            layer's depth; or a JSON or YAML file with a ratio per module.
        ratio: kept share of rows and of columns under ``balanced`` and ``pyramidal``.
        compare_importance: also measure the two other importances, for the report's picture of their overlap.
        base: ``adalora`` masks AdaLoRA instead (Partial-AdaLoRA), with the settings `adalora`; ``dora`` DoRA.
        masking: where masks live: in the sharded ``optimizer``, around whole layers of any tuner; or ``compact``, in
            layers of this package whose A and B are physically smaller, which is faster.
    """

    DEFAULT_SHOTS: ClassVar[int] = 16

    shots: StrictInt | None = Field(None, ge=1)
    sample_fraction: Share | None = None
    selection: Literal["random", "targeted", "inverted", "stochastic"] = "random"
    temperature: Float = Field(1.0, gt=0)
    ratios: FilePath = "derived"
    ratio: Float | None = Field(None, ge=0, le=1)
    compare_importance: StrictBool = False
    base: Literal["lora", "adalora", "dora"] = "lora"
    adalora: AdaLoraSchedule = AdaLoraSchedule()
    masking: Literal["optimizer", "compact"] = "optimizer"

    @property
    def derivation(self) -> DerivationSettings:
        """The settings that the derivation reads."""
        return DerivationSettings.model_validate({key: getattr(self, key) for key in DerivationSettings.model_fields})

    @property
    def derives(self) -> bool:
        """Whether ratios come from Algorithm 1."""
        return self.ratios == "derived"

    @property
    def ranks(self) -> bool:
        """Whether importance is needed at all."""
        return self.derives or self.selection != "random"

    @property
    def draws_samples(self) -> bool:
        """Whether there is a D_t."""
        return self.ranks

    @property
    def alone(self) -> str | None:
        """PEFT's own layers compose with nothing."""
        return None if self.base == "lora" else f"with base: {self.base} trains PEFT's own layers"

    def check(self, total_steps: int | None) -> None:
        """Settings that exclude or need each other."""
        if self.shots is not None and self.sample_fraction is not None:
            raise ConfigError("method.shots", "given beside method.sample_fraction", "expected one of them")
        needs = self.ratios in ("balanced", "pyramidal")
        if needs and self.ratio is None:
            raise ConfigError("method.ratio", f"not given, and ratios is {self.ratios}", "expected 0 to 1")
        if not needs and self.ratio is not None:
            raise ConfigError(
                "method.ratio", f"has no effect under ratios {self.ratios!r}", "expected ratios: balanced"
            )
        if not needs and not self.derives and not Path(self.ratios).is_file():
            raise ConfigError(
                "method.ratios",
                f"{self.ratios!r} is no file",
                "expected derived, balanced, pyramidal, or a JSON or YAML file",
            )
        if self.adalora != AdaLoraSchedule() and self.base != "adalora":
            raise ConfigError("method.adalora", "has no effect under base lora", "expected base: adalora")
        if self.base == "adalora":
            self.adalora.check(total_steps)
        if self.base != "lora" and self.masking == "compact":
            raise ConfigError(
                "method.masking", f"compact, and PEFT's {self.base} has whole layers", "expected optimizer"
            )

    def check_run(self, config: RunConfig) -> None:
        """Refuse what the masked tuner excludes."""
        if self.base == "dora":
            check_dora(config)
        if self.base == "adalora":
            self.adalora.check_run(config)


class PartialLora(Method[PartialLoraSettings]):
    """Every selection and every rule for ratios."""

    settings_class: ClassVar[type[MethodSettings]] = PartialLoraSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """Measure first, where masks need it."""
        settings, plan = self.settings, phase.plan
        if not settings.ranks:
            return self._masked(phase, plan, state, None, targets)
        shots = settings.shots if settings.sample_fraction else settings.shots or settings.DEFAULT_SHOTS
        measuring = replace(
            phase,
            subset=Subset(settings.sample_fraction, shots, self.inputs.seed),
            scoring=ScoringSpec(
                "derivation",
                settings.derivation,
                search=settings.derives,
                compare=settings.compare_importance,
                cache_dir=settings.cache_dir,
            ),
        )
        needs_head = bool(plan.trained) and not state.tensors and (settings.derives or settings.importance != "svd")
        if not needs_head:
            return replace(measuring, name="derive", steps=0), state
        fit = replace(
            measuring,
            name="head",
            plan=replace(plan, modules=dict.fromkeys(plan.modules)),
            target_plan=plan,
            epochs=settings.head_epochs,
            learning_rate=settings.head_learning_rate,
            is_warmup=True,
        )
        return fit, state

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """Draw the masks and cut the plan, and what was trained before, down to them."""
        from sparse_llm_ft.scoring import Derivation

        if phase.scoring is None:
            return None
        assert isinstance(scores, Derivation)
        after = replace(phase, name="train", steps=None, epochs=None, subset=None, is_warmup=False, scoring=None)
        after = replace(after, learning_rate=None, target_plan=None)
        if phase.target_plan is None:
            return self._masked(after, phase.plan, state, scores, targets)
        # The head was fitted to measure the base with; the run itself starts from a fresh one, as any method's does.
        return self._masked(after, phase.target_plan, state.fresh(), scores, targets)

    def resumed(self, phase: Phase) -> Phase:
        """The phase, measured with the micro-batch and the cache that are set now."""
        if phase.scoring is None:
            return phase
        derivation = phase.scoring.derivation.model_copy(update={"micro_batch_size": self.settings.micro_batch_size})
        scoring = replace(phase.scoring, derivation=derivation, cache_dir=self.settings.cache_dir)
        return replace(phase, scoring=scoring)

    def _masked(
        self,
        phase: Phase,
        plan: AdapterPlan,
        state: TrainState,
        scores: Derivation | None,
        targets: Mapping[str, Shape],
    ) -> tuple[Phase, TrainState]:
        from sparse_llm_ft.methods.masking import cut_state, masked_plan
        from sparse_llm_ft.scoring import preserve_flow

        settings, inputs = self.settings, self.inputs
        importance = None if scores is None else scores.importance
        if importance is not None and settings.flow_preservation:
            importance = preserve_flow(importance)
        ratios = self._ratios(list(plan.active), scores)
        masked = masked_plan(plan, targets, ratios, importance, settings.selection, settings.temperature, inputs.seed)
        masked = replace(masked, masking=settings.masking)
        if settings.base == "dora":
            masked = replace(masked, tuner="dora")
        if settings.base == "adalora":
            # AdaLoRA's matrices are other ones than those that may have been trained.
            return replace(phase, plan=adalora_plan(masked, settings.adalora, inputs)), state.fresh()
        return replace(phase, plan=masked), cut_state(state, masked)

    def _ratios(self, names: list[str], scores: Derivation | None) -> Mapping[str, tuple[float, float]]:
        from sparse_llm_ft.scoring import balanced, pyramidal, ratios_from_file

        settings = self.settings
        if settings.derives:
            assert scores is not None
            return scores.ratios
        if settings.ratios == "balanced":
            return balanced(names, float(settings.ratio or 0.0))
        if settings.ratios == "pyramidal":
            return pyramidal(names, float(settings.ratio or 0.0))
        return ratios_from_file(settings.ratios, names)
