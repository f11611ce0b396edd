"""What one process of `compare.py` runs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

STOCK, TUNED, TOOLKIT, BARE = "stock PEFT", "PEFT tuned", "toolkit", "bare base"
SYSTEMS = (STOCK, TUNED, TOOLKIT, BARE)


HEAD, ADAPTERS, ATTENTION, PRODUCTS, ELEMENTWISE, PYTHON = (
    "head and loss",
    "products of rank r",
    "attention",
    "products with the base",
    "element-wise and copies",
    "Python and dispatch",
)
KINDS = (HEAD, ADAPTERS, ATTENTION, PRODUCTS, ELEMENTWISE, PYTHON)
"""Kinds of work in a profile."""


@dataclass(frozen=True)
class Data:
    """The base and the batch.

    Attributes:
        base: folder of the base.
        dtype: of weights that are not quantised, and of the computation.
        batch: samples of a step and rank.
        length: tokens of each sample; none is padded.
        supervised: which positions have a loss: the second half, or all but the first token's.
    """

    base: str
    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["none", "nf4"]
    batch: int
    length: int
    supervised: Literal["half", "all"]

    def __str__(self) -> str:
        """For people: ``float32, 2×256 tokens, half of the positions supervised``."""
        held = self.dtype if self.quantization == "none" else f"{self.quantization} in {self.dtype}"
        return f"{held}, {self.batch}×{self.length} tokens, {self.supervised} of the positions supervised"

    @property
    def prompt(self) -> int:
        """Tokens of each sample without loss; at least one, since nothing predicts the first."""
        return self.length // 2 if self.supervised == "half" else 1


@dataclass(frozen=True)
class Job:
    """One system on one base and batch. Equal jobs are one process.

    Attributes:
        system: one of `SYSTEMS`.
        case: of the toolkit: a name in `compare_cases.CASES`.
        zero_stage: of the toolkit.
        dropout: of PEFT.
        lowest: of the bare base: the layer to whose input the backward pass goes.
    """

    system: str
    data: Data
    case: str = ""
    zero_stage: int = 0
    dropout: float = 0.0
    lowest: int = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> Job:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "data": Data(**values["data"])})
