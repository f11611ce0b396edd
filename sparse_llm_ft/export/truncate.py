"""Adapters of a smaller rank: the best approximation of each ΔW, without computing ΔW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparse_llm_ft.serving.facts import PREFIX, A, B

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Truncation:
    """What a smaller rank has cost.

    Attributes:
        rank: the new rank.
        errors: module -> ||ΔW - ΔW'|| / ||ΔW||, Frobenius norms; 0 where the rank was no larger.
        overall: the same over all modules together.
    """

    rank: int
    errors: dict[str, float]
    overall: float

    def describe(self) -> str:
        """A line for people."""
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"rank {self.rank}: relative error of ΔW {self.overall:.4f} over all modules, at most "
            f"{self.errors[worst]:.4f} ({worst})"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the export's folder."""
        return {"rank": self.rank, "relative_error": self.overall, "relative_error_by_module": self.errors}


def to_rank(weights: Tensors, ranks: Mapping[str, int], rank: int) -> tuple[dict[str, torch.Tensor], Truncation]:
    """Give every pair of a uniform LoRA this rank.

    A smaller pair gets zeros or loses some; of a larger one the singular values beyond `rank` are left out (Eckart and
    Young, 1936: no matrix of that rank is nearer).

    Args:
        weights: tensors by PEFT's names, with lora_alpha = r.
        ranks: module -> rank without zeros.
        rank: the new rank.
    """
    new = dict(weights)
    errors: dict[str, float] = {}
    lost = total = 0.0
    for module, own in ranks.items():
        key_a, key_b = f"{PREFIX}{module}{A}", f"{PREFIX}{module}{B}"
        a, b = weights[key_a][:own], weights[key_b][:, :own]
        new_a, new_b, values = truncated(a, b, rank)
        new[key_a] = torch.cat([new_a, a.new_zeros(rank - new_a.shape[0], a.shape[1])])
        new[key_b] = torch.cat([new_b, b.new_zeros(b.shape[0], rank - new_b.shape[1])], dim=1)
        squares = values.square()
        cut, whole = float(squares[rank:].sum()), float(squares.sum())
        errors[module] = math.sqrt(cut / whole) if whole else 0.0
        lost, total = lost + cut, total + whole
    return new, Truncation(rank, errors, math.sqrt(lost / total) if total else 0.0)


def truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product B A at no more than `rank`, by QR of Aᵀ and B and an SVD of their small core, in float64.

    Args:
        a: (r, d_in).
        b: (d_out, r).

    Returns:
        A (k, d_in) and B (d_out, k) with k <= rank, unchanged if r <= rank; and all singular values of B A, descending.
    """
    q_a, r_a = torch.linalg.qr(a.double().T)  # Shape: (d_in, n), (n, r) with n = min(d_in, r)
    q_b, r_b = torch.linalg.qr(b.double())  # Shape: (d_out, m), (m, r) with m = min(d_out, r)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if a.shape[0] <= rank:
        return a, b, values
    root = values[:rank].sqrt()
    new_a = root[:, None] * (v[:rank] @ q_a.T)
    new_b = (q_b @ u[:, :rank]) * root
    return new_a.to(a.dtype), new_b.to(b.dtype), values
