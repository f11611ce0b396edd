"""Masks of a plan as plain values: which rows of B and columns of A an adapter has, or which of their entries."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_llm_ft.errors import one_line

if TYPE_CHECKING:
    import numpy as np


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


@dataclass(frozen=True)
class EntryBits:
    """The trained entries of one matrix: a bit each, row by row, the lowest bit of a byte first.

    Attributes:
        size: number of the matrix's entries.
    """

    size: int
    bits: bytes

    def __post_init__(self) -> None:
        if self.size < 1 or len(self.bits) != (self.size + 7) // 8:
            raise PlanError(f"a mask of {self.size} entries has {len(self.bits)} bytes")
        if self.size % 8 and self.bits[-1] >> self.size % 8:
            raise PlanError(f"a mask of {self.size} entries has a bit beyond them")

    @classmethod
    def of(cls, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> EntryBits:
        """The mask of an array of bools, of any shape: true is trained."""
        import numpy as np  # settings are checked without it

        return cls(kept.size, np.packbits(kept, axis=None, bitorder="little").tobytes())

    def flags(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(stop - start,) bools, true is trained. Unpacks no more than these; None: to the end."""
        import numpy as np

        stop, first = self.size if stop is None else stop, start // 8
        packed = np.frombuffer(self.bits[first : (stop + 7) // 8], np.uint8)
        return np.unpackbits(packed, bitorder="little")[start - 8 * first : stop - 8 * first].astype(bool)

    @property
    def kept(self) -> int:
        """How many entries are trained."""
        return int.from_bytes(self.bits, "little").bit_count()

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return {"size": self.size, "bits": base64.b64encode(self.bits).decode()}

    @classmethod
    def from_dict(cls, data: object) -> EntryBits:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: it is no such mask.
        """
        if not isinstance(data, dict) or set(data) != {"size", "bits"} or type(data["size"]) is not int:
            raise PlanError(f"{data!r:.60} is not a mask of entries")
        try:
            return cls(data["size"], base64.b64decode(data["bits"], validate=True))
        except (TypeError, ValueError, binascii.Error) as error:
            raise PlanError(f"{data!r:.60} is not a mask of entries ({error})") from None


@dataclass(frozen=True)
class EntryMasks:
    """The trained entries of A (r, d_in) and B (d_out, r)."""

    a: EntryBits
    b: EntryBits
