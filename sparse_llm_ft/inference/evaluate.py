"""A trained run measured again: on other samples or splits, other ranks, another ZeRO stage. Collective."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.data.dataset import SplitBuilder, remarks_of
from sparse_llm_ft.distributed.collectives import encoding_together, run_on_rank_zero
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.build import build_model, engine_settings
from sparse_llm_ft.engine.engine import Engine, check_deepspeed
from sparse_llm_ft.engine.handover import load_state, masks_of
from sparse_llm_ft.evaluation.evaluator import Evaluator
from sparse_llm_ft.inference.trained_run import TrainedRun
from sparse_llm_ft.io.atomic import write_file
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model.limits import check_lengths, tokenizer_for
from sparse_llm_ft.model.loading import check_weights
from sparse_llm_ft.objectives.build import build_objective

METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"


def evaluate(run: TrainedRun, config: RunConfig, world: World, output: Path) -> Mapping[str, Any]:
    """Measure the run's newest checkpoint as training measures it, with an engine around the same model.

    Processes must be connected (`init_distributed`).

    Args:
        config: the run's settings, with what is to be measured, and how, in place.
        output: folder that rank 0 makes, for ``metrics.json`` and ``predictions.jsonl``.

    Returns:
        What ``metrics.json`` holds: ``metrics``, ``split``, ``samples`` of each part, ``step``, and the settings that
        the numbers depend on.

    Raises:
        UserError: data, weights or settings that cannot be used, or a folder that is there.
    """
    check_deepspeed(config.deepspeed.extra)
    check_weights(config.model)
    check_lengths(config, run.task, run.task_mode, run.empty)
    tokenizer = tokenizer_for(config.model, run.task_mode, run.empty)
    parts = SplitBuilder(config, run.task, tokenizer, run.task_mode, **encoding_together(world)).measured()
    for line in remarks_of(parts, config.task):
        Console(world.rank).log(line)
    run_on_rank_zero(world, lambda: output.mkdir(parents=True))
    phase = run.phase.with_batch(1, world.size)
    settings = engine_settings(config, phase, world.size)
    model = build_model(config, run.task_mode, run.plan, settings.to_deepspeed())
    engine = Engine(model, settings, masks_of(run.plan))
    load_state(engine, run.plan, run.state)
    objective = build_objective(run.empty, tokenizer, run.task)
    stage = config.deepspeed.zero_stage
    evaluator = Evaluator(
        config.evaluation, run.task, run.task_mode, parts, tokenizer, objective, world, stage, config.seed
    )
    metrics = evaluator(engine.module, output / PREDICTIONS)
    engine.close()
    result = {
        "metrics": metrics,
        "split": config.evaluation.split,
        "samples": {part.name or config.evaluation.split: len(part.examples) for part in parts},
        "step": run.state.progress.step,
        "evaluation": config.evaluation.model_dump(mode="json"),
        "zero_stage": stage,
        "world_size": world.size,
    }
    run_on_rank_zero(world, lambda: write_file(output / METRICS, json.dumps(result, indent=2) + "\n"))
    dist.destroy_process_group()
    return result


def free_folder(run: Path) -> Path:
    """``RUN/evaluation-1``, or with the next number that is free."""
    number = 1
    while (run / f"evaluation-{number}").exists():
        number += 1
    return run / f"evaluation-{number}"
