"""What a training step must compute, in floating-point operations, and what a device can do in a second.

Forward goes through all layers; backward to activations, down to the lowest layer that trains something, and to weights
only where the whole model is trained. The head is counted at supervised positions. Adapters' own products, under one
hundredth of it, are left out, and so is what is computed twice (gradient checkpointing): the share of the peak (MFU;
Chowdhery et al., 2022, appendix B) does not rise with waste.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from sparse_llm_ft.model.architecture import model_family
from sparse_llm_ft.model.layers import layer_lists
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan

PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16, by the manufacturer's data sheets; a card's name contains the key, and the first one counts."""


@dataclass(frozen=True)
class ModelFlops:
    """A model's sizes that count.

    Attributes:
        layers: entries of all weight matrices of each layer, the lowest first.
        attention: width of all query heads of a layer together.
        causal: whether attention looks back only, which halves it.
        head: entries of the output head's matrix; 0 for one that reads a position of each sample.
    """

    layers: tuple[int, ...]
    attention: int
    causal: bool
    head: int

    def step(
        self, tokens: int, squares: float, supervised: float, lowest: int, whole: bool = False, cached: float = 0.0
    ) -> float:
        """Operations of a step.

        Args:
            tokens: of the whole step, without padding.
            squares: sum of the samples' squared lengths.
            supervised: positions that have a loss.
            lowest: number of the lowest layer that trains something; the number of layers if none does.
            whole: whether all weights are trained.
            cached: share of the step, 0 to 1, whose forward pass begins at layer `lowest`.
        """
        above = self.layers[lowest:]
        pairs = squares * self.attention * (1 if self.causal else 2)
        forward = 2 * tokens * sum(self.layers) + 2 * pairs * len(self.layers)
        forward -= cached * (2 * tokens * sum(self.layers[:lowest]) + 2 * pairs * lowest)
        backward = 2 * tokens * sum(above) + 4 * pairs * len(above) + 2 * supervised * self.head
        weights = 2 * tokens * sum(self.layers) + 2 * supervised * self.head if whole else 0
        return forward + 2 * supervised * self.head + backward + weights


@dataclass(frozen=True)
class StepFlops:
    """A plan's operations, and those that the ranks' devices could do meanwhile.

    Attributes:
        model, lowest, whole: see `ModelFlops.step`.
        peak: operations per second of all ranks' devices.
    """

    model: ModelFlops
    lowest: int
    whole: bool
    peak: float

    def step(self, tokens: int, squares: int, supervised: int, cached: float = 0.0) -> float:
        """Operations of a step, see `ModelFlops.step`."""
        return self.model.step(tokens, squares, supervised, self.lowest, self.whole, cached)

    def mfu(self, tokens: int, squares: int, supervised: int, seconds: float, cached: float = 0.0) -> float:
        """The share of the peak that a step took, 0 to 1."""
        return self.step(tokens, squares, supervised, cached) / (self.peak * seconds)


def model_flops(model: nn.Module) -> ModelFlops | None:
    """The sizes of a transformers model without adapters, which may be on the meta device.

    Returns:
        None where this arithmetic does not hold: two stacks of layers, experts, attention other than the full one.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig) or len(stacks := layer_lists(model)) != 1:
        return None
    (layers,) = stacks.values()
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    weights = [_weights(layer) for layer in layers]
    if kinds != {"full_attention"} or _has_window(text) or not heads or not hidden or None in weights:
        return None
    width = heads * (getattr(text, "head_dim", None) or hidden // heads)
    of_transformers: Any = model
    head = of_transformers.get_output_embeddings()
    causal = model_family(config) == "decoder"
    return ModelFlops(tuple(w for w in weights if w), width, causal, head.weight.numel() if head is not None else 0)


def plan_flops(model: nn.Module, plan: AdapterPlan, dtype: str, device: torch.device, ranks: int) -> StepFlops | None:
    """The operations of a plan's steps, and the peak of all ranks' devices.

    Args:
        model: the base, which may be on the meta device.
        dtype: in which it computes.
        device: a rank's; all are taken to be of one kind.

    Returns:
        None where the arithmetic does not hold, the card's peak is not known, or it computes in another type.
    """
    peak, sizes = peak_flops(device), model_flops(model)
    if peak is None or sizes is None or dtype != "bfloat16":
        return None
    return StepFlops(sizes, lowest_layer(model, plan), FULL_MODEL in plan.trained, peak * ranks)


def _has_window(text: Any) -> bool:
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True)


def _weights(layer: nn.Module) -> int | None:
    """Entries of a layer's matrices; None if some belong to no linear map that every token goes through."""
    matrices = [p for p in layer.parameters() if p.ndim > 1]
    linear = [m.weight for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    experts = any(isinstance(module, nn.ModuleList) for module in layer.modules())
    own = {id(weight) for weight in linear}
    return None if experts or any(id(p) not in own for p in matrices) else sum(w.numel() for w in linear)


def lowest_layer(model: nn.Module, plan: AdapterPlan) -> int:
    """Number of the lowest layer that the plan trains something in, 0 for embeddings and a whole model; the number of
    layers if it trains none of them (a head alone). `model` has one stack of layers.
    """
    ((stack, layers),) = layer_lists(model).items()
    of_transformers: Any = model
    inputs = of_transformers.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    numbers = [len(layers)]
    for name in (*plan.active, *plan.trained):
        if name.startswith(f"{stack}."):
            numbers.append(int(name.removeprefix(f"{stack}.").partition(".")[0]))
        elif name == FULL_MODEL or names.get(inputs) == name:
            numbers.append(0)
    return min(numbers)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second of a CUDA card, where it is one of those known; None for other devices."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * rate for card, rate in PEAK_TFLOPS.items() if card in name), None)
