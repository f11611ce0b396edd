"""Masks of a plan as plain values: which rows of B and columns of A an adapter has."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_llm_ft.errors import one_line


class PlanError(ValueError):
    """A plan contradicts itself or its model; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class IndexMask:
    """The kept rows of B, or columns of A: ascending indices out of `size`.

    Attributes:
        size: out_features (rows) or in_features (columns) of the module.
    """

    size: int
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.indices:
            raise PlanError("a mask keeps at least one row and one column")
        if self.indices[0] < 0 or self.indices[-1] >= self.size:
            raise PlanError(f"kept indices must lie in 0 to {self.size - 1}")
        if any(a >= b for a, b in zip(self.indices, self.indices[1:], strict=False)):
            raise PlanError("kept indices must ascend")

    @classmethod
    def of(cls, size: int, indices: Sequence[int]) -> IndexMask | None:
        """A mask that keeps `indices`, or None where these are all."""
        return None if len(indices) == size else cls(size, tuple(indices))

    def to_dict(self) -> dict[str, object]:
        """JSON values, with one bit per index: plans of large models are read and written at every phase."""
        bits = bytearray((self.size + 7) // 8)
        for index in self.indices:
            bits[index // 8] |= 1 << index % 8
        return {"size": self.size, "bits": base64.b64encode(bits).decode()}

    @classmethod
    def from_dict(cls, data: object, side: int | None = None) -> IndexMask:
        """Read what `to_dict` wrote. The bits must be as many as the size claims.

        Args:
            side: the required size; None: any.

        Raises:
            PlanError: it is no such mask.
        """
        if not isinstance(data, dict) or set(data) != {"size", "bits"} or type(data["size"]) is not int:
            raise PlanError(f"{data!r:.60} is not a mask")
        size = data["size"]
        if side is not None and size != side:
            raise PlanError(f"a mask of size {size!r:.40} where its matrix has {side}")
        try:
            bits = base64.b64decode(data["bits"], validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise PlanError(f"{data!r:.60} is not a mask") from None
        if len(bits) != (size + 7) // 8:
            raise PlanError(f"a mask of size {size!r:.40} has {len(bits)} bytes")
        return cls(size, tuple(i for i in range(len(bits) * 8) if bits[i // 8] >> i % 8 & 1))
