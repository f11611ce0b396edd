"""AdaLoRA's rank allocation (Zhang et al., 2023), step by step, by PEFT's own `RankAllocator`.

The allocator reads ``parameter`` and ``parameter.grad``. Under ZeRO no rank has them unsharded, so it gets copies of
the unsharded values and gradients. `after_step` returns what it sets to zero, to be written back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft.tuners.adalora.config import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator

Tensors = Mapping[str, torch.Tensor]

RankPattern = dict[str, list[bool]]
"""Parameter -> for each of its singular values, whether it is left."""

_SENSITIVITY = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_ADAPTER = "default"


def is_singular_value(name: str) -> bool:
    """Whether a short parameter name belongs to an AdaLoRA adapter's singular values."""
    return name.endswith(".lora_E")


class _Copies:
    """Stands in for a model: named parameters with gradients."""

    def __init__(self, values: Tensors, gradients: Tensors) -> None:
        self.parameters = {}
        for name, value in values.items():
            self.parameters[f"{name}.{_ADAPTER}"] = parameter = torch.nn.Parameter(value.clone())
            parameter.grad = gradients.get(name)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """See `nn.Module.named_parameters`."""
        yield from self.parameters.items()


@dataclass
class RankAllocation:
    """Prunes singular values on AdaLoRA's budget schedule.

    Args:
        config: PEFT's configuration, with ``init_r``, ``target_r``, ``tinit``, ``tfinal``, ``deltaT``, ``total_step``.
        values: the adapters' current values; only their shapes matter.
    """

    config: AdaLoraConfig
    values: Tensors
    rank_pattern: RankPattern | None = None
    allocator: RankAllocator = field(init=False)

    def __post_init__(self) -> None:
        self.allocator = RankAllocator(_Copies(self.values, {}), self.config, _ADAPTER)
        self.values = {}

    def after_step(self, step: int, values: Tensors, gradients: Tensors) -> dict[str, torch.Tensor]:
        """As `AdaLoraModel.update_and_allocate` after optimizer step `step` (from 1).

        Args:
            values: short name -> float32 value after the step, of every ``lora_A``, ``lora_B`` and ``lora_E``; of
                masked ones the kept rows and columns alone.
            gradients: their gradients in that step.

        Returns:
            The singular values to overwrite.
        """
        # Give PEFT's allocator copies, and let it prune by the schedule.
        copies = _Copies(values, gradients)
        last = self.config.total_step - self.config.tfinal
        if step < last and self.allocator.budget_schedule(step)[0] >= self.allocator.init_bgt:
            self.allocator.update_ipt(copies)  # nothing to prune yet, which PEFT's threshold cannot express
        elif step < last:
            _, pattern = self.allocator.update_and_allocate(copies, step)
            self.rank_pattern = pattern or self.rank_pattern
        elif step == last:
            _, self.rank_pattern = self.allocator.update_and_allocate(copies, step, force_mask=True)
            self.allocator.reset_ipt()
        elif self.rank_pattern is not None:
            self.allocator.mask_using_rank_pattern(copies, self.rank_pattern)
        # Return the singular values that it has changed.
        return {
            name: copies.parameters[f"{name}.{_ADAPTER}"].detach()
            for name, value in values.items()
            if is_singular_value(name) and not torch.equal(copies.parameters[f"{name}.{_ADAPTER}"], value)
        }

    def to_dict(self) -> dict[str, RankPattern | None]:
        """A checkpoint's part of it, besides the tensors: ``rank_pattern``."""
        return {"rank_pattern": self.rank_pattern}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The smoothed sensitivities that the next choice uses, as ``<kind>/<parameter>``."""
        return {f"{kind}/{name}": t for kind in _SENSITIVITY for name, t in getattr(self.allocator, kind).items()}

    def restore(self, data: Mapping[str, RankPattern | None] | None, tensors: Tensors) -> None:
        """Continue from `to_dict` and `tensors`."""
        self.rank_pattern = data["rank_pattern"] if data else None
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            getattr(self.allocator, kind)[name] = tensor


def orthogonality(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """AdaLoRA's penalty (Zhang et al., 2023, eq. 4) as PEFT computes it: the mean over all P (``lora_B``, d_out × r)
    and Q (``lora_A``, r × d_in) of ||PᵀP - I||_F and ||Q Qᵀ - I||_F.
    """
    norms = []
    for name, matrix in parameters.items():
        if name.endswith((".lora_A", ".lora_B")):
            gram = matrix @ matrix.T if name.endswith(".lora_A") else matrix.T @ matrix
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return torch.stack(norms).mean()


def is_sensitivity(key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor of `shape` under `key` can be one of `RankAllocation.tensors`.

    Args:
        shapes: short name -> shape of the parameter, of a masked one its kept rows and columns.
    """
    kind, _, name = key.partition("/")
    return kind in _SENSITIVITY and shapes.get(name.removesuffix(f".{_ADAPTER}")) == shape


def is_allocation_state(data: object, values: Tensors) -> bool:
    """Whether `data` can be a `RankAllocation.to_dict`: one bool per singular value in `values`, true if it is left."""
    if not isinstance(data, dict) or set(data) != {"rank_pattern"}:
        return False
    pattern = data["rank_pattern"]
    lengths = {f"{name}.{_ADAPTER}": len(value) for name, value in values.items() if is_singular_value(name)}
    return pattern is None or (
        isinstance(pattern, dict)
        and pattern.keys() == lengths.keys()
        and all(
            isinstance(row, list) and len(row) == lengths[name] and all(isinstance(left, bool) for left in row)
            for name, row in pattern.items()
        )
    )
