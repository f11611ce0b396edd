"""Two-rank cases of the prefix cache: states cross ranks, and at stage 3 nobody gathers what is skipped."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from helpers.case_tools import (
    MODEL,
    PRODUCT,
    RESULTS,
    SAMPLES,
    TRAINING,
    WORLD,
    base_model,
    case,
    engine_settings,
    long_case,
    make_loop,
    plan_for,
    start_values,
)
from sparse_llm_ft.adapters import add_adapters
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.sharded_loading import load_sharded_model
from sparse_llm_ft.training import prefix_store
from sparse_llm_ft.training.prefix_cache import open_prefix

STEPS = 8
RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 10_000,
}


def run(
    stage: int, mode: str, dtype: str = "float32", limit: int = 2**30, folder: Path | None = None
) -> tuple[list[float], list[int | None], list[int], list[int]]:
    """Losses, samples from the cache, calls of the lowest layer and gathers of its weights, by step."""
    settings = replace(engine_settings(stage, 2, dtype), extra={"zero_optimization": RELEASED} if stage == 3 else {})
    base = base_model(getattr(torch, dtype))
    if stage == 3:
        base = load_sharded_model(ModelConfig(name=MODEL, dtype=dtype), settings.to_deepspeed())
    plan = plan_for(base, lora_dropout=0.3)
    plan = replace(plan, modules={n: a if ".layers.1." in n else None for n, a in plan.modules.items()})
    torch.manual_seed(0)
    model = add_adapters(base, plan)
    start = start_values(model)
    engine = Engine(model, settings, plan)
    engine.load({name: start[name] for name in engine.parameters})
    calls, gathers = [0], [0]

    def count(*_: object) -> None:
        calls[-1] += 1

    base.model.layers[0].register_forward_hook(count)
    changes = {"prefix_cache": mode, "prefix_cache_bytes": limit, "learning_rate": 0.05, "warmup_steps": 0}
    training = TRAINING.model_copy(update=changes)
    loop = make_loop(engine, plan, 2, Progress(), training=training)
    loop.prefix = open_prefix(loop, training, lambda line: None, folder and (lambda lowest: folder))
    losses, cached = [], []
    lower = {id(p) for p in base.model.layers[0].parameters()}
    with gathered(lower, gathers):
        for _, step in zip(range(STEPS), loop.steps(), strict=False):
            losses.append(step.loss)
            cached.append(step.cached_samples)
            calls.append(0)
            gathers.append(0)
    if loop.prefix is not None:
        loop.prefix.flush()
    moved = max(float((value - start[name]).abs().max()) for name, value in engine.values().items())
    assert moved > 0.1, "nothing is learned: a comparison would show nothing"
    engine.close()
    return losses, cached, calls[:STEPS], gathers[:STEPS]


@functools.cache
def plain(stage: int, dtype: str = "float32") -> tuple[list[float], list[int | None], list[int], list[int]]:
    """`run` without the cache, which several cases compare with."""
    return run(stage, "off", dtype)


@contextmanager
def gathered(parameters: set[int], counts: list[int]) -> Iterator[None]:
    name = "_PartitionedParameterCoordinator__all_gather_params"
    gather = getattr(PartitionedParameterCoordinator, name)

    def counting(self, params, forward) -> None:
        counts[-1] += sum(id(p) in parameters for p in params)
        gather(self, params, forward)

    with mock.patch.object(PartitionedParameterCoordinator, name, counting):
        yield


def assert_equal(found: list[float], expected: list[float], dtype: str) -> None:
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert worst <= tolerance * max(expected), (worst, found, expected)


@case
def cached_states_cross_ranks_and_nothing_gathers_what_is_skipped() -> None:
    """21 samples, 8 a step: from step 4 on all come from the cache, whichever rank has computed them."""
    check_cached(((2, "float32"), (3, "float32")))


@long_case
def cached_states_cross_ranks_in_every_dtype_at_every_stage() -> None:
    check_cached(PRODUCT)


def check_cached(where: Sequence[tuple[int, str]]) -> None:
    for stage, dtype in where:
        expected, _, plain_calls, plain_gathers = plain(stage, dtype)
        losses, cached, calls, gathers = run(stage, "memory", dtype)
        assert_equal(losses, expected, dtype)
        assert plain_calls == [2] * STEPS and cached[3:] == [8] * (STEPS - 3), (plain_calls, cached)
        assert calls[:2] == [2, 2] and calls[3:] == [0] * (STEPS - 3), calls
        if stage == 3:
            # In the first pass without the lower layer, DeepSpeed still expects it and gathers it ahead.
            assert all(plain_gathers) and not any(gathers[4:]), (plain_gathers, gathers)


@case
def ranks_agree_on_what_the_limit_leaves_out() -> None:
    """At stage 3 all ranks skip the lower layer in a micro-batch, or none does; else they would hang."""
    row = 16 * 4
    limit = sum(sample.length for sample in SAMPLES) * row * 2 // 5
    for stage in (2, 3):
        expected, _, _, _ = plain(stage)
        losses, cached, calls, _ = run(stage, "memory", limit=limit)
        assert_equal(losses, expected, "float32")
        assert any(cached[4:]) and any(calls[4:]), (cached, calls)
        if stage == 3:
            every = [torch.zeros(STEPS, dtype=torch.long) for _ in range(2)]
            dist.all_gather(every, torch.tensor(calls))
            assert torch.equal(*every)


@case
def states_on_disk_serve_a_resumed_run_on_its_ranks() -> None:
    folder = Path(RESULTS).with_name("states")
    expected, _, _, _ = plain(3)
    with mock.patch.object(prefix_store, "SHARD_BYTES", 1500):
        losses, _, calls, _ = run(3, "disk", folder=folder)
    assert_equal(losses, expected, "float32")
    assert calls[3:] == [0] * (STEPS - 3)
    dist.barrier()
    assert {entry.name.split("-")[1] for entry in folder.iterdir()} == {"0", "1"}
    again, cached, calls, _ = run(3, "disk", folder=folder)
    assert_equal(again, expected, "float32")
    assert cached == [4, *[8] * (STEPS - 1)] and calls == [1, *[0] * (STEPS - 1)], (cached, calls, WORLD.rank)
