"""What one rank holds beside a step's activations, at each ZeRO stage, by DeepSpeed's own rules (0.19.8).

Counted on a model on the meta device, parameter by parameter:

    stage 0      parameters and gradients whole; under bfloat16 a float32 master of each trained one
    stages 1, 2  each parameter group flat and padded, its masters and moments cut into one part for each rank
    stage 3      every parameter cut into equal parts, frozen ones too; small ones stay gathered once they were used
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from sparse_llm_ft.adapters import trained_parameters
from sparse_llm_ft.adapters.masking import optimizer_masks
from sparse_llm_ft.engine.engine import EngineSettings
from sparse_llm_ft.model.meta_four_bit import state_tensors
from sparse_llm_ft.optim import MOMENTS, Mask
from sparse_llm_ft.plan import AdapterPlan

ALIGNMENT = 2
"""DeepSpeed pads a flat group at stages 1 and 2 to a multiple of this many values for each rank."""


@dataclass(frozen=True)
class Weight:
    """A parameter of the model.

    Attributes:
        numel: values as stored; of a 4-bit weight the codes.
        itemsize: bytes of one.
        trained: whether it requires gradients.
    """

    numel: int
    itemsize: int
    trained: bool

    def part(self, ranks: int) -> int:
        """Values that each rank holds at stage 3."""
        return -(-self.numel // ranks)


@dataclass(frozen=True)
class Inventory:
    """What a model holds.

    Attributes:
        weights: name -> parameter, the scales of 4-bit weights among them.
        buffers: bytes of what is whole on every rank at any stage: buffers, and the small parts of 4-bit states.
    """

    weights: Mapping[str, Weight]
    buffers: int

    @classmethod
    def of(cls, model: nn.Module) -> Inventory:
        """Of a model on any device with nothing sharded."""
        weights, whole = {}, list(model.buffers())
        for name, parameter in model.named_parameters():
            weights[name] = Weight(parameter.numel(), parameter.element_size(), parameter.requires_grad)
            scales, *others = state_tensors(getattr(parameter, "quant_state", None)) or (None,)
            if scales is not None:  # engine/sharded_loading.py makes them a parameter
                weights[f"{name}_absmax"] = Weight(scales.numel(), scales.element_size(), False)
            whole += others
        seen = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in whole}
        return cls(weights, sum(seen.values()))


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank, the one that holds most.

    Attributes:
        base: what is frozen.
        adapters: values of what is trained, as the model computes with them.
        gradients: at the end of a backward pass.
        optimizer: float32 masters, moments, indices of kept entries.
        buckets: communication buffers that a backward pass has.
        update: the most that the optimizer's step makes beside all these, while gradients exist and activations do not.
        offloaded: of `optimizer`, in the host's memory instead.
    """

    base: int
    adapters: int
    gradients: int
    optimizer: int
    buckets: int
    update: int
    offloaded: int = 0


def rank_bytes(model: nn.Module, plan: AdapterPlan, settings: EngineSettings, ranks: int) -> RankBytes:
    """Count a model on the meta device that trains `plan`."""
    inventory = Inventory.of(model)
    trained = {name: tuple(parameter.shape) for name, parameter in trained_parameters(model).items()}
    config = zero_settings(settings, sum(map(math.prod, trained.values())))
    size = 2 if settings.dtype == "bfloat16" else 4
    groups = [_Group(names, trained, optimizer_masks(plan, trained)) for names in _grouped(trained, settings).values()]
    moments = [len(MOMENTS[algorithm]) for algorithm in _algorithms(trained, settings)]
    stage, count = settings.zero_stage, sum(map(math.prod, trained.values()))
    frozen = [weight for weight in inventory.weights.values() if not weight.trained]
    offloads = config.offload_optimizer is not None and str(config.offload_optimizer.device.value) != "none"

    if stage == 3:
        kept = [w for w in inventory.weights.values() if persists(w, config)] if ranks > 1 else []
        base = sum(w.part(ranks) * w.itemsize for w in frozen) + _whole(kept, trained=False)
        parts = [-(-math.prod(shape) // ranks) for shape in trained.values()]
        adapters = sum(parts) * size + _whole(kept, trained=True)
        per_rank = [sum(-(-math.prod(trained[name]) // ranks) for name in group.names) for group in groups]
        gradients = sum(parts) * size
        buckets = config.reduce_bucket_size * size
    else:
        base = sum(w.numel * w.itemsize for w in frozen)
        padded = [
            -(-group.numel // (ALIGNMENT * ranks)) * ALIGNMENT * ranks if stage else group.numel for group in groups
        ]
        adapters = sum(padded) * size
        per_rank = [total // (ranks if stage else 1) for total in padded]
        gradients = (sum(per_rank) if stage else count) * size
        buckets = config.reduce_bucket_size * size * (2 if config.overlap_comm else 1) if stage else 0
    masters = sum(per_rank) * 4 if stage or size == 2 else 0
    optimizer = masters
    for group, held, kinds in zip(groups, per_rank, moments, strict=True):
        optimizer += group.state(held, kinds, whole=not stage)
    update = sum(per_rank) * 4 if size == 2 or stage else 0
    return RankBytes(
        base + inventory.buffers,
        adapters,
        gradients,
        0 if offloads else optimizer,
        buckets,
        0 if offloads else update,
        optimizer if offloads else 0,
    )


def _whole(weights: Sequence[Weight], trained: bool) -> int:
    """Bytes of those weights that are trained, or of those that are not."""
    return sum(w.numel * w.itemsize for w in weights if w.trained == trained)


def zero_settings(settings: EngineSettings, trained: int) -> Any:
    """DeepSpeed's own settings of ZeRO, defaults filled in."""
    return DeepSpeedZeroConfig(**settings.to_deepspeed(trained)["zero_optimization"])  # type: ignore[arg-type]


def persists(weight: Weight, config: Any) -> bool:
    """Whether a parameter stays gathered at stage 3."""
    return weight.numel <= config.param_persistence_threshold


class _Group:
    """A parameter group of the optimizer."""

    def __init__(self, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], masks: Mapping[str, Mask]) -> None:
        self.names = names
        self.sizes = {name: math.prod(shapes[name]) for name in names}
        self.kept = {name: len(masks[name].indices(0, self.sizes[name])) for name in names if name in masks}

    @property
    def numel(self) -> int:
        return sum(self.sizes.values())

    def state(self, held: int, moments: int, whole: bool) -> int:
        """Bytes of moments, step counts and indices.

        Args:
            held: values of the group's masters on this rank.
            moments: kinds of them.
            whole: whether each parameter has a master of its own; else one holds the group's part.
        """
        if whole:
            kept = sum(self.kept.get(name, size) for name, size in self.sizes.items())
            return 4 * (moments * kept + sum(self.kept.values()) + len(self.names))
        if not self.kept:
            return 4 * (moments * held + 1)
        share = sum(self.kept.get(name, size) for name, size in self.sizes.items()) / max(self.numel, 1)
        kept = round(held * share)
        return 4 * (moments * kept + kept + 1)


def _grouped(trained: Mapping[str, Any], settings: EngineSettings) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in trained:
        groups.setdefault(settings.group_of(name), []).append(name)
    return groups


def _algorithms(trained: Mapping[str, Any], settings: EngineSettings) -> list[str]:
    return [settings.omega_algorithm if group == "omega" else "adamw" for group in _grouped(trained, settings)]
