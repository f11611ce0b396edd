"""What an adapter is made of: A and B, the vectors and omega of a module, and how masks place them in full matrices."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparse_llm_ft.plan import IndexMask, ModuleAdapter


def gate(omega: torch.Tensor) -> torch.Tensor:
    """max(omega, 0), with the gradient of the identity.

    An adapter with omega <= 0 is off (WeightLoRA, section 3.3). Its omega still receives a gradient, so the adapter can
    come back before step T.
    """
    return omega + (omega.clamp(min=0) - omega).detach()


def scatter(matrix: torch.Tensor, rows: IndexMask | None, cols: IndexMask | None) -> torch.Tensor:
    """The full matrix with `matrix` at the kept rows and columns, and zero elsewhere. None: all are kept."""
    for dimension, kept in enumerate((rows, cols)):
        if kept is not None:
            sides = [*matrix.shape]
            sides[dimension] = kept.size
            indices = torch.tensor(kept.indices, device=matrix.device)
            matrix = matrix.new_zeros(sides).index_copy(dimension, indices, matrix)
    return matrix


class Pair(nn.Module):
    """Fresh A and B of one adapter, for a module of (out_features, in_features).

    A is drawn as in PEFT's LoRA, at full width, and then reduced to the kept columns, so a mask changes no entry that
    it keeps. B is zero, so the adapter changes nothing.
    """

    def __init__(self, out_features: int, in_features: int, adapter: ModuleAdapter) -> None:
        super().__init__()
        rows, columns = adapter.shape((out_features, in_features))
        with torch.random.fork_rng(devices=[]):  # their draws depend on the mask, and would shift all later ones
            self.lora_A = nn.Linear(columns, adapter.r, bias=False)
            self.lora_B = nn.Linear(adapter.r, rows, bias=False)
        weight = nn.init.kaiming_uniform_(torch.empty(adapter.r, in_features), a=math.sqrt(5))
        if adapter.cols is not None:
            weight = weight[:, list(adapter.cols.indices)]
        with torch.no_grad():
            self.lora_A.weight.copy_(weight)
            nn.init.zeros_(self.lora_B.weight)


class Vectors(nn.ParameterDict):
    """Adapter name -> a trained vector. It is called as a module, whose hooks fetch values that are offloaded."""

    def __call__(self, adapter_name: str) -> torch.Tensor:
        """`forward`, which torch's own ParameterDict forbids."""
        vector: torch.Tensor = nn.Module.__call__(self, adapter_name)
        return vector

    def forward(self, adapter_name: str) -> torch.Tensor:
        """A copy of the vector: ZeRO-3 shards the parameter again when this returns."""
        return self[adapter_name].clone()


class Omegas(Vectors):
    """Adapter name -> trained omega, (1,)."""

    def forward(self, adapter_name: str) -> torch.Tensor:
        """The gated omega."""
        return gate(self[adapter_name])
