"""A run's checkpoints: finds the newest valid one, and removes old ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.checkpoint.validation import Expected, validate_state
from sparse_llm_ft.distributed.collectives import broadcast_int, run_long_on_rank_zero, run_on_every_rank
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import AWAY, CheckpointError, DivergedError, TrainingError, UserError, may_pass
from sparse_llm_ft.io.atomic import remove_folder, restore_replaced
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import PlanError
from sparse_llm_ft.run_folder import RunFolder

_NAME = re.compile(r"step-[0-9]{8}")
_LISTINGS = 5
"""How often a folder is listed, at most, whose run removes checkpoints meanwhile."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its state and the state's phase."""

    folder: Path
    state: TrainState
    phase: Phase

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self.state.progress.step


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """The folder of a step: ``checkpoints/step-00000100``."""
    return checkpoints / f"step-{step:08d}"


def newest_first(checkpoints: Path) -> Iterator[Path]:
    """The checkpoint folders; the one with the most steps comes first."""
    yield from sorted((path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def newest_valid(
    checkpoints: Path, real: Expected | None = None, run: str | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be used, and a line about each newer one that cannot.

    Args:
        real, run: as in `load_checkpoint`.
    """
    complaints: list[str] = []
    for left in reversed(range(_LISTINGS)):
        complaints = []
        for folder in newest_first(checkpoints):
            try:
                return load_checkpoint(folder, real, run), complaints
            except CheckpointError as error:
                if left and not (folder.exists() or folder.is_symlink()):
                    break  # the run still trains, and has removed it: there are newer ones
                complaints.append(f"{error}; using the checkpoint before it")
        else:
            break
    return None, complaints


def load_checkpoint(folder: Path, real: Expected | None = None, run: str | None = None) -> Checkpoint:
    """Verify and read one checkpoint.

    Args:
        real: the model's modules and shapes; the checkpoint is compared with them before anything is built. None
            without a model: then the checkpoint is only checked against itself.
        run: `RunFolder.identity` of the run that must have written it; None: any run.

    Raises:
        CheckpointError: with the reason why no run can continue from it.
        TrainingError: the file server is away, so that nothing is known of it.
    """
    try:
        state = TrainState.load(folder)
    except (OSError, SafetensorError) as error:
        if not folder.exists():
            raise CheckpointError(f"{folder}: was removed while it was read") from error
        if not may_pass(error):
            raise
        raise TrainingError(f"{folder}: {error}; {AWAY}") from error
    if run is not None and state.record.run != run:
        raise CheckpointError(f"{folder}: belongs to a run with other settings")
    try:
        phase = Phase.from_dict(state.phase, None if real is None else real.targets)
        if real is not None:
            validate_state(state, phase, real)
    except PlanError as error:
        raise CheckpointError(f"{folder}: its phase is not readable ({error})") from None
    if _NAME.fullmatch(folder.name) and folder.name != checkpoint_folder(folder.parent, state.progress.step).name:
        raise CheckpointError(f"{folder}: its state is of step {state.progress.step}")
    return Checkpoint(folder, state, phase)


def save_checkpoint(checkpoints: Path, state: TrainState, keep: int | None, protect: int | None = None) -> None:
    """Write the state as a checkpoint, unless it is already there, and remove all but the newest `keep`.

    Folders of later steps, found damaged when the run was resumed, are neither counted nor removed.

    Args:
        protect: a step whose checkpoint stays in any case.

    Raises:
        DivergedError: a value is not finite; nothing is written.
    """
    folder = checkpoint_folder(checkpoints, state.progress.step)
    if not state.is_saved(folder):
        _check_finite(state)
        state.save(folder)
    if keep is not None:
        kept = None if protect is None else checkpoint_folder(checkpoints, protect).name
        for old in [other for other in newest_first(checkpoints) if other.name <= folder.name][keep:]:
            if old.name == kept:
                continue
            if old.is_symlink():
                old.unlink()  # its target is not ours
            else:
                remove_folder(old)  # what it leaves is tried again at the next save


def _check_finite(state: TrainState) -> None:
    named = [*state.tensors.items(), *((n, t) for n, moments in state.moments.items() for t in moments.values())]
    named += state.callback_tensors.items()
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(
                f"step {state.progress.step} is not saved: {name} or a moment of it is not finite; lower "
                "training.learning_rate; the last checkpoint is intact"
            )


def newest_state(folder: RunFolder, run: str, world: World, console: Console, real: Expected) -> TrainState | None:
    """Collective. The newest valid checkpoint's state; None where there is none. Rank 0 chooses the checkpoint, and
    every rank reads it once.

    Args:
        run: whose checkpoint it must be (`RunFolder.identity`).
        real: what a checkpoint's claims are held against.

    Raises:
        UserError: there are checkpoints, and none can be used.
    """
    found: list[Checkpoint] = []

    def choose() -> None:
        restore_replaced(folder.checkpoints, _NAME)  # of a process that was killed while it replaced a checkpoint
        newest, complaints = newest_valid(folder.checkpoints, real, run)
        if newest is None and complaints:
            raise UserError(
                f"no checkpoint can be used ({complaints[0].rpartition(';')[0]}); "
                f"to start over, choose another output_dir than {folder.path}"
            )
        for complaint in complaints:
            console.log(complaint)
        if newest is not None:
            found.append(newest)

    def read() -> None:
        if not found:
            found.append(load_checkpoint(checkpoint_folder(folder.checkpoints, step), real, run))

    run_long_on_rank_zero(world, choose)
    step = broadcast_int(found[0].step if found else -1)
    if step < 0:
        return None
    console.log(f"resuming from step {step}")
    run_on_every_rank(read, "all nodes must share the file system of output_dir")
    return found[0].state
