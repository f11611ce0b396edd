"""Which methods can follow each other, and what a method excludes in other sections."""

from __future__ import annotations

from sparse_llm_ft.config.methods import AdaLoraMethod, AdaLoraSettings, MethodConfig, PartialLoraMethod
from sparse_llm_ft.config.schema import RunConfig
from sparse_llm_ft.errors import ConfigError

_ALONE = {
    "lora": "trains PEFT's LoRA as it is",
    "lora_plus": "trains PEFT's LoRA as it is",
    "rslora": "trains PEFT's LoRA with a scaling of its own",
    "dora": "trains PEFT's own layers, which have no masks, groups or omega",
    "vera": "trains PEFT's own layers, which have no masks, groups or omega",
    "adalora": "trains PEFT's own layers, which have no masks, groups or omega; use partial_lora with base: adalora",
    "full": "has no adapters",
}
_SHARING, _MASKING, _WEIGHING = (
    ("lora_drop", "tied_lora"),
    ("partial_lora", "sparse_adapter"),
    ("weight_lora", "weight_lora_plus"),
)


def check_chain(methods: tuple[MethodConfig, ...]) -> None:
    """Refuse methods that cannot follow each other, with the reason.

    What composes: lora_drop or tied_lora before masks; weight_lora(_plus) before or after masks.

    Raises:
        ConfigError: naming the two.
    """
    names: list[str] = [method.name for method in methods]
    if len(names) == 1:
        return
    for name in names:
        if name in _ALONE:
            raise _refusal(names, f"{name} {_ALONE[name]}")
    for family in (_SHARING, _MASKING, _WEIGHING):
        if sum(name in family for name in names) > 1:
            raise _refusal(names, f"of {' and '.join(family)} only one can be used, once")
    if any(n in _SHARING for n in names) and any(n in _WEIGHING for n in names):
        raise _refusal(names, "an omega weighs one adapter, and a shared one belongs to several modules")
    if any(name in _SHARING for name in names[1:]):
        raise _refusal(names, "a method that shares adapters starts from fresh ones and must come first")
    for method in methods:
        if isinstance(method, PartialLoraMethod) and method.base != "lora":
            raise _refusal(names, f"partial_lora with base: {method.base} trains PEFT's own layers")


def check_data_path(config: RunConfig) -> None:
    """Refuse ways to pass the data that exclude each other, or that a method cannot work with.

    Raises:
        ConfigError: naming the setting.
    """
    task = config.task
    if task.packing and task.mode not in ("auto", "causal_lm"):
        raise ConfigError("task.packing", f"true, and task.mode is {task.mode}", "expected false, or mode causal_lm")
    if not task.streaming:
        return
    if task.packing:
        raise ConfigError("task.streaming", "true beside task.packing, which needs all lengths", "expected one of them")
    if config.training.max_steps is None:
        raise ConfigError("training.max_steps", "not given, and task.streaming is true", "expected a number of steps")
    for method in config.method:
        draws = method.name in ("lora_drop", "sparse_adapter")
        if draws or (isinstance(method, PartialLoraMethod) and method.ranks):
            raise ConfigError(
                "task.streaming", f"true, and {method.name} draws a part of all samples", "expected streaming: false"
            )


def _refusal(names: list[str], reason: str) -> ConfigError:
    return ConfigError(
        "method", f"[{', '.join(names)}] cannot be composed ({reason})", "expected one method, or another order"
    )


def check_method(config: RunConfig) -> None:
    """Refuse what a method excludes in other sections.

    Raises:
        ConfigError: naming the setting.
    """
    for method in config.method:
        if method.name == "full" and config.model.quantization != "none":
            raise ConfigError(
                "method.name", f"full cannot train a base in {config.model.quantization}", "expected quantization: none"
            )
        dora = method.name == "dora" or (isinstance(method, PartialLoraMethod) and method.base == "dora")
        if dora and config.deepspeed.zero_stage == 3:
            raise ConfigError(
                "deepspeed.zero_stage",
                "3, but PEFT's DoRA reads whole weights of the base in every forward pass",
                "expected 0 to 2",
            )
        adalora: AdaLoraSettings | None = method if isinstance(method, AdaLoraMethod) else None
        if isinstance(method, PartialLoraMethod) and method.base == "adalora":
            adalora = method.adalora
        if adalora is None:
            continue
        if adalora.target_r >= config.adapter.r:
            raise ConfigError(
                "method.target_r",
                f"{adalora.target_r} leaves nothing to prune from adapter.r {config.adapter.r}",
                f"expected less than {config.adapter.r}",
            )
        if config.deepspeed.zero_stage == 3:
            raise ConfigError(
                "deepspeed.zero_stage",
                "3, but adalora's orthogonality penalty needs whole matrices",
                "expected 0 to 2",
            )
