"""Partial-LoRA (Damirchi et al., 2024): delta W = (u_row · B)(u_col · A) with masks u drawn by derived ratios (eq. 6).

phase "head":    only if a fresh classification head is needed for importance or accuracy: fits the head alone, on half
                 of D_t; importance and the derivation then take the other half
phase "derive":  takes no step; computes importance of rows and columns, and derives ratios, on D_t
phase "train":   trains the unmasked entries of A and B
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, StrictInt

from sparse_llm_ft.config.derivation import DerivationSettings, ForwardPasses
from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.config.types import ExpandedPath, Float, Share, expand_path, expand_variables, is_file
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_json, read_yaml
from sparse_llm_ft.methods.adalora import AdaLoraSchedule, adalora_plan
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.methods.peft_baselines import check_dora
from sparse_llm_ft.phase import Phase, ScoringSpec, Subset
from sparse_llm_ft.plan import AdapterPlan, Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.config import RunConfig
    from sparse_llm_ft.scoring import Derivation, Importance
    from sparse_llm_ft.scoring.masks import Selection
    from sparse_llm_ft.scoring.scores import Scores


class MaskSettings(ForwardPasses, MethodSettings):
    """Settings of methods that score the base before they draw masks.

    Attributes:
        head_epochs, head_learning_rate: passes over half of D_t, and their learning rate, in which a fresh
            classification head is fitted alone before the base is scored on the other half. Accuracy on samples that
            the head has seen would say little about the base.
        cache_dir: folder of cached derivations; null: the user's cache folder.
    """

    composes = "masks"
    free = frozenset({"cache_dir", "micro_batch_size"})

    head_epochs: Float = Field(20.0, gt=0)
    head_learning_rate: Float = Field(0.01, gt=0)
    cache_dir: ExpandedPath | None = None


def _is_table(ratios: str) -> bool:
    return ratios.startswith("{")


def _path_or_table(ratios: str) -> str:
    return ratios if _is_table(ratios) else expand_path(expand_variables(ratios))


def read_table(ratios: str) -> Mapping[str, object]:
    """The table in a JSON or YAML file, or in a JSON text.

    Raises:
        ConfigError: it cannot be read.
    """
    try:  # JSON is YAML
        table = parse_json(ratios, constants=True) if _is_table(ratios) else read_yaml(Path(ratios))
    except OSError as error:
        raise ConfigError(
            "method.ratios", f"{ratios!r} cannot be read ({error.strerror})", "name a file that can"
        ) from None
    except ParseError as error:
        raise ConfigError(
            "method.ratios", f"{ratios!r:.200} is not YAML or JSON ({error})", "correct the file"
        ) from None
    if not isinstance(table, dict) or not table:
        raise ConfigError(
            "method.ratios", f"{ratios!r:.200} is not a table", "expected module: p or module: [p_row, p_col]"
        )
    return table


class PartialLoraSettings(DerivationSettings, MaskSettings):
    """Random row and column masks with ratios derived from the base (`DerivationSettings`).

    Attributes:
        shots: samples per class in D_t, the few-shot set from which ratios are derived.
        sample_fraction: in place of `shots`, a stratified share of the training set. With neither, D_t is 2 % of a
            small GLUE set, 5 % of a large one, and 16 samples per class of other tasks; 200 samples at least.
        selection: ``random`` draws each index with its ratio; ``targeted`` takes the most important ones;
            ``inverted`` their complement; ``stochastic`` samples by softmax(importance / temperature).
        ratios: ``derived`` (`derivation`); ``balanced``, `ratio` everywhere; ``pyramidal``, `ratio` to the power of the
            layer's depth; or a JSON or YAML file with a ratio per module, in whose place config.yaml has its table.
        ratio: kept share of rows and columns under ``balanced`` and ``pyramidal``. Under ``derived`` (ours): the share
            of LoRA's values that is trained. Derived ratios are multiplied by one factor to give it: the derivation
            says where to keep more, and this how much.
        min_ratio: the smallest share that a module keeps, of rows and of columns (ours); smaller ratios are raised.
        mask_scaling: divide each adapter's output by the square root of its kept share of columns (ours). A keeps the
            variance of a full-width LoRA's, so without it A x has that much less.
        compare_importance: also compute the other two importances, for the report's figure of their overlap.
        base: ``adalora`` masks AdaLoRA instead (Partial-AdaLoRA), with the settings `adalora`; ``dora`` masks DoRA.
        masking: where masks are applied: in the sharded ``optimizer``, with full layers of any tuner; or ``compact``,
            in this package's layers, whose A and B are physically smaller and faster.
    """

    shots: StrictInt | None = Field(None, ge=1)
    sample_fraction: Share | None = None
    selection: Literal["random", "targeted", "inverted", "stochastic"] = "random"
    temperature: Float = Field(1.0, gt=0)
    ratios: Annotated[str, AfterValidator(_path_or_table)] = "derived"
    ratio: Float | None = Field(None, ge=0, le=1)
    min_ratio: Annotated[Float, Field(ge=0, le=1)] = 0.0
    mask_scaling: StrictBool = False
    compare_importance: StrictBool = False
    base: Literal["lora", "adalora", "dora"] = "lora"
    adalora: AdaLoraSchedule = AdaLoraSchedule()
    masking: Literal["optimizer", "compact"] = "optimizer"

    @property
    def derivation_settings(self) -> DerivationSettings:
        """Those of the settings that a derivation reads."""
        return DerivationSettings.model_validate({key: getattr(self, key) for key in DerivationSettings.model_fields})

    @property
    def derives(self) -> bool:
        """Whether ratios are derived from the model."""
        return self.ratios == "derived"

    @property
    def ranks(self) -> bool:
        """Whether importance is needed."""
        return self.derives or self.selection != "random"

    @property
    def draws_samples(self) -> bool:
        """Whether D_t is needed."""
        return self.ranks

    @property
    def alone(self) -> str | None:
        """Why it composes with no other method, if so: PEFT's own layers do not."""
        return None if self.base == "lora" else f"with base: {self.base} trains PEFT's own layers"

    def check(self, total_steps: int | None) -> None:
        """Refuse settings that contradict each other."""
        if self.shots is not None and self.sample_fraction is not None:
            raise ConfigError("method.shots", "given together with method.sample_fraction", "expected one of them")
        needs = self.ratios in ("balanced", "pyramidal")
        if needs and self.ratio is None:
            raise ConfigError("method.ratio", f"not given, and ratios is {self.ratios}", "expected 0 to 1")
        if not needs and not self.derives and self.ratio is not None:
            raise ConfigError("method.ratio", "has no effect on ratios from a file", "expected ratios: balanced")
        if not needs and not self.derives and not _is_table(self.ratios) and not is_file(self.ratios):
            raise ConfigError(
                "method.ratios",
                f"{self.ratios!r} is not a file",
                "expected derived, balanced, pyramidal, or a JSON or YAML file",
            )
        self._check_without_effect()
        if self.min_ratio and self.ratios == "balanced":
            raise ConfigError("method.min_ratio", "has no effect under ratios 'balanced'", "expected method.ratio")
        if self.mask_scaling and self.base == "adalora":
            raise ConfigError(
                "method.mask_scaling", "true, and AdaLoRA has one scaling for all", "expected base: lora or dora"
            )
        if self.adalora != AdaLoraSchedule() and self.base != "adalora":
            raise ConfigError("method.adalora", "has no effect under base lora", "expected base: adalora")
        if self.base == "adalora":
            self.adalora.check(total_steps)
        if self.base != "lora" and self.masking == "compact":
            raise ConfigError(
                "method.masking", f"compact, and PEFT's {self.base} has full layers", "expected optimizer"
            )

    def _check_without_effect(self) -> None:
        """Refuse what would change nothing: a way of deriving given ratios, or of ranking for a random choice."""
        given = f"ratios {self.ratios!r:.40}"
        idle: dict[str, str] = {}
        if self.selection != "stochastic":
            idle["temperature"] = f"selection {self.selection}"
        if not self.derives:
            idle["compare_importance"] = given
        if not self.ranks:
            idle |= dict.fromkeys(("importance", "flow_preservation"), f"{given} and selection random")
        for key, why in idle.items():
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                raise ConfigError(f"method.{key}", f"{value!r} has no effect under {why}", "expected to leave it out")

    def with_files(self) -> Self:
        """With the table of ratios in place of its file."""
        if self.ratios in ("derived", "balanced", "pyramidal"):
            return self
        return self.model_copy(update={"ratios": json.dumps(read_table(self.ratios))})

    def check_run(self, config: RunConfig) -> None:
        """Refuse settings that the masked tuner excludes."""
        if self.base == "dora":
            check_dora(config)
        if self.base == "adalora":
            self.adalora.check_run(config)


