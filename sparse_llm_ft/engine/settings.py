"""What an engine is built with, as DeepSpeed's configuration has it."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, DtypeEnum
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, OffloadDeviceEnum
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from pydantic import ValidationError

from sparse_llm_ft.adapters import is_adapter, is_omega
from sparse_llm_ft.config import merge
from sparse_llm_ft.config.problems import wanted
from sparse_llm_ft.errors import ConfigError, reason_of

deepspeed.utils.logger.setLevel(logging.ERROR)  # on import it logs notes such as "untested optimizer"
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``."""
_LEAVE_GRADIENTS = {
    *("comms_logger", "csv_monitor", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print"),
    *("tensorboard", "timers", "wall_clock_breakdown", "wandb"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
}
_LEAVE_GRADIENTS_OF_ZERO = {
    *("allgather_bucket_size", "allgather_partitions", "ignore_unused_parameters", "round_robin_gradients", "stage"),
    "sub_group_size",
}
"""DeepSpeed's settings that say nothing about how gradients are kept and reduced; of all, and of ZeRO, where those of
stage 3 belong to them too.
"""
_DOCUMENTED = "see deepspeed.ai/docs/config-json"
_NEEDS_NORM = {"offload_optimizer", "cpu_offload"}
_REFUSALS = (
    *(AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError),
    *(DeepSpeedConfigError, ZeRORuntimeException),
)
"""How DeepSpeed refuses settings, or fails on them, when it reads them or builds an engine."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine.

    Attributes:
        micro_batch_size: samples per rank and forward pass.
        accumulation_steps: forward passes per optimizer step.
        dtype: ``bfloat16`` (with float32 master weights) or ``float32``.
        omega_lr, omega_algorithm: learning rate and optimizer of trained omegas.
        extra: DeepSpeed's own settings, merged into ours.
        lora_b_lr_factor: B's learning rate divided by that of the other adapter parameters (LoRA+).
        head_lr_factor: the learning rate of what is trained whole beside adapters, divided by that of the adapters.
    """

    zero_stage: int
    dtype: Literal["float32", "bfloat16"]
    micro_batch_size: int
    accumulation_steps: int
    max_grad_norm: float
    weight_decay: float
    omega_lr: float
    omega_algorithm: Literal["adamw", "sgd"]
    extra: Mapping[str, object]
    lora_b_lr_factor: float = 1.0
    head_lr_factor: float = 1.0

    def to_deepspeed(self, trained: int = BUCKET_ELEMENTS) -> dict[str, object]:
        """DeepSpeed's configuration as a dict.

        Args:
            trained: number of values that are trained. Where DeepSpeed keeps gradients, every backward pass of stages
                1 to 3 allocates a bucket for them, which need be no larger; its default takes 1 GB in bfloat16.
        """
        ours = {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
            "gradient_clipping": 0.0,  # AdapterOptimizer clips: DeepSpeed's norm would count masked entries
            "bf16": {"enabled": self.dtype == "bfloat16", "check_grad_overflow": False},
            "zero_optimization": {
                "stage": self.zero_stage,
                "reduce_bucket_size": min(trained, BUCKET_ELEMENTS),
                **self._without_its_norm(),
            },
            "zero_allow_untested_optimizer": True,  # AdapterOptimizer is not on DeepSpeed's list
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice in every micro-batch
        }
        return merge(ours, self.extra)

    def has_flat_gradients(self, trained: int) -> bool:
        """Whether the engine keeps and averages gradients by itself (engine/flat_gradients.py): at stages 1 and 2,
        where DeepSpeed would have them all in one bucket and the user's settings leave the matter alone.

        Args:
            trained: number of values that are trained.
        """
        given = self.extra.get("zero_optimization", {})
        assert isinstance(given, Mapping), "config/load.py refuses anything else"
        others = self.extra.keys() - _LEAVE_GRADIENTS - {"zero_optimization"}
        of_zero = {key for key in given.keys() - _LEAVE_GRADIENTS_OF_ZERO if not key.startswith("stage3_")}
        return self.zero_stage in (1, 2) and trained <= BUCKET_ELEMENTS and not others and not of_zero

    def group_of(self, name: str) -> str:
        """The parameter group of a trained parameter: ``omega``; ``whole`` for modules of the base, whose moments
        outlive a change of adapters and so need a step count of their own; ``lora_B`` under LoRA+; else ``adapter``.

        Args:
            name: the parameter's short name.
        """
        if is_omega(name):
            return "omega"
        if not is_adapter(name):
            return "whole"
        return "lora_B" if self.lora_b_lr_factor != 1.0 and name.endswith(".lora_B") else "adapter"

    def _without_its_norm(self) -> dict[str, object]:
        """AdapterOptimizer skips updates that are not finite. Where DeepSpeed allows it, it does not look as well: it
        would compute a norm of its own and wait for it.
        """
        given = self.extra.get("zero_optimization", {})
        assert isinstance(given, Mapping), "config/load.py refuses anything else"
        known = "compute_grad_norm" in DeepSpeedZeroConfig.model_fields and self.zero_stage in (1, 2)
        return {"compute_grad_norm": False} if known and not given.keys() & _NEEDS_NORM else {}


def check_deepspeed(extra: Mapping[str, object], zero_stage: int, dtype: Literal["float32", "bfloat16"]) -> None:
    """Refuse DeepSpeed settings that are unknown or invalid, or that the engine has no use for, before anything slow.

    Raises:
        ConfigError: naming the first such setting.
    """
    fields = DeepSpeedZeroConfig.model_fields
    known = [*fields, *(f.alias for f in fields.values() if f.alias)]  # DeepSpeed's documents have the aliases
    given = extra.get("zero_optimization", {})
    assert isinstance(given, Mapping), "config/load.py refuses anything else"
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else _DOCUMENTED
            raise ConfigError(f"deepspeed.zero_optimization.{key}", "unknown key", hint)
    try:
        zero = DeepSpeedZeroConfig(**{**given, "stage": zero_stage})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(["deepspeed.zero_optimization", *(str(part) for part in problem["loc"])])
        reason = wanted(problem)
        if not problem["loc"]:  # several settings together, of which the reason speaks
            raise ConfigError(where, f"DeepSpeed refuses this ({reason})", _DOCUMENTED) from None
        raise ConfigError(where, f"{problem['input']!r} is not allowed", f"expected {reason}") from None
    _check_offload(zero)
    for key, value in extra.items():  # in the user's order, so that every rank names the same one
        if key != "zero_optimization":
            _check_alone(key, value)
    with refused_by_deepspeed(extra):
        ours = EngineSettings(zero_stage, dtype, 1, 1, 0.0, 0.0, 0.0, "sgd", extra)
        given_type = DeepSpeedConfig(ours.to_deepspeed()).grad_accum_dtype
        accumulates = None if given_type is None else DtypeEnum(given_type).value
    # DeepSpeed's optimizer for this keeps masters elsewhere (`zero.masters`), or there is none at stage 0.
    apart = zero_stage == 0 or (zero_stage == 1 and offload_device(zero) == "none")
    if apart and dtype == "bfloat16" and accumulates == torch.float32:
        raise ConfigError(
            "deepspeed.data_types.grad_accum_dtype",
            f"{given_type}, and deepspeed.zero_stage is {zero_stage}",
            "expected deepspeed.zero_stage 2 or 3 beside it",
        )


def _check_alone(key: str, value: object) -> None:
    """Refuse one of DeepSpeed's settings that it does not take, whatever is beside it.

    Raises:
        ConfigError: naming the setting.
    """
    try:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, key: value})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        inner = [str(part) for part in problem["loc"] if part != key]
        right = "no such key" if problem["type"] == "extra_forbidden" else wanted(problem)
        raise ConfigError(
            ".".join(["deepspeed", key, *inner]), f"{problem['input']!r} is not allowed", f"expected {right}"
        ) from None
    except _REFUSALS as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise ConfigError(f"deepspeed.{key}", f"{value!r:.200} is not allowed ({reason})", _DOCUMENTED) from error


