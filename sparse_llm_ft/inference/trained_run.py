"""A run read from its folder, finished or not: what its newest checkpoint trained, and the model with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sparse_llm_ft.adapters import add_adapters, trained_parameters
from sparse_llm_ft.adapters.masking import to_full
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
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan
from sparse_llm_ft.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class TrainedRun:
    """A run and the newest of its checkpoints that can be used.

    Attributes:
        config: the settings that the run began with; data and relative paths need not be where they were.
        context: the run, opened again.
        phase, state: of the checkpoint; the state's tensors are float32 and hold kept rows and columns alone.
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
        """The task, with the settings in place."""
        return self.context.task

    @property
    def task_mode(self) -> TaskMode:
        """How the model learned the task."""
        return self.context.task_mode

    @property
    def empty(self) -> PreTrainedModel:
        """The base on the meta device."""
        return self.context.empty

    @property
    def plan(self) -> AdapterPlan:
        """What the checkpoint's phase trains."""
        return self.phase.plan

    @property
    def full(self) -> bool:
        """Whether the base itself was trained, so that there is no adapter."""
        return FULL_MODEL in self.plan.trained


def read_run(
    path: str,
    config: RunConfig | None = None,
    world: World = ONE_PROCESS,
    trust_remote_code: bool = False,
    agree: Callable[[int], int] = int,
) -> TrainedRun:
    """Open the run in `path` and find its newest usable checkpoint. Reads no weights of the base.

    Args:
        config: the run's settings with others in their place; None: `in_one_process` of them.
        trust_remote_code: whether code that the base brings along may run here. The folder's own config.yaml cannot
            allow it: the folder may be a stranger's.
        agree: makes of this process's newest step the one that all of several processes take.

    Raises:
        UserError: no run, no checkpoint, a base that is not there, or one whose code nobody here has allowed.
    """
    folder = open_run(path)
    stored = folder.config()
    config = in_one_process(stored) if config is None else config
    if config.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{path}: its config.yaml sets model.trust_remote_code, so code that {config.model.name} brings along "
            "would run here; give --trust-remote-code if you trust it"
        )
    context = RunContext.open(config, world, resolve_task(config.task))
    found, complaints = newest_valid(folder.checkpoints, context.expected, RunFolder.identity(stored))
    if found is None:
        raise UserError("; ".join((*complaints, f"{path}: no checkpoint can be used")))
    step = agree(found.step)
    if step != found.step:  # the run continues, and has saved another checkpoint meanwhile
        try:
            found = load_checkpoint(checkpoint_folder(folder.checkpoints, step), context.expected)
        except CheckpointError as error:
            raise UserError(f"{error}; try again") from error
    return TrainedRun(folder, stored, context, found.phase, found.state, tuple(complaints))


def in_one_process(config: RunConfig) -> RunConfig:
    """The settings without what one process here may lack: no DeepSpeed, and the model's default attention."""
    model = config.model.model_copy(update={"gradient_checkpointing": False, "attn_implementation": None})
    return config.model_copy(update={"model": model, "deepspeed": DeepSpeedConfig(zero_stage=0)})


def load_trained(run: TrainedRun, dequantize: bool = False) -> PeftModel:
    """The base with the run's adapters and heads on it, in evaluation mode, on this process's device.

    The adapters are built from the checkpoint's plan, so any phase and any tuner will do.

    Args:
        dequantize: turn a base that was trained on in 4 bit into ``W = dequantise(quantise(W))`` in `model.dtype`, the
            weights that training saw.

    Raises:
        UserError: the base cannot be loaded, or the checkpoint lacks a trained tensor.
    """
    settings = run.context.config.model
    base = load_model(settings, run.task_mode, run.config.seed)
    if dequantize and settings.quantization != "none":
        base.dequantize()
    model = add_adapters(base, run.plan)
    values = to_full(run.plan, run.state.tensors)
    parameters = trained_parameters(model)
    if missing := sorted(parameters.keys() - values.keys()):
        raise UserError(f"{run.folder.path}: the newest checkpoint has no value for {missing[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    return model.eval()
