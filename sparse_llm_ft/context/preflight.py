"""Checks everything that can be checked without torch: settings, data files, the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from sparse_llm_ft.config import RunConfig, check_world
from sparse_llm_ft.config.schema import LOSS
from sparse_llm_ft.data.reading import check_columns, check_references, has_split
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError, reaching
from sparse_llm_ft.evaluation.metrics import numbers_of
from sparse_llm_ft.model.base_files import stage_folder
from sparse_llm_ft.run_folder import RunFolder


def preflight(config: RunConfig, world: World) -> Task:
    """Check everything that a run needs except the model. Reads the first row of each split, and writes nothing.

    Returns:
        The task with the config's settings, for `RunContext.open`.

    Raises:
        UserError: the first thing that is wrong.
    """
    folder = RunFolder(config.output_dir)
    with reaching("output_dir"):
        resumes = folder.has_checkpoints()
    check_world(config, world.size, resumes)
    folder.check(config)
    _check_trackers(config.trackers)
    task = resolve_task(config.task)
    check_columns(task, "train")
    if config.training.eval_every is not None:
        if not has_split(task, "validation"):
            raise ConfigError(
                "training.eval_every",
                f"{config.training.eval_every}, but there is no validation split in {config.task.path}",
                "expected a file validation.jsonl (or .json, .csv, ...) there, or no eval_every",
            )
        check_columns(task, "validation")
    _check_best(config, task)
    if config.evaluation.samples:
        check_eval_splits(config, task)
    return task


def check_node(config: RunConfig) -> None:
    """Check what only a node that trains can; a login node may lack the variables in ``model.stage_to``.

    Raises:
        ConfigError: naming the setting.
    """
    if config.model.stage_to is not None:
        stage_folder(config.model.stage_to)


def _check_best(config: RunConfig, task: Task) -> None:
    """Refuse a metric that no validation gives."""
    training, known = config.training, (LOSS, *numbers_of(task.metrics))
    stopping = training.early_stopping
    asked = {"training.keep_best": training.keep_best, "training.early_stopping.metric": stopping and stopping.metric}
    for setting, metric in asked.items():
        if metric is None:
            continue
        if metric not in known:
            raise ConfigError(setting, repr(metric), f"expected one of {', '.join(known)}")
        if training.eval_every is None:
            raise ConfigError(setting, f"{metric}, but nothing is validated", "expected training.eval_every beside it")
        if metric != LOSS and not config.evaluation.samples:
            raise ConfigError(
                setting, f"{metric}, and evaluation.samples is 0", f"expected {LOSS}, or samples to take it on"
            )
    if training.keep_best and stopping and training.keep_best != stopping.metric:
        raise ConfigError(
            "training.early_stopping.metric",
            f"{stopping.metric}, and training.keep_best is {training.keep_best}",
            "expected the same",
        )


def check_eval_splits(config: RunConfig, task: Task) -> None:
    """Check the split that is evaluated, and those evaluated with it.

    Raises:
        UserError: a split does not exist, or its first row cannot be used.
    """
    split = config.evaluation.split
    for further in (None, *task.further_splits):
        if not has_split(task, split, further):
            name = f"{split} ({further})" if further else split
            raise ConfigError(
                "evaluation.split",
                f"{config.task.path or task.hub_id} has no split {name}",
                "expected one that is there, or evaluation.samples=0",
            )
        check_columns(task, split, further)
    check_references(task, split, config.task.references or ())


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is named twice, or whose library is missing."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("trackers", f"{name} twice", "expected each once")
        if find_spec(name) is None:
            raise ConfigError(
                "trackers", f"{name} is not installed", f"expected pip install {name}, or trackers without it"
            )