def _check_offload(zero: DeepSpeedZeroConfig) -> None:
    """Refuse what only works with an optimizer of DeepSpeed's own, which has no masks.

    Raises:
        ConfigError: naming the setting.
    """
    offload = "deepspeed.zero_optimization.offload_optimizer"
    if zero.zenflow is not None:
        raise ConfigError("deepspeed.zero_optimization.zenflow", "needs an optimizer of DeepSpeed's", "expected none")
    if offload_device(zero) == "nvme":
        raise ConfigError(f"{offload}.device", "nvme needs an optimizer of DeepSpeed's", "expected cpu")
    if zero.offload_optimizer is not None and zero.offload_optimizer.ratio < 1:
        raise ConfigError(
            f"{offload}.ratio", f"{zero.offload_optimizer.ratio} needs an optimizer of DeepSpeed's", "expected 1"
        )


def offload_device(zero: DeepSpeedZeroConfig) -> str:
    """Where the optimizer's state is: ``cpu`` or ``nvme``; ``none``: where the rank computes."""
    offload = zero.offload_optimizer
    return "none" if offload is None else str(OffloadDeviceEnum(offload.device).value)


@contextmanager
def refused_by_deepspeed(extra: Mapping[str, object]) -> Iterator[None]:
    """The body gives DeepSpeed settings of the user's beside our own, which it takes.

    Args:
        extra: the user's.

    Raises:
        ConfigError: DeepSpeed refuses them; with its reason.
    """
    try:
        yield
    except _REFUSALS as error:
        if not extra:
            raise
        names = ", ".join(sorted(extra))
        raise ConfigError("deepspeed", f"{names}: DeepSpeed refuses this ({reason_of(error)})", _DOCUMENTED) from error
