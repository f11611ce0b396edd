"""Row and column masks of a plan that live in the optimizer: which entries of which parameter, and the two layouts.

Under ``masking: optimizer`` the layers' A and B are whole, their masked entries are 0 and stay so, and only the
optimizer knows the masks. A state (checkpoint, hand-over between phases) always holds the kept rows and columns alone,
so methods, checkpoints and export do not depend on where masks live.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sparse_llm_ft.adapters.convert import trained_parameters
from sparse_llm_ft.adapters.layer import scatter
from sparse_llm_ft.plan import AdapterPlan, IndexMask

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Lines:
    """The kept rows (dimension 0) or columns (1) of a matrix with `width` columns; a vector is one column."""

    dimension: int
    kept: IndexMask
    width: int


def optimizer_masks(plan: AdapterPlan) -> dict[str, Lines]:
    """What the optimizer has to mask: short parameter name -> its kept lines; nothing where layers are compact.

    Beside A and B it is DoRA's magnitude: an output that no adapter writes keeps the norm of its pretrained weights.
    """
    lines = _matrices(plan)
    if plan.tuner == "dora" and plan.masking == "optimizer":
        for name, adapter in plan.active.items():
            if adapter.rows is not None:
                lines[f"{name}.lora_magnitude_vector"] = Lines(0, adapter.rows, 1)
    return lines


def to_kept(plan: AdapterPlan, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Only the kept columns of every A and rows of every B, of tensors that are laid out as the plan's layers."""
    return _masked(plan, tensors, lambda lines, t: t.index_select(lines.dimension, _indices(lines, t)))


def to_whole(plan: AdapterPlan, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The reverse of `to_kept`, with zeros at masked rows and columns."""

    def spread(lines: Lines, tensor: torch.Tensor) -> torch.Tensor:
        return scatter(tensor, lines.kept, None) if lines.dimension == 0 else scatter(tensor, None, lines.kept)

    return _masked(plan, tensors, spread)


@torch.no_grad()
def clear_masked(model: nn.Module, plan: AdapterPlan) -> None:
    """Set the masked columns of every A, and rows of every B, to 0: what never trains must add nothing."""
    matrices = _matrices(plan)
    for name, parameter in trained_parameters(model).items():
        if name in matrices:
            lines = matrices[name]
            mask = torch.zeros(lines.kept.size, dtype=parameter.dtype, device=parameter.device)
            if not mask.is_meta:
                mask[_indices(lines, mask)] = 1.0
            parameter.mul_(mask.unsqueeze(1 - lines.dimension))


def _matrices(plan: AdapterPlan) -> dict[str, Lines]:
    """Of A and B, where masks live in the optimizer."""
    found: dict[str, Lines] = {}
    if plan.masking == "optimizer":
        for owner, name in plan.matrix_owners().items():
            adapter = plan.active[name]
            if adapter.cols is not None:
                found[f"{owner}.lora_A"] = Lines(1, adapter.cols, adapter.cols.size)
            if adapter.rows is not None:
                found[f"{owner}.lora_B"] = Lines(0, adapter.rows, adapter.r)
    return found


def _masked(
    plan: AdapterPlan,
    tensors: Mapping[str, torch.Tensor],
    convert: Callable[[Lines, torch.Tensor], torch.Tensor],
) -> Tensors:
    matrices = _matrices(plan)
    return {name: convert(matrices[name], t) if name in matrices else t for name, t in tensors.items()}


def _indices(lines: Lines, tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor(lines.kept.indices, device=tensor.device)
