"""What a phase's gradients take in a step; and its peaks beside its steps: building its engine, the end of the phase
before, a save.

A GPU holds nothing of a checkpoint, whose tensors lie in the host's memory. A CPU's memory is the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers.core_model_loading import dot_natural_key

from sparse_llm_ft.adapters import is_adapter, is_omega, trained_parameters
from sparse_llm_ft.adapters.convert import short_name
from sparse_llm_ft.engine.rank_bytes import RankBytes, Weight
from sparse_llm_ft.engine.settings import EngineSettings
from sparse_llm_ft.engine.shared_files import SLICE_BYTES
from sparse_llm_ft.engine.step_trace import Use
from sparse_llm_ft.optim import MOMENTS


@dataclass(frozen=True)
class TrainedBytes:
    """A phase's trained parameters on one rank.

    Attributes:
        sizes: values of each parameter.
        item: bytes of a value in the model.
        moments: values of all moments that a checkpoint has.
        held: what the rank holds while the phase runs.
        stage: of ZeRO.
    """

    sizes: tuple[int, ...]
    item: int
    moments: int
    held: RankBytes
    stage: int

    def gradients_during(self, use: Use, earlier: bool, guarded: bool) -> int:
        """Gradients and buckets while `use` lasts.

        Args:
            earlier: whether a micro-step of the same step came before.
            guarded: whether passes may run out of memory, and so have their own gradients first
                (engine/memory_guard.py).
        """
        held = self.held
        if held.flat and guarded:
            return use.gradients + (held.whole if earlier else 0)
        if held.flat:  # from a step's first backward pass on
            return held.whole if earlier or use.backward else 0
        if self.stage == 0:
            return held.gradients if earlier else use.gradients
        if self.stage == 1 and earlier:  # whole until the last micro-step, in buckets that stay
            return held.buckets + sum(self.sizes) * self.item
        gradients = held.gradients if earlier or self.stage == 3 else 0
        return gradients + (held.buckets if use.backward or self.stage == 3 else 0)

    def averaging(self, guarded: bool) -> int:
        """Flat gradients between the passes and the update."""
        held = self.held
        if not held.flat:
            return 0
        return max(held.buckets + held.gradients, 2 * held.whole if guarded else 0)

    @classmethod
    def of(cls, model: nn.Module, settings: EngineSettings, held: RankBytes) -> TrainedBytes:
        """Of a model on the meta device."""
        trained = trained_parameters(model)
        kinds = {name: MOMENTS[settings.omega_algorithm if is_omega(name) else "adamw"] for name in trained}
        moments = sum(len(kinds[name]) * parameter.numel() for name, parameter in trained.items())
        item = 2 if settings.dtype == "bfloat16" else 4
        return cls(tuple(p.numel() for p in trained.values()), item, moments, held, settings.zero_stage)

    @property
    def count(self) -> int:
        """Values of all parameters."""
        return sum(self.sizes)

    @property
    def state(self) -> int:
        """A checkpoint's tensors: values and moments, whole, as float32."""
        return 4 * (self.count + self.moments)

    def reading(self, on_gpu: bool) -> int:
        """Beside what is always there, while a checkpoint's tensors are read (`Shards.read`)."""
        message = 4 * max(self.sizes, default=0)
        return message if on_gpu else self.state + message

    def building(self) -> int:
        """Beside the base, while fresh adapters, which are float32 first, become those of an engine, which then takes
        their values from a checkpoint. The checkpoint is not among it.
        """
        fresh = 4 * self.count
        flattened = 2 * self.item * self.count if self.stage in (1, 2) else 0  # the parameters and their flat copy
        done = self.held.adapters + self.held.optimizer + 4 * max(self.sizes, default=0)
        return max(fresh, flattened, done)

    def closing(self) -> int:
        """Beside the base and a checkpoint, while the engine is closed and the next phase's fresh adapters are not
        there yet.

        At stages 1 and 2 the parameters get memory of their own before the flat ones go.
        """
        copies = self.item * self.count if self.stage in (1, 2) else 0
        return self.held.adapters + self.held.optimizer + copies


def sharded_reading(weights: Mapping[str, Weight], ranks: int, itemsize: int) -> int:
    """The most bytes while a base is read at stage 3: each tensor is whole until it is cut, with the slice in which it
    comes, beside the parts of those before it.

    Args:
        weights: of the model with its adapters, by name (`Inventory.weights`).
        itemsize: bytes of a value in the files' tensors, as they are read.
    """
    base = {name: weight for name, weight in weights.items() if not is_adapter(short_name(name))}
    held = most = 0
    for name in sorted(base, key=dot_natural_key):  # as transformers reads them
        weight = base[name]
        values = 2 * weight.numel if f"{name}_absmax" in weights else weight.numel  # two 4-bit codes lie in a byte
        whole, part = values * itemsize, weight.part(ranks) * weight.itemsize
        read = whole if whole <= SLICE_BYTES else SLICE_BYTES // ranks  # the ranks of a node read a slice together
        most = max(most, held + whole + read + part)
        held += part
    return most
