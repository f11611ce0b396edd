"""The adapter layer: one wrapped linear module and the adapters on it.

y = W x + gate(omega) * (lora_alpha / r) * scatter_rows(v * B (u * (A dropout(x[cols]))))
x: (..., d_in), y: (..., d_out), u: (r,), v: (kept rows,); u and v are 1 unless the plan trains them

Masked rows and columns do not exist: A is (r, kept columns), B is (kept rows, r). Modules of one group share one A and
one B. They belong to the group's first module, like an adapter of its own, so that they are one parameter of the model
with or without a `PeftModel` around it; the other modules hold references.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn

from sparse_llm_ft.adapters.dropout import SeededDropout
from sparse_llm_ft.adapters.function import Adapted, adapted_linear, count_hooks, is_readable
from sparse_llm_ft.adapters.parts import Omegas, Pair, Vectors, scatter
from sparse_llm_ft.model.linear import LinearLayer, is_transposed, sides
from sparse_llm_ft.plan import ModuleAdapter


@contextmanager
def calling_parts(model: nn.Module) -> Iterator[None]:
    """A context in which layers with adapters call the modules below them, which some ranks hook and others do not.

    At ZeRO-3 all ranks must call the same modules.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLoraLayer)]
    for layer in layers:
        layer.calls_parts = True
    try:
        yield
    finally:
        for layer in layers:
            layer.calls_parts = False


