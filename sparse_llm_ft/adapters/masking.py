"""A plan's masks in the optimizer: which entries of which parameter, and the two layouts of tensors.

Under ``masking: optimizer`` the layers' A and B are full, their masked entries are and stay 0, and only the optimizer
knows the masks. A `TrainState` always holds the kept rows and columns alone (compact layout), so methods, checkpoints
and export need not know where a mask is applied. Where single entries are masked, it holds the
matrices with their zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from sparse_llm_ft.adapters.convert import trained_parameters
from sparse_llm_ft.adapters.parts import scatter
from sparse_llm_ft.adapters.tuners import TensorShape, tuner_of
from sparse_llm_ft.optim.masks import Mask, PackedMask, RowColumnMask
from sparse_llm_ft.plan import AdapterPlan, IndexMask

Tensors = dict[str, torch.Tensor]


def optimizer_masks(plan: AdapterPlan, parameters: Mapping[str, TensorShape] | None = None) -> dict[str, Mask]:
    """The optimizer's masks: short parameter name -> mask; of the adapters none if layers are compact.

    Beside A and B, they cover vectors with one entry per row (`Tuner.masked_vectors`), and embeddings of which only
    some rows are trained (`AdapterPlan.rows`).

    Args:
        parameters: short name -> full shape of what is trained; needed for `AdapterPlan.rows`.
    """
    masks: dict[str, Mask] = {**_matrices(plan), **entry_masks(plan)}
    masks |= {name: RowColumnMask(0, kept, (parameters or {})[name][1]) for name, kept in row_masks(plan).items()}
    if plan.masking == "optimizer":
        for part in tuner_of(plan).masked_vectors:
            masks |= {f"{n}.{part}": RowColumnMask(0, a.rows, 1) for n, a in plan.active.items() if a.rows is not None}
    return masks


def entry_masks(plan: AdapterPlan) -> dict[str, PackedMask]:
    """The masks of single entries: short parameter name -> mask."""
    found: dict[str, PackedMask] = {}
    active = plan.active
    for owner, name in plan.matrix_owners().items():
        if (entries := active[name].entries) is not None:
            found |= {f"{owner}.lora_A": PackedMask(entries.a), f"{owner}.lora_B": PackedMask(entries.b)}
    return found


def to_compact(plan: AdapterPlan, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """From the layers' layout to the compact one: only the kept columns of every A and rows of every B."""
    compact = _masked(plan, tensors, RowColumnMask.select)
    for name, kept in row_masks(plan).items():
        if name in compact:
            compact[name] = compact[name][list(kept.indices)]
    return compact


def row_masks(plan: AdapterPlan) -> dict[str, IndexMask]:
    """`AdapterPlan.rows` by the short name of the parameter."""
    return {f"{name}.weight": kept for name, kept in plan.rows.items()}


def fill_rows(kept: IndexMask, rows: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A copy of `whole` with `rows` at the kept ones."""
    indices = torch.tensor(kept.indices, device=whole.device)
    return whole.index_copy(0, indices, rows.to(whole))


def to_full(plan: AdapterPlan, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The inverse of `to_compact`, with zeros at masked rows and columns. Rows of embeddings (`AdapterPlan.rows`) stay
    alone, because the others are not zero: `fill_rows`.
    """
    return _masked(
        plan,
        tensors,
        lambda mask, t: scatter(t, mask.kept, None) if mask.dimension == 0 else scatter(t, None, mask.kept),
    )


def convert_moments(
    moments: Mapping[str, Mapping[str, torch.Tensor]], convert: Callable[[str, Tensors], Tensors]
) -> dict[str, Tensors]:
    """Moments in another layout. All of one kind are converted at once, as a plan's masks are then made once.

    Args:
        moments: short parameter name -> kind, such as ``exp_avg`` -> moment.
        convert: kind, and parameter name -> moment -> the same parameters' in the other layout.
    """
    kinds = dict.fromkeys(kind for entry in moments.values() for kind in entry)
    found = {kind: convert(kind, {n: entry[kind] for n, entry in moments.items() if kind in entry}) for kind in kinds}
    return {name: {kind: found[kind][name] for kind in entry} for name, entry in moments.items()}


@torch.no_grad()
def clear_masked(model: nn.Module, plan: AdapterPlan) -> None:
    """Set masked entries of every A, B and v to 0: what is never trained must add nothing."""
    matrices, entries = _matrices(plan), entry_masks(plan)
    for name, parameter in trained_parameters(model).items():
        if name in entries and not parameter.is_meta:
            flags = torch.from_numpy(entries[name].entries.flags()).view(parameter.shape)
            parameter.mul_(flags.to(parameter.device, parameter.dtype))
        if name in matrices:
            mask = matrices[name]
            kept = torch.zeros(mask.kept.size, dtype=parameter.dtype, device=parameter.device)
            if not kept.is_meta:
                kept[torch.tensor(mask.kept.indices, device=kept.device)] = 1.0
            parameter.mul_(kept.view([-1 if axis == mask.dimension else 1 for axis in range(parameter.dim())]))


def _matrices(plan: AdapterPlan) -> dict[str, RowColumnMask]:
    """The masks of A, B and v that the optimizer applies."""
    found: dict[str, RowColumnMask] = {}
    if plan.masking == "optimizer":
        active = plan.active
        for owner, name in plan.matrix_owners().items():
            adapter = active[name]
            if adapter.cols is not None:
                found[f"{owner}.lora_A"] = RowColumnMask(1, adapter.cols, adapter.cols.size)
            if adapter.rows is not None:
                found[f"{owner}.lora_B"] = RowColumnMask(0, adapter.rows, adapter.r)
        for name, adapter in active.items():
            if adapter.train_vectors and adapter.rows is not None:
                found[f"{name}.lora_v"] = RowColumnMask(0, adapter.rows, 1)
    return found


def _masked(
    plan: AdapterPlan,
    tensors: Mapping[str, torch.Tensor],
    convert: Callable[[RowColumnMask, torch.Tensor], torch.Tensor],
) -> Tensors:
    matrices = _matrices(plan)
    return {name: convert(matrices[name], t) if name in matrices else t for name, t in tensors.items()}
