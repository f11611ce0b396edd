"""Persistent buffers: what belongs to a model's weights and is no parameter (running means, a router's bias)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class KeptBuffers:
    """Keeps a model's persistent buffers at their values while it trains.

    A run trains parameters, and its output and checkpoints hold parameters: an adapter belongs to the base with the
    base's own buffers. Without this, a module that changes a buffer in every forward pass (running means) would be
    measured with other values than anyone can load, and a resumed run would begin with others than it stopped with.
    """

    def __init__(self, model: nn.Module) -> None:
        copies: dict[int, torch.Tensor] = {}  # modules may share one
        self._kept = [
            (module, name, copies.setdefault(id(buffer), buffer.detach().clone()))
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back, also into a buffer that the module has replaced."""
        for module, name, value in self._kept:
            present = module._buffers.get(name)
            if present is None or present.shape != value.shape:
                module._buffers[name] = value.clone()
            else:
                present.copy_(value)


_FIXED = "_sparse_llm_ft_fixed"
"""Attribute of a loaded model: names of its parameters that are never trained."""


def remember_fixed(model: nn.Module, parts: Sequence[str] = ()) -> None:
    """Note which parameters of a freshly built model are never trained: those that its class fixes, such as sinusoidal
    positions (Marian), and those of `parts`.

    The former follow from the config: transformers does not save them, and computes them when it loads the model.

    Args:
        parts: modules that no sample reaches (`unreached_parts`).
    """
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad or name in unsaved}
    inside = tuple(f"{part}." for part in parts)
    fixed |= {name for name, _ in model.named_parameters() if name.startswith(inside)}
    setattr(model, _FIXED, frozenset(fixed))


def fixed_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are never trained, as `remember_fixed` has noted them."""
    return getattr(model, _FIXED, frozenset())


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's buffers that belong to its weights, on the CPU. Without them it is another model."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if name not in parameters and isinstance(tensor, torch.Tensor)
    }
