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
from sparse_llm_ft.config.schema import (
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TrainingConfig,
)

__all__ = [
    "EvaluationConfig",
    "ModelConfig",
    "RunConfig",
    "TaskConfig",
    "TrainingConfig",
    "check_steps",
    "check_world",
    "dump_config",
    "load_config",
    "merge",
    "parse_config",
    "split_arguments",
]