class PartialLora(Method[PartialLoraSettings]):
    """Draws masks by any selection from any ratios."""

    settings_class: ClassVar[type[MethodSettings]] = PartialLoraSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The phase that derives, or fits a head first, if masks need it; else the masked plan."""
        settings, plan = self.settings, phase.plan
        if not settings.ranks:
            return self._masked(phase, plan, state, None, targets)
        # Masks need scores: take them on D_t.
        measuring = replace(
            phase,
            subset=Subset(settings.sample_fraction, settings.shots, self.inputs.seed),
            scoring=ScoringSpec(
                "derivation",
                settings.derivation_settings,
                search=settings.derives,
                compare=settings.compare_importance,
                cache_dir=settings.cache_dir,
            ),
        )
        # A fresh head must be fitted first, unless importance does not need one.
        from sparse_llm_ft.model.architecture import HEAD_NAMES

        has_head = any(name.partition(".")[0] in HEAD_NAMES for name in plan.trained)
        needs_head = has_head and not state.tensors and (settings.derives or settings.importance != "svd")
        if not needs_head:
            return replace(measuring, name="derive", steps=0), state
        assert measuring.subset is not None
        if settings.shots == 1:
            raise ConfigError(
                "method.shots",
                "1, and a fresh head is fitted on half of the samples of each class",
                "expected 2 or more, or method.sample_fraction",
            )
        fit = replace(
            measuring,
            name="head",
            subset=replace(measuring.subset, part="half"),
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
        """The plan with masks, and the trained tensors reduced to them."""
        from sparse_llm_ft.scoring import Derivation

        if phase.scoring is None:
            return None
        assert isinstance(scores, Derivation)
        after = self._after(phase)
        if phase.target_plan is None:
            return self._masked(after, phase.plan, state, scores, targets)
        # The head was fitted only for the scores; the run itself starts from a fresh one, as with any method.
        return self._masked(after, phase.target_plan, state.fresh(), scores, targets)

    def foresee(self, phase: Phase, targets: Mapping[str, Shape]) -> tuple[Phase, str] | None:
        """The masks of a derivation that is in the cache; else such that keep as much as one may: everything, or what
        `ratio` leaves of it.
        """
        if phase.scoring is None:
            return None
        settings, plan = self.settings, phase.target_plan or phase.plan
        names = list(plan.active)
        known = None if self.inputs.derived is None else self.inputs.derived(phase)
        if known is not None:
            after, _ = self._drawn(self._after(phase), plan, known, targets)
            return after, "every module keeps what the derivation in the cache says"
        if not settings.derives:
            ratios, words = self._ratios(names, None, targets), "every module keeps what its given ratio says"
        else:
            share = 1.0 if settings.ratio is None else max(settings.ratio, settings.min_ratio)
            ratios = dict.fromkeys(names, (share, share))
            words = f"every module keeps {share:g} of its rows and columns"
            words += " (method.ratio)" if settings.ratio is not None else ", the most that a derivation can leave"
        # Which rows and columns these are does not matter, only how many.
        after, _ = self._with_masks(self._after(phase), plan, ratios, None, "random", targets)
        return after, words

    def _after(self, phase: Phase) -> Phase:
        return replace(
            phase,
            name="train",
            steps=None,
            epochs=None,
            subset=None,
            is_warmup=False,
            scoring=None,
            learning_rate=None,
            target_plan=None,
        )

    def resumed(self, phase: Phase) -> Phase:
        """The phase with the present micro-batch of the derivation and its present cache."""
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
        from sparse_llm_ft.methods.masking import mask_state

        after, masked = self._drawn(phase, plan, scores, targets)
        # AdaLoRA's matrices differ from those that may be trained already.
        return after, state.fresh() if self.settings.base == "adalora" else mask_state(state, plan, masked)

    def _drawn(
        self, phase: Phase, plan: AdapterPlan, scores: Derivation | None, targets: Mapping[str, Shape]
    ) -> tuple[Phase, AdapterPlan]:
        """As `_with_masks`, by what was derived."""
        from sparse_llm_ft.scoring import preserve_flow

        importance = None if scores is None else scores.importance
        if importance is not None and self.settings.flow_preservation:
            importance = preserve_flow(importance)
        ratios = self._ratios(list(plan.active), scores, targets)
        return self._with_masks(phase, plan, ratios, importance, self.settings.selection, targets)

    def _with_masks(
        self,
        phase: Phase,
        plan: AdapterPlan,
        ratios: Mapping[str, tuple[float, float]],
        importance: Mapping[str, Importance] | None,
        selection: Selection,
        targets: Mapping[str, Shape],
    ) -> tuple[Phase, AdapterPlan]:
        """The phase that trains the masked plan, and that plan before it becomes AdaLoRA's."""
        from sparse_llm_ft.methods.masking import masked_plan, scaled_masks

        settings, inputs = self.settings, self.inputs
        masked = masked_plan(plan, targets, ratios, importance, selection, settings.temperature, inputs.seed)
        masked = replace(masked, masking=settings.masking)
        if settings.mask_scaling:
            masked = scaled_masks(masked)
        if settings.base == "dora":
            masked = replace(masked, tuner="dora")
        adalora = settings.base == "adalora"
        return replace(phase, plan=adalora_plan(masked, settings.adalora, inputs) if adalora else masked), masked

    def _ratios(
        self, names: list[str], scores: Derivation | None, targets: Mapping[str, Shape]
    ) -> Mapping[str, tuple[float, float]]:
        from sparse_llm_ft.scoring import balanced, pyramidal, ratios_from_table, with_share

        settings = self.settings
        if settings.ratios == "balanced":
            return balanced(names, float(settings.ratio or 0.0))
        if settings.derives:
            assert scores is not None
            ratios = scores.ratios
            if settings.ratio is not None:
                ratios = with_share(ratios, {name: targets[name] for name in names}, settings.ratio)
        elif settings.ratios == "pyramidal":
            ratios = pyramidal(names, float(settings.ratio or 0.0))
        else:
            ratios = ratios_from_table(read_table(settings.ratios), names)
        least = settings.min_ratio
        return {name: (max(rows, least), max(cols, least)) for name, (rows, cols) in ratios.items()}
