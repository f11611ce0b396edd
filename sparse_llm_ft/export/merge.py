"""Merges adapters into the base's weights, W + ΔW; the result needs only transformers."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from sparse_llm_ft.model.linear import refuse_shared_weights


@torch.no_grad()
def merge_adapters(model: PeftModel) -> PreTrainedModel:
    """The base with all adapters merged and wrappers removed. `model` must not be used afterwards.

    Each layer is merged in float32 and rounded once, ``round(W + ΔW)``; PEFT would compute ``round(W + round(ΔW))``.
    Weights must not be quantised (`load_trained` with ``dequantize``).

    Raises:
        ValueError: a layer is quantised or shares its weight, or a merged weight is not finite.
    """
    base = model.get_base_model()
    layers = [(name, module) for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    refuse_shared_weights(base, dict(layers))
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
