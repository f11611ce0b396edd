"""The checkpoints of a run: which is the newest that can be trusted, and how many stay."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from sparse_llm_ft.errors import CheckpointError, TrainingError
from sparse_llm_ft.methods import Phase
from sparse_llm_ft.plan import PlanError
from sparse_llm_ft.state import TrainState


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """``checkpoints/step-00000100``."""
    return checkpoints / f"step-{step:08d}"


def newest_first(checkpoints: Path) -> Iterator[Path]:
    """The checkpoint folders, the one with the most steps first."""
    yield from sorted(checkpoints.glob("step-????????"), reverse=True)


def newest_valid(checkpoints: Path, run: str | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be used, and a line about each newer one that cannot.

    Args:
        run: see `load_checkpoint`.
    """
    complaints = []
    for folder in newest_first(checkpoints):
        try:
            load_checkpoint(folder, run)
        except CheckpointError as error:
            complaints.append(f"{error}; using the checkpoint before it")
        else:
            return folder, complaints
    return None, complaints


def load_checkpoint(folder: Path, run: str | None = None) -> tuple[TrainState, Phase]:
    """The state and its phase.

    Args:
        run: the only run, by `RunFolder.identity`, whose checkpoint it may be; None: any.

    Raises:
        CheckpointError: anything about the folder that keeps a run from going on from it.
    """
    state = TrainState.load(folder)
    if folder.name != checkpoint_folder(folder.parent, state.progress.step).name:
        raise CheckpointError(f"{folder}: holds step {state.progress.step}")
    if run is not None and state.record.get("run") != run:
        raise CheckpointError(f"{folder}: belongs to a run with other settings")
    try:
        return state, Phase.from_dict(state.phase)
    except (PlanError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its phase is not readable ({error})") from None


def save_checkpoint(checkpoints: Path, state: TrainState, keep: int | None) -> None:
    """Write the state as a checkpoint, unless a good one of its step is there, and drop all but the newest `keep`.

    A folder of a later step was found damaged when the run was resumed; it neither counts as kept nor is it removed.

    Raises:
        TrainingError: a value is not finite; nothing is written.
    """
    folder = checkpoint_folder(checkpoints, state.progress.step)
    try:
        load_checkpoint(folder, state.record.get("run"))
    except CheckpointError:
        _check_finite(state)
        state.save(folder)
    if keep is not None:
        for old in [other for other in newest_first(checkpoints) if other.name <= folder.name][keep:]:
            shutil.rmtree(old)


def _check_finite(state: TrainState) -> None:
    named = [*state.tensors.items(), *((n, t) for n, moments in state.moments.items() for t in moments.values())]
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"step {state.progress.step} is not saved: {name} or a moment of it is not finite; lower "
                "training.learning_rate; the last checkpoint is intact"
            )