class SparseLoraLayer(nn.Module, BaseTunerLayer):
    """Wraps an `nn.Linear`, `Linear4bit` or `Conv1D`, with one or several named adapters, as PEFT allows."""

    # Typed here, since nn.Module's attributes are "Tensor or Module" to a type checker.
    base_layer: LinearLayer
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_omega: Omegas
    lora_u: Vectors
    lora_v: Vectors
    active_adapters: list[str]
    get_base_weight: Callable[[], torch.Tensor]
    set_base_weight: Callable[[torch.Tensor], None]
    delete_adapter: Callable[[str], None]
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    disable_adapters: bool
    merged: bool

    adapter_layer_names = ("lora_A", "lora_B", "lora_omega", "lora_u", "lora_v")
    other_param_names = ("adapters", "lora_dropout", "_scale", "_shared", "lora_rows", "lora_cols")

    observe: Callable[[torch.Tensor], None] | None = None
    """Called with every adapter's scaled output, (..., kept rows); for scores taken during forward passes."""

    calls_parts: bool = False
    """Whether to call the base layer and the adapter's parts as modules even where nobody hooks them."""

    engine_hooks: int = 0
    """ZeRO-3: the number of hooks with which the engine would gather the parameters of the base layer and the adapter
    when those are called. It gathers them with this layer too, so these hooks need not run.
    """

    def __init__(
        self,
        base_layer: LinearLayer,
        adapter_name: str,
        adapter: ModuleAdapter,
        lora_dropout: float,
        shared: Pair | None = None,
        owns_shared: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self.out_features, self.in_features = sides(base_layer)
        self.adapters: dict[str, ModuleAdapter] = {}
        self._scale: dict[str, float] = {}  # a factor that users may set, 1 otherwise
        self._shared: dict[str, Pair] = {}  # a plain dict: the group's first module registers the pair
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_omega, self.lora_u, self.lora_v = Omegas(), Vectors(), Vectors()
        # Indices are buffers: they move to devices with the module, and are not saved.
        self.lora_rows, self.lora_cols = BufferDict({}, persistent=False), BufferDict({}, persistent=False)
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, adapter, lora_dropout, shared=shared, owns_shared=owns_shared)

    def update_layer(
        self,
        adapter_name: str,
        adapter: ModuleAdapter,
        lora_dropout: float,
        inference_mode: bool = False,
        shared: Pair | None = None,
        owns_shared: bool = False,
    ) -> None:
        """Add the adapter, or replace it by a fresh one (`Pair`).

        Args:
            shared: the pair of the adapter's group; None: the adapter has its own.
            owns_shared: whether this is the group's first module, which registers the pair.
        """
        # Remove what is there under this name.
        self.adapters[adapter_name] = adapter
        self._scale[adapter_name] = 1.0
        self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        for parts in (self.lora_A, self.lora_B, self._shared, self.lora_rows, self.lora_cols):
            if adapter_name in parts:
                del parts[adapter_name]
        # Build A and B, the indices of kept rows and columns, omega, u and v.
        pair = Pair(self.out_features, self.in_features, adapter) if shared is None else shared
        if shared is None or owns_shared:
            self.lora_A[adapter_name], self.lora_B[adapter_name] = pair.lora_A, pair.lora_B
        if shared is not None:
            self._shared[adapter_name] = shared
        for buffers, kept in ((self.lora_rows, adapter.rows), (self.lora_cols, adapter.cols)):
            if kept is not None:
                buffers[adapter_name] = torch.tensor(kept.indices, device=self.base_layer.weight.device)
        rows, _ = adapter.shape((self.out_features, self.in_features))
        for vectors, trained, size, value in (
            (self.lora_omega, adapter.train_omega, 1, adapter.omega),
            (self.lora_u, adapter.train_vectors, adapter.r, 1.0),
            (self.lora_v, adapter.train_vectors, rows, 1.0),
        ):
            if trained:
                vectors[adapter_name] = nn.Parameter(torch.full((size,), float(value)))
            elif adapter_name in vectors:
                del vectors[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Convert this adapter's parameters to `dtype`."""
        for part in self.pair(adapter_name):
            part.to(dtype)
        for vectors in (self.lora_omega, self.lora_u, self.lora_v):
            if adapter_name in vectors:
                vectors[adapter_name].data = vectors[adapter_name].data.to(dtype)

    def drop_shared(self, adapter_name: str) -> None:
        """Let go of the adapter's group, whose pair will be built anew."""
        if self._shared.pop(adapter_name, None) is not None and adapter_name in self.lora_A:
            del self.lora_A[adapter_name], self.lora_B[adapter_name]

    def pair(self, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
        """The adapter's A and B: its own, or its group's."""
        if adapter_name in self._shared:
            shared = self._shared[adapter_name]
            return shared.lora_A, shared.lora_B
        parts: Any = self._modules  # every step asks for every layer, and looking up attributes takes longer
        return parts["lora_A"]._modules[adapter_name], parts["lora_B"]._modules[adapter_name]

    def omega(self, adapter_name: str) -> torch.Tensor | float:
        """The factor on this adapter's output: a one-element tensor if it is trained, else a number."""
        if adapter_name in self.lora_omega:
            return self.lora_omega(adapter_name)
        return max(self.adapters[adapter_name].omega, 0.0)

    @property
    def r(self) -> dict[str, int]:
        """Adapter name -> rank; other libraries read it, as the next two."""
        return {name: adapter.r for name, adapter in self.adapters.items()}

    @property
    def lora_alpha(self) -> dict[str, float]:
        """Adapter name -> lora_alpha."""
        return {name: adapter.lora_alpha for name, adapter in self.adapters.items()}

    @property
    def scaling(self) -> dict[str, float]:
        """Adapter name -> `get_scaling`."""
        return {name: self.get_scaling(name) for name in self.adapters}

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def get_scaling(self, adapter_name: str) -> float:
        """``lora_alpha / r`` times the factor of `scale_layer` and `set_scale`."""
        return self.adapters[adapter_name].scaling * self._scale[adapter_name]

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply this adapter's output by `scale`; 1 is as trained."""
        if adapter_name in self._scale:
            self._scale[adapter_name] = scale

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT: activate these adapters, and require gradients for them alone; shared pairs included."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name, pair in self._shared.items():
            pair.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As in PEFT; shared pairs included."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in set(names) & self._shared.keys():
            self._shared[name].requires_grad_(requires_grad)

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' output by `scale`."""
        for name in self._present(self.active_adapters):
            self._scale[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; None undoes every scale."""
        for name in self._present(self.active_adapters):
            self._scale[name] = 1.0 if scale is None else self._scale[name] / scale

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Args: x of shape (..., d_in). Returns: (..., d_out) in the base layer's dtype."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [] if self.merged else self._present(self.active_adapters)
        if len(names) == 1 and not (args or kwargs) and self._is_direct(names[0]):
            return self._adapted(names[0], x)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            output = self._adapter_output(name, x).to(result.dtype)  # Shape: (..., kept rows)
            if self.observe is not None:
                self.observe(output)
            masked = name in self.lora_rows
            result = result.index_add(-1, self.lora_rows[name], output) if masked else result + output
        return result

    def _is_direct(self, name: str) -> bool:
        """Whether `adapted_linear` can take the place of the modules below: nobody looks at what they are given."""
        if self.calls_parts or self.observe is not None or not self.cast_input_dtype_enabled:
            return False
        return is_readable(self.base_layer) and self.count_hooks(name) == self.engine_hooks

    def count_hooks(self, adapter_name: str) -> int:
        """How many hooks act on the modules below, see `count_hooks`."""
        parts: Any = self._modules
        own = (parts[name] for name in ("base_layer", "lora_omega", "lora_u", "lora_v"))
        return count_hooks(*own, *self.pair(adapter_name))

    def _adapted(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(..., d_out): the output with one adapter, by `adapted_linear`."""
        adapter, parts = self.adapters[name], self._modules
        down, up = self.pair(name)
        dropout: Any = parts["lora_dropout"]._modules[name]  # type: ignore[union-attr]
        call = Adapted(
            parts["base_layer"],  # type: ignore[arg-type]
            self.get_scaling(name) if adapter.train_omega else max(adapter.omega, 0.0) * self.get_scaling(name),
            None if adapter.rows is None else self.lora_rows[name],
            None if adapter.cols is None else self.lora_cols[name],
            SeededDropout.draw(dropout.p) if type(dropout) is nn.Dropout and dropout.training else None,
        )
        a, b = down.weight, up.weight
        if adapter.train_vectors:
            a, b = self.lora_u[name][:, None] * a, self.lora_v[name][:, None] * b
        return adapted_linear(x, a, b, self.lora_omega[name] if adapter.train_omega else None, call)

    def _adapter_output(self, name: str, x: torch.Tensor) -> torch.Tensor:
        down, up = self.pair(name)
        if name in self.lora_cols:
            x = x.index_select(-1, self.lora_cols[name])
        hidden = down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype)))  # (..., r)
        if name in self.lora_u:
            hidden = hidden * self.lora_u(name)
        # Scale the r-wide tensor, not the d_out-wide one: fewer bytes are saved for backward.
        output: torch.Tensor = up(hidden * (self.omega(name) * self.get_scaling(name)))
        return output * self.lora_v(name) if name in self.lora_v else output

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Omega * (lora_alpha / r) * diag(v) B diag(u) A, shape (d_out, d_in), float32."""
        down, up = self.pair(adapter)
        omega = self.omega(adapter)
        a, b = down.weight.float(), up.weight.float()
        if adapter in self.lora_u:
            a, b = self.lora_u(adapter).float()[:, None] * a, self.lora_v(adapter).float()[:, None] * b
        delta: torch.Tensor = (b @ a) * self.get_scaling(adapter)
        delta = delta * (omega.float() if isinstance(omega, torch.Tensor) else omega)
        return scatter(delta, self.adapters[adapter].rows, self.adapters[adapter].cols)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight.

        Args:
            safe_merge: refuse an adapter whose sum with the weight is not finite; as in PEFT, those before it in
                `adapter_names` are merged by then.
            adapter_names: None: the active ones.
        """
        for name in self._present(check_adapters_to_merge(self, adapter_names)):
            weight = self.get_base_weight()
            merged = (weight.float() + self._stored_delta(name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {name!r} gives weights that are not finite")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what `merge` added; exact up to rounding in the base's dtype."""
        if not self.merged:
            warnings.warn("nothing is merged", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.adapters:
                weight = self.get_base_weight()
                self.set_base_weight((weight.float() - self._stored_delta(name)).to(weight.dtype))

    def _stored_delta(self, adapter: str) -> torch.Tensor:
        """`get_delta_weight` as the base layer stores its weight."""
        delta = self.get_delta_weight(adapter)
        return delta.T if is_transposed(self.base_layer) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: ΔW is a low-rank product, which PEFT's LoRA can represent."""
        return True

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.adapters]

    def __repr__(self) -> str:
        return "sparse_lora." + super().__repr__()
