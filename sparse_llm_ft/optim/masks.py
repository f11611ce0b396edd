"""Masks of trained entries, in the form that the sharded optimizer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sparse_llm_ft.plan import IndexMask
from sparse_llm_ft.plan_masks import EntryBits


class Mask(Protocol):
    """Which entries of a parameter are trained."""

    def indices(self, start: int, stop: int) -> torch.Tensor:
        """The kept entries among `start` to `stop` of the flattened parameter: ascending, counted from `start`."""
        ...


@dataclass(frozen=True)
class EntryMask:
    """An element-wise mask: a bool tensor of the parameter's shape."""

    entries: torch.Tensor

    def indices(self, start: int, stop: int) -> torch.Tensor:
        """See `Mask.indices`."""
        return self.entries.reshape(-1)[start:stop].nonzero().flatten()


@dataclass(frozen=True)
class PackedMask:
    """An element-wise mask as a plan holds it."""

    entries: EntryBits

    def indices(self, start: int, stop: int) -> torch.Tensor:
        """See `Mask.indices`. Unpacks entries `start` to `stop` alone."""
        return torch.from_numpy(np.flatnonzero(self.entries.flags(start, stop)))


@dataclass(frozen=True)
class RowColumnMask:
    """The kept rows (dimension 0) or columns (1) of a matrix with `width` columns; a vector is one column."""

    dimension: int
    kept: IndexMask
    width: int

    def indices(self, start: int, stop: int) -> torch.Tensor:
        """See `Mask`. Needs memory for entries `start` to `stop`, not for the parameter."""
        if start >= stop:
            return torch.zeros(0, dtype=torch.long)
        first, last = start // self.width, (stop - 1) // self.width
        rows, cols, kept = torch.arange(first, last + 1), torch.arange(self.width), torch.tensor(self.kept.indices)
        if self.dimension == 0:
            rows = kept[(kept >= first) & (kept <= last)]
        else:
            cols = kept
        flat = (rows[:, None] * self.width + cols).flatten()
        return flat[(flat >= start) & (flat < stop)] - start

    def select(self, matrix: torch.Tensor) -> torch.Tensor:
        """The kept rows or columns of a full matrix."""
        return matrix.index_select(self.dimension, torch.tensor(self.kept.indices, device=matrix.device))
