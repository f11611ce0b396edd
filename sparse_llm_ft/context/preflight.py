"""Everything that can be wrong before torch is imported: settings, where data lie, the run folder."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_llm_ft.config import RunConfig, check_steps, check_world
from sparse_llm_ft.data.reading import check_columns, check_references, has_split, resolve_task
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.run_folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """A run whose settings, data and folder are in order, as far as a first look shows.

    Attributes:
        task: the registry's, with the config's settings in place.
    """

    config: RunConfig
    world: World
    folder: RunFolder
    task: Task


def prepare(config: RunConfig, world: World) -> Prepared:
    """Check what a run needs besides the model; of each split that it reads, the first row. Changes nothing on disk.

    Raises:
        UserError: whatever is wrong first.
    """
    folder = RunFolder(config.output_dir)
    check_world(config, world.size, resumes=folder.has_checkpoints())
    folder.check(config)
    task = resolve_task(config.task)
    check_columns(config.task, "train")
    check_steps(config, config.training.max_steps)
    if config.training.eval_every is not None:
        if not has_split(config.task, "validation"):
            raise ConfigError(
                "training.eval_every",
                f"{config.training.eval_every}, but there is no validation split in {config.task.path}",
                "expected a file validation.jsonl (or .json, .csv, ...) there, or no eval_every",
            )
        check_columns(config.task, "validation")
    if config.evaluation.samples:
        check_measured(config, task)
    return Prepared(config, world, folder, task)


def check_measured(config: RunConfig, task: Task) -> None:
    """Look at the split that is measured, and at those measured beside it.

    Raises:
        UserError: it is not there, or its first row cannot be used.
    """
    split = config.evaluation.split
    for further in (None, *task.further_splits):
        if not has_split(config.task, split, further):
            name = f"{split} ({further})" if further else split
            raise ConfigError(
                "evaluation.split",
                f"{config.task.path or task.hub_id} has no split {name}",
                "expected one that is there, or evaluation.samples=0",
            )
        check_columns(config.task, split, further)
    check_references(config.task, split)
