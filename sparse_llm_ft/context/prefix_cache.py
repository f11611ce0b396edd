"""Refuses ``training.prefix_cache`` where cached states would be untrue."""

from __future__ import annotations

from transformers import PreTrainedModel

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.prefix import why_not_constant
from sparse_llm_ft.plan import AdapterPlan

_CHANGING = ("data_efficiency", "compression_training")
"""Sections of DeepSpeed's configuration that change tokens or weights while a run trains."""


def check_prefix_cache(config: RunConfig, plan: AdapterPlan, empty: PreTrainedModel) -> None:
    """Refuse the cache if the lower layers' output is no constant function of the sample.

    Args:
        plan: the run's first.

    Raises:
        ConfigError: with the reason.
    """
    mode = config.training.prefix_cache
    if mode == "off":
        return
    why = why_not_constant(empty, plan, config.task.max_length)
    changing = next((name for name in _CHANGING if name in config.deepspeed.extra), None)
    if why is None and changing is not None:
        why = f"deepspeed.{changing} changes what the lower layers compute"
    if why is not None:
        raise ConfigError("training.prefix_cache", f"{mode}, but {why}", "expected off")
