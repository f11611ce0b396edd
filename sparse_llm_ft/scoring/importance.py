"""Importance of the rows and of the columns of a weight (Partial-LoRA, section 4.2.2), and what is read off it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sparse_llm_ft.errors import TrainingError
from sparse_llm_ft.plan import ModuleName


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of one weight of shape (d_out, d_in); larger is more important.

    Attributes:
        rows: (d_out,) float32, on the CPU.
        cols: (d_in,) float32, on the CPU.
    """

    rows: torch.Tensor
    cols: torch.Tensor


def svd_importance(weight: torch.Tensor) -> Importance:
    """Row norms of W V with V = Q Λ and W = P Λ Qᵀ, and the same of Wᵀ for the columns (eq. 4-5), without an SVD.

    P has orthonormal columns, so ``‖(W Q Λ)_i‖ = ‖(P Λ²)_i‖ = ‖(W Wᵀ)_i‖``, and for columns
    ``‖Wᵀ W e_j‖ = sqrt(w_jᵀ (W Wᵀ) w_j)``, w_j the j-th column: one Gram matrix gives both, and the smaller one is
    taken. Float32: the scores only order indices, and differ from those of an SVD by about 1e-6 of their size.

    Args:
        weight: (d_out, d_in), on any device; a half precision is widened first.
    """
    weight = weight.detach().float()
    if weight.shape[0] > weight.shape[1]:
        turned = svd_importance(weight.T)
        return Importance(turned.cols, turned.rows)
    gram = weight @ weight.T  # Shape: (d_out, d_out)
    squares = (weight * (gram @ weight)).sum(0)  # Shape: (d_in,)
    # A quadratic form of a Gram matrix is not negative; its rounding may be.
    return Importance(gram.norm(dim=1).cpu(), squares.clamp_min(0).sqrt().cpu())


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of an `nn.Linear`, or what the codes of a bitsandbytes `Linear4bit` stand for.

    Returns:
        (d_out, d_in) float32 on the weight's device; a copy where the weight is stored otherwise.
    """
    weight: Any = module.weight
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is None:
        return weight.detach().float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, quant_state).detach().float()


def ranking(scores: torch.Tensor) -> torch.Tensor:
    """Indices from the most to the least important; among equals the lower index comes first.

    Args:
        scores: (size,).

    Returns:
        (size,) int64.
    """
    return torch.argsort(scores, descending=True, stable=True)


def check_finite(importance: Mapping[str, Importance]) -> None:
    """Refuse scores that order nothing.

    Raises:
        TrainingError: a score is NaN or infinite, naming the module.
    """
    for name, scores in importance.items():
        for side, values in (("rows", scores.rows), ("columns", scores.cols)):
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                raise TrainingError(f"the importance of {bad} {side} of module {name!r} is not a finite number")


def preserve_flow(importance: Mapping[str, Importance]) -> dict[str, Importance]:
    """Flow preservation (appendix H): scores_l + scores_{l+1}, in favour of what the next layer finds important.

    The paper does not say which module the next one is. Ours: the module of the same name in the next numbered layer
    of `importance`, whose rows stand beside these rows and whose columns beside these columns. The last layer, a
    module without number and a side whose size differs keep their scores. The sum is of the scores as they were
    measured; it does not pile up from the top.
    """
    following = _following(importance)

    def added(name: str, side: str) -> torch.Tensor:
        own: torch.Tensor = getattr(importance[name], side)
        if name not in following:
            return own
        other: torch.Tensor = getattr(importance[following[name]], side)
        return own + other if own.shape == other.shape else own

    return {name: Importance(added(name, "rows"), added(name, "cols")) for name in importance}


def kept_count(ratio: float, size: int) -> int:
    """``ratio * size`` rounded to the nearest whole number, halves up."""
    return int(ratio * size + 0.5)


def overlap(
    first: Mapping[str, Importance], second: Mapping[str, Importance], ratios: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Share of the top indices that two measures have in common (Figure 12), rows and columns, by module.

    As many top indices are compared as `ratios` (p_row, p_col) keeps; where that is none, the share is 1.
    """
    return {
        name: (
            _share(first[name].rows, second[name].rows, p_row),
            _share(first[name].cols, second[name].cols, p_col),
        )
        for name, (p_row, p_col) in ratios.items()
    }


def _share(first: torch.Tensor, second: torch.Tensor, ratio: float) -> float:
    count = kept_count(ratio, len(first))
    if count == 0:
        return 1.0
    common = set(ranking(first)[:count].tolist()) & set(ranking(second)[:count].tolist())
    return len(common) / count


def _following(names: Mapping[str, object]) -> dict[str, str]:
    """Module -> the module of the same name in the next numbered layer, where there is one."""
    series: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        stack, number, rest = ModuleName.parse(name)
        if number is not None:
            series.setdefault((stack, rest), {})[number] = name
    following: dict[str, str] = {}
    for numbered in series.values():
        ordered = [numbered[number] for number in sorted(numbered)]
        following |= dict(pairwise(ordered))
    return following
