"""Everything that can be wrong before torch is imported: settings, data, the run folder."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_llm_ft.config import RunConfig, check_steps, check_world
from sparse_llm_ft.data.reading import Example, check_task, has_split, read_split
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.distributed import World
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.training.run_folder import RunFolder
from sparse_llm_ft.training.schedule import Schedule


@dataclass(frozen=True)
class Prepared:
    """A run whose settings, data and folder are in order.

    Attributes:
        task: the registry's, with the config's settings in place.
        validation: empty unless `training.eval_every` asks for it.
        measured: the subset for ``metrics.before`` and ``metrics.after``; may be empty.
    """

    config: RunConfig
    world: World
    folder: RunFolder
    train: list[Example]
    validation: list[Example]
    measured: list[Example]
    schedule: Schedule
    task: Task


def prepare(config: RunConfig, world: World) -> Prepared:
    """Check and read what a run needs besides the model. Changes nothing on disk.

    Raises:
        UserError: whatever is wrong first.
    """
    folder = RunFolder(config.output_dir)
    check_world(config, world.size, resumes=folder.has_checkpoints())
    folder.check(config)
    train = read_split(config.task, "train")
    schedule = Schedule(config.training, len(train))
    check_steps(config, schedule.total_steps)
    validation: list[Example] = []
    if config.training.eval_every is not None:
        if not has_split(config.task, "validation"):
            raise ConfigError(
                "training.eval_every",
                f"{config.training.eval_every}, but there is no validation split in {config.task.path}",
                "expected validation.jsonl there, or no eval_every",
            )
        validation = read_split(config.task, "validation")
    measured: list[Example] = []
    if config.evaluation.samples:
        if not has_split(config.task, config.evaluation.split):
            raise ConfigError(
                "evaluation.split",
                f"{config.task.path} has no {config.evaluation.split}.jsonl",
                "expected a split that is there, or evaluation.samples=0",
            )
        measured = read_split(config.task, config.evaluation.split)[: config.evaluation.samples]
    return Prepared(config, world, folder, train, validation, measured, schedule, check_task(config.task))
