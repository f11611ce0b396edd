"""The linear layers of a model: `nn.Linear`, bitsandbytes' 4-bit ones, and transformers' `Conv1D` (GPT-2), whose weight
is stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparse_llm_ft.plan import Shape

LinearLayer = nn.Linear | Conv1D


def linear_shape(module: nn.Module) -> Shape | None:
    """(out_features, in_features) of a linear layer; None for any other module.

    The output layer inside of `nn.MultiheadAttention` is none: that module reads its weight and never calls it.
    """
    if not isinstance(module, LinearLayer) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    return sides(module)


def sides(layer: LinearLayer) -> Shape:
    """(out_features, in_features)."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as (in_features, out_features)."""
    return isinstance(module, Conv1D)


def refuse_shared_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse to merge into a weight that another module has too: it would change that one as well.

    Args:
        layers: the layers to merge into, with adapters or not: name -> module.

    Raises:
        ValueError: naming the two.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for layer in layers.values():
        weight: Any = getattr(layer, "base_layer", layer).weight
        if len(names := owners[id(weight)]) > 1:
            raise ValueError(f"{names[0]} and {names[1]} share one weight, and a merge into one would change both")


def any_transposed(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether one of the named modules, with or without adapters, stores its weight transposed."""
    modules = (model.get_submodule(name) for name in names)
    return any(is_transposed(getattr(module, "base_layer", module)) for module in modules)


def in_dtype(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    """`value` in `dtype`. To ask first is cheaper than a conversion to what it has, of which a step makes thousands."""
    return value if value.dtype is dtype else value.to(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What torch.autocast computes linear layers in on this device at present; None if it is off, or unknown there."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def restore_transposed(model: nn.Module, empty: PreTrainedModel) -> None:
    """Turn layers back into `Conv1D` that `empty` has as such: quantisation replaces them, and transformers
    dequantises them into `nn.Linear`, whose weights a reader of the saved model would take for transposed ones.
    """
    for name, original in empty.named_modules():
        module: Any = model.get_submodule(name) if is_transposed(original) else None
        if isinstance(module, nn.Linear):
            with torch.device("meta"):
                layer: Any = Conv1D(module.out_features, module.in_features)
            layer.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
            layer.bias = module.bias
            model.set_submodule(name, layer)
