"""Settings of the methods: one class each, told apart by `name`. The rules themselves are in sparse_llm_ft.methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, StrictBool, StrictInt

from sparse_llm_ft.config.derivation import DerivationSettings, ForwardPasses
from sparse_llm_ft.config.types import FilePath, Float, Section, Share
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.plan import MAX_RANK


class _Method(Section):
    def check(self, total_steps: int | None) -> None:
        """Refuse what contradicts itself or, once it is known, the run's length (in optimizer steps).

        Raises:
            ConfigError: naming the setting.
        """


class LoraMethod(_Method):
    """LoRA on every target module for the whole run, by PEFT."""

    name: Literal["lora"]


class LoraPlusMethod(_Method):
    """LoRA+ (Hayou et al., 2024): LoRA with a larger learning rate for B.

    Attributes:
        lr_ratio: learning rate of B over that of A.
    """

    name: Literal["lora_plus"]
    lr_ratio: Float = Field(16.0, gt=0)


class DoraMethod(_Method):
    """DoRA (Liu et al., 2024), by PEFT."""

    name: Literal["dora"]


class VeraMethod(_Method):
    """VeRA (Kopiczko et al., 2024), by PEFT: frozen random projections, trained scaling vectors.

    Attributes:
        r: rank of the projections; far larger than LoRA's, since only r + d_out values a module are trained.
    """

    name: Literal["vera"]
    r: StrictInt = Field(256, ge=1, le=MAX_RANK)


class AdaLoraSettings(_Method):
    """AdaLoRA's (Zhang et al., 2023) schedule: it starts at `adapter.r` and prunes singular values.

    Attributes:
        target_r: mean rank that is left; less than `adapter.r`.
        tinit, tfinal: optimizer steps before pruning begins and after it has ended; None: a tenth and three tenths
            of the run.
        delta_t: steps between two prunings.
        orth_reg_weight: coefficient of the orthogonality penalty.
    """

    target_r: StrictInt = Field(4, ge=1)
    tinit: StrictInt | None = Field(None, ge=0)
    tfinal: StrictInt | None = Field(None, ge=0)
    delta_t: StrictInt = Field(1, ge=1)
    orth_reg_weight: Float = Field(0.5, ge=0)

    def schedule(self, total_steps: int) -> tuple[int, int]:
        """(tinit, tfinal) of a run of `total_steps`."""
        tinit = total_steps // 10 if self.tinit is None else self.tinit
        tfinal = 3 * total_steps // 10 if self.tfinal is None else self.tfinal
        return tinit, tfinal

    def check(self, total_steps: int | None) -> None:
        """Between tinit and tfinal must lie a step to prune in."""
        if total_steps is not None and sum(self.schedule(total_steps)) >= total_steps:
            raise ConfigError(
                "method.tinit",
                f"tinit and tfinal take all {total_steps} steps of the run",
                "expected tinit + tfinal < steps",
            )


class AdaLoraMethod(AdaLoraSettings):
    """AdaLoRA on every target module, by PEFT."""

    name: Literal["adalora"]


class FullMethod(_Method):
    """Full fine-tuning of every parameter; no adapters."""

    name: Literal["full"]


class TiedLoraMethod(_Method):
    """Tied-LoRA (Renduchintala et al., 2023) as LoRA-drop's paper compares it: all layers share one pair per module
    type and shape.
    """

    name: Literal["tied_lora"]


Unit = Annotated[Float, Field(ge=0, le=1)]


class LoraDropMethod(_Method):
    """LoRA-drop (Zhou et al., 2024): a pilot scores every layer's LoRA output; unimportant layers share one LoRA.

    Attributes:
        sample_fraction: alpha, stratified share of the training set that the pilot trains and is scored on.
        pilot_epochs: n, passes of the pilot over the sample.
        threshold: T; of each module type the most important layers are kept until their shares sum to T.
        share: whether the others share one LoRA per type and shape; false removes them.
        choose: which layers keep their own: by ``importance``; ``inverted`` the least important, as many;
            ``random`` as many; ``top`` as many of the highest layers.
    """

    name: Literal["lora_drop"]
    sample_fraction: Share = 0.1
    pilot_epochs: Float = Field(3.0, gt=0)
    threshold: Share = 0.9
    share: StrictBool = True
    choose: Literal["importance", "inverted", "random", "top"] = "importance"


class PartialLoraMethod(_Method, DerivationSettings):
    """Partial-LoRA (Damirchi et al., 2024): random row and column masks, with ratios derived from the base.

    Attributes:
        shots: samples per class in D_t, the few-shot set that ratios are derived from.
        sample_fraction: a share of the training set instead, stratified.
        head_epochs, head_learning_rate: passes over D_t that a fresh classification head is fitted for, alone, before
            the derivation, and their learning rate.
        selection: ``random`` draws each index with its ratio; ``targeted`` takes the most important ones;
            ``inverted`` their complement; ``stochastic`` samples by softmax(importance / temperature).
        ratios: ``derived`` (Algorithm 1); ``balanced``, `ratio` everywhere; ``pyramidal``, ratio to the power of the
            layer's depth; or a JSON or YAML file with a ratio per module.
        ratio: kept share of rows and of columns under ``balanced`` and ``pyramidal``.
        compare_importance: also measure the two other importances, for the report's picture of their overlap.
        base: ``adalora`` masks AdaLoRA instead (Partial-AdaLoRA), with the settings `adalora`; ``dora`` DoRA.
        masking: where masks live: in the sharded ``optimizer``, around whole layers of any tuner; or ``compact``, in
            layers of this package whose A and B are physically smaller, which is faster.
        cache_dir: where derivations are kept, by content; null: the user's cache folder.
    """

    name: Literal["partial_lora"]
    shots: StrictInt | None = Field(None, ge=1)
    sample_fraction: Share | None = None
    head_epochs: Float = Field(20.0, gt=0)
    head_learning_rate: Float = Field(0.01, gt=0)
    selection: Literal["random", "targeted", "inverted", "stochastic"] = "random"
    temperature: Float = Field(1.0, gt=0)
    ratios: FilePath = "derived"
    ratio: Unit | None = None
    compare_importance: StrictBool = False
    base: Literal["lora", "adalora", "dora"] = "lora"
    adalora: AdaLoraSettings = AdaLoraSettings()
    masking: Literal["optimizer", "compact"] = "optimizer"
    cache_dir: FilePath | None = None

    DEFAULT_SHOTS: ClassVar[int] = 16

    @property
    def derivation(self) -> DerivationSettings:
        """The settings that only the derivation reads."""
        return DerivationSettings.model_validate({key: getattr(self, key) for key in DerivationSettings.model_fields})

    @property
    def derives(self) -> bool:
        """Whether ratios come from Algorithm 1."""
        return self.ratios == "derived"

    @property
    def ranks(self) -> bool:
        """Whether importance is needed at all."""
        return self.derives or self.selection != "random"

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
        if self.adalora != AdaLoraSettings() and self.base != "adalora":
            raise ConfigError("method.adalora", "has no effect under base lora", "expected base: adalora")
        if self.base == "adalora":
            self.adalora.check(total_steps)
        if self.base != "lora" and self.masking == "compact":
            raise ConfigError(
                "method.masking", f"compact, and PEFT's {self.base} has whole layers", "expected optimizer"
            )


class SparseAdapterMethod(_Method, ForwardPasses):
    """Sparse Adapter as LoRA-drop's paper compares it: a targeted SNIP mask on LoRA at a fixed sparsity.

    Attributes:
        sparsity: share of rows, and of columns, that is masked.
        shots: samples per class that the gradients are taken from.
        head_epochs, head_learning_rate, micro_batch_size, cache_dir: as of `PartialLoraMethod`.
    """

    name: Literal["sparse_adapter"]
    sparsity: Annotated[Float, Field(ge=0, lt=1)] = 0.5
    shots: StrictInt = Field(16, ge=1)
    head_epochs: Float = Field(20.0, gt=0)
    head_learning_rate: Float = Field(0.01, gt=0)
    cache_dir: FilePath | None = None

    def as_partial(self) -> PartialLoraMethod:
        """The Partial-LoRA that it is."""
        return PartialLoraMethod(
            name="partial_lora",
            shots=self.shots,
            importance="snip",
            selection="targeted",
            ratios="balanced",
            ratio=1 - self.sparsity,
            head_epochs=self.head_epochs,
            head_learning_rate=self.head_learning_rate,
            masking="compact",
            micro_batch_size=self.micro_batch_size,
            cache_dir=self.cache_dir,
        )


class WeightLoraMethod(_Method):
    """WeightLoRA (Veprikov et al., section 3.3).

    Attributes:
        keep: K, how many adapters stay.
        steps: T, optimizer steps with trained omega, after which the others are disconnected.
        cut_every: optimizer steps between two cuts (the paper cuts after each).
        cut_after: optimizer steps before the first cut. Once cut, an adapter hardly ever comes back, so this
            warm-up decides what the choice is made from.
        omega_lr, omega_optimizer: step rule of omega; its learning rate does not follow `training.schedule`.
        choose: ``omega`` keeps the largest; ``random`` is the paper's ablation RLoRA.
        batch_growth: what the freed memory is used for. ``keep_global``: larger micro-batch, fewer accumulation
            steps, the same updates. ``grow_global``: larger micro-batch and global batch.
        lr_scaling: how the learning rate follows a grown global batch.
    """

    name: Literal["weight_lora"]
    keep: StrictInt = Field(ge=1)
    steps: StrictInt = Field(ge=1)
    cut_every: StrictInt = Field(1, ge=1)
    cut_after: StrictInt = Field(0, ge=0)
    omega_lr: Float = Field(0.1, gt=0)
    omega_optimizer: Literal["sgd", "adamw"] = "sgd"
    choose: Literal["omega", "random"] = "omega"
    batch_growth: Literal["none", "keep_global", "grow_global"] = "keep_global"
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"

    def check(self, total_steps: int | None) -> None:
        """A cut must come before T, and T before the run's end."""
        if self.cut_after >= self.steps:
            raise ConfigError(
                "method.cut_after",
                f"{self.cut_after} leaves no cut before step {self.steps}",
                "expected less than method.steps",
            )
        if self.lr_scaling != "none" and self.batch_growth != "grow_global":
            raise ConfigError(
                "method.lr_scaling",
                f"{self.lr_scaling!r} has no effect under batch_growth {self.batch_growth}",
                "expected none, or batch_growth: grow_global",
            )
        if total_steps is not None and self.steps >= total_steps:
            raise ConfigError(
                "method.steps",
                f"{self.steps} is not before the run's end at step {total_steps}",
                f"expected 1 to {total_steps - 1}, or more training.max_steps or epochs",
            )


