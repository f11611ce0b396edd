"""Reads a run from its folder, finished or not: its newest checkpoint and the trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sparse_llm_ft.adapters import add_adapters, trained_parameters
from sparse_llm_ft.adapters.masking import fill_rows, row_masks, to_full
from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.checkpoint.store import checkpoint_folder, load_checkpoint, newest_valid
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.config.schema import DeepSpeedConfig
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.distributed.world import ONE_PROCESS, World
from sparse_llm_ft.errors import CheckpointError, UserError
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.linear import restore_transposed
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan
from sparse_llm_ft.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class TrainedRun:
    """A run and its newest usable checkpoint; under `training.keep_best`, the best one so far.

    Attributes:
        config: the run's original settings; data and relative paths may have moved.
        context: the run's context, opened again.
        phase, state: from the checkpoint; the state's tensors are float32 and have kept rows and columns only.
        complaints: a line about each newer checkpoint that cannot be used.
    """

    folder: RunFolder
    config: RunConfig
    context: RunContext
    phase: Phase
    state: TrainState
    complaints: tuple[str, ...]

    @property
    def task(self) -> Task:
        """The resolved task."""
        return self.context.task

    @property
    def task_mode(self) -> TaskMode:
        """The task mode of training."""
        return self.context.task_mode

    @property
    def empty(self) -> PreTrainedModel:
        """The base on the meta device."""
        return self.context.empty

    @property
    def plan(self) -> AdapterPlan:
        """The plan of the checkpoint's phase."""
        return self.phase.plan

    @property
    def full(self) -> bool:
        """Whether the base itself was trained, without adapters."""
        return FULL_MODEL in self.plan.trained


def read_run(
    path: str,
    config: RunConfig | None = None,
    world: World = ONE_PROCESS,
    trust_remote_code: bool = False,
    broadcast: Callable[[int], int] = int,
    console: Console | None = None,
) -> TrainedRun:
    """Open the run in `path` and find its newest usable checkpoint. Reads no weights of the base.

    Args:
        config: replaces the run's settings; None means `in_one_process` of them.
        trust_remote_code: whether the base's own code may run. The folder's config.yaml cannot allow it, since the
            folder is untrusted.
        broadcast: returns rank 0's value, so that all processes load the same step.
        console: as in `RunContext.open`.

    Raises:
        UserError: there is no run, no checkpoint or no base, or the base's code is not allowed.
    """
    # The settings.
    folder = open_run(path)
    stored = folder.config()
    config = in_one_process(stored) if config is None else config
    if config.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{path}: its config.yaml sets model.trust_remote_code, which would run code of {config.model.name} here; "
            "give --trust-remote-code if you trust it"
        )

    # The checkpoint: every process loads rank 0's step.
    context = RunContext.open(config, world, resolve_task(config.task), begun=True, console=console)
    found, complaints = newest_valid(folder.checkpoints, context.expected, folder.stored_identity())
    if found is None:
        raise UserError("; ".join((*complaints, f"{path}: no usable checkpoint")))
    best = found.state.record.best
    kept = best.step if stored.training.keep_best and best is not None and best.value is not None else found.step
    step = broadcast(kept)
    if step != found.step:  # the best one; or the run is still training and has saved another checkpoint
        try:
            found = load_checkpoint(checkpoint_folder(folder.checkpoints, step), context.expected)
        except CheckpointError as error:
            raise UserError(f"{error}; try again") from error
    return TrainedRun(folder, stored, context, found.phase, found.state, tuple(complaints))


def in_one_process(config: RunConfig) -> RunConfig:
    """The settings for one process: no DeepSpeed, the model's default attention, and no copy of its files."""
    model = config.model.model_copy(
        update={"gradient_checkpointing": False, "attn_implementation": None, "stage_to": None}
    )
    return config.model_copy(update={"model": model, "deepspeed": DeepSpeedConfig(zero_stage=0)})


def load_trained(run: TrainedRun, dequantize: bool = False) -> PeftModel:
    """The base with the run's adapters and head, in evaluation mode, on this process's device.

    The checkpoint's plan determines the adapters, so every phase and tuner works.

    Args:
        dequantize: turn a 4-bit base into ``dequantise(quantise(W))`` in ``model.dtype``, the weights of training.

    Raises:
        UserError: the base cannot be loaded, or the checkpoint lacks a trained tensor.
    """
    settings = run.context.config.model
    with Wait(run.context.console, "loading", unit="bytes") as wait:
        base = load_model(settings, run.task_mode, run.config.seed, wait)
    if dequantize and settings.quantization != "none":
        base.dequantize()
        restore_transposed(base, run.empty)
    model = add_adapters(base, run.plan)
    values = to_full(run.plan, run.state.tensors)
    parameters = trained_parameters(model)
    if missing := sorted(parameters.keys() - values.keys()):
        raise UserError(f"{run.folder.path}: the newest checkpoint has no value for {missing[0]}")
    rows = row_masks(run.plan)
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = values[name]
            parameter.copy_(fill_rows(rows[name], value, parameter) if name in rows else value)
    return model.eval()
