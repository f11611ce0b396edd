"""Traces on the meta device, each made once for the same sizes: a search over settings asks for many of them again."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.engine.evaluation_trace import EvaluationBytes, Generation, evaluation_bytes
from sparse_llm_ft.engine.memory import StepBytes, step_bytes
from sparse_llm_ft.engine.step_trace import Batch, StepTrace, trace_step, traced_model
from sparse_llm_ft.plan import AdapterPlan


@lru_cache(maxsize=256)
def _trace(key: _Key, model: ModelConfig, batch: Batch, mode: TaskMode, on_gpu: bool) -> StepTrace:
    return trace_step(model, key.plan, batch, mode, on_gpu)


@lru_cache(maxsize=8)
def _model(key: _Key, model: ModelConfig, mode: TaskMode) -> Any:
    return traced_model(model, key.plan, mode)


@lru_cache(maxsize=256)
def _evaluation(
    key: _Key, model: ModelConfig, batch: Batch, mode: TaskMode, generation: Generation | None, on_gpu: bool
) -> EvaluationBytes:
    return evaluation_bytes(model, key.plan, batch, mode, generation, on_gpu)


@lru_cache(maxsize=256)
def _step_bytes(key: _Key, model: ModelConfig, length: int, mode: TaskMode, samples: int) -> StepBytes:
    return step_bytes(model, key.plan, length, mode, samples)


@dataclass(frozen=True)
class _Key:
    """A plan as a key: equal for plans that cost the same bytes."""

    text: str
    plan: AdapterPlan = field(compare=False)

    @classmethod
    def of(cls, plan: AdapterPlan) -> _Key:
        modules = {
            name: adapter
            and (
                adapter.r,
                adapter.train_omega,
                adapter.train_vectors,
                adapter.group,
                adapter.rows and len(adapter.rows.indices),
                adapter.cols and len(adapter.cols.indices),
                adapter.entries is not None,
            )
            for name, adapter in plan.modules.items()
        }
        rows = {name: len(kept.indices) for name, kept in plan.rows.items()}
        others = (plan.lora_dropout, plan.tuner, dict(plan.options), plan.trained, plan.masking, rows)
        return cls(repr((modules, others)), plan)


def cached_trace(model: ModelConfig, plan: AdapterPlan, batch: Batch, mode: TaskMode, on_gpu: bool) -> StepTrace:
    """`trace_step`, once for the same sizes."""
    return _trace(_Key.of(plan), model, batch, mode, on_gpu)


def cached_step_bytes(
    model: ModelConfig, plan: AdapterPlan, length: int, mode: TaskMode, samples: int = 1
) -> StepBytes:
    """`step_bytes`, once for the same sizes."""
    return _step_bytes(_Key.of(plan), model, length, mode, samples)


def cached_model(model: ModelConfig, plan: AdapterPlan, mode: TaskMode) -> Any:
    """`traced_model`, once for the same sizes."""
    return _model(_Key.of(plan), model, mode)


def cached_evaluation(
    model: ModelConfig,
    plan: AdapterPlan,
    batch: Batch,
    mode: TaskMode,
    generation: Generation | None,
    on_gpu: bool,
) -> EvaluationBytes:
    """`evaluation_bytes`, once for the same sizes."""
    return _evaluation(_Key.of(plan), model, batch, mode, generation, on_gpu)