class WeightLoraPlusMethod(WeightLoraMethod):
    """WeightLoRA+ (section 3.4): the survivors' ranks grow into the warm-up's parameter budget.

    Attributes:
        expansion: ``gaussian`` adds random rows to A and zero columns to B; ``qr`` orthonormalises A first.
    """

    name: Literal["weight_lora_plus"]  # type: ignore[assignment]
    expansion: Literal["qr", "gaussian"] = "qr"


MethodConfig = (
    LoraMethod
    | LoraPlusMethod
    | DoraMethod
    | VeraMethod
    | AdaLoraMethod
    | FullMethod
    | TiedLoraMethod
    | SparseAdapterMethod
    | PartialLoraMethod
    | LoraDropMethod
    | WeightLoraMethod
    | WeightLoraPlusMethod
)


def _as_list(value: Any) -> Any:
    """One method, or a list of methods or of their names."""
    if isinstance(value, list | tuple):
        return [{"name": item} if isinstance(item, str) else item for item in value]
    return [{"name": value} if isinstance(value, str) else value]


Methods = Annotated[
    tuple[Annotated[MethodConfig, Field(discriminator="name")], ...], BeforeValidator(_as_list), Field(min_length=1)
]
"""The method, or several that are applied one after the other."""


def method_class(name: object) -> type[_Method] | None:
    """The settings class of the method of that name."""
    kinds: tuple[type[_Method], ...] = get_args(MethodConfig)
    return next((kind for kind in kinds if name in get_args(kind.model_fields["name"].annotation)), None)


def method_names() -> list[str]:
    """All names that `method.name` may have."""
    kinds: tuple[type[_Method], ...] = get_args(MethodConfig)
    return sorted(get_args(kind.model_fields["name"].annotation)[0] for kind in kinds)
