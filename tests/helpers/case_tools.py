"""What the two-rank cases share: the registry, a tiny model, samples, engines and loops."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from sparse_llm_ft.adapters import find_targets, is_omega, trained_parameters
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.data.tokenization import Sample
from sparse_llm_ft.distributed.world import find_world
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.settings import EngineSettings
from sparse_llm_ft.objectives.language_modeling import CompletionObjective
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, uniform_plan, with_omega
from sparse_llm_ft.training.callbacks import Callback
from sparse_llm_ft.training.loop import Loop
from sparse_llm_ft.training.schedule import Schedule

MODEL, RESULTS = sys.argv[-2:]  # the launcher puts --local_rank before them
WORLD = find_world()
TRAINING = TrainingConfig(learning_rate=0.01, max_steps=20, warmup_steps=3, global_batch_size=8, max_grad_norm=0.5)
SAMPLES = [
    Sample(tuple(3 + (i * j) % 17 for j in range(1, 3 + i % 4)), (*(4 + (i + j) % 15 for j in range(1 + i % 3)), 2))
    for i in range(21)
]
OBJECTIVE, PLAIN = CompletionObjective(0, keeps_logits=True), CompletionObjective(0, keeps_logits=False)
PAIRED = ((0, "bfloat16"), (1, "float32"), (2, "bfloat16"), (3, "float32"))
"""Each stage and each dtype; a long case goes through `PRODUCT`, every stage with every dtype."""
PRODUCT = tuple((stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16"))
CASES: dict[str, Callable[[], None]] = {}
LONG_CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def long_case(function: Callable[[], None]) -> Callable[[], None]:
    """One for `make test-long`, in a launch of its own with the others of its kind."""
    LONG_CASES[function.__name__] = function
    return function


def base_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).requires_grad_(False)


def plan_for(model: torch.nn.Module, train_omega: bool = False, lora_dropout: float = 0.0) -> AdapterPlan:
    plan = uniform_plan(find_targets(model, "all-linear"), 4, 8, lora_dropout)
    return with_omega(plan) if train_omega else plan


def engine_settings(stage: int, micro: int, dtype: str = "float32", algorithm: str = "sgd") -> EngineSettings:
    accumulation = 8 // (micro * WORLD.size)
    return EngineSettings(stage, dtype, micro, accumulation, TRAINING.max_grad_norm, 0.1, 0.5, algorithm, {})


def start_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Adapter values that are nowhere zero, the same on every rank."""
    generator = torch.Generator().manual_seed(7)

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        if is_omega(name):
            return torch.ones(1)
        around = 1.0 if name.endswith((".lora_u", ".lora_v")) else 0.0
        return around + torch.randn(shape, generator=generator) * 0.2

    return {name: drawn(name, p.shape) for name, p in trained_parameters(model).items()}


def make_loop(
    engine: Engine,
    plan: AdapterPlan,
    micro: int,
    progress: Progress,
    callback: Callback | None = None,
    training: TrainingConfig = TRAINING,
) -> Loop:
    phase = Phase("train", plan).with_batch(micro, 8)
    return Loop(engine, phase, callback, SAMPLES, OBJECTIVE, Schedule(training, len(SAMPLES)), progress, WORLD, 3, 0)
