"""Where a run is: four integers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps done in the whole run.
        samples: training samples consumed; the run's place in its data.
        phase: index of the current phase, from 0.
        phase_step: optimizer steps done in it.
    """

    step: int = 0
    samples: int = 0
    phase: int = 0
    phase_step: int = 0
