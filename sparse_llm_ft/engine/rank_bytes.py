"""What one rank holds beside a step's activations, at each ZeRO stage, by DeepSpeed's own rules (0.19.8).

Counted on a model on the meta device, parameter by parameter:

    stage 0      parameters and gradients whole; under bfloat16 a float32 master of each trained one
    stages 1, 2  each parameter group flat and padded, its masters and moments cut into one part for each rank. Its
                 gradients are flat too in a backward pass, and cut after a step's last one. Where DeepSpeed keeps them
                 (`EngineSettings.has_flat_gradients` is false), a bucket takes them in a backward pass, and of a
                 parameter that a cut goes through, both ranks keep the whole gradient
    stage 3      every parameter cut into equal parts, frozen ones too; small ones stay gathered once they were used
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from sparse_llm_ft.adapters import trained_parameters
from sparse_llm_ft.adapters.masking import optimizer_masks
from sparse_llm_ft.engine.settings import EngineSettings, offload_device
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
    """Bytes of one rank; of each line, those of the rank that holds most of it.

    Attributes:
        base: what is frozen.
        adapters: values of what is trained, as the model computes with them.
        gradients: at the end of a backward pass, averaged.
        optimizer: float32 masters, moments, indices of kept entries.
        buckets: communication buffers that a backward pass has; of flat gradients the tensors that are averaged, where
            the averages are others.
        update: the most that the optimizer's step makes beside all these, while gradients exist and activations do not.
        offloaded: of `optimizer`, in the host's memory instead.
        flat: whether gradients are flat (engine/flat_gradients.py).
    """

    base: int
    adapters: int
    gradients: int
    optimizer: int
    buckets: int
    update: int
    offloaded: int = 0
    flat: bool = False

    @property
    def whole(self) -> int:
        """Of flat gradients those of a backward pass."""
        return self.buckets or self.gradients


def rank_bytes(model: nn.Module, plan: AdapterPlan, settings: EngineSettings, ranks: int) -> RankBytes:
    """Count a model on the meta device that trains `plan`."""
    inventory = Inventory.of(model)
    trained = {name: tuple(parameter.shape) for name, parameter in trained_parameters(model).items()}
    sizes = {name: math.prod(shape) for name, shape in trained.items()}
    count, stage, size = sum(sizes.values()), settings.zero_stage, 2 if settings.dtype == "bfloat16" else 4
    config = zero_settings(settings, count)
    masks = optimizer_masks(plan, trained)
    groups = [
        _Group({name: sizes[name] for name in names}, masks, stage, ranks)
        for names in _grouped(trained, settings).values()
    ]
    moments = [len(MOMENTS[algorithm]) for algorithm in _algorithms(trained, settings)]
    frozen = [weight for weight in inventory.weights.values() if not weight.trained]
    offloads = offload_device(config) != "none"
    flat = settings.has_flat_gradients(count)

    if stage == 3:
        kept = [w for w in inventory.weights.values() if persists(w, config)] if ranks > 1 else []
        base = sum(w.part(ranks) * w.itemsize for w in frozen) + _whole(kept, ranks, trained=False)
        gradients = sum(group.held for group in groups) * size
        adapters = gradients + _whole(kept, ranks, trained=True)
        buckets = config.reduce_bucket_size * size
    else:
        base = sum(w.numel * w.itemsize for w in frozen)
        adapters = sum(group.numel for group in groups) * size
        gradients = int(np.max(sum(group.gradients() for group in groups))) * size if stage else count * size
        buckets = config.reduce_bucket_size * size * (2 if config.overlap_comm else 1) if stage else 0
        if flat:
            gradients = sum(group.held for group in groups) * size
            buckets = adapters if ranks > 1 else 0
    values = sum(group.held for group in groups)
    masters = values * 4 if stage or size == 2 else 0
    states = sum(group.state(kinds) for group, kinds in zip(groups, moments, strict=True))
    optimizer = masters + int(np.max(states))
    update = values * 4 if size == 2 or (stage and not flat) else 0  # the gradients in float32, if these are others
    return RankBytes(
        base + inventory.buffers,
        adapters,
        gradients,
        0 if offloads else optimizer,
        buckets,
        0 if offloads else update,
        optimizer if offloads else 0,
        flat,
    )


def _whole(weights: Sequence[Weight], ranks: int, trained: bool) -> int:
    """Bytes of those gathered weights that are trained, or of those that are not: all ranks' parts, with padding."""
    return sum(w.part(ranks) * ranks * w.itemsize for w in weights if w.trained == trained)


