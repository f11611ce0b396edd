"""Where a run is, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Counters of a run. A checkpoint holds them.

    Attributes:
        step: optimizer steps done.
        samples: samples consumed.
        phase: number of the current phase, from 0.
        phase_step: optimizer steps done in the current phase.
        phase_skipped: those of them whose update was skipped.
        start_step, start_samples: where the counted part of the run began: what precedes it (a pilot) has a length
            and a schedule of its own, and the data begin anew after it.
    """

    step: int = 0
    samples: int = 0
    phase: int = 0
    phase_step: int = 0
    start_step: int = 0
    start_samples: int = 0
    phase_skipped: int = 0

    @property
    def phase_updates(self) -> int:
        """Updates made in the current phase: what its length and its rule go by, so that a last cut is never missed."""
        return self.phase_step - self.phase_skipped

    @property
    def counted_steps(self) -> int:
        """Steps done of the part that counts."""
        return self.step - self.start_step

    @property
    def position(self) -> int:
        """Samples consumed of the part that counts: the place in the data."""
        return self.samples - self.start_samples
