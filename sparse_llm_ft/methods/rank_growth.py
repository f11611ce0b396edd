"""WeightLoRA+: ranks grow into a parameter budget; what the adapters compute stays the same (section 3.4)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch

from sparse_llm_ft.plan import MAX_RANK, Shape

Pair = tuple[torch.Tensor, torch.Tensor]
"""A of shape (r, d_in), B of shape (d_out, r)."""


def grow_ranks(
    ranks: Mapping[str, int], shapes: Mapping[str, Shape], budget: int, max_rank: int = MAX_RANK
) -> dict[str, int]:
    """The largest ranks whose parameters fit `budget`, raised in turn.

    Ranks are raised by one, in the order of `ranks`, until any further raise would exceed the budget. No rank is raised
    beyond the smaller side of its matrix or beyond `max_rank`, so that a part of the budget may be left over.

    Args:
        ranks: module -> present rank, which is never lowered.
        shapes: module -> (d_out, d_in); one more rank costs d_out + d_in parameters.
        budget: parameters that A and B of all modules may have together.
        max_rank: no rank is raised beyond it.

    Raises:
        ValueError: the present ranks exceed the budget.
    """
    grown = dict(ranks)
    left = budget - parameters(grown, shapes)
    if left < 0:
        raise ValueError(f"the ranks already need {budget - left} parameters, more than the budget of {budget}")
    while True:
        lowest = [n for n, r in grown.items() if r < min(*shapes[n], max_rank) and sum(shapes[n]) <= left]
        if not lowest:
            return grown
        for name in lowest:
            if sum(shapes[name]) <= left:
                grown[name] += 1
                left -= sum(shapes[name])


def parameters(ranks: Mapping[str, int], shapes: Mapping[str, Shape]) -> int:
    """Number of values in A and B of all modules."""
    return sum(r * sum(shapes[name]) for name, r in ranks.items())


def left_over(ranks: Mapping[str, int], shapes: Mapping[str, Shape], budget: int, max_rank: int) -> int:
    """The parameters of `budget` that grown ranks do not use because of `max_rank`; 0 if it stops none of them."""
    left = budget - parameters(ranks, shapes)
    stopped = [name for name, r in ranks.items() if max_rank <= r < min(shapes[name]) and sum(shapes[name]) <= left]
    return left if stopped else 0


def expand_gaussian(
    a: torch.Tensor, b: torch.Tensor, rank: int, generator: torch.Generator, inputs: int | None = None
) -> Pair:
    """Random rows below A, zero columns beside B: B A is unchanged.

    The new rows have the variance of a fresh LoRA's A, 1 / (3 inputs).

    Args:
        a: (r, d_in).
        b: (d_out, r).
        rank: new rank, at least r.
        inputs: in_features of the module, if a mask leaves A fewer columns: it is drawn for all. None: d_in.

    Returns:
        A (rank, d_in) and B (d_out, rank).
    """
    r, d_in = a.shape
    rows = torch.randn(rank - r, d_in, generator=generator, dtype=a.dtype) / (3 * (inputs or d_in)) ** 0.5
    return torch.cat([a, rows]), _pad_columns(b, rank)


def expand_qr(a: torch.Tensor, b: torch.Tensor, rank: int, generator: torch.Generator) -> Pair:
    """Orthonormalise A and add rows: with Aᵀ = Q R, A becomes [Q, E]ᵀ and B becomes [B Rᵀ, 0]; B A is unchanged.

    E are orthonormal columns of (I - Q Qᵀ) N, N random. Shapes as in `expand_gaussian`; computed in float64.
    """
    r, d_in = a.shape
    q, upper = torch.linalg.qr(a.double().T)  # Shape: (d_in, r), (r, r)
    noise = torch.randn(d_in, rank - r, generator=generator, dtype=torch.float64)
    extension = torch.linalg.qr(noise - q @ (q.T @ noise))[0]  # Shape: (d_in, rank - r)
    # Project again: one projection leaves a rounding residue if N nearly lies in the span of Q.
    extension = torch.linalg.qr(extension - q @ (q.T @ extension))[0]
    new_b = _pad_columns(b.double() @ upper.T, rank)
    return torch.cat([q, extension], dim=1).T.contiguous().to(a.dtype), new_b.to(b.dtype)


def module_generator(seed: int, module: str) -> torch.Generator:
    """The random generator of one module: independent of other modules and of the machine."""
    # torch's CPU generator uses only the low 32 bits of a seed, so mix them first.
    mixed = np.random.SeedSequence([seed, zlib.crc32(module.encode())])
    return torch.Generator().manual_seed(int(mixed.generate_state(1)[0]))


def pad_moments(moments: Mapping[str, torch.Tensor], shape: torch.Size) -> dict[str, torch.Tensor]:
    """The moments of a grown matrix: the old entries keep theirs, the new ones start at zero."""
    padded = {}
    for key, old in moments.items():
        new = torch.zeros(shape, dtype=old.dtype)
        new[: old.shape[0], : old.shape[1]] = old
        padded[key] = new
    return padded


def _pad_columns(b: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)
