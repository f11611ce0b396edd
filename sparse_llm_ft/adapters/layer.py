"""The adapter layer: one wrapped linear module and the adapters on it.

y = W x + gate(omega) * (lora_alpha / r) * B (A dropout(x))          x: (..., d_in), y: (..., d_out)
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn

from sparse_llm_ft.plan import ModuleAdapter


def gate(omega: torch.Tensor) -> torch.Tensor:
    """max(omega, 0), with the gradient of the identity.

    An adapter with omega <= 0 is off (WeightLoRA, section 3.3), yet its omega goes on receiving a gradient, so that
    it can come back before step T.
    """
    return omega + (omega.clamp(min=0) - omega).detach()


class SparseLoraLayer(nn.Module, BaseTunerLayer):
    """Wraps an `nn.Linear` or a bitsandbytes `Linear4bit`; several named adapters may sit on it, as PEFT allows."""

    # Typed here, since nn.Module's attributes are "Tensor or Module" to a type checker.
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_omega: Any
    active_adapters: Any
    get_base_weight: Any
    set_base_weight: Any
    set_adapter: Any
    delete_adapter: Any
    _cast_input_dtype: Any
    _move_adapter_to_device_of_base_layer: Any
    disable_adapters: Any
    merged: Any

    adapter_layer_names = ("lora_A", "lora_B", "lora_omega")
    other_param_names = ("adapters", "lora_dropout", "_scale")

    def __init__(self, base_layer: nn.Module, adapter_name: str, adapter: ModuleAdapter, lora_dropout: float) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.adapters: dict[str, ModuleAdapter] = {}
        self._scale: dict[str, float] = {}  # a factor that users may set, 1 otherwise
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_omega = nn.ParameterDict()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, adapter, lora_dropout)

    def update_layer(
        self, adapter_name: str, adapter: ModuleAdapter, lora_dropout: float, inference_mode: bool = False
    ) -> None:
        """Add the adapter, or build it anew: A as PEFT's LoRA initialises it, B zero, so that it changes nothing."""
        self.adapters[adapter_name] = adapter
        self._scale[adapter_name] = 1.0
        self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(self.in_features, adapter.r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(adapter.r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter_name].weight)
        if adapter.train_omega:
            self.lora_omega[adapter_name] = nn.Parameter(torch.full((1,), float(adapter.omega)))
        elif adapter_name in self.lora_omega:
            del self.lora_omega[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Convert this adapter's parameters to `dtype`."""
        self.lora_A[adapter_name].to(dtype)
        self.lora_B[adapter_name].to(dtype)
        if adapter_name in self.lora_omega:
            self.lora_omega[adapter_name].data = self.lora_omega[adapter_name].data.to(dtype)

    def omega(self, adapter_name: str) -> torch.Tensor | float:
        """The factor of this adapter's output: a one-element tensor where it is trained, else a number."""
        if adapter_name in self.lora_omega:
            return gate(self.lora_omega[adapter_name])
        return max(self.adapters[adapter_name].omega, 0.0)

    def get_scaling(self, adapter_name: str) -> float:
        """``lora_alpha / r``, times what `scale_layer` or `set_scale` set."""
        return self.adapters[adapter_name].scaling * self._scale[adapter_name]

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply this adapter's output by `scale`; 1 is as trained."""
        if adapter_name in self._scale:
            self._scale[adapter_name] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' output by `scale`."""
        for name in self._present(self.active_adapters):
            self._scale[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; None undoes all of it."""
        for name in self._present(self.active_adapters):
            self._scale[name] = 1.0 if scale is None else self._scale[name] / scale

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Args: x of shape (..., d_in). Returns: (..., d_out) in the base layer's dtype."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        for name in self._present(self.active_adapters):
            result = result + self._adapter_output(name, x).to(result.dtype)
        return result

    def _adapter_output(self, name: str, x: torch.Tensor) -> torch.Tensor:
        down, up = self.lora_A[name], self.lora_B[name]
        hidden = down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype)))  # (..., r)
        # The factor goes onto the r-wide tensor, not onto the d_out-wide one: fewer bytes kept for backward.
        return up(hidden * (self.omega(name) * self.get_scaling(name)))

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Omega * (lora_alpha / r) * B A, shape (d_out, d_in), float32."""
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        delta: torch.Tensor = (up.float() @ down.float()) * self.get_scaling(adapter)
        omega = self.omega(adapter)
        return delta * (omega.float() if isinstance(omega, torch.Tensor) else omega)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight.

        Args:
            safe_merge: refuse to add an adapter whose sum with the weight is not finite; those before it in
                `adapter_names` are merged by then, as in PEFT.
            adapter_names: None merges the active ones.
        """
        for name in self._present(check_adapters_to_merge(self, adapter_names)):
            weight = self.get_base_weight()
            merged = (weight.float() + self.get_delta_weight(name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {name!r} gives weights that are not finite")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what `merge` added (exact up to rounding in the base's dtype)."""
        if not self.merged:
            warnings.warn("nothing is merged", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.adapters:
                weight = self.get_base_weight()
                self.set_base_weight((weight.float() - self.get_delta_weight(name)).to(weight.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is a low-rank product, and PEFT's LoRA can hold it."""
        return True

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.adapters]

    def __repr__(self) -> str:
        return "sparse_lora." + super().__repr__()
