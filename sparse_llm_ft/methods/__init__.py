"""The methods, each a rule plan × measurements -> plan. A new one is one file, its settings, and one line below."""

from collections.abc import Callable

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.methods.lora import Lora
from sparse_llm_ft.methods.phase import Method, Phase
from sparse_llm_ft.methods.weight_lora import WeightLora

METHODS: dict[str, Callable[[RunConfig], Method]] = {
    "lora": Lora,
    "weight_lora": WeightLora,
    "weight_lora_plus": WeightLora,
}


def make_method(config: RunConfig) -> Method:
    """The rule that `method.name` names."""
    return METHODS[config.method.name](config)


__all__ = ["METHODS", "Method", "Phase", "make_method"]
