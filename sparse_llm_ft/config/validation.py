"""Checks across sections: which methods compose, and which ways of passing the data exclude each other."""

from __future__ import annotations

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.config.registry import METHODS, find_settings
from sparse_llm_ft.config.schema import RunConfig
from sparse_llm_ft.errors import ConfigError


def check_chain(methods: tuple[MethodSettings, ...]) -> None:
    """Refuse methods that cannot follow each other, with the reason.

    A method that shares adapters can precede one that masks them; one that weighs them can precede or follow it.

    Raises:
        ConfigError: naming the methods.
    """
    if len(methods) == 1:
        return
    names = [method.name for method in methods]
    kinds = [method.composes for method in methods]
    for method in methods:
        if method.alone is not None:
            raise _refusal(names, f"{method.name} {method.alone}")
    for kind in kinds:
        if kinds.count(kind) > 1:
            family = [name for name in sorted({*METHODS, *names}) if find_settings(name).composes == kind]
            raise _refusal(names, f"of {' and '.join(family)} only one can be used, once")
    if "shares" in kinds and "weighs" in kinds:
        raise _refusal(names, "an omega weighs one adapter, and a shared one belongs to several modules")
    if "shares" in kinds[1:]:
        raise _refusal(names, "a method that shares adapters starts from fresh ones and must come first")


def _refusal(names: list[str], reason: str) -> ConfigError:
    return ConfigError(
        "method", f"[{', '.join(names)}] cannot be composed ({reason})", "expected one method, or another order"
    )


def check_data_path(config: RunConfig) -> None:
    """Refuse ways of passing the data that exclude each other, or that a method cannot use.

    Raises:
        ConfigError: naming the setting.
    """
    task = config.task
    if task.packing and task.mode not in ("auto", "causal_lm"):
        raise ConfigError("task.packing", f"true, and task.mode is {task.mode}", "expected false, or mode causal_lm")
    if not task.streaming:
        return
    if config.training.prefix_cache != "off":
        raise ConfigError(
            "training.prefix_cache",
            f"{config.training.prefix_cache}, but streamed samples have no numbers to keep them under",
            "expected off",
        )
    if task.packing:
        raise ConfigError("task.streaming", "true beside task.packing, which needs all lengths", "expected one of them")
    if config.training.max_steps is None:
        raise ConfigError("training.max_steps", "not given, and task.streaming is true", "expected a number of steps")
    for method in config.method:
        if method.draws_samples:
            raise ConfigError(
                "task.streaming", f"true, and {method.name} draws a part of all samples", "expected streaming: false"
            )
