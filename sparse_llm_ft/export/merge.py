"""Adapters added to the weights they stand on: W + ΔW, for a model that nothing but transformers is needed for."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel


@torch.no_grad()
def merge_adapters(model: PeftModel) -> PreTrainedModel:
    """The base with every adapter merged and no wrapper left; `model` is used up.

    Each layer is merged in float32 and rounded to its own type once: ``round(W + ΔW)``, while PEFT would compute
    ``round(W + round(ΔW))``. Weights must not be quantised (`load_trained` with ``dequantize``).

    Raises:
        ValueError: a layer is quantised, or a merged weight is not finite.
    """
    base = model.get_base_model()
    layers = [(name, module) for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        linear = layer.get_base_layer()
        dtype = linear.weight.dtype
        if not dtype.is_floating_point or hasattr(linear.weight, "quant_state"):
            raise ValueError(f"{name} is quantised")
        layer.float()
        layer.merge(safe_merge=True)
        base.set_submodule(name, layer.get_base_layer().to(dtype))
    base.requires_grad_(False)
    return base
