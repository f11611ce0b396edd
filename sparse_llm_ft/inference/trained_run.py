"""A run read from its folder, finished or not: what its newest checkpoint trained, and the model with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sparse_llm_ft.adapters import add_adapters, linear_modules, trained_parameters
from sparse_llm_ft.adapters.masking import to_whole
from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.checkpoint.store import checkpoint_folder, load_checkpoint, newest_valid
from sparse_llm_ft.checkpoint.validation import Expected
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.data.reading import resolve_task
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.errors import CheckpointError, UserError
from sparse_llm_ft.export.options import open_run
from sparse_llm_ft.model.architecture import TaskMode
from sparse_llm_ft.model.loading import empty_model, find_model_task_mode, load_model
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan
from sparse_llm_ft.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedRun:
    """A run and the newest of its checkpoints that can be used.

    Attributes:
        config: the settings it began with; data and relative paths need not be where they were.
        use: how the model learned the task.
        empty: the base on the meta device.
        phase, state: of the checkpoint; the state's tensors are float32 and hold kept rows and columns alone.
        complaints: a line about each newer checkpoint that cannot be used.
    """

    folder: RunFolder
    config: RunConfig
    task: Task
    task_mode: TaskMode
    empty: PreTrainedModel
    phase: Phase
    state: TrainState
    complaints: tuple[str, ...]

    @property
    def plan(self) -> AdapterPlan:
        """What the checkpoint's phase trains."""
        return self.phase.plan

    @property
    def full(self) -> bool:
        """Whether the base itself was trained, so that there is no adapter."""
        return FULL_MODEL in self.plan.trained


def read_run(path: str, agree: Callable[[int], int] = int) -> TrainedRun:
    """Find the newest usable checkpoint of the run in `path`; no weights of the base are read.

    Args:
        agree: makes of this process's newest step the one that all of several processes take.

    Raises:
        UserError: no run, no checkpoint, or a base that is not there.
    """
    folder = open_run(path)
    config = folder.config()
    task = resolve_task(config.task)
    task_mode = find_model_task_mode(config.model, task, config.task.mode)
    empty = empty_model(config.model, task_mode=task_mode)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    real = Expected(linear_modules(empty), shapes, len(config.method))
    newest, complaints = newest_valid(folder.checkpoints, real, RunFolder.identity(config))
    if newest is None:
        raise UserError("; ".join((*complaints, f"{path}: no checkpoint can be used")))
    step = agree(int(newest.name.removeprefix("step-")))
    try:
        state, phase = load_checkpoint(checkpoint_folder(folder.checkpoints, step), real)
    except CheckpointError as error:  # the run goes on, and has removed it meanwhile
        raise UserError(f"{error}; try again") from error
    return TrainedRun(folder, config, task, task_mode, empty, phase, state, tuple(complaints))


def load_trained(run: TrainedRun, dequantize: bool = False) -> PeftModel:
    """The base with the run's adapters and heads on it, in evaluation mode, on this process's device.

    The adapters are built from the checkpoint's plan, so any phase and any tuner will do.

    Args:
        dequantize: turn a base that was trained on in 4 bit into ``W = dequantise(quantise(W))`` in `model.dtype`, the
            weights that training saw.

    Raises:
        UserError: the base cannot be loaded, or the checkpoint lacks a trained tensor.
    """
    # Neither changes what is computed, and the second may ask for hardware that is not here.
    settings = run.config.model.model_copy(update={"gradient_checkpointing": False, "attn_implementation": None})
    base = load_model(settings, run.task_mode, run.config.seed)
    if dequantize and settings.quantization != "none":
        base.dequantize()
    model = add_adapters(base, run.plan)
    values = to_whole(run.plan, run.state.tensors)
    parameters = trained_parameters(model)
    if missing := sorted(parameters.keys() - values.keys()):
        raise UserError(f"{run.folder.path}: the newest checkpoint has no value for {missing[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    return model.eval()
