"""Dropout that is drawn again in backward from its seed, so that no mask is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SeededDropout:
    """Dropout of one forward pass: each entry is dropped with probability `p`, independently.

    The factor 1 / (1 - p) on the entries that stay is left to the caller, who has another factor to apply anyway.
    """

    p: float
    seed: int

    @classmethod
    def draw(cls, p: float) -> SeededDropout:
        """A seed from torch's CPU generator, whatever the device: reading it waits for no GPU."""
        return cls(p, int(torch.randint(2**62, (1,))))

    def mask(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Mask:
        """What is dropped of values (shape) of a floating-point type: the same at every call."""
        if device.type == "meta":
            return Mask(None, None)
        generator = torch.Generator(device).manual_seed(self.seed)
        if device.type == "cpu" and self.p <= 0.25:
            return Mask(None, _dropped(math.prod(shape), self.p, generator))
        # In the values' own type, since a GPU multiplies two of them twice as fast as values with flags.
        kept = torch.empty(shape, dtype=dtype, device=device)
        return Mask(kept.bernoulli_(1.0 - self.p, generator=generator), None)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which entries are dropped, in one of two forms: a factor on each, or, for few on a CPU, their flat indices, which
    are much faster there. Neither: none, for tensors without values.

    Attributes:
        kept: 1 where an entry stays, else 0.
        dropped: int64, ascending.
    """

    kept: torch.Tensor | None
    dropped: torch.Tensor | None

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """The contiguous `values` with zeros for the dropped entries."""
        if self.kept is not None:
            return values * self.kept
        return self.apply_(values.clone(memory_format=torch.contiguous_format))

    def add_kept(self, total: torch.Tensor, values: torch.Tensor) -> None:
        """Add `values`, without the dropped entries, to `total`; `values` may change."""
        if self.kept is not None:
            total.addcmul_(values, self.kept)
        else:
            total.add_(self.apply_(values))

    def apply_(self, values: torch.Tensor) -> torch.Tensor:
        """Set the dropped entries of the contiguous `values` to zero, in place."""
        if self.kept is not None:
            return values.mul_(self.kept)
        if self.dropped is not None:
            values.view(-1).index_fill_(0, self.dropped, 0.0)
        return values


def _dropped(size: int, p: float, generator: torch.Generator) -> torch.Tensor:
    """Ascending indices of the dropped ones among `size` entries.

    Between two dropped entries lies a geometrically distributed number of kept ones. Drawing those takes p draws per
    entry in place of one, and a CPU's generator is slower than its arithmetic.
    """
    indices: list[torch.Tensor] = []
    last = -1
    while True:
        left = size - 1 - last
        count = int(left * p + 6 * math.sqrt(left * p) + 8)
        uniform = torch.rand(count, generator=generator).neg_().add_(1.0)  # in (0, 1]
        gaps = uniform.log_().mul_(1.0 / math.log1p(-p)).long().add_(1)
        found = gaps.cumsum_(0).add_(last)
        last = int(found[-1])
        indices.append(found)
        if last >= size - 1:
            positions = indices[0] if len(indices) == 1 else torch.cat(indices)
            return positions[: int(torch.searchsorted(positions, size))]
