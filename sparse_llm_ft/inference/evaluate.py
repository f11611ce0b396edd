"""Evaluates a trained run: possibly on other samples, ranks or another ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparse_llm_ft.data.dataset import SplitBuilder, remarks_of
from sparse_llm_ft.distributed.collectives import coordinate, run_on_rank_zero
from sparse_llm_ft.engine.build import build_model, engine_settings
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.inference.trained_run import TrainedRun
from sparse_llm_ft.io.atomic import draft_of, new_folder, rename_numbered, write_file
from sparse_llm_ft.model.loading import check_weights

METRICS_FILE, PREDICTIONS_FILE = "metrics.json", "predictions.jsonl"


def evaluate(run: TrainedRun, output: Path) -> Mapping[str, Any]:
    """Collective. Evaluate the run's newest checkpoint with the same engine and model as in training.

    Processes must be connected (`process_group`).

    Args:
        run: opened with the evaluation's settings.
        output: folder for ``metrics.json`` and ``predictions.jsonl``; it has this name when both are in it.

    Returns:
        The contents of ``metrics.json``: ``metrics``, ``split``, ``samples`` of each part, ``step``, and the settings
        that the numbers depend on.

    Raises:
        UserError: data or weights cannot be used, or the folder came into being meanwhile.
    """
    with ExitStack() as opened:
        draft: list[Path] = []  # rank 0's
        run_on_rank_zero(run.context.world, lambda: draft.append(opened.enter_context(new_folder(output))))
        result = _measure(run, *(draft or [output]))
        run_on_rank_zero(run.context.world, opened.close)
    return result


def evaluate_again(run: TrainedRun, folder: Path) -> tuple[Mapping[str, Any], Path]:
    """Collective. `evaluate` into ``folder/evaluation-N``. The number N is chosen when all is measured, so that several
    evaluations of one run may be under way.

    Returns:
        What `evaluate` does, and the new folder; on other ranks than 0 `folder` itself.
    """
    world, stem = run.context.world, folder / "evaluation"
    found: list[Path] = []
    with ExitStack() as opened:
        draft: list[Path] = []  # rank 0's
        run_on_rank_zero(world, lambda: draft.append(opened.enter_context(draft_of(stem))))
        result = _measure(run, *(draft or [stem]))
        run_on_rank_zero(world, lambda: found.append(rename_numbered(draft[0], stem)))
    return result, (found or [folder])[0]


def _measure(run: TrainedRun, output: Path) -> dict[str, Any]:
    """Collective. Measure, and let rank 0 write both files into the folder `output`. Returns ``metrics.json``."""
    # Data.
    ranks = coordinate(run.context.world, "reading and tokenising the data")
    context = run.context.dated(ranks.broadcast)
    config, world = context.config, context.world
    check_weights(config.model)
    builder = SplitBuilder(config, context.task, context.tokenizer, context.task_mode, ranks, context.embeddings)
    parts = builder.measured()
    for line in remarks_of(parts, config.task):
        context.console.log(line)

    # The model with the checkpoint's state in an engine.
    settings = engine_settings(config, run.phase.with_batch(1, world.size), world.size)
    model = build_model(config, context.task_mode, run.plan, settings.to_deepspeed(), world, context.console)
    engine = Engine(model, settings, run.plan)
    engine.load_state_dict(run.state.engine_state)

    # Metrics.
    metrics = context.evaluator(parts)(engine.module, output / PREDICTIONS_FILE)
    engine.close()
    result = {
        "metrics": metrics,
        "split": config.evaluation.split,
        "samples": {part.name or config.evaluation.split: len(part.examples) for part in parts},
        "step": run.state.progress.step,
        "evaluation": config.evaluation.model_dump(mode="json"),
        "zero_stage": config.deepspeed.zero_stage,
        "world_size": world.size,
    }
    run_on_rank_zero(world, lambda: write_file(output / METRICS_FILE, json.dumps(result, indent=2) + "\n"))
    return result
