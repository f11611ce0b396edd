"""Importance of a weight's rows and columns (Partial-LoRA, section 4.2.2), and quantities derived from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sparse_llm_ft.errors import TrainingError
from sparse_llm_ft.model.linear import is_transposed
from sparse_llm_ft.plan import ModuleName


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of one weight of shape (d_out, d_in); a larger score is more important.

    Attributes:
        rows: (d_out,) float32, on the CPU.
        cols: (d_in,) float32, on the CPU.
    """

    rows: torch.Tensor
    cols: torch.Tensor


def svd_importance(weight: torch.Tensor) -> Importance:
    """Row norms of W V with V = Q Λ and W = P Λ Qᵀ, and the same of Wᵀ for the columns (eq. 4-5), without an SVD.

    P has orthonormal columns, so ``‖(W Q Λ)_i‖ = ‖(P Λ²)_i‖ = ‖(W Wᵀ)_i‖``, and for columns
    ``‖Wᵀ W e_j‖ = sqrt(w_jᵀ (W Wᵀ) w_j)``, w_j the j-th column. One Gram matrix gives both; the smaller one is used. In
    float32: scores only order indices, and differ from those of an SVD by about 1e-6 of their size.

    Args:
        weight: (d_out, d_in), on any device; half precision is converted to float32 first.
    """
    weight = weight.detach().float()
    if weight.shape[0] > weight.shape[1]:
        turned = svd_importance(weight.T)
        return Importance(turned.cols, turned.rows)
    gram = weight @ weight.T  # Shape: (d_out, d_out)
    squares = (weight * (gram @ weight)).sum(0)  # Shape: (d_in,)
    # A quadratic form of a Gram matrix is not negative, but its rounded value may be.
    return Importance(gram.norm(dim=1).cpu(), squares.clamp_min(0).sqrt().cpu())


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of an `nn.Linear`, that of a `Conv1D` transposed, or that of a `Linear4bit` dequantised.

    Returns:
        (d_out, d_in) float32 on the weight's device; a copy if the weight is stored in another form.
    """
    weight: Any = module.weight
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is None:
        return (weight.T if is_transposed(module) else weight).detach().float()
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
    """Refuse scores that cannot order indices.

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

    The paper does not say which module is the next one. Here it is the module of the same name in the next numbered
    layer of `importance`; its rows are added to these rows, and its columns to these columns. The last layer, modules
    without a number and sides of different sizes keep their scores. Only original scores are added: sums do not
    accumulate from the top.
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
    """``ratio * size`` rounded to the nearest integer, halves up."""
    return int(ratio * size + 0.5)


def overlap(
    first: Mapping[str, Importance], second: Mapping[str, Importance], ratios: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Module -> the share of top indices that two measures have in common (Figure 12), of rows and of columns.

    As many top indices count as `ratios` (p_row, p_col) keeps; if that is none, the share is 1.
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
    """Module -> the module of the same name in the next numbered layer, if any."""
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
