"""The methods, each a rule plan × measurements -> plan. A new one is one file, its settings, and one line below."""

from collections.abc import Callable

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.methods.baselines import Full, PeftBaseline, TiedLora
from sparse_llm_ft.methods.chain import Chain
from sparse_llm_ft.methods.lora_drop import LoraDrop
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.methods.partial_lora import PartialLora
from sparse_llm_ft.methods.weight_lora import WeightLora

METHODS: dict[str, Callable[[RunConfig, int, int], Method]] = {
    "lora": PeftBaseline,
    "lora_plus": PeftBaseline,
    "rslora": PeftBaseline,
    "dora": PeftBaseline,
    "vera": PeftBaseline,
    "adalora": PeftBaseline,
    "full": Full,
    "tied_lora": TiedLora,
    "sparse_adapter": PartialLora,
    "partial_lora": PartialLora,
    "lora_drop": LoraDrop,
    "weight_lora": WeightLora,
    "weight_lora_plus": WeightLora,
}


def build_methods(config: RunConfig, total_steps: int) -> Chain:
    """The rules that `method` names, in order.

    Args:
        total_steps: optimizer steps of the run at its initial global batch.
    """
    return Chain([METHODS[method.name](config, i, total_steps) for i, method in enumerate(config.method)])


__all__ = ["METHODS", "Chain", "Method", "build_methods"]
