"""A model's layers, found by structure."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

BACKEND = "inductor"
"""torch.compile's; it needs a C++ compiler, and on a GPU Triton."""


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Name -> each stack of equal layers: one in a decoder or an encoder, two in an encoder-decoder, none in a model
    that keeps its layers otherwise.

    A stack is a list of modules of one class, each of which has linear parts of its own; lists inside of its layers
    (experts) are not stacks.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _is_stack(module):
            found[name] = module
    return found


def compile_layers(model: nn.Module) -> int:
    """Let torch compile each layer when it is first called; names of modules and parameters stay.

    What was compiled before for other adapters is dropped.

    Returns:
        The number of layers; 0 if none are found.
    """
    torch.compiler.reset()
    layers = [layer for stack in layer_lists(model).values() for layer in stack]
    for layer in layers:
        layer.compile(backend=BACKEND)
    return len(layers)


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which compiled layers run as they are written: torch would not see the hooks of a measurement, and
    compiles again for every other mode and shape of generation.
    """
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _is_stack(layers: nn.ModuleList) -> bool:
    alike = len({type(layer) for layer in layers}) == 1
    return alike and all(sum(1 for _ in layer.modules()) > 3 for layer in layers)


def checkpointed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, of those that activation checkpointing computes again in backward, see `enable_checkpointing`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    }


def keep_all_layers(base: nn.Module) -> bool:
    """Turn LayerDrop off (M2M100, NLLB): each rank would skip layers of its own, and ZeRO's buckets and gathers would
    wait for gradients that another rank does not have. Returns whether the model had it.
    """
    dropping = [module for module in base.modules() if getattr(module, "layerdrop", 0.0)]
    for module in dropping:
        module.layerdrop = 0.0  # type: ignore[assignment]
    return bool(dropping)
