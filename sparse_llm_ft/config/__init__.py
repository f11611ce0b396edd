"""Settings: typed sections, loading with overrides, and the checks that need no model."""

from sparse_llm_ft.config.load import (
    check_steps,
    check_world,
    dump_config,
    load_config,
    merge,
    parse_config,
    split_arguments,
)
from sparse_llm_ft.config.methods import LoraMethod, MethodConfig, WeightLoraMethod, WeightLoraPlusMethod
from sparse_llm_ft.config.sections import (
    AdapterConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "LoraMethod",
    "MethodConfig",
    "ModelConfig",
    "RunConfig",
    "TaskConfig",
    "TrainingConfig",
    "WeightLoraMethod",
    "WeightLoraPlusMethod",
    "check_steps",
    "check_world",
    "dump_config",
    "load_config",
    "merge",
    "parse_config",
    "split_arguments",
]
