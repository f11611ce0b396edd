"""The adapter tuner. Importing this package registers it in PEFT, so that `get_peft_model` and
`PeftModel.from_pretrained` know `SparseLoraConfig`.

PEFT's `register_peft_method` refuses names outside its own enum, so this file fills the same mappings itself.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from sparse_llm_ft.adapters.build import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    add_adapters,
    base_options,
    change_plan,
    peft_adapter,
    save_peft_adapter,
    write_peft_adapter,
)
from sparse_llm_ft.adapters.config import SparseLoraConfig, SparsePeftType
from sparse_llm_ft.adapters.convert import (
    base_tensors,
    is_adapter,
    is_omega,
    residual_norms,
    to_stock_lora,
    trained_parameters,
)
from sparse_llm_ft.adapters.layer import SparseLoraLayer
from sparse_llm_ft.adapters.model import SparseLoraModel
from sparse_llm_ft.adapters.targets import check_plan, find_targets, linear_modules
from sparse_llm_ft.adapters.tuners import TUNERS, Tuner, count_parameters, count_stored_parameters, tuner_of

PEFT_TYPE_TO_CONFIG_MAPPING[SparsePeftType.SPARSE_LORA] = SparseLoraConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[SparsePeftType.SPARSE_LORA] = SparseLoraModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[SparsePeftType.SPARSE_LORA] = SparseLoraModel.prefix  # type: ignore[index]

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "TUNERS",
    "SparseLoraConfig",
    "SparseLoraLayer",
    "SparseLoraModel",
    "SparsePeftType",
    "Tuner",
    "add_adapters",
    "base_options",
    "base_tensors",
    "change_plan",
    "check_plan",
    "count_parameters",
    "count_stored_parameters",
    "find_targets",
    "is_adapter",
    "is_omega",
    "linear_modules",
    "peft_adapter",
    "residual_norms",
    "save_peft_adapter",
    "to_stock_lora",
    "trained_parameters",
    "tuner_of",
    "write_peft_adapter",
]