def zero_settings(settings: EngineSettings, trained: int) -> Any:
    """DeepSpeed's own settings of ZeRO, defaults filled in."""
    return DeepSpeedZeroConfig(**settings.to_deepspeed(trained)["zero_optimization"])  # type: ignore[arg-type]


def persists(weight: Weight, config: Any) -> bool:
    """Whether a parameter stays gathered at stage 3."""
    return weight.numel <= config.param_persistence_threshold


class _Group:
    """A parameter group of the optimizer, and how its values are cut among the ranks. Arrays have one entry for each.

    Args:
        sizes: name -> values, in the group's order.
        masks: of the optimizer.

    Attributes:
        numel: values of all ranks, with padding.
        held: values of the masters on each rank.
    """

    def __init__(self, sizes: Mapping[str, int], masks: Mapping[str, Mask], stage: int, ranks: int) -> None:
        self.sizes, self.stage = sizes, stage
        self.ranks = ranks if stage else 1
        self._kept = {name: masks[name].indices(0, n).numpy() for name, n in sizes.items() if name in masks}
        if stage == 3:
            self.held = sum(-(-n // ranks) for n in sizes.values())
            self.numel = self.held * ranks
        else:
            unit = ALIGNMENT * ranks if stage else 1
            self.numel = -(-sum(sizes.values()) // unit) * unit
            self.held = self.numel // self.ranks

    def gradients(self) -> np.ndarray:
        """Values of the gradients at stages 1 and 2: DeepSpeed keeps the whole gradient of every parameter of which a
        part is here, and pads.
        """
        whole = own = np.zeros(self.ranks, dtype=np.int64)
        for name, size in self.sizes.items():
            here = self._here(name)
            whole, own = whole + size * (here > 0), own + here
        return whole + self.held - own

    def state(self, moments: int) -> np.ndarray | int:
        """Bytes of moments, step counts and indices of kept entries.

        Args:
            moments: kinds of them.
        """
        if not self.stage:  # each parameter has a master of its own
            kept = sum(len(self._kept[name]) if name in self._kept else n for name, n in self.sizes.items())
            return 4 * (moments * kept + sum(map(len, self._kept.values())) + len(self.sizes))
        masked, kept_here = np.zeros(self.ranks, dtype=bool), np.zeros(self.ranks, dtype=np.int64)
        for name in self.sizes:
            here = self._here(name)
            if name in self._kept:
                masked = masked | (here > 0)
                here = np.bincount((self._start(name) + self._kept[name]) // self._part(name), minlength=self.ranks)
            kept_here = kept_here + here
        return 4 * np.where(masked, moments * kept_here + kept_here + 1, moments * self.held + 1)

    def _part(self, name: str) -> int:
        """Values after which a rank's part ends and the next one's begins: of the parameter, or of the flat group."""
        return -(-self.sizes[name] // self.ranks) if self.stage == 3 else self.held

    def _start(self, name: str) -> int:
        """Where the parameter begins in what is cut."""
        return 0 if self.stage == 3 else self._starts[name]

    @cached_property
    def _starts(self) -> dict[str, int]:
        return dict(zip(self.sizes, itertools.accumulate(self.sizes.values(), initial=0), strict=False))

    def _here(self, name: str) -> np.ndarray:
        """(ranks,), how many of the parameter's values each rank has."""
        part, start = self._part(name), self._start(name)
        low = np.arange(self.ranks, dtype=np.int64) * part
        return np.clip(np.minimum(start + self.sizes[name], low + part) - np.maximum(start, low), 0, None)


def _grouped(trained: Mapping[str, Any], settings: EngineSettings) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in trained:
        groups.setdefault(settings.group_of(name), []).append(name)
    return groups


def _algorithms(trained: Mapping[str, Any], settings: EngineSettings) -> list[str]:
    return [settings.omega_algorithm if group == "omega" else "adamw" for group in _grouped(trained, settings)]
