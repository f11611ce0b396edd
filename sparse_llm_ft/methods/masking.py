"""A plan's masks: of rows and columns, also for shared pairs, or of single entries. Reduces trained tensors to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from sparse_llm_ft.adapters.masking import convert_moments, to_compact
from sparse_llm_ft.checkpoint.state import Tensors, TrainState
from sparse_llm_ft.errors import TrainingError
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, Shape
from sparse_llm_ft.plan_masks import EntryBits, EntryMasks
from sparse_llm_ft.scoring import Importance, draw_masks
from sparse_llm_ft.scoring.masks import Selection, generator

Ratios = Mapping[str, tuple[float, float]]


def masked_plan(
    plan: AdapterPlan,
    targets: Mapping[str, Shape],
    ratios: Ratios,
    importance: Mapping[str, Importance] | None,
    selection: Selection,
    temperature: float,
    seed: int,
) -> AdapterPlan:
    """The plan with masks from `draw_masks`. Modules that share a pair share a mask of rows and a mask of columns.

    Args:
        ratios, importance: by module.
    """
    owned = None if importance is None else _importance_of_owners(importance, plan)
    shapes = {owner: targets[name] for owner, name in plan.matrix_owners().items()}
    drawn = draw_masks(shapes, _ratios_of_owners(ratios, plan), selection, owned, temperature, seed)
    modules: dict[str, ModuleAdapter | None] = dict(plan.modules)
    for name, adapter in plan.active.items():
        rows, cols = drawn[plan.owners[name]]
        d_out, d_in = targets[name]
        modules[name] = replace(adapter, rows=IndexMask.of(d_out, rows), cols=IndexMask.of(d_in, cols))
    return replace(plan, modules=modules)


def scaled_masks(plan: AdapterPlan) -> AdapterPlan:
    """The plan with each scaling multiplied by sqrt(columns / kept columns) (ours).

    A is drawn as for all columns, so the variance of A x falls with the kept share, and Adam's steps on B change the
    output less by its root. The plan's scaling makes up for it; layers, merging and export then need nothing.
    """
    modules = dict(plan.modules)
    for name, adapter in plan.active.items():
        if (cols := adapter.cols) is not None:
            grown = adapter.lora_alpha * math.sqrt(cols.size / len(cols.indices))
            modules[name] = replace(adapter, lora_alpha=grown)
    return replace(plan, modules=modules)


def _ratios_of_owners(ratios: Ratios, plan: AdapterPlan) -> dict[str, tuple[float, float]]:
    """Pair -> (p_row, p_col): the mean over its modules."""
    members = _members(plan)
    return {
        owner: (sum(ratios[n][0] for n in names) / len(names), sum(ratios[n][1] for n in names) / len(names))
        for owner, names in members.items()
    }


def _importance_of_owners(importance: Mapping[str, Importance], plan: AdapterPlan) -> dict[str, Importance]:
    """Pair -> importance: its module's own, or the sum over its modules, each scaled to sum to one."""

    def total(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([part / part.sum().clamp(min=1e-30) for part in parts]).sum(0)

    return {
        owner: importance[names[0]]
        if len(names) == 1
        else Importance(total([importance[n].rows for n in names]), total([importance[n].cols for n in names]))
        for owner, names in _members(plan).items()
    }


def _members(plan: AdapterPlan) -> dict[str, list[str]]:
    """Pair -> the modules that use it."""
    members: dict[str, list[str]] = {}
    for name, owner in plan.owners.items():
        members.setdefault(owner, []).append(name)
    return members


def random_entries(plan: AdapterPlan, targets: Mapping[str, Shape], share: float, seed: int) -> AdapterPlan:
    """The plan with every entry of A and B kept with probability `share`, independently (Xu & Zhang, 2024).

    The masks of a pair depend on `seed` and its name, not on other pairs.
    """
    masks = {}
    for owner, name in plan.matrix_owners().items():
        rows, columns = targets[name]
        r = plan.active[name].r
        b, a = (generator(seed, owner, axis).random(r * side) < share for axis, side in enumerate((rows, columns)))
        masks[owner] = EntryMasks(EntryBits.of(a), EntryBits.of(b))
    return _with_entries(plan, masks)


def largest_entries(plan: AdapterPlan, scores: Mapping[str, torch.Tensor], share: float) -> AdapterPlan:
    """The plan with the `share` of all entries of all A and B that score highest (Lee et al., 2019, algorithm 1); among
    equals the earlier ones.

    Args:
        scores: ``<pair>.lora_A`` and ``<pair>.lora_B`` -> scores of the matrix's shape.

    Raises:
        TrainingError: a score is not finite, naming the matrix, or all are 0: they order nothing.
    """
    names = [f"{owner}.{part}" for owner in plan.matrix_owners() for part in ("lora_A", "lora_B")]
    for name in names:
        if not bool(torch.isfinite(scores[name]).all()):
            raise TrainingError(
                f"the scores of the entries of {name!r} are not finite numbers after method.warmup_steps; lower "
                "training.learning_rate"
            )
    if not any(bool(scores[name].any()) for name in names):
        raise TrainingError(
            "the scores of all entries are 0 after method.warmup_steps, as at LoRA's start: the warmup has changed "
            "nothing; raise method.warmup_steps or training.learning_rate"
        )
    flat = torch.cat([scores[name].flatten() for name in names]).numpy()
    kept = np.zeros(len(flat), dtype=bool)
    kept[np.argsort(-flat, kind="stable")[: max(1, round(share * len(flat)))]] = True
    ends = np.cumsum([scores[name].numel() for name in names])[:-1]
    parts = [EntryBits.of(part) for part in np.split(kept, ends)]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return _with_entries(plan, dict(zip(plan.matrix_owners(), (EntryMasks(a, b) for a, b in pairs), strict=True)))


def _with_entries(plan: AdapterPlan, masks: Mapping[str, EntryMasks]) -> AdapterPlan:
    """The plan with the masks of its pairs, which its optimizer applies."""
    owners = plan.owners
    modules = {
        name: adapter and replace(adapter, entries=masks[owners[name]]) for name, adapter in plan.modules.items()
    }
    return replace(plan, modules=modules, masking="optimizer")


def mask_state(state: TrainState, before: AdapterPlan, plan: AdapterPlan) -> TrainState:
    """The state with only the kept rows of every B and v and columns of every A, moments included.

    Where the plan has another scaling than `before`, what was trained stays as it was at the kept places: B is divided
    by their ratio. Its gradient is multiplied by it then, and so are the moments, the second one twice.
    """
    new, old = plan.active, before.active
    growth = {owner: new[name].scaling / old[name].scaling for owner, name in plan.matrix_owners().items()}
    powers = {"exp_avg": 1, "exp_avg_sq": 2}
    masks = replace(plan, masking="optimizer", rows={})  # whose full layout the state has, but for `AdapterPlan.rows`

    def reduced(part: Tensors, power: int) -> Tensors:
        return {name: rescaled(name, tensor, power) for name, tensor in to_compact(masks, part).items()}

    def rescaled(name: str, tensor: torch.Tensor, power: int) -> torch.Tensor:
        owner, _, part = name.rpartition(".")
        factor = growth.get(owner, 1.0) if part == "lora_B" else 1.0
        return tensor if factor == 1 else tensor * factor**power

    tensors = reduced(state.tensors, -1)
    moments = convert_moments(state.moments, lambda kind, part: reduced(part, powers[kind]))
    return replace(state, tensors=tensors, moments=moments)
