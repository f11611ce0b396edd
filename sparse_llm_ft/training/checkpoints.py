"""The checkpoints of a run: which is the newest that can be trusted, and how many stay."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from sparse_llm_ft.errors import CheckpointError
from sparse_llm_ft.folders import verify_folder
from sparse_llm_ft.state import TrainState


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """``checkpoints/step-00000100``."""
    return checkpoints / f"step-{step:08d}"


def newest_first(checkpoints: Path) -> Iterator[Path]:
    """The checkpoint folders, the one with the most steps first."""
    yield from sorted(checkpoints.glob("step-????????"), reverse=True)


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes its checksums, and a line about each newer one that does not."""
    complaints = []
    for folder in newest_first(checkpoints):
        try:
            TrainState.load(folder)
        except CheckpointError as error:
            complaints.append(f"{error}; using the checkpoint before it")
        else:
            return folder, complaints
    return None, complaints


def save_checkpoint(checkpoints: Path, state: TrainState, keep: int | None) -> None:
    """Write the state as a checkpoint, unless a good one of its step is there, and drop all but the newest `keep`."""
    folder = checkpoint_folder(checkpoints, state.progress.step)
    try:
        verify_folder(folder)
    except CheckpointError:
        state.save(folder)
    if keep is not None:
        for old in list(newest_first(checkpoints))[keep:]:
            shutil.rmtree(old)
