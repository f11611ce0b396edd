"""Logs the numbers of each step to metrics.jsonl, TensorBoard and other trackers."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_llm_ft.run_folder import RunFolder
from sparse_llm_ft.training.trackers import Trackers


class MetricsLogger:
    """Writes on rank 0; does nothing on other ranks.

    Args:
        step: the last step done. TensorBoard drops later ones, which a resumed run repeats.
        trackers: the run's; they outlive this object.
        tensorboard: whether events are written.
    """

    def __init__(self, folder: RunFolder, rank: int, step: int, trackers: Trackers, tensorboard: bool) -> None:
        self.folder = folder if rank == 0 else None
        self.step = step
        self.trackers = trackers
        self.tensorboard = tensorboard and rank == 0

    def open(self) -> None:
        """Begin a file of events.

        Raises:
            OSError: the file cannot be written; `write` and `close` raise the same.
        """
        if self.tensorboard:
            assert self.folder is not None
            from torch.utils.tensorboard import SummaryWriter  # only rank 0 needs it

            self.events = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self.step + 1)

    def write(self, line: Mapping[str, object]) -> None:
        """Log one step. Every number becomes a TensorBoard curve, except ``step`` and ``phase``."""
        if self.folder is None:
            return
        self.folder.log(line)
        step = line["step"]
        assert isinstance(step, int)
        self.trackers.log(step, {key: value for key, value in line.items() if key != "step"})
        if not self.tensorboard:
            return
        for key, value in line.items():
            if isinstance(value, Mapping):  # omega by module
                for name, part in value.items():
                    self.events.add_scalar(f"{key}/{name}", part, step)
            elif key not in ("step", "phase") and value is not None:
                self.events.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush the events."""
        if self.tensorboard:
            self.events.close()
